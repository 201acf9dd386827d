"""Decoding over a device mesh gives the tokens of one device, and rows stay where they are."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, struct
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from spec_jax import (
    Decoder,
    DecoderConfig,
    Drafter,
    NGram,
    Sampling,
    SmallModel,
    base_decoding,
    decoding,
    speculative_decoding,
    stream,
)
from spec_jax.losses import next_token_loss
from spec_jax.sharding import decoder_shardings, left_to_compiler, over_rows
from tests.spec.strategies import NAMES, random_pair, strategy
from tests.spec.transformers import CONFIG, compare, near, ragged_prompts, transformer

SMALL, GAMMA = "small draft", 3
MESHES: dict[str, dict[str, int]] = {
    "data": {"data": 8},
    "model": {"model": 2},
    "both": {"data": 4, "model": 2},
    "others": {"expert": 2, "data": 2},
}
GROUPED = dataclasses.replace(CONFIG, heads=4, kv_heads=2)
# Numbers of heads, and of key-value heads, and a mesh that does not divide them.
UNDIVIDED_HEADS, UNDIVIDING = ((4, 2), (3, 1)), {"data": 2, "model": 4}
COLLECTIVES = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
# Of a cache: as many as nothing else has.
SLOTS = 101
SAMPLINGS = {"coupled": Sampling(), "greedy": Sampling(temperature=0.0)}
PROMPTS, LENGTHS = ragged_prompts(3, 16, 12)


def mesh_of(sizes: Mapping[str, int], kind: AxisType = AxisType.Auto) -> Mesh:
    count = int(np.prod(list(sizes.values())))
    axis_types = (kind,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=axis_types, devices=jax.devices()[:count])


def models(name: str) -> tuple[Any, Drafter]:
    if name == SMALL:
        return transformer(0), SmallModel(near(0, 0.05), gamma=GAMMA)
    pair = strategy(name, CONFIG, GAMMA)
    return pair.target, pair.drafter


def arguments(sampling: str, rows: int = len(PROMPTS)) -> dict[str, Any]:
    options = {"max_new_tokens": 20, "key": jax.random.key(2), "sampling": SAMPLINGS[sampling], "eos_id": 5}
    return options | {"prompt_length": LENGTHS[:rows]}


def decoded_over(mesh: Mesh, name: str, sampling: str, rows: int = len(PROMPTS)) -> Any:
    target, drafter = models(name)
    target, drafter = (jax.device_put(model, decoder_shardings(model, mesh)) for model in (target, drafter))
    chosen = arguments(sampling, rows)
    with jax.set_mesh(mesh):
        return speculative_decoding(target, drafter, PROMPTS[:rows], verification="coupled", **chosen)


def check_equal(name: str, sampling: str, sharded: Any, rows: int = len(PROMPTS)) -> None:
    """Against plain decoding of the named target."""
    alone = check_equal_to(models(name)[0], sampling, sharded, rows)
    if name == SMALL and rows == len(PROMPTS):
        # Rows end at different times, so that some wait for others.
        assert len(set(np.asarray(alone.lengths).tolist())) > 1


def check_equal_to(target: Decoder, sampling: str, sharded: Any, rows: int = len(PROMPTS)) -> Any:
    """Against plain decoding on one device, which itself knows of no mesh and is returned."""
    chosen = arguments(sampling, rows)
    alone = base_decoding(target, PROMPTS[:rows], **chosen)
    found = compare(target, PROMPTS[:rows], LENGTHS[:rows], chosen["sampling"], chosen["key"], sharded, alone)
    assert found.rows == rows
    assert found.diverged == 0
    # The product over cut heads sums in another order; more than a row or two would not be that.
    assert found.different <= 1
    return alone


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("sizes", MESHES.values(), ids=list(MESHES))
def test_small_draft_equals_one_device(sizes: dict[str, int], sampling: str):
    check_equal(SMALL, sampling, decoded_over(mesh_of(sizes), SMALL, sampling))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_strategy_equals_one_device(name: str):
    mesh = mesh_of(MESHES["both"])
    check_equal(name, "coupled", decoded_over(mesh, name, "coupled"))


@pytest.mark.parametrize(("mesh", "rows"), [({"data": 4}, 11), ({"data": 4, "model": 2}, 2)], ids=str)
def test_rows_that_the_mesh_does_not_divide(mesh: dict[str, int], rows: int):
    check_equal(SMALL, "coupled", decoded_over(mesh_of(mesh), SMALL, "coupled", rows=rows), rows=rows)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(("heads", "kv_heads"), UNDIVIDED_HEADS)
def test_heads_that_the_mesh_does_not_divide(heads: int, kv_heads: int, kind: AxisType):
    target = transformer(0, dataclasses.replace(CONFIG, heads=heads, kv_heads=kv_heads))
    mesh = mesh_of(UNDIVIDING, kind)
    placed = jax.device_put(target, decoder_shardings(target, mesh))
    with jax.set_mesh(mesh):
        result = base_decoding(placed, PROMPTS, **arguments("coupled"))
    check_equal_to(target, "coupled", result)


@pytest.mark.parametrize("sizes", MESHES.values(), ids=list(MESHES))
def test_explicit_axes(sizes: dict[str, int]):
    """As `jax.make_mesh` makes them where no types are given. What comes back is to be read at any place."""
    mesh = mesh_of(sizes, AxisType.Explicit)
    result = decoded_over(mesh, SMALL, "coupled")
    check_equal(SMALL, "coupled", result)
    with jax.set_mesh(mesh):
        assert {jax.typeof(leaf).sharding.spec for leaf in jax.tree.leaves(result)} <= {P(None), P(None, None)}
        assert result.tokens[1, 2] == np.asarray(result.tokens)[1, 2]


def test_axes_of_both_kinds_within_a_program_of_ones_own():
    """The compiler keeps `data`, types say how `model` is cut."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Explicit))
    target, drafter = (jax.device_put(model, decoder_shardings(model, mesh)) for model in models(SMALL))
    with jax.set_mesh(mesh):
        program = jax.jit(partial(speculative_decoding, prompt=PROMPTS, verification="coupled", **arguments("coupled")))
        check_equal(SMALL, "coupled", program(target, drafter))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_drafters_state_may_be_numbers_of_python(kind: AxisType):
    @struct.dataclass
    class Numbered(NGram):
        def start(self, *arguments: Any, **options: Any) -> int:
            return 0

    target, _ = models(SMALL)
    alone = base_decoding(target, PROMPTS, **arguments("coupled"))
    with jax.set_mesh(mesh_of(MESHES["data"], kind)):
        result = speculative_decoding(
            target, Numbered(gamma=2), PROMPTS, verification="coupled", **arguments("coupled")
        )
        rounds = list(stream(target, Numbered(gamma=2), PROMPTS, verification="coupled", **arguments("coupled")))
    np.testing.assert_array_equal(result.tokens, alone.tokens)
    np.testing.assert_array_equal(sum(step.count_b for step in rounds), alone.lengths)


