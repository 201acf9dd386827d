"""The original's early exit and prophet: both logits, both losses and every gradient agree to 2e-5."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spec_jax import Decoder, DecoderConfig, ModelWithProphet
from spec_jax.interop import decoder_from_torch, in_torch_layout, pair_from_torch, pair_torch_names, torch_names
from spec_jax.losses import early_exit_logits, next_token_loss, prophet_losses
from tests.spec.test_interop import DATA, load
from tests.spec.transformers import uncached

EXIT, PAIR = load("spec_early_exit"), load("spec_prophet")
EXIT_ARGUMENTS: dict[str, Any] = json.loads((DATA / "spec_early_exit.json").read_text())["args"]
PAIR_ARGUMENTS: dict[str, Any] = json.loads((DATA / "spec_prophet.json").read_text())["args"]


def state(case: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.removeprefix("param/"): value for name, value in case.items() if name.startswith("param/")}


def close(got: Any, expected: np.ndarray, message: str = "") -> None:
    np.testing.assert_allclose(got, expected, atol=2e-5, rtol=0, err_msg=message)


def check_gradients(
    gradients: Any, names: Mapping[str, str], case: dict[str, np.ndarray], absent: Callable[[str], bool]
) -> None:
    """Every gradient of the case is met, and what it lacks is what the original never applied."""
    compared = set()
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        ours = jax.tree_util.keystr(path).removesuffix(".value")
        name = f"grad/{names[ours]}"
        if absent(name):
            assert name not in case
            continue
        expected = case[name]
        assert np.abs(expected).max() > 2e-4, f"{name}: too small a gradient to prove anything at 2e-5"
        close(in_torch_layout(ours, gradient), expected, name)
        compared.add(name)
    assert compared == {name for name in case if name.startswith("grad/")}


def test_early_exit():
    decoder, tokens = decoder_from_torch(state(EXIT), **EXIT_ARGUMENTS), jnp.asarray(EXIT["tokens"])
    assert decoder.config.early_exit_layer == 2
    logits, exit_logits = early_exit_logits(decoder, tokens)
    close(logits, EXIT["logits"])
    close(exit_logits, EXIT["early_exit_logits"])

    def losses(decoder: Decoder) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        both = early_exit_logits(decoder, tokens[:, :-1])
        main, early = (next_token_loss(logits, tokens[:, 1:]) for logits in both)
        return main + early, (main, early)

    (_, (main, early)), gradients = jax.jit(jax.value_and_grad(losses, has_aux=True))(decoder)
    close(main, EXIT["loss"])
    close(early, EXIT["early_exit_loss"])
    check_gradients(gradients, torch_names(decoder.config), EXIT, lambda name: False)


def is_feed_forward(name: str) -> bool:
    return ".layers." in name and name.split(".layers.")[1].split(".")[1] == "1"


def original_pair(*, without_feed_forward: tuple[str, ...]) -> ModelWithProphet:
    """With the last feed-forward weights of these models at 0, which takes them out: the original never calls them."""
    weights = {
        name: value * (not (".1.3." in name and name.startswith(without_feed_forward)))
        for name, value in state(PAIR).items()
    }
    return pair_from_torch(
        weights, model=PAIR_ARGUMENTS["model"], prophet=PAIR_ARGUMENTS["prophet"], **PAIR_ARGUMENTS["wrapper"]
    )


def test_prophet():
    """Its losses are over all windows; the original leaves the last one out, so it gets one token less here."""
    pair, tokens = original_pair(without_feed_forward=("model", "prophet")), jnp.asarray(PAIR["tokens"])
    close(pair.target(tokens).logits, PAIR["model_logits"])
    close(pair.target(tokens).hidden, PAIR["model_hidden"])
    inputs = pair.prophet.embed(jnp.asarray(PAIR["start_tokens"]), tokens[:, :9])
    close(pair.prophet.read(inputs).logits, PAIR["prophet_logits"])

    def losses(pair: ModelWithProphet) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        main = next_token_loss(pair.target(tokens[:, :-1]).logits, tokens[:, 1:])
        prophet = prophet_losses(pair, pair(tokens[:, :-1]), tokens[:, :-1])[1]
        return main + prophet, (main, prophet)

    (total, (main, prophet)), gradients = jax.jit(jax.value_and_grad(losses, has_aux=True))(pair)
    close(main, PAIR["main_loss"])
    close(prophet, PAIR["prophet_loss"])
    close(total, PAIR["total_loss"])
    check_gradients(gradients, pair_torch_names(pair), PAIR, is_feed_forward)


def test_feed_forwards_are_applied():
    """What is right about the original is met above; with the prophet's own feed-forwards, its loss is another."""
    tokens = jnp.asarray(PAIR["tokens"])[:, :-1]
    losses = []
    for skipped in (("model", "prophet"), ("model",)):
        pair = original_pair(without_feed_forward=skipped)
        losses.append(float(prophet_losses(pair, uncached(pair, tokens), tokens)[1]))
    close(losses[0], PAIR["prophet_loss"])
    assert abs(losses[1] - losses[0]) > 1e-3


