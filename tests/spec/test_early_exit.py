"""The exit: halves of a forward, gradients, recycling, and how much work a round does."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spec_jax import Decoder, DecoderConfig, EarlyExit
from spec_jax.drafters.base import Proposal, Sequence
from spec_jax.drafters.early_exit import EarlyExitState
from spec_jax.layers import FeedForward
from spec_jax.losses import early_exit_logits, next_token_loss
from spec_jax.verification import Draft
from tests.spec.strategies import drafting_what_is_there
from tests.spec.transformers import CONFIG, cached, transformer, uncached

EXIT = dataclasses.replace(CONFIG, depth=3, early_exit_layer=1)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, CONFIG.vocab_size, (3, 12)))
# Compiled as a whole: one operation after the other is slower, even once.
early, late = jax.jit(Decoder.early), jax.jit(Decoder.late)


@jax.jit
def exit_logits(decoder: Decoder, early_btd: jax.Array, cache: Any = None, recycled_btd: Any = None) -> Any:
    """(B, T, V) logits of the exit, and its cache."""
    assert decoder.early_exit is not None
    return decoder.early_exit(early_btd, cache, recycled_btd)


def test_halves_make_a_forward():
    """Layer by layer position by position, then the rest at once: the logits and the cache of one forward."""
    decoder = transformer(0, EXIT)
    whole = cached(decoder, TOKENS, decoder.init_cache(3, 16))
    cache = decoder.init_cache(3, 16)
    hidden = []
    for position in range(12):
        of_one, cache = early(decoder, TOKENS[:, position : position + 1], cache.with_length(jnp.full(3, position)))
        hidden.append(of_one)
    halves = late(decoder, np.concatenate(hidden, axis=1), cache.with_length(jnp.zeros(3, jnp.int32)))
    np.testing.assert_allclose(halves.logits, whole.logits, atol=1e-5)
    np.testing.assert_allclose(halves.early_hidden, whole.early_hidden, atol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), halves.cache, whole.cache)


@pytest.mark.parametrize("detach", [False, True])
def test_detaching_stops_the_exit_loss_at_the_trunk(detach: bool):
    changed = {"early_exit_extra_blocks": 1, "detach_early_exit_hiddens": detach, "early_exit_recycling": 5}
    decoder = transformer(0, dataclasses.replace(EXIT, **changed))

    def exit_loss(decoder: Decoder) -> jax.Array:
        logits = early_exit_logits(decoder, TOKENS[:, :-1], key=jax.random.key(0))[1]
        return next_token_loss(logits, TOKENS[:, 1:])

    gradients = jax.jit(jax.grad(exit_loss))(decoder)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        name, largest = jax.tree_util.keystr(path), np.abs(gradient).max()
        if ".early_exit" in name:
            assert largest > 1e-6, name
        elif detach or ".blocks[1]" in name or ".blocks[2]" in name or ".head" in name:
            assert largest == 0, name  # Recycled hidden states are always detached.
        else:
            assert largest > 1e-6, name


def test_recycling_sees_the_newest_state_a_round_can_have():
    """Rounds of 4 positions: each sees the trunk's last hidden state just before the round, and nothing later."""
    decoder = transformer(0, dataclasses.replace(EXIT, early_exit_recycling=4))
    seen = jax.jit(jax.jacfwd(lambda scale: _recycled(decoder, scale)))(jnp.ones(12))
    # seen[t, s]: how the exit's logits at t move with the final hidden state at s.
    source_t = [np.flatnonzero(np.abs(row) > 1e-6).tolist() for row in seen]
    sources = [only[0] if only else -1 for only in source_t]
    assert all(len(only) <= 1 for only in source_t)
    assert all(source < position for position, source in enumerate(sources))
    starts = [position for position in range(1, 12) if sources[position] != sources[position - 1]]
    assert all(sources[start] == start - 1 for start in starts)
    assert all(after - before == 4 for before, after in itertools.pairwise(starts))


def _recycled(decoder: Decoder, scale: jax.Array) -> jax.Array:
    """(T,) one number of the exit's logits for each position, the final hidden states scaled one by one."""

    class Scaled:
        config, early_exit = decoder.config, _Unnormed(decoder.early_exit)

        def __call__(self, tokens_bt: jax.Array) -> Any:
            output = decoder(tokens_bt)
            return dataclasses.replace(output, hidden=output.hidden * scale[None, :, None])

    logits = early_exit_logits(Scaled(), TOKENS[:1], key=jax.random.key(1))[1]  # pyright: ignore
    return logits[0, :, 0]