def test_arrays_of_a_mesh_that_is_not_set_are_refused():
    mesh = mesh_of(MESHES["both"], AxisType.Explicit)
    target, _ = models(SMALL)
    placed = jax.device_put(target, decoder_shardings(target, mesh))
    message = r"split over Explicit axes must be that of jax.set_mesh, got float32\[.*@model.*\] without"
    with pytest.raises(ValueError, match=message):
        base_decoding(placed, PROMPTS, **arguments("coupled"))


def test_a_loss_over_explicit_axes():
    """Its gradient is that of one device, and lies as the weights do."""

    @left_to_compiler
    def loss(target: Decoder, rows: jax.Array, *, scale: float) -> jax.Array:
        return scale * next_token_loss(target(rows[:, :-1]).logits, rows[:, 1:])

    gradient = jax.jit(jax.value_and_grad(partial(loss, scale=2.0)))
    target, rows = transformer(0), jnp.asarray(PROMPTS[:8])
    alone = gradient(target, rows)
    mesh = mesh_of(MESHES["both"], AxisType.Explicit)

    def reduced(target: Decoder) -> jax.Array:
        """As where weights are gathered over `data` for the forward, and gradients summed over it."""
        return loss(jax.tree.map(lambda x: jax.reshard(x, P(reduced=frozenset(("data",)))), target), rows, scale=2.0)

    with jax.set_mesh(mesh):
        target = jax.device_put(target, decoder_shardings(target, mesh))
        rows = jax.device_put(rows, P("data"))
        spread = gradient(target, rows)
        assert list(map(jax.typeof, jax.tree.leaves(spread[1]))) == list(map(jax.typeof, jax.tree.leaves(target)))
        summed = jax.jit(jax.value_and_grad(reduced))(jax.device_put(transformer(0), P()))
    for results in (spread, summed):
        for got, wanted in zip(jax.tree.leaves(results), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_streams_over_a_mesh(kind: AxisType):
    target, drafter = models(SMALL)
    alone = base_decoding(target, PROMPTS, **arguments("coupled"))
    mesh = mesh_of(MESHES["both"], kind)
    target, drafter = (jax.device_put(model, decoder_shardings(model, mesh)) for model in (target, drafter))
    rows: list[list[int]] = [[] for _ in PROMPTS]
    with jax.set_mesh(mesh):
        for step in stream(target, drafter, PROMPTS, verification="coupled", **arguments("coupled")):
            for row, tokens in enumerate(rows):
                tokens += step.row(row)[0]
    wanted = [tokens[:length].tolist() for tokens, length in zip(np.asarray(alone.tokens), np.asarray(alone.lengths))]
    assert sum(got != want for got, want in zip(rows, wanted)) <= 1


def test_another_target_gives_other_tokens():
    """The negative control: the comparison notices a weight that one device has wrong."""
    target, drafter = models(SMALL)
    wrong = jax.tree.map(lambda weight: weight, target)
    kernel = wrong.blocks[1].attention.to_out.kernel
    kernel[...] = kernel[...].at[:16].multiply(-1)
    chosen = arguments("coupled")
    result = speculative_decoding(wrong, drafter, PROMPTS, verification="coupled", **chosen)
    plain = base_decoding(target, PROMPTS, **chosen)
    found = compare(target, PROMPTS, LENGTHS, chosen["sampling"], chosen["key"], result, plain)
    assert found.diverged > len(PROMPTS) / 2


def prepared_on(mesh: Mesh, config: DecoderConfig) -> tuple[Any, ...]:
    """Target, drafter, prompts, their lengths and the request."""
    target, drafter = transformer(0, config), SmallModel(transformer(1, config), gamma=GAMMA)
    target, drafter = (jax.device_put(model, decoder_shardings(model, mesh)) for model in (target, drafter))
    chosen = arguments("coupled")
    prepared = decoding._prepare(
        target, drafter, PROMPTS, LENGTHS, 20, chosen["key"], chosen["sampling"], 5, 0, "coupled", 1.0, None, None
    )
    return target, drafter, prepared.prompt_bp, prepared.prompt_length_b, prepared.request


def compiled(mesh: Mesh, config: DecoderConfig = CONFIG) -> str:
    """The compiled decoding."""
    with jax.set_mesh(mesh):
        lowered = decoding.compiled_decode.lower(*prepared_on(mesh, config), size=128, width=64)
        return lowered.compile().as_text() or ""


def compiled_round(mesh: Mesh, config: DecoderConfig = CONFIG) -> str:
    """The compiled round of `stream`."""
    with jax.set_mesh(mesh):
        target, drafter, *prompts, request = prepared_on(mesh, config)
        state = decoding.compiled_start(target, drafter, *prompts, request, size=128)
        return decoding.compiled_round.lower(target, drafter, state, request).compile().as_text() or ""


def collectives(program: str) -> dict[str, int]:
    """How often each kind of communication stands in it."""
    names = re.findall(rf" ({COLLECTIVES})(?:-start)?\(", program)
    return {name: names.count(name) for name in set(names)}


def test_rows_stay_where_they_are():
    """Over `data` alone the devices have one thing to agree on: whether all rows are done."""
    assert collectives(compiled(mesh_of({"data": 4}))) == {"all-reduce": 1}


@pytest.mark.parametrize("config", [CONFIG, GROUPED])
@pytest.mark.parametrize("program", [compiled, compiled_round])
def test_only_sums_travel(program: Callable[..., str], config: DecoderConfig):
    """No cache is gathered. Where axes are Explicit, the few numbers that come back are, too."""
    found = collectives(program(mesh_of(MESHES["both"]), config))
    assert found.keys() == {"all-reduce"}
    if program is compiled_round:
        # Behind attention and feed-forward, in the draft's first pass, in the loop over its others, in the target's.
        assert found["all-reduce"] == 2 * config.depth * 3
    explicit = program(mesh_of(MESHES["both"], AxisType.Explicit), config)
    returned = collectives(explicit)
    assert returned.pop("all-gather") == len(re.findall(r"(?:s32|pred)\[\d+(?:,\d+)?\]\S* all-gather\(", explicit))
    assert returned == found


def caches_sent(mesh: Mesh, target: Any, drafter: Drafter, **chosen: Any) -> list[str]:
    """What a decoding sends between devices that has an axis of the caches' slots."""
    decode = partial(speculative_decoding, verification="coupled", cache_size=SLOTS, **chosen)
    with jax.set_mesh(mesh):
        program = jax.jit(decode).lower(target, drafter).compile().as_text() or ""
    slots = rf"f32\[[^\]]*\b{SLOTS}\b[^\]]*\]"
    assert re.search(slots, program)
    return re.findall(rf"{slots}\S* (?:{COLLECTIVES})", program)


@pytest.mark.parametrize(("heads", "kv_heads"), UNDIVIDED_HEADS)
def test_no_cache_of_heads_that_the_mesh_does_not_divide_is_gathered(heads: int, kv_heads: int):
    config, mesh = dataclasses.replace(CONFIG, heads=heads, kv_heads=kv_heads), mesh_of(UNDIVIDING)
    pair = transformer(0, config), transformer(1, config)
    target, draft = (jax.device_put(model, decoder_shardings(model, mesh)) for model in pair)
    assert caches_sent(mesh, target, SmallModel(draft, gamma=GAMMA), prompt=PROMPTS, **arguments("coupled")) == []


def place(weight: Any) -> NamedSharding:
    """Of a variable that holds a sharding in place of an array."""
    return jax.tree.leaves(weight)[0]


def test_what_is_cut():
    mesh = mesh_of(MESHES["both"])
    target, _ = models(SMALL)
    shardings = decoder_shardings(target, mesh)
    block = shardings.blocks[0]
    assert place(block.attention.to_qkv.kernel).spec == P(None, "model")
    assert place(block.attention.to_out.kernel).spec == P("model")
    assert place(block.feed_forward.up.bias).spec == P("model")
    assert place(block.feed_forward.down.bias).spec == P()
    assert place(shardings.head.to_logits.kernel).spec == P()
    # Attention between key-value heads or not at all.
    attention: Any = decoder_shardings(transformer(0, GROUPED), mesh_of(UNDIVIDING)).blocks[0].attention
    assert (place(attention.to_qkv.kernel).spec, place(attention.to_out.kernel).spec) == (P(), P())
    # No axis `model`, and one that divides nothing: all whole.
    for sizes in ({"data": 8}, {"model": 5}):
        found = {sharding.spec for sharding in jax.tree.leaves(decoder_shardings(target, mesh_of(sizes)))}
        assert found == {P()}


def test_all_that_is_cut():
    """What the first product of a layer cuts, the second sums over."""
    mesh = mesh_of({"model": 2})
    feed_forward: Any = decoder_shardings(transformer(0), mesh).blocks[0].feed_forward
    assert place(feed_forward.up.kernel).spec == P(None, "model")
    assert place(feed_forward.down.kernel).spec == P("model")


def test_optimiser_states_and_other_models():
    """What has fewer axes than its weight, as Adafactor's means, and what is no decoder's, however it is called."""
    mesh = mesh_of({"data": 1, "model": 2})
    weights: Any = transformer(0)
    state = optax.adafactor(1e-3, min_dim_size_to_factor=2).init(weights)
    shardings = decoder_shardings(state, mesh)
    assert jax.tree.leaves(jax.device_put(state, shardings))
    factors = [x for path, x in jax.tree_util.tree_leaves_with_path(shardings) if "v_row" in jax.tree_util.keystr(path)]
    assert {sharding.spec for sharding in factors} == {P()}
    moments: Any = decoder_shardings(optax.adam(1e-3).init(weights), mesh)
    assert place(moments[0].mu.blocks[0].attention.to_qkv.kernel).spec == P(None, "model")

    class Other(nnx.Module):
        def __init__(self) -> None:
            self.down = nnx.Linear(4, 4, rngs=nnx.Rngs(0))

    assert place(decoder_shardings(Other(), mesh).down.kernel).spec == P()


def test_no_mesh_is_refused():
    with pytest.raises(ValueError, match="mesh must be a Mesh, got None"):
        decoder_shardings(transformer(0), None)  # pyright: ignore[reportArgumentType]


def test_rows_under_a_shard_map_are_cut_already():
    rows, spec = jnp.ones((4, 3)), P("data")
    with jax.set_mesh(mesh_of({"data": 2})):
        mapped = jax.jit(jax.shard_map(over_rows, in_specs=spec, out_specs=spec))(rows)
    np.testing.assert_array_equal(mapped, rows)


def of_two(name: str, kind: AxisType = AxisType.Explicit) -> Mesh:
    return jax.make_mesh((2,), (name,), axis_types=(kind,), devices=jax.devices()[:2])


def test_all_blocks_of_pairs_and_exits_are_split():
    mesh = of_two("model")
    pair = decoder_shardings(random_pair(CONFIG), mesh)
    config = dataclasses.replace(CONFIG, early_exit_layer=1, early_exit_extra_blocks=1)
    with_exit = decoder_shardings(transformer(0, config), mesh)
    assert with_exit.early_exit is not None
    for blocks in (pair.target.blocks, pair.prophet.decoder.blocks, with_exit.early_exit.blocks):
        assert jax.tree.leaves(blocks[0].attention.to_qkv.kernel)[0].spec == P(None, "model")


def test_what_lies_over_explicit_axes_after_the_compiler():
    """Rows of three axes, if the mesh divides them, and heads of four; not over an axis that is Auto."""

    def spec(mesh: Mesh, shape: tuple[int, ...]) -> P:
        with jax.set_mesh(mesh):
            return jax.typeof(jax.jit(left_to_compiler(lambda x: x + 1))(jnp.zeros(shape))).sharding.spec

    assert spec(of_two("data"), (4, 2, 2)) == P("data", None, None)
    assert spec(of_two("data"), (3, 2, 2)) == P(None, None, None)
    kinds = (AxisType.Auto, AxisType.Explicit)
    mixed = jax.make_mesh((2, 2), ("data", "model"), axis_types=kinds, devices=jax.devices()[:4])
    assert spec(mixed, (4, 2, 2, 2)) == P(None, "model", None, None)
    mixed = jax.make_mesh((2, 2), ("data", "expert"), axis_types=kinds, devices=jax.devices()[:4])
    assert spec(mixed, (4, 2, 2)) == P("expert", None, None)
    assert spec(mixed, (2, 2, 2)) == P(None, None, None)


def test_an_option_that_is_split_is_found_too():
    placed = jax.device_put(jnp.zeros((4, 4)), NamedSharding(of_two("model"), P("model")))
    with pytest.raises(ValueError, match="split over Explicit axes"):
        left_to_compiler(lambda *, x: x)(x=placed)
