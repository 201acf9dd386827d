"""Drafting strategies, one a file, behind one protocol."""

from spec_jax.drafters.base import Drafter as Drafter
from spec_jax.drafters.small_model import SmallModel as SmallModel