class _Unnormed:
    """The exit's input instead of its logits: a norm would hide a scale, and `stop_gradient` hides everything."""

    def __init__(self, branch: Any) -> None:
        self.branch = branch

    def __call__(self, early_btd: jax.Array, cache: Any, recycled_btd: jax.Array) -> tuple[jax.Array, Any]:
        return recycled_btd, cache


def flops(function: Any, *arguments: Any) -> float:
    analysis: Any = jax.jit(function).lower(*arguments).compile().cost_analysis()
    return float((analysis[0] if isinstance(analysis, list) else analysis)["flops"])


def greedy(logits_bv: jax.Array, offset: int | jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.argmax(logits_bv, axis=-1).astype(jnp.int32), jax.nn.log_softmax(logits_bv)


@pytest.mark.parametrize("blocks", [0, 1])
@pytest.mark.parametrize("recycling", [0, 5])
def test_drafted_logits_are_the_uncached_exits(blocks: int, recycling: int):
    """Over four rounds of ragged rows, after full, partial and no acceptance: what `choose` sees is the exit's own.

    With blocks of its own and recycling, earlier positions have been read with what was newest then, which one forward
    cannot show: of that case only the first round is compared.
    """
    config = dataclasses.replace(EXIT, early_exit_extra_blocks=blocks, early_exit_recycling=recycling)
    decoder, gamma, width = transformer(0, config), 3, 24
    tokens_bs = jnp.asarray(np.random.default_rng(1).integers(0, CONFIG.vocab_size, (3, width)), jnp.int32)
    whole = uncached(decoder, tokens_bs)
    length_b = np.array([1, 2, 6])
    drafter = EarlyExit(gamma=gamma)

    @jax.jit
    def drafted(cache: Any, state: Any, length_b: jax.Array, emitted_b: jax.Array) -> tuple[jax.Array, Any, Any]:
        """Logits that a round drafts from, and the caches and states behind it."""
        sequence = Sequence(tokens_bs, length_b)
        choose = drafting_what_is_there(sequence)
        proposal = drafter.propose(decoder, sequence, cache.with_length(length_b - 1), state, choose)
        scored: Any = drafter.score(decoder, proposal, sequence.window(length_b - 1, gamma + 1))
        return proposal.draft.log_probs_bjv, scored.cache, drafter.update(proposal.state, scored, emitted_b)

    prefill = cached(decoder, tokens_bs, decoder.init_cache(3, width))
    cache, state = prefill.cache, drafter.start(decoder, Sequence(tokens_bs, jnp.asarray(length_b)), prefill, width)
    for round_, emitted_b in enumerate(np.array([[4, 1, 2], [1, 4, 4], [4, 4, 1], [2, 3, 4]])):
        expected = np.asarray(uncached_exit_logits(decoder, whole, length_b[:, None] - 2))
        drafted_bjv, cache, state = drafted(cache, state, length_b, emitted_b)
        for offset in range(gamma):
            if not (blocks and recycling) or (round_ == 0 and offset == 0):
                picked = expected[np.arange(3), length_b - 1 + offset]
                np.testing.assert_allclose(drafted_bjv[:, offset], picked, atol=2e-5)
        length_b = length_b + emitted_b


@jax.jit
def uncached_exit_logits(decoder: Decoder, whole: Any, newest_b1: jax.Array) -> jax.Array:
    """(B, T, V): positions of the round see the newest final hidden state, all before it the one before themselves."""
    position_1t = jnp.arange(whole.hidden.shape[1])[None, :]
    source_bt = jnp.minimum(position_1t - 1, newest_b1)
    recycled = jnp.take_along_axis(whole.hidden, jnp.maximum(source_bt, 0)[:, :, None], axis=1)
    recycled = jnp.where(source_bt[:, :, None] < 0, 0, recycled)
    return exit_logits(decoder, whole.early_hidden, None, recycled)[0]


@pytest.mark.parametrize("gamma", [3, 5])
def test_scoring_does_not_repeat_the_first_layers(gamma: int):
    """Counted in the compiled programs: scoring is layers [e, depth) of gamma + 1 positions and layers [0, e) of one.

    Drafting has then run layers [0, e) for the other gamma positions: each layer once for each position of a round.
    """
    config = DecoderConfig(vocab_size=24, dim=64, depth=6, heads=2, dim_head=32, early_exit_layer=4)
    decoder, batch, positions = transformer(0, config), 2, gamma + 1
    cache = decoder.init_cache(batch, 32).with_length(jnp.full((batch,), 7))
    window_bt = jnp.zeros((batch, positions), jnp.int32)
    early_bd = jnp.zeros((batch, config.dim))
    draft = Draft(window_bt[:, 1:], jnp.zeros((batch, gamma, 24)), jnp.full((batch,), gamma))

    def score(decoder: Decoder, cache: Any, early_bjd: jax.Array) -> Any:
        proposal = Proposal(draft, cache, (None, early_bjd))
        return EarlyExit(gamma=gamma).score(decoder, proposal, window_bt)

    scoring = flops(score, decoder, cache, jnp.zeros((batch, gamma, config.dim)))
    whole = flops(lambda decoder, cache: decoder(window_bt, cache), decoder, cache)
    second_half = flops(Decoder.late, decoder, jnp.zeros((batch, positions, config.dim)), cache)
    first_half_of_one = flops(Decoder.early, decoder, window_bt[:, :1], cache)
    first_half_of_all = flops(Decoder.early, decoder, window_bt, cache)
    assert scoring == pytest.approx(second_half + first_half_of_one, rel=0.02)
    assert whole == pytest.approx(second_half + first_half_of_all, rel=0.02)
    assert first_half_of_all > (positions - 0.5) * first_half_of_one

    def propose(decoder: Decoder, cache: Any, before_bd: jax.Array) -> Any:
        sequence = Sequence(jnp.zeros((batch, 32), jnp.int32), jnp.full((batch,), 8))
        state = EarlyExitState(before_bd, before_bd, before_bd, None)
        return EarlyExit(gamma=gamma).propose(decoder, sequence, cache, state, greedy)

    drafting = flops(propose, decoder, cache, early_bd)
    exit_once = flops(exit_logits, decoder, early_bd[:, None])
    # The first token, and then a loop, which is counted as if it ran once.
    assert drafting == pytest.approx(2 * (first_half_of_one + exit_once), rel=0.03)
    (loop,) = (e for e in jax.make_jaxpr(propose)(decoder, cache, early_bd).eqns if e.primitive.name == "scan")
    assert loop.params["length"] == gamma - 1
    assert scoring < 0.6 * whole


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"early_exit_layer": 0}, r"early_exit_layer must be an integer in \[1, depth = 3\) or None, got 0"),
        ({"early_exit_layer": 3}, r"early_exit_layer must be an integer in \[1, depth = 3\) or None, got 3"),
        ({"early_exit_recycling": -1}, "early_exit_recycling must be at least 0, got -1"),
        ({"early_exit_extra_blocks": -1}, "early_exit_extra_blocks must be at least 0, got -1"),
        (
            {"early_exit_layer": None, "early_exit_extra_blocks": 1},
            "early_exit_extra_blocks must not be set without early_exit_layer, got 1",
        ),
        (
            {"early_exit_layer": None, "early_exit_recycling": 3},
            "early_exit_recycling must not be set without early_exit_layer, got 3",
        ),
    ],
)
def test_bad_configuration(changed: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(EXIT, **changed)


def test_bad_loss_input():
    with pytest.raises(ValueError, match="decoder must have early_exit_layer for an early-exit loss, got None"):
        early_exit_logits(transformer(0), TOKENS)
    recycling = transformer(0, dataclasses.replace(EXIT, early_exit_recycling=5))
    with pytest.raises(ValueError, match="key must be given for an exit with early_exit_recycling, got None"):
        early_exit_logits(recycling, TOKENS)


def test_several_blocks_of_its_own_have_a_cache_each():
    decoder = transformer(0, dataclasses.replace(EXIT, early_exit_extra_blocks=2))
    early_btd, cache = early(decoder, TOKENS)[0], decoder.init_exit_cache(3, 12)
    first_btv, cache = exit_logits(decoder, early_btd[:, :7], cache)
    second_btv, _ = exit_logits(decoder, early_btd[:, 7:], cache.with_length(np.full(3, 7)))
    parts_btv = np.concatenate((first_btv, second_btv), axis=1)
    np.testing.assert_allclose(parts_btv, exit_logits(decoder, early_btd)[0], atol=2e-5)


def test_blocks_of_its_own_get_the_slots_asked_for():
    decoder = transformer(0, dataclasses.replace(EXIT, early_exit_extra_blocks=1))
    state = EarlyExit().start(decoder, Sequence(TOKENS, jnp.array([1, 2, 6])), uncached(decoder, TOKENS), 32)
    assert state.cache.size == 32


def test_untrained_recycling_changes_nothing():
    decoder = Decoder(dataclasses.replace(EXIT, early_exit_recycling=4), rngs=nnx.Rngs(0))
    early_btd = np.asarray(early(decoder, TOKENS)[0])
    with_some, without = (exit_logits(decoder, early_btd, None, x)[0] for x in (early_btd + 1, 0 * early_btd))
    np.testing.assert_array_equal(with_some, without)


def test_rounds_begin_at_a_random_place_of_each_row():
    """Of 64 equal rows, hidden states are their positions counted from 1: all four ways to lay rounds of four come."""
    decoder = transformer(0, dataclasses.replace(EXIT, early_exit_recycling=4))

    class Counting:
        config, early_exit = decoder.config, _Unnormed(decoder.early_exit)

        def __call__(self, tokens_bt: jax.Array) -> Any:
            output = decoder(tokens_bt)
            position_1t1 = jnp.arange(1.0, 13.0)[None, :, None]
            return dataclasses.replace(output, hidden=jnp.broadcast_to(position_1t1, output.hidden.shape))

    counting: Any = Counting()
    seen_btd = early_exit_logits(counting, jnp.tile(TOKENS[:1], (64, 1)), key=jax.random.key(0))[1]
    assert len(np.unique(seen_btd[:, :, 0], axis=0)) == 4


@pytest.mark.parametrize("length_b", [[1, 2, 5], [3, 4, 6]])
def test_states_follow_each_rows_own_position(length_b: list[int]):
    """After a round they are those of a start behind all that is then known."""
    decoder = transformer(0, dataclasses.replace(EXIT, early_exit_recycling=3))
    whole, drafter, emitted_b = uncached(decoder, TOKENS), EarlyExit(gamma=3), jnp.array([1, 4, 2])
    before, after = (Sequence(TOKENS, jnp.array(length_b) + more) for more in (0, emitted_b))
    index_bt1 = (before.length_b[:, None] - 1 + jnp.arange(4)[None, :])[:, :, None]
    window = {name: jnp.take_along_axis(getattr(whole, name), index_bt1, axis=1) for name in ("hidden", "early_hidden")}
    scored = dataclasses.replace(whole, **window)
    updated = drafter.update((drafter.start(decoder, before, whole, 12), []), scored, emitted_b)
    jax.tree.map(np.testing.assert_array_equal, updated, drafter.start(decoder, after, whole, 12))


def test_a_factory_of_feed_forwards_can_tell_the_exits_blocks_from_the_trunks():
    layers = []

    def factory(layer: int, rngs: nnx.Rngs) -> nnx.Module:
        layers.append(layer)
        return FeedForward(config, rngs=rngs)

    config = DecoderConfig(dim=8, depth=3, heads=1, dim_head=4, early_exit_layer=2, early_exit_extra_blocks=2)
    Decoder(config, rngs=nnx.Rngs(0), feed_forward=factory)
    assert layers == [0, 1, 2, 3, 4]


def test_the_place_of_the_rounds_is_of_the_key():
    decoder = transformer(0, dataclasses.replace(CONFIG, early_exit_layer=1, early_exit_recycling=4))
    tokens = jnp.ones((1, 12), jnp.int32)
    first, *others = (np.asarray(early_exit_logits(decoder, tokens, key=jax.random.key(seed))[1]) for seed in range(6))
    assert any((other != first).any() for other in others)


def test_an_exit_without_layers_has_no_cache_and_one_with_recycling_wants_states():
    plain = transformer(0, dataclasses.replace(CONFIG, early_exit_layer=1))
    assert plain.init_exit_cache(1, 4) is None
    recycling = transformer(0, dataclasses.replace(CONFIG, early_exit_layer=1, early_exit_recycling=2))
    assert recycling.early_exit is not None
    with pytest.raises(ValueError, match="recycled must be given"):
        recycling.early_exit(jnp.zeros((1, 2, CONFIG.dim)))
