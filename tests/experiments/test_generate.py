import dataclasses
import io
import pathlib
import sys
import types
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

import spec_jax
from experiments.generate import GenerateConfig, generate, load_run
from experiments.samples import ByteText
from tests.experiments.runs import tiny_config, train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = tiny_config(folder, steps=8)
    train(config)
    return config.output


def printed(config):
    console = Console(file=io.StringIO(), width=200)
    assert generate(config, console) == 0
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize(
    "changes", [{"plain": True}, {"drafter": "none"}, {"drafter": "ngram"}, {"gamma": 2}, {"verification": "block"}]
)
def test_greedy_text_is_the_same_whatever_drafts(run, changes):
    config = GenerateConfig(checkpoint=run, prompt="alpha", temperature=0.0, max_new_tokens=20, **changes)
    target = load_run(run).target
    result = spec_jax.base_decoding(
        target, np.array([list(b"alpha")]), max_new_tokens=20, key=jax.random.key(0), sampling=config.sampling
    )
    assert printed(config).startswith("alpha" + ByteText().feed(result.tokens[0].tolist(), [""] * 20).plain)


def test_a_seed_gives_a_text(run):
    config = GenerateConfig(checkpoint=run, prompt="alpha", max_new_tokens=20)
    assert printed(config).splitlines()[:-1] == printed(config).splitlines()[:-1]
    assert "20 bytes in" in printed(config)


@pytest.mark.parametrize("seed", [0, 5])
def test_a_drawn_text_is_that_of_the_rule_and_the_seed(run, seed):
    """The coupled rule gives what plain decoding gives with the same key, and rejection does not."""
    config = GenerateConfig(checkpoint=run, prompt="alpha", temperature=1.5, max_new_tokens=20, seed=seed)
    result = spec_jax.base_decoding(
        load_run(run).target,
        np.array([list(b"alpha")]),
        max_new_tokens=20,
        key=jax.random.key(seed),
        sampling=config.sampling,
    )
    characters = ByteText()
    text = "alpha" + characters.feed(result.tokens[0].tolist(), [""] * 20).plain + characters.end().plain
    for changes, equal in (({"plain": True}, True), ({"verification": "coupled"}, True), ({}, False)):
        assert printed(dataclasses.replace(config, **changes)).startswith(text) == equal


def test_what_drafts_and_how_tokens_are_drawn(run):
    loaded = load_run(str(run))
    with pytest.raises(ValueError, match="drafter must be one of trained, ngram, layer-skip, none, got 'n-gram'"):
        loaded.drafter("n-gram")
    trained, ngram = (loaded.drafter(name, 2) for name in ("trained", "ngram"))
    assert isinstance(trained, spec_jax.SmallModel)
    assert isinstance(ngram, spec_jax.NGram)
    assert trained.gamma == ngram.gamma == 2
    assert [getattr(loaded.drafter(name), "gamma", None) for name in ("trained", "ngram", "none")] == [5, 5, None]
    filters = {"temperature": 0.5, "top_k": 3, "top_p": 0.875, "min_p": 0.25}
    config = GenerateConfig(checkpoint=run, prompt="a", **filters)
    assert config.sampling == spec_jax.Sampling(**filters)
    # Colours are explained where there are any.
    config = GenerateConfig(checkpoint=run, prompt="a", max_new_tokens=4)
    shown = [printed(dataclasses.replace(config, plain=plain)) for plain in (False, True)]
    assert ["drafted and accepted" in text for text in shown] == [True, False]
    assert shown[1].splitlines()[-1].startswith("4 bytes in 4 rounds")


def test_an_older_checkpoint(run):
    old, new = (load_run(run, step).target.embed.embedding[...] for step in (4, 8))
    assert abs(old - new).max() > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": ""}, "prompt must have at least one byte"),
        ({"drafter": "oracle"}, "drafter must be one of trained, ngram, layer-skip, none, got 'oracle'"),
        ({"plain": True, "drafter": "ngram"}, "drafter must not be given with plain, got 'ngram'"),
        ({"drafter": "layer-skip"}, "drafter 'layer-skip' needs .*: run python -m experiments.search_layer_skip"),
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 0, got -1"),
        ({"gamma": -1}, "gamma must be at least 0, got -1"),
        ({"seed": 2**63}, "seed must be in .0, 2.32., got 9223372036854775808"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"checkpoint": pathlib.Path("nowhere")}, "checkpoint must be the output folder of a training run"),
        ({"step": 5}, r"step must be one of 4, 8, got 5"),
    ],
)
def test_bad_input(run, changes, message):
    with pytest.raises(ValueError, match=message):
        printed(GenerateConfig(**{"checkpoint": run, "prompt": "a", **changes}))


def test_drafts_are_as_long_as_asked_for(monkeypatch: pytest.MonkeyPatch):
    seen = []

    def spy(console: Console, target: None, drafter: tuple[str, int], *_: Any, **__: Any) -> tuple[int, int]:
        seen.append(drafter)
        return 1, 1

    run = types.SimpleNamespace(target=None, drafter=lambda *given: given)
    module = sys.modules[generate.__module__]
    monkeypatch.setattr(module, "load_run", lambda *_: run)
    monkeypatch.setattr(module, "print_stream", spy)
    generate(GenerateConfig(checkpoint=pathlib.Path(), prompt="a", drafter="ngram", gamma=3), Console(quiet=True))
    assert seen == [("ngram", 3)]
