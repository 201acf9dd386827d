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
from tests.moe.meshes import (
    DIM,
    MESHES,
    Case,
    Results,
    all_on,
    assert_equal,
    case,
    drops,
    mesh_of,
    on,
    results,
    worst_errors,
)
from tests.moe.support import ALL, apply, config, hidden_states, initial_layer

EXPERTS = (1, 3, 5, 8, 16)


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


# What else a case has. Every dispatch meets every slot order on three meshes and, on some mesh, each of these.
OPTIONS: tuple[dict[str, Any], ...] = (
    {"num_experts": 16, "masked": False},
    {"num_experts": 5, "router": TopN(), "gumbel_noise": 0.5, "input_jitter": 0.1},
    {"num_experts": 3, "router": CoordinateDescent(policy_train="all"), "group_size": "batch"},
    {"num_experts": 8, "straight_through": True, "group_size": 11, "masked": False, "recompute": True},
    {"num_experts": 8, "router": TopN(n=3, policy_train="all", score="sigmoid", bias=True)},
    {"num_experts": 5, "num_shared_experts": 1, "group_size": 7},
    {"num_experts": 16, "router": ExpertChoice()},
    {"num_experts": 3, "capacity_factor_train": None},
    {"num_experts": 1, "router": TopN(n=1), "group_size": "batch"},
)


def cases_of_mesh(number: int) -> list[Case]:
    """Each dispatch with another slot order."""
    turn, shift = divmod(number, 3)
    cases = []
    for place, dispatch in enumerate(DISPATCHES):
        order = (place + shift + turn) % 3
        options = OPTIONS[(3 * (place + turn) + order) % len(OPTIONS)]
        cases.append(case(dispatch=dispatch, slot_order=get_args(SlotOrder)[order], **options))
    return cases


@cache
def of_mesh_on_one_device(number: int) -> list[Results]:
    return results(cases_of_mesh(number))


@pytest.mark.slow
@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_dispatches_and_slot_orders_on_any_mesh(shape: tuple[int, int]):
    """With drops and without, with padding and without, in groups cut by devices and whole ones, by every router."""
    number = MESHES.index(shape)
    wanted = of_mesh_on_one_device(number)
    assert max(drops(r) for r in wanted) > 0
    assert_equal(results(all_on(mesh_of(*shape), cases_of_mesh(number))), wanted, relative=1e-5)


@pytest.mark.slow
def test_every_dispatch_meets_every_slot_order_on_three_meshes():
    """Now and then nothing is dropped."""
    numbers = range(len(MESHES))
    configs = [case.moe.config for number in numbers for case in cases_of_mesh(number)]
    met = Counter((config.dispatch, config.slot_order) for config in configs)
    assert met == dict.fromkeys(product(DISPATCHES, get_args(SlotOrder)), 3)
    assert min(drops(r) for number in numbers for r in of_mesh_on_one_device(number)) == 0


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


def test_no_room_at_all():
    """Without a least capacity, few tokens of many experts may have no slot anywhere."""
    options = {"num_experts": 16, "capacity_factor_train": 0.01, "min_capacity": 0}
    cases = [case(dispatch=dispatch, **options) for dispatch in ("dense", "index")]
    wanted = results(cases)
    assert not any(r.out.outputs.any() for r in wanted)
    assert_equal(results(all_on(mesh_of(2, 2), cases)), wanted, relative=1e-5)


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


def test_padding_moves_the_borders_of_groups_across_devices():
    """Groups of as many tokens as a device has, which are its own only where none is padding."""
    cases = [case(num_experts=4, group_size=11)]
    wanted = results(cases)
    assert drops(wanted[0]) > 0
    assert_equal(results(all_on(mesh_of(1, 3), cases)), wanted, relative=1e-5)


def test_groups_are_cut_from_all_tokens_and_not_from_those_of_a_device():
    """Of 33 tokens, nine a device: of the groups of eight, three are on two."""
    cases = [case(num_experts=4, group_size=8, masked=False)]
    wanted = results(cases)
    assert drops(wanted[0]) > 0
    assert_equal(results(all_on(mesh_of(2, 2), cases)), wanted, relative=1e-5)


def test_sequences_in_halves():
    """Two on four devices."""
    moe, x = initial_layer(config(capacity_factor_train=1.0, min_capacity=1)), hidden_states(2, 8, DIM)
    wanted, got = (apply(layer, x) for layer in (moe, on(mesh_of(1, 4), moe)))
    assert float(wanted.metrics.dropped_a[0]) > 0
    np.testing.assert_allclose(got.outputs, wanted.outputs, atol=1e-5)


@pytest.mark.parametrize("train_factor", [2.0, None])
@pytest.mark.parametrize("group_size", ["sequence", "batch"])
def test_evaluation_on_a_mesh_has_its_own_policy_and_capacity(group_size: str, train_factor: float | None):
    router = TopN(policy_train="all", policy_eval="threshold", threshold_eval=0.4)
    one = case(
        num_experts=4,
        router=router,
        group_size=group_size,
        capacity_factor_train=train_factor,
        capacity_factor_eval=0.5,
    )
    wanted, got = (apply(c.moe, c.x, train=False, mask=c.mask) for c in (one, *all_on(mesh_of(1, 3), [one])))
    assert 0 < float(wanted.metrics.wanted_a[1]) < 1
    assert float(wanted.metrics.dropped_a[0]) > 0
    np.testing.assert_allclose(got.outputs, wanted.outputs, atol=1e-5)
    np.testing.assert_allclose(got.metrics.dropped_a, wanted.metrics.dropped_a, atol=1e-6)
    np.testing.assert_allclose(got.metrics.wanted_a, wanted.metrics.wanted_a, atol=1e-6)


def test_a_device_has_room_for_all_choices_of_all_tokens():
    """Equal logits: every token asks for experts 0 and 1, which are on one device, and nothing is dropped."""
    one = case(num_experts=4, dispatch="ragged", capacity_factor_train=None, masked=False)
    one = one._replace(moe=jax.tree.map(lambda leaf: leaf, one.moe))  # case() is of a cached layer
    one.moe.router_de[...] = jnp.zeros((8, 4))
    wanted, got = (apply(c.moe, c.x) for c in (one, *all_on(mesh_of(1, 2), [one])))
    np.testing.assert_array_equal(wanted.metrics.load_e, [0.5, 0.5, 0, 0])
    np.testing.assert_allclose(got.outputs, wanted.outputs, atol=1e-5)


def test_a_device_has_room_for_all_groups_that_padding_lets_it_see():
    """Device 1 has tokens 11 .. 21, of groups 3 .. 13 and 14 .. 24, and the surest two of each."""
    one = case(num_experts=4, router=TopN(n=1), slot_order="priority", group_size=11, masked=False)
    one = one._replace(moe=jax.tree.map(lambda leaf: leaf, one.moe))  # case() is of a cached layer
    one.moe.router_de[...] = jnp.zeros((8, 4)).at[0, 0].set(1.0)
    sure_t = jnp.ones(33).at[12:16].set(2.0)
    x = one.x.at[..., 0].set(sure_t.reshape(3, 11))
    one = one._replace(x=x, mask=(jnp.arange(33) >= 3).reshape(3, 11))
    wanted, got = results([one]), results(all_on(mesh_of(1, 3), [one]))
    np.testing.assert_array_equal((np.asarray(wanted[0].out.outputs) != 0).any(-1).reshape(-1)[11:22].sum(), 4)
    assert_equal(got, wanted, relative=1e-5)
