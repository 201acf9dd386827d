import numpy as np
import pytest

from experiments import assert_expert_parallel
from experiments.assert_expert_parallel import AssertConfig, Row
from moe_jax import TopN

TINY = ["--dim", "8", "--num-experts", "3", "--batch", "3", "--length", "5", "--data", "2", "--expert", "2"]


def test_equal_within_the_tolerance_and_different_beyond_it(capsys: pytest.CaptureFixture[str]):
    assert assert_expert_parallel.main([*TINY, "--dtype", "float64"]) == 0
    shown = capsys.readouterr().out
    assert "2 data × 2 expert (4 of 8 devices)" in " ".join(shown.split())
    assert "gradient of parameters.experts.w_in_edf" in shown
    # No two orders of summing agree to the last bit everywhere.
    assert assert_expert_parallel.main([*TINY, "--dtype", "float64", "--tolerance", "0"]) == 1
    assert "DIFFERENT" in capsys.readouterr().out


def test_a_gradient_of_nothing_but_zeros_proves_nothing():
    assert not Row("gradient of input", largest=0.0, error=0.0).passes(1e-5)
    assert Row("metrics.nonfinite_logits", largest=0.0, error=0.0).passes(1e-5)
    assert not Row("outputs", largest=1.0, error=float("nan")).passes(1e-5)


def test_meshes():
    def shape(data: int | None = None, expert: int | None = None) -> dict[str, int]:
        return dict(assert_expert_parallel.mesh_of(AssertConfig(data=data, expert=expert)).shape)

    assert shape() == {"data": 1, "expert": 8}
    assert shape(data=2) == {"data": 2, "expert": 4}
    assert shape(expert=3) == {"data": 2, "expert": 3}
    with pytest.raises(ValueError, match=r"data \* expert must be at most the 8 devices, got 4 \* 3"):
        shape(data=4, expert=3)
    with pytest.raises(ValueError, match="expert must be at least 1, got 0"):
        shape(expert=0)
    with pytest.raises(ValueError, match=r"seed must be in \[0, 2\^32\), got -1"):
        AssertConfig(seed=-1)
    for tolerance in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="tolerance must be at least 0, got"):
            AssertConfig(tolerance=tolerance)
    with pytest.raises(ValueError, match=r"^experts_per_token must be at most num_experts \(4\), got 8"):
        AssertConfig(num_experts=4, experts_per_token=8)
    with pytest.raises(ValueError, match="num_experts must be at least 1, got 0"):
        AssertConfig(num_experts=0)
    assert AssertConfig(num_experts=1).layer().router == TopN(n=1)


def test_the_layer_is_as_asked_for():
    config = AssertConfig(dispatch="ragged", slot_order="choice", group_size="batch", capacity_factor=2.0).layer()
    assert (config.dispatch, config.slot_order, config.group_size) == ("ragged", "choice", "batch")
    assert (config.capacity_factor_train, config.gumbel_noise) == (2.0, 0.5)


def test_differences_are_beside_the_largest_entry():
    assert assert_expert_parallel.TOLERANCES == {"float32": 1e-5, "float64": 1e-12, "bfloat16": 2e-2}
    (row,) = assert_expert_parallel._rows({"": np.array([4.0, -7.0])}, {"": np.array([4.0, -8.0])})
    assert (row.largest, row.error) == (8, 0.125)
