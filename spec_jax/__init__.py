"""Exact, fast speculative decoding in JAX.

Axis letters: B batch, T query positions, S cache slots, N heads, K key-value heads, H head dim, D model dim,
V vocabulary, J drafted tokens, P prompt positions. Beside them: N places of the output or start states of a prophet,
W windows that a prophet learns from. Arrays carry them: `logits_btv`, `length_b`.
"""

from spec_jax.cache import KVCache as KVCache
from spec_jax.config import DecoderConfig as DecoderConfig
from spec_jax.decoder import Decoder as Decoder
from spec_jax.decoder import DecoderOutput as DecoderOutput
from spec_jax.decoding import StreamedRound as StreamedRound
from spec_jax.decoding import base_decoding as base_decoding
from spec_jax.decoding import speculative_decoding as speculative_decoding
from spec_jax.decoding import stream as stream
from spec_jax.drafters import Drafter as Drafter
from spec_jax.drafters import EarlyExit as EarlyExit
from spec_jax.drafters import LayerSkip as LayerSkip
from spec_jax.drafters import NGram as NGram
from spec_jax.drafters import Prophet as Prophet
from spec_jax.drafters import SmallModel as SmallModel
from spec_jax.prophet import ModelWithProphet as ModelWithProphet
from spec_jax.prophet import ProphetModel as ProphetModel
from spec_jax.result import DecodeResult as DecodeResult
from spec_jax.result import DecodeStats as DecodeStats
from spec_jax.sampling import Sampling as Sampling
from spec_jax.verification import Verification as Verification
