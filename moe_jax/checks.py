"""Arguments that are not of the kind they should be, in words that name them."""

import dataclasses
import math
import numbers
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh


def one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raises ValueError when `value` is not one of the allowed names."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def whole(name: str, value: Any, least: int, *, otherwise: str = "") -> None:
    """Raises ValueError when `value` is no integer, or a smaller one. `otherwise` says what else it might have been."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise ValueError(f"{name} must be an integer{otherwise}, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def number(name: str, value: Any, least: float) -> None:
    """Raises ValueError when `value` is no finite number, or a smaller one."""
    if not _finite(value) or value < least:
        raise ValueError(f"{name} must be finite and at least {least}, got {value!r}")


def positive(name: str, value: Any, *, otherwise: str = "") -> None:
    """Raises ValueError when `value` is no finite number above 0. `otherwise` says what else it might have been."""
    if not _finite(value) or not value > 0:
        raise ValueError(f"{name} must be finite and positive{otherwise}, got {value!r}")


def flag(name: str, value: Any) -> None:
    """Raises ValueError when `value` is no bool."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be a bool, got {value!r}")


def instance(name: str, value: Any, kind: type) -> None:
    """Raises ValueError when `value` is no instance of a class."""
    if not isinstance(value, kind):
        raise ValueError(f"{name} must be a {kind.__name__}, got {value!r}")


def function(name: str, value: Any) -> None:
    """Raises ValueError when `value` cannot be called, or is a module: weights of its own would get no gradient."""
    if not callable(value):
        raise ValueError(f"{name} must be a function, got {value!r}")
    if isinstance(value, nnx.Module):
        raise ValueError(f"{name} must be a function without weights, got a {type(value).__name__}")


def device_mesh(name: str, value: Any) -> None:
    """Raises ValueError when `value` is no mesh."""
    if not isinstance(value, AbstractMesh):
        instance(name, value, Mesh)


def two_axes(data_axis: Any, expert_axis: Any) -> None:
    """Raises ValueError when these are no two names."""
    instance("data_axis", data_axis, str)
    instance("expert_axis", expert_axis, str)
    if data_axis == expert_axis:
        raise ValueError(f"data_axis and expert_axis must be different names, got {data_axis!r} twice")


def array(name: str, value: Any) -> None:
    """Raises ValueError when `value` is no array of NumPy or JAX."""
    if not hasattr(value, "dtype"):
        raise ValueError(f"{name} must be an array, got a {type(value).__name__}")


def floating(name: str, dtype: Any) -> None:
    """Raises ValueError when `dtype` is no floating-point type, or one of fewer than 16 bits."""
    try:
        # None is float64 to NumPy.
        fits = dtype is not None and jnp.issubdtype(dtype, jnp.floating)
    except TypeError:
        fits = False
    if not fits:
        raise ValueError(f"{name} must be floating point, got {dtype}")
    if jnp.finfo(dtype).bits < 16:
        raise ValueError(f"{name} must have 16 bits or more, got {dtype}")


def floating_array(name: str, value: Any) -> jax.Array:
    """The array, as JAX's.

    Raises:
      ValueError: it is none, or not floating point of 16 bits or more.
    """
    array(name, value)
    floating(name, value.dtype)
    return jnp.asarray(value)


def renamed(error: ValueError, names: Mapping[str, str], prefix: str = "") -> ValueError:
    """An error of this module's form about an argument that the user knows by another name.

    Args:
      error: its message begins with the argument.
      names: of ours, the user's where they differ.
      prefix: what the user's begin with.
    """
    name, _, rest = str(error).partition(" ")
    return ValueError(f"{prefix}{names.get(name, name)} {rest}")


def without_numpy(config: Any) -> None:
    """NumPy's numbers among the fields of a frozen dataclass become Python's, which promote nothing they meet."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, np.generic):
            object.__setattr__(config, field.name, value.item())


def _finite(value: Any) -> bool:
    """Whether it is a real number that a float holds."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
