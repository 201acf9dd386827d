"""The original's early exit and prophet: both logits, both losses and every gradient agree to 2e-5."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spec_jax import Decoder, ModelWithProphet
from spec_jax.interop import decoder_from_torch, pair_from_torch, pair_torch_names, torch_names
from spec_jax.losses import early_exit_logits, next_token_loss, prophet_losses
from tests.spec.test_interop import DATA, load

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
        expected = case[name].T if ours.endswith(".kernel") else case[name]
        assert np.abs(expected).max() > 2e-4, f"{name}: too small a gradient to prove anything at 2e-5"
        close(gradient, expected, name)
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


def original_pair(*, skip_feed_forward: bool) -> ModelWithProphet:
    """As loaded, or with the feed-forwards' last weights at 0, which takes them out: the original never calls them."""
    weights = state(PAIR)
    if skip_feed_forward:
        weights = {name: value * (".1.3." not in name) for name, value in weights.items()}
    return pair_from_torch(
        weights, model=PAIR_ARGUMENTS["model"], prophet=PAIR_ARGUMENTS["prophet"], **PAIR_ARGUMENTS["wrapper"]
    )


def test_prophet():
    """Its losses are over all windows; the original leaves the last one out, so it gets one token less here."""
    pair, tokens = original_pair(skip_feed_forward=True), jnp.asarray(PAIR["tokens"])
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
    """What is right about the original is met above; with its weights as they are, the losses differ."""
    tokens = jnp.asarray(PAIR["tokens"])
    pair = original_pair(skip_feed_forward=False)
    main, prophet = prophet_losses(pair, pair(tokens), tokens)
    assert abs(main - PAIR["main_loss"]) > 1e-3
    assert abs(prophet - PAIR["prophet_loss"]) > 1e-3


@pytest.mark.parametrize("width", [64, 32])
def test_projection_is_loaded(width: int):
    """A prophet of another width has a projection, which must then be among the weights."""
    weights = state(PAIR)
    prophet = PAIR_ARGUMENTS["prophet"] | {"dim": width}
    with pytest.raises(ValueError, match=r"left over \['to_prophet_start_token.weight'\]|missing \['to_prophet_st"):
        pair_from_torch(
            weights | ({"to_prophet_start_token.weight": np.zeros((64, 64))} if width == 64 else {}),
            model=PAIR_ARGUMENTS["model"],
            prophet=prophet,
        )
