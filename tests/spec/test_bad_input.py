"""Bad input is refused before any compute, by a ValueError that names the argument, what was expected and what came."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, struct

from spec_jax import LayerSkip, NGram, Sampling, SmallModel, base_decoding, speculative_decoding, stream
from spec_jax import decoding as decoding_module
from tests.spec.toys import Toy, random_toy

TARGET, DRAFT = random_toy(0, 4), random_toy(1, 4)
PROMPT = [[1, 2, 3], [0, 3, 1]]
NAN, INF = float("nan"), float("inf")


def sampled(**values: Any) -> dict[str, Any]:
    return {"sampling": Sampling(**values)}


# What is wrong, and the message that comes.
OF_EVERY_DECODING: list[tuple[dict[str, Any], str]] = [
    ({"prompt": np.zeros((0, 3), int)}, "prompt must have at least one row and one token, got shape (0, 3)"),
    ({"prompt": np.zeros((2, 0), int)}, "prompt must have at least one row and one token, got shape (2, 0)"),
    ({"prompt": [1, 2, 3]}, "prompt must be (B, P) integers, got (3,) int64"),
    ({"prompt": np.zeros((1, 2, 3), int)}, "prompt must be (B, P) integers, got (1, 2, 3) int64"),
    ({"prompt": [[0.5, 1.0]]}, "prompt must be (B, P) integers, got (1, 2) float64"),
    ({"prompt": [[True, False]]}, "prompt must be (B, P) integers, got (1, 2) bool"),
    ({"prompt": [[1, 2], [1, 4]]}, "prompt must hold tokens in [0, 4), got 4 at row 1, position 1"),
    ({"prompt_length": [True, True]}, "prompt_length must be (2,) integers, got (2,) bool"),
    ({"eos_id": True}, "eos_id must be"),
    ({"pad_id": -(2**31) - 1}, "pad_id must be a Python integer of 32 bits, got -2147483649"),
    (sampled(top_k=-0.5), "top_k as a fraction must be in [0, 1), got -0.5"),
    (sampled(top_k=np.int64(0)), "top_k must be at least 1, got 0"),
    (sampled(temperature=np.ones(1)), "temperature must be a finite number >= 0, got"),
    ({"prompt": [[1, -1]]}, "prompt must hold tokens in [0, 4), got -1 at row 0, position 1"),
    ({"prompt": jnp.full((1, 2), 200, jnp.uint8)}, "prompt must hold tokens in [0, 4), got 200 at row 0, position 0"),
    ({"prompt": [[1, 2], [1]]}, "prompt must be one rectangular array, padded where rows are shorter"),
    ({"prompt": "abc"}, "prompt must be (B, P) integers, got () <U3"),
    ({"prompt": jax.random.split(jax.random.key(0), (2, 3))}, "prompt must be one rectangular array"),
    (sampled(temperature=10**400), "temperature must be a finite number >= 0, got 1000"),
    ({"prompt_length": [[1], [1, 2]]}, "prompt_length must be one rectangular array"),
    ({"prompt_length": [0, 3]}, "prompt_length must be in [1, 3], got 0 to 3"),
    ({"prompt_length": [1, 4]}, "prompt_length must be in [1, 3], got 1 to 4"),
    ({"prompt_length": [1, 2, 3]}, "prompt_length must be (2,) integers, got (3,) int64"),
    ({"prompt_length": 3}, "prompt_length must be (2,) integers, got () int64"),
    ({"prompt_length": [1.0, 2.0]}, "prompt_length must be (2,) integers, got (2,) float64"),
    ({"max_new_tokens": -1}, "max_new_tokens must be a Python integer >= 0, got -1"),
    ({"max_new_tokens": 1.5}, "max_new_tokens must be a Python integer >= 0, got 1.5"),
    ({"max_new_tokens": True}, "max_new_tokens must be a Python integer >= 0, got True"),
    ({"max_new_tokens": 2**31}, "max_new_tokens must leave a row with fewer than 2^31 slots, got 2147483648"),
    ({"cache_size": 5}, "cache_size must be at least"),
    ({"cache_size": "99"}, "got '99'"),
    ({"cache_size": 2**31}, "cache_size must leave a row with fewer than 2^31 slots, got 2147483648"),
    ({"cache_size": 20.5}, "cache_size must be at least"),
    ({"pad_id": 1.5}, "pad_id must be a Python integer of 32 bits, got 1.5"),
    ({"pad_id": 2**31}, "pad_id must be a Python integer of 32 bits, got 2147483648"),
    (
        {"key": jax.random.split(jax.random.key(0))},
        "key must be one key, as jax.random.key(seed) gives, got (2,) key<fry>",
    ),
    ({"key": 7}, "key must be one key, as jax.random.key(seed) gives, got 7"),
    ({"key": None}, "key must be one key, as jax.random.key(seed) gives, got None"),
    ({"key": jnp.zeros(4, jnp.uint32)}, "key must be one key, as jax.random.key(seed) gives, got (4,) uint32"),
    ({"key": jnp.zeros(2)}, "key must be one key, as jax.random.key(seed) gives, got (2,) float32"),
    ({"row_ids": [1]}, "row_ids must be (2,) integers in [0, 2^32), got (1,) int64"),
    ({"row_ids": [0, -1]}, "row_ids must be (2,) integers in [0, 2^32), got (2,) int64: [ 0 -1]"),
    ({"row_ids": [0.0, 1.0]}, "row_ids must be (2,) integers in [0, 2^32), got (2,) float64"),
    ({"row_ids": [0, 2**32]}, "row_ids must be (2,) integers in [0, 2^32)"),  # It would have the noise of row 0.
    ({"eos_id": 1.5}, "eos_id must be a token, a Python integer in [0, 4), got 1.5"),
    ({"eos_id": 4}, "eos_id must be a token, a Python integer in [0, 4), got 4"),
    ({"eos_id": -1}, "eos_id must be a token, a Python integer in [0, 4), got -1"),
    ({"eos_id": jnp.int32(3)}, "eos_id must be a token, a Python integer in [0, 4), got Array(3, dtype=int32)"),
    ({"sampling": None}, "sampling must be a spec_jax.Sampling, got None"),
    ({"sampling": {"temperature": 0}}, "sampling must be a spec_jax.Sampling, got {'temperature': 0}"),
    (sampled(temperature=-0.1), "temperature must be a finite number >= 0, got -0.1"),
    (sampled(temperature=NAN), "temperature must be a finite number >= 0, got nan"),
    (sampled(temperature=INF), "temperature must be a finite number >= 0, got inf"),
    (sampled(temperature=1e39), "temperature must be a finite number >= 0, got 1e+39"),  # Not finite in float32.
    (sampled(temperature="0.7"), "temperature must be a finite number >= 0, got '0.7'"),
    (sampled(temperature=np.complex64(1)), "temperature must be a finite number >= 0, got (1+0j)"),
    (sampled(temperature=np.array(True)), "temperature must be a finite number >= 0, got True"),
    (sampled(temperature=np.array("1")), "temperature must be a finite number >= 0, got 1"),
    (sampled(temperature=None), "temperature must be a finite number >= 0, got None"),
    (sampled(temperature=np.ones(2)), "temperature must be a finite number >= 0, got [1. 1.]"),
    (sampled(temperature=jnp.float32(-1)), "temperature must be a finite number >= 0, got -1.0"),
    (sampled(top_k=0), "top_k must be at least 1, got 0"),
    (sampled(top_k=-3), "top_k must be at least 1, got -3"),
    (sampled(top_k=1.0), "top_k as a fraction must be in [0, 1), got 1.0"),
    (sampled(top_k=NAN), "top_k as a fraction must be in [0, 1), got nan"),
    (sampled(top_k=True), "top_k must be an integer count, a float fraction or None, got True"),
    (sampled(top_k="5"), "top_k must be an integer count, a float fraction or None, got '5'"),
    (sampled(top_p=0), "top_p must be in (0, 1], got 0"),
    (sampled(top_p=1.5), "top_p must be in (0, 1], got 1.5"),
    (sampled(top_p=NAN), "top_p must be in (0, 1], got nan"),
    (sampled(min_p=-0.1), "min_p must be in [0, 1], got -0.1"),
    (sampled(min_p=1.1), "min_p must be in [0, 1], got 1.1"),
    (sampled(min_p=NAN), "min_p must be in [0, 1], got nan"),
]


class Undecorated(NGram):
    """A subclass inherits that it is a dataclass, not that it is a pytree."""


OF_SPECULATIVE_DECODING: list[tuple[dict[str, Any], str]] = [
    ({"drafter": SmallModel(DRAFT, gamma=-1)}, "gamma must be an integer >= 0, got -1"),
    ({"drafter": SmallModel(DRAFT, gamma=2.5)}, "gamma must be an integer >= 0, got 2.5"),  # pyright: ignore
    ({"drafter": SmallModel(DRAFT, gamma=True)}, "gamma must be an integer >= 0, got True"),
    (
        {"drafter": SmallModel(random_toy(1, 3))},
        "drafter must have the target's vocabulary of 4 tokens, got 3",
    ),
    ({"drafter": SmallModel(None)}, "draft must be a model, such as a spec_jax.Decoder, got None"),
    ({"drafter": NGram(max_ngram=2.5)}, "max_ngram must be an integer, got 2.5"),  # pyright: ignore
    ({"verification": "accept"}, "verification must be one of 'rejection', 'block', 'coupled', got 'accept'"),
    ({"verification": None}, "verification must be one of 'rejection', 'block', 'coupled', got None"),
    ({"lenience": 0.0}, "lenience must be in (0, 1], got 0.0"),
    ({"lenience": 1e-50}, "lenience must be in (0, 1], got 1e-50"),  # 0 in float32.
    ({"lenience": 10**400}, "lenience must be in (0, 1], got 1000"),
    ({"lenience": 1.5}, "lenience must be in (0, 1], got 1.5"),
    ({"lenience": jnp.float32(1.5)}, "lenience must be in (0, 1], got 1.5"),
    ({"lenience": np.array(1.5)}, "lenience must be in (0, 1], got 1.5"),
    ({"lenience": np.ones(2)}, "lenience must be in (0, 1], got array([1., 1.])"),
    ({"drafter": None}, "drafter must be a spec_jax.Drafter, such as SmallModel(draft), got None"),
    ({"drafter": DRAFT}, "drafter must be a spec_jax.Drafter, such as SmallModel(draft), got Toy"),
    (
        {"drafter": Undecorated()},
        "drafter must be a pytree, its class decorated by flax.struct.dataclass, got Und",
    ),
    ({"lenience": NAN}, "lenience must be in (0, 1], got nan"),
    (
        {"lenience": 0.5, "verification": "block"},
        "lenience must be 1 for verification 'block': only 'rejection' has it; got 0.5",
    ),
    ({"lenience": 0.5, "verification": "coupled"}, "lenience must be 1 for verification 'coupled'"),
    (
        {"cache_size": 14},
        "cache_size must be at least 15 (prompt 3 + max_new_tokens 6 + gamma 5 + 1), got 14",
    ),
]


@pytest.fixture(autouse=True)
def nothing_computes(monkeypatch: pytest.MonkeyPatch):
    """Reaching a compiled entry is a failure of its own."""

    def reached(*arguments: Any, **others: Any) -> None:
        raise AssertionError("bad input reached the compiled call")

    for name in ("compiled_decode", "compiled_start", "compiled_round"):
        monkeypatch.setattr(decoding_module, name, reached)


def good(**changed: Any) -> dict[str, Any]:
    return {"prompt": PROMPT, "max_new_tokens": 6, "key": jax.random.key(0)} | changed


def test_good_input_reaches_the_compiled_call():
    """The arguments that the tables change are themselves right."""
    for decode in (
        lambda: base_decoding(TARGET, **good()),
        lambda: speculative_decoding(TARGET, **good(drafter=SmallModel(DRAFT))),
        lambda: next(stream(TARGET, **good(drafter=SmallModel(DRAFT)))),
    ):
        with pytest.raises(AssertionError, match="reached the compiled call"):
            decode()


@pytest.mark.parametrize(("changed", "message"), OF_EVERY_DECODING, ids=[message for _, message in OF_EVERY_DECODING])
def test_every_decoding(changed: dict[str, Any], message: str):
    """Streams check when they are made, not when they are read."""
    match = re.escape(message)
    with pytest.raises(ValueError, match=match):
        base_decoding(TARGET, **good(**changed))
    for decode in (speculative_decoding, stream):
        with pytest.raises(ValueError, match=match):
            decode(TARGET, **good(drafter=SmallModel(DRAFT), **changed))
    with pytest.raises(ValueError, match=match):
        stream(TARGET, None, **good(**changed))


@pytest.mark.parametrize(
    ("changed", "message"), OF_SPECULATIVE_DECODING, ids=[message for _, message in OF_SPECULATIVE_DECODING]
)
@pytest.mark.parametrize("decode", [speculative_decoding, stream])
def test_speculative_decoding(decode, changed: dict[str, Any], message: str):
    if decode is stream and changed == {"drafter": None}:
        return  # It streams plain decoding.
    with pytest.raises(ValueError, match=re.escape(message)):
        decode(TARGET, **good(**({"drafter": SmallModel(DRAFT)} | changed)))


def test_what_is_no_model_and_no_layers():
    with pytest.raises(ValueError, match=re.escape("target must be a model, such as a spec_jax.Decoder, got None")):
        base_decoding(None, **good())  # pyright: ignore[reportArgumentType]

    class Wrapper:
        """Not registered as a pytree."""

        vocab_size = TARGET.vocab_size
        init_cache = staticmethod(TARGET.init_cache)

        def __call__(self, tokens_bt: Any, cache: Any = None) -> Any:
            return TARGET(tokens_bt, cache)

    message = "must be a pytree of its weights, such as a flax.nnx.Module or a flax.struct.dataclass, got Wrapper"
    with pytest.raises(ValueError, match=f"target {message}"):
        base_decoding(Wrapper(), **good())
    with pytest.raises(ValueError, match=f"draft {message}"):
        speculative_decoding(TARGET, SmallModel(Wrapper()), **good())
    with pytest.raises(ValueError, match=re.escape("target must be a model, such as a spec_jax.Decoder, got Linear")):
        base_decoding(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), **good())  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="skip_attention must be a tuple of layers, got 1"):
        LayerSkip(1, (2,))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", ["prompt", "prompt_length", "row_ids"])
def test_arrays_that_are_traced(name: str):
    value = {"prompt": PROMPT, "prompt_length": [1, 2], "row_ids": [3, 4]}[name]
    with pytest.raises(ValueError, match=f"{name} must be known on the host: only weights, key, .* may be traced, got"):
        jax.jit(lambda x: base_decoding(TARGET, **good(**{name: x})).tokens)(jnp.asarray(value))


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p"])
def test_one_number_for_each_row_traced(name: str):
    """As many as there are tokens: they would be taken for one each."""
    with pytest.raises(ValueError, match=f"{name} must be .*, got .*Tracer"):
        jax.jit(lambda x: base_decoding(TARGET, **good(sampling=Sampling(**{name: x}))))(jnp.ones(TARGET.vocab_size))


def test_a_stream_is_of_the_host():
    with pytest.raises(ValueError, match="key must be known on the host, where a stream's rounds go, got it traced"):
        jax.jit(lambda key: stream(TARGET, None, **good(key=key)))(jax.random.key(0))
    with pytest.raises(ValueError, match="target must be known on the host, where a stream's rounds go, got it traced"):
        jax.jit(lambda target: stream(target, None, **good()))(TARGET)
    with pytest.raises(ValueError, match=r"verification must be one of .*, got 'typical'"):
        stream(TARGET, None, **good(verification="typical"))
    known = good()
    with pytest.raises(ValueError, match=r"stream must be called outside of jax\.jit"):
        jax.jit(lambda: list(stream(TARGET, None, **known)))()


def test_a_stream_of_plain_decoding_takes_what_rule_and_lenience_go_together():
    stream(TARGET, None, **good(verification="rejection", lenience=0.5))
    with pytest.raises(ValueError, match="lenience must be 1 for verification 'block'"):
        stream(TARGET, None, **good(verification="block", lenience=0.5))


@pytest.mark.parametrize("name", ["lenience", "eos_id", "pad_id", "max_new_tokens", "top_k"])
def test_numbers_that_are_traced(name: str):
    def decode(x: jax.Array) -> jax.Array:
        changed: dict[str, Any] = {"sampling": Sampling(top_k=x)} if name == "top_k" else {name: x}  # pyright: ignore[reportArgumentType]
        return speculative_decoding(TARGET, SmallModel(DRAFT), **good(**changed)).tokens

    with pytest.raises(ValueError, match=f"{name} must be known on the host: only weights, .* may be traced, got"):
        jax.jit(decode)(1)


def test_a_stream_knows_all_on_the_host():
    """What is traced is named, be it in the drafter or in how to sample."""
    known = good()

    def with_drafter(draft: Toy) -> None:
        stream(TARGET, SmallModel(draft), **known)

    def with_sampling(temperature: jax.Array) -> None:
        stream(TARGET, None, **known, sampling=Sampling(temperature=temperature))

    for name, function, argument in (("drafter", with_drafter, DRAFT), ("sampling", with_sampling, 1.0)):
        with pytest.raises(ValueError, match=f"{name} must be known on the host, where a stream"):
            jax.jit(function)(argument)


@pytest.mark.parametrize("missing", ["vocab_size", "init_cache", "__call__"])
def test_a_target_without_a_part_of_a_model(missing: str):
    parts = {
        "__annotations__": {"table": jax.Array},
        "vocab_size": 4,
        "init_cache": lambda self, batch, size: TARGET.init_cache(batch, size),
        "__call__": lambda self, tokens, cache=None: TARGET(tokens, cache),
    }
    kind: Any = struct.dataclass(type("Partial", (), {name: part for name, part in parts.items() if name != missing}))
    with pytest.raises(ValueError, match="target must be a model"):
        base_decoding(kind(TARGET.table), **good())
