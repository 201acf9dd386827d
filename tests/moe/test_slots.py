"""Capacity and slots by hand, for every order, group size and mask."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_jax
from moe_jax import capacity, token_groups
from moe_jax.slots import SlotOrder
from tests.moe.support import assign_slots, choice

# Four tokens, two choices each. Expert 0 is everybody's first or second choice.
CHOICES = [[0, 1], [1, 0], [0, 2], [0, 3]]
ONE_GROUP = token_groups(jnp.ones(4, bool), 4, "batch")


@pytest.mark.parametrize(
    ("tokens", "experts", "factor", "least", "slots"),
    [
        (1024, 16, 1.25, 4, 80),  # floor(1024 * 1.25 / 16)
        (1024, 16, 2.0, 4, 128),
        (24, 6, 1.25, 4, 5),
        (24, 4, 1.25, 4, 7),  # 7.5 rounds down
        (100, 5, 1.15, 0, 23),  # 22.999... in floating point
        (24, 16, 1.0, 4, 4),  # 1.5, but at least 4
        (24, 16, 1.0, 0, 1),
        (1, 16, 2.0, 4, 1),  # never more slots than tokens: the original gives one token 64 slots
        (6, 2, 8.0, 4, 6),
        (24, 4, None, 4, 24),  # dropless
        (0, 4, 1.0, 4, 0),
    ],
)
def test_capacity(tokens: int, experts: int, factor: float | None, least: int, slots: int):
    assert capacity(tokens, experts, factor, least) == slots


@pytest.mark.parametrize(
    ("tokens", "experts", "factor", "slots"),
    [
        (np.int16(20000), 1, 2.0, 20000),
        (np.int32(2**30), 4, np.int32(8), 2**30),
        (2**31, 4, None, 2**31),
        (2**40, 2, np.float16(1.0), 2**39),
    ],
)
def test_capacity_of_many_tokens(tokens: int, experts: int, factor: float | None, slots: int):
    assert capacity(tokens, experts, factor, 0) == slots


@pytest.mark.parametrize(
    ("order", "keep", "slot_of_kept"),
    [
        # Expert 0's queue in order of tokens: 0 (first choice), 1 (second), 2, 3. Two fit.
        ("token", [[1, 1], [1, 1], [0, 1], [0, 1]], [0, 0, 1, 1, 0, 0]),
        # First choices first: tokens 0, 2, 3, then token 1. Expert 1: token 1's first before token 0's second.
        ("choice", [[1, 1], [1, 0], [1, 1], [0, 1]], [0, 1, 0, 1, 0, 0]),
        # As "choice", but tokens in the order 3, 2, 1, 0.
        ("priority", [[0, 1], [1, 0], [1, 1], [1, 1]], [1, 0, 1, 0, 0, 0]),
    ],
)
def test_slot_orders_by_hand(order: SlotOrder, keep: list[list[int]], slot_of_kept: list[int]):
    asked = choice(CHOICES, priority=[[0.4, 0.4], [0.5, 0.5], [0.6, 0.6], [0.7, 0.7]])
    routing = assign_slots(asked, ONE_GROUP, num_experts=4, capacity_factor=2.0, min_capacity=1, slot_order=order)
    assert routing.capacity == 2
    np.testing.assert_array_equal(routing.keep_ta, np.asarray(keep, bool))
    np.testing.assert_array_equal(np.asarray(routing.slot_ta)[routing.keep_ta], slot_of_kept)
    np.testing.assert_array_equal(routing.gate_ta, np.asarray(keep, np.float32))
    np.testing.assert_array_equal(routing.count_eg, [[2], [2], [1], [1]])


def test_assignments_that_nobody_wants_take_no_slot():
    asked = choice(CHOICES, wanted=[[True, False], [True, False], [True, False], [True, False]])
    routing = assign_slots(asked, ONE_GROUP, num_experts=4, capacity_factor=3.0, min_capacity=1)
    np.testing.assert_array_equal(routing.keep_ta, asked.wanted_ta)
    np.testing.assert_array_equal(np.asarray(routing.slot_ta)[:, 0], [0, 0, 1, 2])
    np.testing.assert_array_equal(routing.count_eg[:, 0], [3, 1, 0, 0])


def test_groups_have_slots_of_their_own():
    groups = token_groups(jnp.ones(4, bool), 4, 2)
    np.testing.assert_array_equal(groups.group_t, [0, 0, 1, 1])
    routing = assign_slots(choice([[0], [0], [0], [1]]), groups, num_experts=4, capacity_factor=2.0, min_capacity=0)
    assert routing.capacity == 1
    np.testing.assert_array_equal(routing.keep_ta[:, 0], [True, False, True, True])
    # Group 1's slot is behind group 0's.
    np.testing.assert_array_equal(routing.slot_ta[:, 0], [0, 0, 1, 1])


@pytest.mark.parametrize(
    ("group_size", "group", "count"),
    [
        ("batch", [0, 0, 0, 0, 0, 0], [5]),
        ("sequence", [0, 0, 0, 1, 1, 1], [2, 3]),
        # Real tokens are 0, 2, 3, 4, 5: two by two, the padding at 1 passed over.
        (2, [0, 0, 0, 1, 1, 2], [2, 2, 1]),
        (100, [0, 0, 0, 0, 0, 0], [5]),
    ],
)
def test_token_groups(group_size: int | str, group: list[int], count: list[int]):
    mask_t = jnp.asarray([True, False, True, True, True, True])
    groups = token_groups(mask_t, 3, group_size)
    real = np.asarray(mask_t)
    np.testing.assert_array_equal(np.asarray(groups.group_t)[real], np.asarray(group)[real])
    np.testing.assert_array_equal(groups.count_g, count)
    assert groups.num_groups == len(count)
    assert groups.size <= 6
    none = token_groups(jnp.ones(0, bool), 3, group_size)
    assert len(none.group_t) == none.count_g.sum() == 0


def test_padding_lowers_the_capacity_to_that_of_the_real_tokens():
    # Eight positions, four real tokens, all for expert 0: floor(4 * 2 / 4) = 2 slots, not 4.
    mask_t = jnp.asarray([True, False] * 4)
    asked = choice([[0]] * 8, wanted=[[True], [False]] * 4)
    routing = assign_slots(asked, token_groups(mask_t, 8, "batch"), num_experts=4, capacity_factor=2.0, min_capacity=0)
    np.testing.assert_array_equal(routing.keep_ta[:, 0], [1, 0, 1, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(routing.available_eg, [[2]] * 4)


@pytest.mark.parametrize("order", ["token", "choice", "priority"])
def test_slots_are_unique_and_without_gaps(order: SlotOrder):
    random = np.random.default_rng(0)
    asked = choice(
        random.permuted(np.tile(np.arange(4), (40, 1)), axis=1)[:, :3],
        wanted=random.random((40, 3)) < 0.7,
        priority=np.tile(random.random((40, 1)), (1, 3)),
    )
    groups = token_groups(jnp.ones(40, bool), 10, "sequence")
    routing = assign_slots(asked, groups, num_experts=4, capacity_factor=2.0, slot_order=order)
    assert not (routing.keep_ta & ~asked.wanted_ta).any()
    for expert in range(4):
        here_ta = np.asarray(routing.keep_ta) & (np.asarray(routing.expert_index_ta) == expert)
        taken = np.asarray(routing.slot_ta)[here_ta]
        for group in range(4):
            in_group = np.sort(taken[taken // routing.capacity == group]) - group * routing.capacity
            np.testing.assert_array_equal(in_group, np.arange(int(routing.count_eg[expert, group])))


def test_more_queues_than_int32_has_numbers_are_refused():
    def assign() -> None:
        choices = choice(jnp.zeros((512, 1), jnp.int32))
        many = dataclasses.replace(choices, probs_te=jnp.zeros((512, 2**22)))
        moe_jax.assign_slots(many, token_groups(jnp.ones(512, bool), 1, "sequence"), num_experts=2**22,
                             capacity_factor=1.0)  # fmt: skip

    with pytest.raises(ValueError, match=f"num_experts · groups · choices must fit int32, got {2**22} · 512 · 1"):
        jax.eval_shape(assign)


def test_no_second_choice_comes_before_a_first_however_sure_the_token():
    asked = choice([[0, 1], [1, 0]], priority=[[0.4, 0.4], [0.9, 0.9]])
    groups = token_groups(jnp.ones(2, bool), 2, "batch")
    routing = assign_slots(asked, groups, num_experts=4, capacity_factor=2.0, min_capacity=0, slot_order="priority")
    np.testing.assert_array_equal(routing.keep_ta, [[True, False], [True, False]])


def test_of_equally_sure_tokens_the_earlier_is_served():
    groups = token_groups(jnp.ones(3, bool), 3, "batch")
    asked = choice([[0]] * 3, priority=[[0.5]] * 3)
    routing = assign_slots(asked, groups, num_experts=4, capacity_factor=3.0, min_capacity=0, slot_order="priority")
    np.testing.assert_array_equal(routing.keep_ta[:, 0], [True, True, False])


def test_a_group_of_few_real_tokens_has_no_more_slots_than_tokens():
    """Two of six positions are real, and the least capacity is 4."""
    groups = token_groups(jnp.arange(6) < 2, 6, "sequence")
    asked = choice([[0]] * 6, wanted=[[True]] * 2 + [[False]] * 4)
    routing = assign_slots(asked, groups, num_experts=4, capacity_factor=1.0, min_capacity=4)
    np.testing.assert_array_equal(routing.available_eg, [[2]] * 4)
