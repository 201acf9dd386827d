"""A decoder with experts, decoding speculatively over a mesh, gives the tokens of one device."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from experiments.expert_decoder import decoder_places
from spec_jax import Sampling, SmallModel, base_decoding, speculative_decoding
from tests.experiments.experts import CONFIG, dense_draft, sparse_decoder
from tests.spec.test_sharded_decoding import caches_sent, mesh_of, place
from tests.spec.transformers import compare, ragged_prompts

MESHES = {"experts": {"data": 2, "expert": 4}, "heads": {"data": 2, "expert": 2, "model": 2}}
SAMPLINGS = {"coupled": Sampling(), "greedy": Sampling(temperature=0.0)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "rows", "sampling", "kind"),
    [
        ("experts", 14, "coupled", AxisType.Auto),
        ("experts", 16, "coupled", AxisType.Explicit),
        ("heads", 14, "coupled", AxisType.Auto),
        ("heads", 14, "greedy", AxisType.Auto),
        ("heads", 14, "coupled", AxisType.Explicit),
    ],
)
def test_tokens_are_those_of_one_device(mesh: str, rows: int, sampling: str, kind: AxisType):
    """Of rows that all devices that share tokens divide, and of such that they do not."""
    target, draft = sparse_decoder(), dense_draft()
    prompts, lengths = ragged_prompts(4, rows, 12)
    chosen: dict[str, Any] = {"max_new_tokens": 24, "key": jax.random.key(1), "prompt_length": lengths, "eos_id": 5}
    chosen["sampling"] = SAMPLINGS[sampling]
    alone = base_decoding(target, prompts, **chosen)
    devices = mesh_of(MESHES[mesh], kind)
    spread = [jax.device_put(model, decoder_places(model, devices)) for model in (target, draft)]
    with jax.set_mesh(devices):
        result = speculative_decoding(
            spread[0], SmallModel(spread[1], gamma=3), prompts, verification="coupled", **chosen
        )
    assert 0.01 < float(result.acceptance_rate) < 0.95
    assert len(set(np.asarray(alone.lengths).tolist())) > 1
    found = compare(target, prompts, lengths, chosen["sampling"], chosen["key"], result, alone)
    assert found.diverged == 0
    # Sums in another order; more than a row or two would not be that.
    assert found.different <= 1


@pytest.mark.parametrize(("rows", "depth"), [(16, 3), (12, 3), (12, 2)])
def test_no_cache_is_gathered(rows: int, depth: int):
    """Whether as many devices as share tokens divide the rows or not, and whether the experts are the last layer."""
    prompts, lengths = ragged_prompts(4, rows, 12)
    mesh = mesh_of(MESHES["experts"])
    pair = sparse_decoder(dataclasses.replace(CONFIG, depth=depth)), dense_draft()
    target, draft = (jax.device_put(model, decoder_places(model, mesh)) for model in pair)
    chosen: dict[str, Any] = {"max_new_tokens": 24, "key": jax.random.key(1), "prompt_length": lengths}
    assert caches_sent(mesh, target, SmallModel(draft, gamma=3), prompt=prompts, **chosen) == []


def test_experts_and_heads_are_spread():
    places = decoder_places(sparse_decoder(), mesh_of(MESHES["heads"]))
    block = places.blocks[1]
    assert place(block.feed_forward.block.moe.experts.w_in_edf).spec[0] == "expert"
    assert place(block.feed_forward.block.moe.router_de).is_fully_replicated
    assert place(block.attention.to_qkv.kernel).spec == PartitionSpec(None, "model")
