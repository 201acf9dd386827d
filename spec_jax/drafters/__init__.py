"""Drafting strategies, one a file, behind one protocol."""

from spec_jax.drafters.base import Drafter as Drafter
from spec_jax.drafters.early_exit import EarlyExit as EarlyExit
from spec_jax.drafters.layer_skip import LayerSkip as LayerSkip
from spec_jax.drafters.ngram import NGram as NGram
from spec_jax.drafters.prophet import Prophet as Prophet
from spec_jax.drafters.small_model import SmallModel as SmallModel
