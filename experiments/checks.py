"""Numbers of a configuration that are too small or too large, in words that name them; and what is not installed."""

import importlib.util
from typing import Any

import numpy as np


def at_least(least: float, config: Any, *names: str, prefix: str = "") -> None:
    """Raises ValueError when a field is smaller, or one of the numbers in it. What is None may be left out.

    Args:
      least: the smallest number allowed.
      config: whose fields.
      *names: fields, each a number, or numbers of which there must be one.
      prefix: what the user's name of a field begins with.
    """
    for name in names:
        value = getattr(config, name)
        if value is None:
            continue
        numbers = np.ravel(value)
        if not numbers.size:
            raise ValueError(f"{prefix}{name} must have at least one value, got {value}")
        # NaN is not smaller.
        if not numbers.min() >= least:
            raise ValueError(f"{prefix}{name} must be at least {least}, got {value}")


def different(config: Any, *names: str) -> None:
    """Raises ValueError when a named field, a sequence, holds something twice."""
    for name in names:
        values = getattr(config, name)
        if len(set(values)) < len(values):
            raise ValueError(f"{name} must be different ones, got {' '.join(map(str, values))}")


def check_seed(seed: int) -> None:
    """Raises ValueError where a seed is none of `jax.random.key`, of whose larger ones only 32 bits count."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be in [0, 2^32), got {seed}")


def not_installed(*modules: str) -> list[str]:
    """Those that cannot be imported."""
    return [module for module in modules if importlib.util.find_spec(module) is None]
