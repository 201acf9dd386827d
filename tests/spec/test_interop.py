"""The original's weights: logits, loss, every gradient, greedy continuation and top-k filter agree to 2e-5."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spec_jax import Decoder, DecoderConfig, Sampling, base_decoding
from spec_jax.interop import decoder_from_torch, decoder_to_torch, in_torch_layout, torch_names
from spec_jax.layers import FeedForward
from spec_jax.losses import next_token_loss
from spec_jax.sampling import filtered_log_probs, keep_top_k
from tests.spec.transformers import CONFIG, transformer
from tests.tensors import TensorOfBfloat16

DATA = pathlib.Path(__file__).parent.parent / "data"


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(DATA / f"{name}.npz") as arrays:
        return dict(arrays)


CASE = load("spec_decoder")
ARGUMENTS: dict[str, Any] = json.loads((DATA / "spec_decoder.json").read_text())["args"]
STATE = {name.removeprefix("param/"): value for name, value in CASE.items() if name.startswith("param/")}


def original() -> Decoder:
    return decoder_from_torch(STATE, **ARGUMENTS)


def test_logits():
    np.testing.assert_allclose(original()(jnp.asarray(CASE["tokens"])).logits, CASE["logits"], atol=2e-5, rtol=0)


def test_loss_and_every_gradient():
    tokens = jnp.asarray(CASE["tokens"])

    def loss(decoder: Decoder) -> jax.Array:
        return next_token_loss(decoder(tokens[:, :-1]).logits, tokens[:, 1:])

    value, gradients = jax.jit(jax.value_and_grad(loss))(original())
    np.testing.assert_allclose(value, CASE["loss"], atol=2e-5, rtol=0)
    names = torch_names(original().config)
    compared = set()
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        ours = jax.tree_util.keystr(path).removesuffix(".value")
        name = names[ours]
        expected = CASE[f"grad/{name}"]
        assert np.abs(expected).max() > 2e-4, f"{name}: too small a gradient to prove anything at 2e-5"
        np.testing.assert_allclose(in_torch_layout(ours, gradient), expected, atol=2e-5, rtol=0, err_msg=name)
        compared.add(f"grad/{name}")
    assert compared == {name for name in CASE if name.startswith("grad/")}


def test_greedy_continuation():
    expected = CASE["greedy_from_8"]
    result = base_decoding(
        original(),
        CASE["tokens"][:, :8],
        max_new_tokens=expected.shape[1],
        key=jax.random.key(0),
        sampling=Sampling(temperature=0.0),
    )
    np.testing.assert_array_equal(result.tokens, expected)


@pytest.mark.parametrize("fraction", [0.5, 0.9, 0.99])
def test_top_k_by_fraction(fraction: float):
    case = load("spec_top_k")
    expected = case[f"top_k_{fraction}"]
    np.testing.assert_array_equal(keep_top_k(jnp.asarray(case["logits"]), fraction), expected)
    log_probs = filtered_log_probs(jnp.asarray(case["logits"]), Sampling(top_k=fraction).checked())
    np.testing.assert_allclose(log_probs, jax.nn.log_softmax(expected, axis=-1), atol=2e-5, rtol=0)


def without(name: str) -> dict[str, np.ndarray]:
    return {key: value for key, value in STATE.items() if key != name}


@pytest.mark.parametrize(
    ("state", "arguments", "message"),
    [
        (without("to_logits.1.weight"), {}, r"state_dict .* missing \['to_logits.1.weight'\], left over \[\]"),
        (STATE | {"extra": np.zeros(1)}, {}, r"state_dict .* missing \[\], left over \['extra'\]"),
        (
            STATE | {"layers.1.0.to_out.weight": np.zeros((64, 63))},
            {},
            r"state_dict\['layers.1.0.to_out.weight'\] must have shape \(64, 64\), got \(64, 63\)",
        ),
        (
            STATE | {"layers.1.0.to_qkv.weight": np.zeros((64, 192))},
            {},
            r"state_dict\['layers.1.0.to_qkv.weight'\] must have shape \(192, 64\), got \(64, 192\)",
        ),
        (STATE | {3: np.zeros(1)}, {}, r"state_dict .* missing \[\], left over \['3'\]"),
        (
            STATE | {"layers.1.0.to_out.weight": np.zeros((64, 64), complex)},
            {},
            r"state_dict\['layers.1.0.to_out.weight'\] must be floating point, got complex128",
        ),
        (
            STATE | {"layers.1.0.to_out.weight": TensorOfBfloat16()},
            {},
            r"state_dict\['layers.1.0.to_out.weight'\] must be a CPU tensor .* Got unsupported ScalarType BFloat16",
        ),
        (
            STATE | {"layers.1.0.to_out.weight": [[1.0], [2.0, 3.0]]},
            {},
            r"state_dict\['layers.1.0.to_out.weight'\] must be a CPU tensor .* inhomogeneous",
        ),
        (STATE, {"depth": 2}, r"missing \[\], left over \['layers.2.0.norm.weight'"),
        (STATE, {"depth": 4}, r"missing \['layers.3.0.norm.weight'"),
        (STATE, {"num_tokens": 51}, r"state_dict\['token_emb.weight'\] must have shape \(51, 64\), got \(50, 64\)"),
        (STATE, {"num_tokens": 0}, "num_tokens must be at least 1, got 0"),
        (
            STATE,
            {"early_exit_extra_transformer_blocks": 1},
            "early_exit_extra_transformer_blocks must not be set without",
        ),
        (STATE, {"vocab_size": 50}, r"constructor_args must be among \[.*'num_tokens'\], got \['vocab_size'\]"),
    ],
)
def test_bad_weights(state: dict, arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        decoder_from_torch(state, **(ARGUMENTS | arguments))


def test_rotary_frequencies_may_be_missing():
    """They are recomputed, not loaded."""
    decoder = decoder_from_torch(without("rotary_emb.inv_freq"), **ARGUMENTS)
    np.testing.assert_allclose(decoder(jnp.asarray(CASE["tokens"])).logits, CASE["logits"], atol=2e-5, rtol=0)


def test_what_is_written_is_read_back():
    """Under every argument that the original has; linear layers are written as torch keeps them, (out, in)."""
    shared: dict[str, Any] = {"dim": 8, "depth": 2, "heads": 2, "dim_head": 4, "ff_mult": 3, "early_exit_layer": 1}
    shared["detach_early_exit_hiddens"] = True
    decoder = transformer(0, DecoderConfig(vocab_size=7, early_exit_extra_blocks=1, **shared))
    weights = decoder_to_torch(decoder)
    assert weights["layers.1.1.1.weight"].shape == (24, 8)
    back = decoder_from_torch(weights, num_tokens=7, early_exit_extra_transformer_blocks=1, **shared)
    assert back.config == decoder.config
    jax.tree.map(np.testing.assert_array_equal, back, decoder)


def test_what_the_original_does_not_have_is_not_written():
    for changed, message in (
        ({"kv_heads": 1}, "decoder must have as many kv_heads as heads, 2, got 1"),
        ({"early_exit_layer": 1, "early_exit_recycling": 3}, "decoder must have early_exit_recycling 0, got 3"),
        ({"rotary_base": 5e5}, "decoder must have rotary_base 10000.0, got 500000.0"),
        ({"norm_epsilon": 1e-5}, "decoder must have norm_epsilon 1.19.*e-07, got 1e-05"),
    ):
        decoder = transformer(0, dataclasses.replace(CONFIG, **changed))
        with pytest.raises(ValueError, match=message):
            decoder_to_torch(decoder)


def test_feed_forward_layers_of_the_callers_are_not_written():
    def feed_forward(layer: int, rngs: nnx.Rngs) -> nnx.Module:
        return nnx.Linear(CONFIG.dim, CONFIG.dim, rngs=rngs)

    decoder = Decoder(CONFIG, rngs=nnx.Rngs(0), feed_forward=feed_forward)
    with pytest.raises(ValueError, match=r"feed-forward layers of its config, got others: \.blocks\[0\]\.feed_forward"):
        decoder_to_torch(decoder)


class ReluFeedForward(FeedForward):
    """Weights of the same names and shapes, and another function."""

    def __call__(self, hidden_btd: jax.Array) -> jax.Array:
        return self.down(jax.nn.relu(self.up(self.norm(hidden_btd))))


@pytest.mark.parametrize("exit_layers", [0, 1])
def test_feed_forward_layers_of_the_same_weights_are_not_written_either(exit_layers: int):
    """Where the exit has one of its own, the trunk's are the original's."""
    config = dataclasses.replace(CONFIG, early_exit_layer=1, early_exit_extra_blocks=exit_layers)

    def feed_forward(layer: int, rngs: nnx.Rngs) -> nnx.Module:
        return (FeedForward if exit_layers and layer < CONFIG.depth else ReluFeedForward)(config, rngs=rngs)

    decoder = Decoder(config, rngs=nnx.Rngs(0), feed_forward=feed_forward)
    with pytest.raises(ValueError, match="feed-forward layers of its config, got others: ReluFeedForward"):
        decoder_to_torch(decoder)


def test_weights_of_half_precision_become_float32():
    decoder = decoder_from_torch({name: value.astype(np.float16) for name, value in STATE.items()}, **ARGUMENTS)
    assert {leaf.dtype for leaf in jax.tree.leaves(decoder)} == {jnp.dtype(jnp.float32)}
    written = decoder_to_torch(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), decoder))
    assert {value.dtype for value in written.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("other", [None, list(STATE.items())])
def test_what_is_neither_weights_nor_a_decoder(other: Any):
    with pytest.raises(ValueError, match=r"state_dict must map names to arrays, got (NoneType|list)"):
        decoder_from_torch(other, **ARGUMENTS)
    with pytest.raises(ValueError, match=r"decoder must be a Decoder, got (NoneType|list)"):
        decoder_to_torch(other)


def test_weights_of_integers_are_refused():
    name = "layers.1.0.to_out.weight"
    with pytest.raises(ValueError, match="must be floating point, got int64"):
        decoder_from_torch(STATE | {name: np.zeros(STATE[name].shape, int)}, **ARGUMENTS)