def test_extra_blocks_are_loaded():
    """Under the original's names: a decoder's own weights, written and read back."""
    arguments = EXIT_ARGUMENTS | {"early_exit_extra_transformer_blocks": 1}
    block = {
        name.replace("layers.0", "early_exit_transformer_blocks.0"): value
        for name, value in state(EXIT).items()
        if name.startswith("layers.0")
    }
    decoder = decoder_from_torch(state(EXIT) | block, **arguments)
    assert decoder.early_exit is not None
    for ours, theirs in zip(jax.tree.leaves(decoder.early_exit.blocks[0]), jax.tree.leaves(decoder.blocks[0])):
        np.testing.assert_array_equal(ours, theirs)


def test_projection_is_loaded():
    """A prophet of another width than its target has a projection, transposed as all linear layers are."""
    narrow = PAIR_ARGUMENTS["prophet"] | {"dim": 32}
    config = DecoderConfig(vocab_size=50, dim=32, depth=2, heads=4, dim_head=16)
    prophet = torch_names(config)
    shapes = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    weights = {name: value for name, value in state(PAIR).items() if name.startswith("model.")}
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        ours = jax.tree_util.keystr(path).removesuffix(".value")
        value = rng.normal(size=leaf.shape)
        weights[f"prophet.{prophet[ours]}"] = in_torch_layout(ours, value)
    weights["to_prophet_start_token.weight"] = rng.normal(size=(32, 64))
    pair = pair_from_torch(weights, model=PAIR_ARGUMENTS["model"], prophet=narrow)
    state_b1d = rng.normal(size=(1, 1, 64)).astype(np.float32)
    inputs = pair.prophet.embed(jnp.asarray(state_b1d), jnp.zeros((1, 0), jnp.int32))
    expected = state_b1d[0, 0] @ weights["to_prophet_start_token.weight"].T
    np.testing.assert_allclose(inputs[0, 0], expected, rtol=1e-4, atol=1e-4)
    del weights["to_prophet_start_token.weight"]
    with pytest.raises(ValueError, match=r"missing \['to_prophet_start_token.weight'\]"):
        pair_from_torch(weights, model=PAIR_ARGUMENTS["model"], prophet=narrow)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": {"width": 1}}, r"model must be among \[.*'num_tokens'\], got \['width'\]"),
        ({"model": 5}, "model must map arguments to values, got 5"),
        ({"prophet": PAIR_ARGUMENTS["prophet"] | {"dim": 0}}, r"prophet\.dim must be at least 1, got 0"),
    ],
)
def test_arguments_of_the_pair_that_are_none(changed: dict[str, Any], message: str):
    arguments = {name: PAIR_ARGUMENTS[name] for name in ("model", "prophet")} | changed
    with pytest.raises(ValueError, match=message):
        pair_from_torch(state(PAIR), **arguments)


def test_the_wrappers_arguments_are_kept():
    pair = pair_from_torch(
        state(PAIR),
        model=PAIR_ARGUMENTS["model"],
        prophet=PAIR_ARGUMENTS["prophet"],
        prophet_train_length=9,
        num_leading_start_tokens=3,
        detach_model_embed_for_prophet=True,
    )
    assert (pair.prophet_train_length, pair.prophet.num_leading_start_tokens) == (9, 3)
    assert pair.detach_target_hiddens


def test_a_pair_has_the_defaults_of_one_made_here():
    pair = pair_from_torch(state(PAIR), model=PAIR_ARGUMENTS["model"], prophet=PAIR_ARGUMENTS["prophet"])
    options = (pair.prophet_train_length, pair.prophet.num_leading_start_tokens, pair.detach_target_hiddens)
    assert options == (8, 1, False)
