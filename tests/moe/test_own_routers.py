"""Routers of the user's own: what is made of a choice that is not quite one, and what is refused."""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType

from moe_jax import Router, RouterInputs, TopN
from tests.moe.meshes import mesh_of
from tests.moe.support import apply, hidden_states, layer

X = (2, 6, 8)


def test_a_router_without_a_choice_of_its_own_is_refused():
    with pytest.raises(TypeError, match=r"abstract class Router .*choose.*num_choices"):
        Router()  # pyright: ignore[reportAbstractUsage]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unreliable(TopN):
    """Chooses two, whatever it says."""

    says: int

    def num_choices(self, num_experts: int) -> int:
        return self.says


def test_a_router_that_chooses_others_than_it_says_is_refused():
    """On a mesh, as many rows are sent as it says."""
    x = hidden_states(1, 4, 8)
    assert layer(router=Unreliable(says=2))(x, train=False).outputs.shape == x.shape
    for devices in (1, 2):
        moe = layer(router=Unreliable(says=1))
        with (
            jax.set_mesh(jax.make_mesh((devices,), ("expert",), axis_types=(AxisType.Auto,))),
            pytest.raises(ValueError, match=r"router must give expert_index_ta \(\d, 1\), .*, got \(\d, 2\)"),
        ):
            moe(x, train=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Careless(TopN):
    """Asks for experts of padding too, and gives a field of its choice in another dtype, or no choice."""

    field: str = "expert_index_ta"
    dtype: Any = None

    def choose(self, inputs: RouterInputs, *, train: bool) -> Any:
        if not self.field:
            return None
        choice = super().choose(inputs, train=train)
        choice = dataclasses.replace(choice, wanted_ta=jnp.ones_like(choice.wanted_ta))
        if self.dtype is None:
            return choice
        return dataclasses.replace(choice, **{self.field: getattr(choice, self.field).astype(self.dtype)})


@pytest.mark.parametrize("dispatch", ["index", "ragged"])
def test_padding_that_a_router_asks_for_takes_nothing(dispatch: Any):
    """And where there is no mask, no more is asked for on a mesh that pads."""
    options = {"capacity_factor_train": 1.0, "min_capacity": 0, "dispatch": dispatch}
    x, mask = hidden_states(*X), jnp.arange(6)[None] >= jnp.array([[4], [3]])
    careful, careless = (layer(router=router(policy_train="all"), **options) for router in (TopN, Careless))
    expected = apply(careful, x, mask=mask)
    chex.assert_trees_all_equal(apply(careless, x, mask=mask), expected)
    expected = apply(careful, x[:1, :5])
    with jax.set_mesh(mesh_of(1, 2)):
        chex.assert_trees_all_close(apply(careless, x[:1, :5]), expected, atol=1e-6)


def test_integers_of_a_router_may_be_narrow():
    """As wide as experts need is less than their slots do."""
    options: dict[str, Any] = {"num_experts": 64, "capacity_factor_train": None}
    x = hidden_states(8, 5, 8)
    routers = (Careless(policy_train="all", dtype=dtype) for dtype in (jnp.int32, jnp.uint8))
    wide, narrow = (apply(layer(router=router, **options), x) for router in routers)
    chex.assert_trees_all_equal(narrow, wide)


@pytest.mark.parametrize(
    ("field", "dtype", "message"),
    [
        ("expert_index_ta", jnp.float32, "router must give expert_index_ta of a dtype that is integer, got float32"),
        ("wanted_ta", jnp.int32, "router must give wanted_ta of a dtype that is bool, got int32"),
        ("gate_ta", jnp.int32, "router must give gate_ta of a dtype that is floating, got int32"),
        ("", jnp.int32, "router must give a Choice, got a NoneType"),
    ],
)
def test_a_router_that_gives_other_kinds_is_refused(field: str, dtype: Any, message: str):
    moe = layer(router=Careless(field=field, dtype=dtype))
    with pytest.raises(ValueError, match=message):
        moe(hidden_states(*X), train=False)
