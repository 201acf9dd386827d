"""Layers on meshes of forced host devices, and all that they compute, to be compared with one device."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from moe_jax import MoE, MoEOutput
from moe_jax.dtypes import wide_dtype
from tests.moe.support import config, initial_layer

MESHES = ((1, 1), (1, 2), (2, 1), (2, 2), (1, 3), (3, 2), (2, 4), (1, 8), (8, 1))
BATCH, LENGTH, DIM = 3, 11, 8


def mesh_of(data: int, expert: int, names: tuple[str, str] = ("data", "expert")) -> Mesh:
    return jax.make_mesh((data, expert), names, axis_types=(AxisType.Auto,) * 2)


class Case(NamedTuple):
    """A call of a layer."""

    moe: MoE
    x: jax.Array
    mask: jax.Array | None = None
    key: jax.Array | None = None


def case(*, masked: bool = True, dtype: Any = jnp.float32, seed: int = 1, **options: Any) -> Case:
    """Three sequences of 11 tokens, a few of them padding that must not matter, and capacities that drop."""
    options = {"capacity_factor_train": 1.0, "min_capacity": 1, "param_dtype": dtype, **options}
    random = np.random.default_rng(seed)
    x = random.standard_normal((BATCH, LENGTH, DIM))
    mask = random.random((BATCH, LENGTH)) < 0.8
    if masked:
        x[~mask] = np.nan
    x = jnp.asarray(x, dtype)
    return Case(initial_layer(config(**options)), x, jnp.asarray(mask) if masked else None, jax.random.key(seed))


def on(mesh: Mesh, moe: MoE) -> MoE:
    """The same layer on a mesh."""
    moe = jax.tree.map(lambda leaf: leaf, moe)
    moe.mesh = mesh
    return moe


def all_on(mesh: Mesh, cases: Sequence[Case]) -> list[Case]:
    return [case._replace(moe=on(mesh, case.moe)) for case in cases]


class Results(NamedTuple):
    """All that a call and its gradient give."""

    out: MoEOutput
    moe_bar: MoE
    x_bar: jax.Array


def results(cases: Sequence[Case]) -> list[Results]:
    """Each case in a compiled program of its own: one of all takes longer to compile than these together."""
    return [_results(case) for case in cases]


@jax.jit
def _results(case: Case) -> Results:
    def loss(moe: MoE, x: jax.Array) -> tuple[jax.Array, MoEOutput]:
        out = moe(x, train=True, mask=case.mask, key=case.key)
        # The auxiliary losses are made to weigh as much as the outputs.
        squares = jnp.sum(out.outputs.astype(wide_dtype(x.dtype)) ** 2)
        return squares + 100 * out.total_aux_loss.astype(squares.dtype), out

    gradients, out = jax.grad(loss, argnums=(0, 1), has_aux=True)(case.moe, case.x)
    return Results(out, *gradients)


def worst_errors(got: Results, wanted: Results) -> dict[str, float]:
    """The largest error of each array, relative to its largest entry."""
    errors = {}
    for (path, leaf), (_, target) in zip(jax.tree.leaves_with_path(got), jax.tree.leaves_with_path(wanted)):
        leaf, target = np.asarray(leaf, np.float64), np.asarray(target, np.float64)
        assert np.isfinite(target).all()
        errors[jax.tree_util.keystr(path)] = float(np.abs(leaf - target).max() / max(np.abs(target).max(), 1e-6))
    return errors


def assert_equal(got: Sequence[Results], wanted: Sequence[Results], *, relative: float) -> None:
    assert len(got) == len(wanted)
    for index, (one, other) in enumerate(zip(got, wanted)):
        wrong = {name: error for name, error in worst_errors(one, other).items() if not error <= relative}
        assert not wrong, f"case {index}: {wrong}"


def drops(results: Results) -> float:
    """The share of the first choices that capacity refused."""
    return float(results.out.metrics.dropped_a[0])
