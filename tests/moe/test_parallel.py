"""A layer over a mesh computes what it computes on one device: outputs, losses, metrics and every gradient."""

from collections import Counter
from functools import cache
from itertools import product
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_jax.parallel
from moe_jax import CoordinateDescent, ExpertChoice, MoE, RouterTotals, TopN, token_groups
from moe_jax.dispatch import DISPATCHES
from moe_jax.exchange import Exchange
from moe_jax.parallel import Placement, _most_groups
from moe_jax.slots import SlotOrder
from tests.moe.meshes import MESHES, Case, Results, all_on, assert_equal, case, drops, mesh_of, results, worst_errors
from tests.moe.support import ALL

EXPERTS = (1, 3, 5, 8, 16)
RANDOM = TopN()


def router_for(num_experts: int) -> TopN:
    return TopN(n=1) if num_experts == 1 else ALL


def float64_cases() -> list[Case]:
    return [case(num_experts=n, router=router_for(n), dtype=jnp.float64) for n in EXPERTS]


@cache
def float64_on_one_device() -> list[Results]:
    return results(float64_cases())


@pytest.mark.slow
@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_any_number_of_experts_on_any_mesh(shape: tuple[int, int]):
    """In float64, where nothing but the order of sums may differ."""
    with jax.enable_x64(True):
        wanted = float64_on_one_device()
        assert [drops(r) > 0 for r in wanted] == [n > 1 for n in EXPERTS]
        assert wanted[0].out.outputs.dtype == jnp.float64
        assert_equal(results(all_on(mesh_of(*shape), float64_cases())), wanted, relative=1e-12)


# Each line: a dispatch, a slot order, the number of experts, and options. Every mesh has every dispatch and every slot
# order, and each of their nine pairs is on three meshes; every kind of group, padding and router is on several.
COVER: dict[tuple[int, int], list[tuple[str, str, int, dict[str, Any]]]] = {
    (1, 1): [("index", "token", 5, {}), ("ragged", "choice", 8, {}), ("dense", "priority", 3, {})],
    (1, 2): [
        ("index", "choice", 3, {"group_size": "batch", "masked": False}),
        ("ragged", "priority", 5, {"straight_through": True}),
        ("dense", "token", 8, {"group_size": 7}),
    ],
    (2, 1): [
        ("index", "priority", 8, {"group_size": 11, "masked": False}),
        ("ragged", "token", 5, {"router": RANDOM}),
        ("dense", "choice", 3, {"group_size": "batch"}),
    ],
    (2, 2): [
        ("index", "token", 3, {"router": CoordinateDescent(policy_train="all"), "group_size": "batch"}),
        ("ragged", "choice", 16, {"masked": False}),
        ("dense", "priority", 5, {"straight_through": True, "group_size": 3}),
        ("ragged", "token", 8, {"router": ExpertChoice()}),
    ],
    (1, 3): [
        ("index", "choice", 5, {"num_shared_experts": 1}),
        ("ragged", "priority", 8, {"router": CoordinateDescent(policy_train="all")}),
        ("dense", "token", 16, {}),
    ],
    (3, 2): [
        ("index", "priority", 8, {"masked": False}),
        ("ragged", "token", 5, {"straight_through": True}),
        ("dense", "choice", 3, {"router": RANDOM, "group_size": "batch"}),
    ],
    (2, 4): [
        ("index", "token", 16, {"group_size": 11, "masked": False}),
        ("ragged", "choice", 3, {"num_shared_experts": 1, "group_size": "batch"}),
        ("dense", "priority", 8, {"group_size": 7}),
        ("index", "token", 16, {"router": ExpertChoice()}),
    ],
    (1, 8): [
        ("index", "choice", 16, {"router": RANDOM, "gumbel_noise": 0.5, "input_jitter": 0.1}),
        ("ragged", "priority", 8, {"router": TopN(n=3, policy_train="all", score="sigmoid", bias=True)}),
        ("dense", "token", 5, {"group_size": 4}),
        ("ragged", "token", 1, {"router": TopN(n=1)}),
    ],
    (8, 1): [
        ("index", "priority", 3, {"capacity_factor_train": None}),
        ("ragged", "token", 5, {"router": RANDOM}),
        ("dense", "choice", 8, {"straight_through": True}),
    ],
}


def test_the_cover_covers():
    assert set(COVER) == set(MESHES)
    pairs = Counter((dispatch, order) for lines in COVER.values() for dispatch, order, _, _ in lines[:3])
    assert pairs == {pair: 3 for pair in product(DISPATCHES, get_args(SlotOrder))}
    for lines in COVER.values():
        assert {dispatch for dispatch, *_ in lines} == set(DISPATCHES)
        assert {order for _, order, *_ in lines} == set(get_args(SlotOrder))


