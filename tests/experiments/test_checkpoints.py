import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from experiments.checkpoints import Checkpoints, has_checkpoint, named_leaves, newest, open_run, run_folder

MODELS = {"target": {"kernel": jnp.arange(6.0).reshape(2, 3)}, "draft": {"kernel": jnp.ones((4,), jnp.bfloat16)}}
OPTIMIZER = (jnp.int32(3), {"mu": jnp.full((2, 3), 0.1)})
CONFIGURATION = {"seed": 0, "target": {"depth": 2}, "schedule": "constant", "steps": 9}


def save(folder: pathlib.Path, steps, keep: int = 3) -> None:
    with Checkpoints(folder, keep=keep) as checkpoints:
        for step in steps:
            models = jax.tree.map(lambda x, step=step: x + step, MODELS)
            checkpoints.save(step, {"models": models, "optimizer": OPTIMIZER}, CONFIGURATION)


def restore(folder: pathlib.Path, **templates):
    with open_run(folder) as checkpoints:
        step = checkpoints.require_latest()
        checkpoints.check(step, CONFIGURATION)
        return checkpoints.restore(step, templates or {"models": MODELS, "optimizer": OPTIMIZER})


def test_round_trip_bit_for_bit(tmp_path):
    save(tmp_path, [0])
    restored = restore(tmp_path)
    assert jax.tree.structure(restored["optimizer"]) == jax.tree.structure(OPTIMIZER)
    expected = {"models": MODELS, "optimizer": OPTIMIZER}
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_parts_are_read_apart_and_the_last_ones_kept(tmp_path):
    save(tmp_path, [1, 2, 3, 4], keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["3", "4"]
    np.testing.assert_array_equal(restore(tmp_path, models=MODELS)["models"]["target"]["kernel"][0], [4, 5, 6])


def test_what_a_kill_leaves_is_no_checkpoint(tmp_path):
    save(tmp_path, [5])
    half = tmp_path / "checkpoints" / "6.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "checkpoints" / "5", half)
    with open_run(tmp_path) as checkpoints:
        assert checkpoints.latest == 5
    save(tmp_path, [7])
    assert not half.exists()


def test_half_a_checkpoint_is_none(tmp_path):
    (tmp_path / "checkpoints" / "6.orbax-checkpoint-tmp").mkdir(parents=True)
    assert not has_checkpoint(tmp_path)


def test_readers_sweep_nothing_up(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """What looks like a killed run's rest may be what a running one writes."""
    save(tmp_path, [1])
    seen, options = [], ocp.CheckpointManagerOptions

    def recorded(**given):
        seen.append((given["read_only"], given["cleanup_tmp_directories"]))
        return options(**given)

    monkeypatch.setattr(ocp, "CheckpointManagerOptions", recorded)
    with open_run(tmp_path):
        pass
    newest(tmp_path)
    assert seen == [(True, False)] * 2


def test_a_run_folder_and_its_checkpoints_folder_both_open(tmp_path):
    # A run's own folder may be called like that, too.
    for run in (tmp_path, tmp_path / "other" / "checkpoints"):
        save(run, [5])
        for path in (run, run / "checkpoints"):
            assert run_folder(path) == run
            with open_run(path) as checkpoints:
                assert checkpoints.configuration(5) == CONFIGURATION


def test_a_step_that_there_never_was(tmp_path):
    save(tmp_path, [5, 7])
    with open_run(tmp_path) as checkpoints, pytest.raises(ValueError, match="step must be one of 5, 7, got 6"):
        checkpoints.configuration(6)


def damage(path: pathlib.Path, how: str) -> None:
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    else:
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])


