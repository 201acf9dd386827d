"""A recompile is a bug: every jitted entry is traced once, whatever changes that should not matter."""

from __future__ import annotations

from typing import Any

import chex
import jax
import numpy as np
import pytest

from spec_jax import Sampling, SmallModel, base_decoding, loop, speculative_decoding, stream
from spec_jax import decoding as decoding_module
from tests.spec.toys import Toy, random_toy

TARGET, DRAFTER = random_toy(0, 4), SmallModel(random_toy(1, 4), gamma=2)


@pytest.fixture
def traced_once(monkeypatch: pytest.MonkeyPatch):
    """The three entries as `decoding` makes them, but a second trace is an error."""
    chex.clear_trace_counter()

    def entry(function, **options):
        return jax.jit(chex.assert_max_traces(function, n=1), **options)

    monkeypatch.setattr(decoding_module, "compiled_decode", entry(loop.decode, static_argnames=("size", "width")))
    monkeypatch.setattr(decoding_module, "compiled_start", entry(loop.start, static_argnames=("size",)))
    monkeypatch.setattr(decoding_module, "compiled_round", entry(loop.decode_round, donate_argnames=("state",)))
    yield
    chex.clear_trace_counter()


def arguments(**changed: Any) -> dict[str, Any]:
    return {"prompt": [[1, 2, 3], [0, 0, 1]], "max_new_tokens": 5, "key": jax.random.key(0)} | changed


SAME_PROGRAM: dict[str, dict[str, Any]] = {
    "prompt content": {"prompt": [[3, 3, 3], [1, 2, 0]]},
    "prompt as another integer type": {"prompt": np.array([[3, 3, 3], [1, 2, 0]], np.uint8)},
    "prompt width within the bucket": {"prompt": np.ones((2, 64), int)},
    "prompt length": {"prompt_length": [1, 2]},
    "key": {"key": jax.random.key(7)},
    "old-style key": {"key": jax.random.PRNGKey(7)},
    "temperature": {"sampling": Sampling(temperature=0.5)},
    "temperature as an integer": {"sampling": Sampling(temperature=2)},
    "greedy": {"sampling": Sampling(temperature=0)},
    "top_p": {"sampling": Sampling(top_p=0.9)},
    "min_p": {"sampling": Sampling(min_p=0.1)},
    "an array for a number": {"sampling": Sampling(temperature=np.float64(0.3), top_p=jax.numpy.float32(0.5))},
    "end token": {"eos_id": 2},
    "padding token": {"pad_id": -1},
    "max_new_tokens within the bucket": {"max_new_tokens": 50},
    "the fewest of the bucket": {"max_new_tokens": 1},
    "the most of the bucket": {"max_new_tokens": 64},
    "row ids": {"row_ids": [8, 3]},
}


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize("rule", ["plain", "rejection", "block", "coupled"])
def test_one_call(rule: str):
    def run(**changed: Any) -> None:
        if rule == "plain":
            base_decoding(TARGET, **arguments(**changed))
        else:
            speculative_decoding(TARGET, DRAFTER, **arguments(**changed), verification=rule)

    run()
    for changed in SAME_PROGRAM.values():
        run(**changed)
    with pytest.raises(AssertionError, match="traced > 1 times"):  # The counter counts: top_k is part of the program.
        run(sampling=Sampling(top_k=2))


@pytest.mark.usefixtures("traced_once")
def test_lenience_and_weights():
    speculative_decoding(TARGET, DRAFTER, **arguments())
    for lenience in (0.5, 1, 0.25):
        speculative_decoding(TARGET, DRAFTER, **arguments(), lenience=lenience)
    other = SmallModel(random_toy(8, 4), gamma=2)
    speculative_decoding(random_toy(9, 4), other, **arguments())


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize("drafter", [None, DRAFTER], ids=["plain", "rejection"])
def test_stream(drafter: SmallModel | None):
    """One trace of the start and one of the round, over many rounds and all changes."""
    for changed in ({}, *SAME_PROGRAM.values()):
        assert len(list(stream(TARGET, drafter, **arguments(**changed)))) >= 1


@pytest.mark.parametrize("drafter", [None, DRAFTER], ids=["plain", "rejection"])
def test_inside_other_transformations(drafter: SmallModel | None):
    """Weights and every number of the sampling are arguments of a jitted function that maps over keys and scans."""
    prompt = [[1, 2, 3], [0, 0, 1]]

    def decode(target: Toy, drafter: SmallModel | None, sampling: Sampling, key: jax.Array) -> jax.Array:
        if drafter is None:
            return base_decoding(target, prompt, max_new_tokens=5, key=key, sampling=sampling).tokens
        return speculative_decoding(target, drafter, prompt, max_new_tokens=5, key=key, sampling=sampling).tokens

    @jax.jit
    def traced(target: Toy, drafter: SmallModel | None, numbers: jax.Array, keys: jax.Array):
        temperature, top_p, min_p = numbers
        sampling = Sampling(temperature=temperature, top_p=top_p, min_p=min_p)
        mapped = jax.vmap(lambda key: decode(target, drafter, sampling, key))(keys)
        scanned = jax.lax.scan(lambda carry, key: (carry, decode(target, drafter, sampling, key)), 0, keys)[1]
        return mapped, scanned

    keys = jax.random.split(jax.random.key(0), 6)
    for numbers in ((1.0, 1.0, 0.0), (0.0, 1.0, 0.0), (1.5, 0.6, 0.2)):
        sampling = Sampling(temperature=numbers[0], top_p=numbers[1], min_p=numbers[2])
        expected = np.stack([decode(TARGET, drafter, sampling, key) for key in keys])
        for got in traced(TARGET, drafter, jax.numpy.array(numbers), keys):
            np.testing.assert_array_equal(got, expected)


def test_no_other_jitted_entry():
    """The three above are all there is."""
    jitted = {name for name, value in vars(decoding_module).items() if isinstance(value, type(jax.jit(lambda: 0)))}
    assert jitted == {"compiled_decode", "compiled_start", "compiled_round"}