@pytest.mark.slow
@pytest.mark.parametrize("shape", COVER, ids=str)
def test_every_option(shape: tuple[int, int]):
    cases = [
        case(dispatch=dispatch, slot_order=order, num_experts=number, **options)
        for dispatch, order, number, options in COVER[shape]
    ]
    assert_equal(results(all_on(mesh_of(*shape), cases)), results(cases), relative=1e-5)


def gradients_of_first_device(moe: MoE, where: Placement) -> MoE:
    """As `on_every_device`, with the sum over devices left out: each gradient is that of device 0's tokens."""

    def of_first(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
        return jax.lax.psum(jnp.where(jax.lax.axis_index(axes) == 0, x, 0), axes)

    def left_out(axes: tuple[str, ...]) -> Any:
        @jax.custom_vjp
        def varying(leaf: jax.Array) -> jax.Array:
            return jax.lax.pcast(leaf, axes, to="varying")

        varying.defvjp(lambda leaf: (varying(leaf), None), lambda _, bar: (of_first(bar, axes),))
        return varying

    data = tuple(axis for axis in where.axes if axis != where.exchange.axis)
    return moe_jax.parallel.each_weight(moe, experts=left_out(data), others=left_out(where.axes))


def totals_of_first_device(totals: RouterTotals, where: Placement) -> RouterTotals:
    """As `summed_over_devices`, with the sum left out."""
    first = jax.lax.axis_index(where.axes) == 0
    return jax.lax.psum(jax.tree.map(lambda x: jnp.where(first, x, jnp.zeros_like(x)), totals), where.axes)


@pytest.mark.parametrize(
    ("name", "without_sum", "expected"),
    [
        ("on_every_device", gradients_of_first_device, ".moe_bar.router_de"),
        ("summed_over_devices", totals_of_first_device, ".out.balance_loss"),
    ],
)
def test_a_missing_sum_over_devices_is_found(
    name: str, without_sum: Any, expected: str, monkeypatch: pytest.MonkeyPatch
):
    cases = [case(num_experts=4)]
    wanted = results(cases)
    monkeypatch.setattr(moe_jax.parallel, name, without_sum)
    jax.clear_caches()
    errors = worst_errors(results(all_on(mesh_of(2, 2), cases))[0], wanted[0])
    # A hundred times what is allowed.
    assert max(error for path, error in errors.items() if expected in path) > 1e-3
    jax.clear_caches()


def test_bfloat16():
    cases = [case(num_experts=5, dispatch=dispatch) for dispatch in ("index", "ragged")]
    cases = [c._replace(x=c.x.astype(jnp.bfloat16)) for c in cases]
    got = results(all_on(mesh_of(2, 2), cases))
    assert got[0].out.outputs.dtype == jnp.bfloat16
    assert_equal(got, results(cases), relative=2e-2)


def test_dropped_tokens_are_the_same():
    """With the capacity of half the tokens, the outputs that are zero are zero on every mesh."""
    cases = [case(num_experts=4, router=TopN(n=1), capacity_factor_train=0.5, bias=False, masked=False)]
    one, other = (np.asarray(r[0].out.outputs) == 0 for r in (results(cases), results(all_on(mesh_of(2, 4), cases))))
    assert 0 < one.all(-1).sum() < one.shape[0] * one.shape[1]
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("masked", [False, True])
def test_no_device_has_tokens_of_more_groups_than_its_buffer_has_room_for(masked: bool):
    random = np.random.default_rng(0)
    for devices, local_tokens, size in [(2, 7, 3), (4, 6, 6), (4, 6, 4), (8, 5, 1), (3, 8, 20), (8, 4, 8)]:
        where = Placement(mesh_of(1, devices), ("expert",), Exchange(4, "expert", devices))
        for _ in range(20 if masked else 1):
            mask_t = random.random(devices * local_tokens) < (0.7 if masked else 1)
            groups = token_groups(jnp.asarray(mask_t), local_tokens, size)
            by_device = zip(np.asarray(groups.group_t).reshape(devices, -1), mask_t.reshape(devices, -1))
            found = max(len(set(group_t[real_t].tolist())) for group_t, real_t in by_device)
            most = _most_groups(where, groups, local_tokens, moving=masked)
            # Without padding, no more room than is needed.
            assert found <= most if masked else found == most