@pytest.mark.parametrize("how", ["missing", "truncated", "changed"])
def test_damage_to_any_file_is_noticed(tmp_path, how):
    save(tmp_path, [1, 2])
    original = tmp_path / "checkpoints" / "2"
    names = [path.relative_to(original) for path in original.glob("*/**/*") if path.is_file()]
    assert len(names) > 10
    for name in names:
        shutil.copytree(original, tmp_path / "copy" / "checkpoints" / "2")
        shutil.copytree(tmp_path / "checkpoints" / "1", tmp_path / "copy" / "checkpoints" / "1")
        damage(tmp_path / "copy" / "checkpoints" / "2" / name, how)
        with pytest.raises(ValueError, match=rf"complete and readable.*{name}; delete that folder to fall .* step 1"):
            restore(tmp_path / "copy")
        shutil.rmtree(tmp_path / "copy")


def test_the_newest_other_checkpoint_is_the_one_to_fall_back_on(tmp_path):
    save(tmp_path, [1, 2, 3])
    damage(tmp_path / "checkpoints" / "3" / "description" / "metadata", "truncated")
    with pytest.raises(ValueError, match=r"/3: .*; delete that folder to fall back on step 2$"):
        restore(tmp_path)


def test_damage_is_noticed_behind_a_sound_checkpoint(tmp_path):
    save(tmp_path, [1, 2])
    damage(tmp_path / "checkpoints" / "2" / "description" / "metadata", "truncated")
    with open_run(tmp_path) as checkpoints:
        assert checkpoints.configuration(1) == CONFIGURATION
        with pytest.raises(ValueError, match="damaged or missing: description/metadata"):
            checkpoints.configuration(2)


def test_checkpoints_of_before_there_were_reports(tmp_path):
    save(tmp_path, [1])
    written = tmp_path / "checkpoints" / "1" / "description" / "metadata"
    description = json.loads(written.read_text())
    assert description.pop("reports") == []
    written.write_text(json.dumps(description))
    (tmp_path / "checkpoints" / "1" / "digests.json").unlink()
    with open_run(tmp_path) as checkpoints:
        assert checkpoints.reports(1) == []


def test_damage_is_noticed_without_digests(tmp_path):
    save(tmp_path, [2])
    (tmp_path / "checkpoints" / "2" / "digests.json").unlink()
    (tmp_path / "checkpoints" / "2" / "description" / "metadata").write_text('{"configuration": {"see')
    with pytest.raises(ValueError, match=r"checkpoint must be complete and readable, got .*2"):
        restore(tmp_path)


@pytest.mark.parametrize(
    ("configuration", "message"),
    [
        (CONFIGURATION | {"seed": 1}, "seed: expected 0, got 1"),
        (CONFIGURATION | {"target": {"depth": 3}}, "target.depth: expected 2, got 3"),
        (CONFIGURATION | {"target": {"depth": 2, "dim": 4}}, "target.dim: expected 'nothing', got 4"),
    ],
)
def test_another_configuration(tmp_path, configuration, message):
    save(tmp_path, [1])
    with open_run(tmp_path) as checkpoints, pytest.raises(ValueError, match=message):
        checkpoints.check(1, configuration)


def test_other_shapes(tmp_path):
    save(tmp_path, [1])
    with pytest.raises(ValueError, match=r"models.target.kernel: expected \[2, 2\], got \[2, 3\]"):
        restore(tmp_path, models={"target": {"kernel": jnp.zeros((2, 2))}, "draft": MODELS["draft"]})


def test_arrays_that_nobody_asks_for_or_that_are_not_there(tmp_path):
    save(tmp_path, [1])
    with pytest.raises(ValueError, match=r"models.draft.kernel: expected None, got \[4\]"):
        restore(tmp_path, models={"target": MODELS["target"]})
    with pytest.raises(ValueError, match=r"models.more: expected \[3\], got None"):
        restore(tmp_path, models=MODELS | {"more": jnp.zeros(3)})


def test_missing(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="checkpoint must be the output folder of a training run"):
        open_run(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    closed = []
    monkeypatch.setattr(Checkpoints, "close", lambda self: closed.append(self.folder))
    with pytest.raises(ValueError, match="checkpoint must be the output folder of a training run"):
        open_run(tmp_path)
    assert closed == [tmp_path / "checkpoints"]


def test_leaves_are_named_by_path():
    assert list(named_leaves({"a": [1, {"b": 2}], "c": 3})) == ["a.0", "a.1.b", "c"]
