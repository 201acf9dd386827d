"""What draft, early exit and prophet learn from: losses and their weights, own samples, seeds."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spec_jax
from experiments import (
    train_draft,
    train_early_exit,
    train_prophet,
)
from experiments.distillation import DistillationConfig, key_of, own_samples
from spec_jax.losses import distillation_loss, early_exit_logits
from tests.experiments.runs import leaves
from tests.experiments.strategies import MODULES, OWN, TARGET, early_exit_config, prophet_config


def test_own_samples_are_the_targets():
    """The prompt, then what plain decoding gives; another batch has other noise."""
    target = train_draft.make_models(tiny_config_of())["target"]
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 12)))
    samples = jax.jit(partial(own_samples, dataclasses.replace(OWN, prompt_length=5)))(target, tokens, 0)
    np.testing.assert_array_equal(samples[:, :5], tokens[:, :5])
    plain = spec_jax.base_decoding(target, np.asarray(tokens[:, :5]), max_new_tokens=7, key=key_of(tokens, 0))
    np.testing.assert_array_equal(samples[:, 5:], plain.tokens)
    assert (key_of(tokens, 0) != key_of(tokens[:, ::-1], 0)).all()


def test_own_samples_have_the_noise_of_the_seed():
    tokens_bt = jnp.ones((2, 5), jnp.int32)
    assert key_of(tokens_bt, 0) != key_of(tokens_bt, 1)


def test_a_prompt_may_be_as_long_as_the_sequence():
    """The sample is then the one token behind it that a row also has."""
    DistillationConfig(weight=1.0, own_samples=True, prompt_length=8).check(8)


WEIGHTS = {"target_loss": 1.0, "draft_loss": 1.0, "early_exit_loss": 0.5, "prophet_loss": 0.5, "distillation": 3.0}


@pytest.mark.parametrize("kind", MODULES)
def test_the_loss_is_the_weighted_sum_of_its_parts(kind: str, tmp_path):
    """Distillation on own samples is that on the sampled text, and another seed samples another."""
    make, module = MODULES[kind]
    weights = {f.name: 0.5 for f in dataclasses.fields(make(tmp_path)) if f.name.endswith("_loss_weight")}
    own = DistillationConfig(weight=3.0, own_samples=True, prompt_length=4)
    config = make(tmp_path, seed=3, distillation=own, **weights)
    models, tokens = module.make_models(config), jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 33)))

    def losses_of(config, tokens) -> tuple[jax.Array, dict[str, jax.Array]]:
        return jax.jit(module.make_loss_fn(config))(models, tokens)

    total, losses = losses_of(config, tokens)
    np.testing.assert_allclose(total, sum(WEIGHTS[name] * loss for name, loss in losses.items()), rtol=1e-6)
    given = dataclasses.replace(config, distillation=dataclasses.replace(own, own_samples=False))
    samples = own_samples(own, models["target"], tokens, 3)
    on_samples = losses_of(given, samples)[1]["distillation"]
    np.testing.assert_allclose(losses["distillation"], on_samples, rtol=1e-5)
    elsewhere = losses_of(given, tokens)[1], losses_of(dataclasses.replace(config, seed=4), tokens)[1]
    assert all(abs(other["distillation"] / on_samples - 1) > 1e-4 for other in elsewhere)


def test_an_exit_learns_from_the_head(tmp_path):
    """The divergence is the exit's from the head, not the other way; what it recycles is drawn from the seed."""
    distillation = DistillationConfig(weight=1.0)
    config = early_exit_config(tmp_path, seed=3, distillation=distillation)
    # What recycles starts at zero.
    models = jax.tree.map(lambda weight: weight + 0.05, train_early_exit.make_models(config))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 33)))
    read = tokens[:, :-1]
    logits, exit_logits = early_exit_logits(models["target"], read, key=key_of(read, 3))
    losses = train_early_exit.make_loss_fn(config)(models, tokens)[1]
    np.testing.assert_allclose(losses["distillation"], distillation_loss(exit_logits, logits), rtol=1e-5)
    assert abs(distillation_loss(logits, exit_logits) / losses["distillation"] - 1) > 1e-3
    other = train_early_exit.make_loss_fn(dataclasses.replace(config, seed=4))(models, tokens)[1]
    assert other["early_exit_loss"] != losses["early_exit_loss"]


@pytest.mark.parametrize("kind", MODULES)
def test_another_seed_has_other_weights(kind: str, tmp_path):
    make, module = MODULES[kind]
    first, second = (module.make_models(make(tmp_path, seed=seed)) for seed in (0, 1))
    for name in first:
        assert any((x != y).any() for x, y in zip(leaves(first[name]), leaves(second[name]), strict=True)), name


def test_a_prophet_is_trained_as_its_configuration_says(tmp_path):
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 33)))
    config = prophet_config(tmp_path, num_leading_start_tokens=3, prophet_train_length=6, detach_target_hiddens=True)
    models = train_prophet.make_models(config)
    assert models["prophet"].num_leading_start_tokens == 3

    def gradient_and_loss(**changes: Any) -> tuple[Any, Any]:
        loss_fn = train_prophet.make_loss_fn(dataclasses.replace(config, **changes))
        gradient, losses = jax.jit(jax.grad(loss_fn, has_aux=True))(models, tokens)
        return gradient["target"], losses["prophet_loss"]

    detached, loss = gradient_and_loss()
    alone, _ = gradient_and_loss(prophet_loss_weight=0.0)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), detached, alone)
    joined, same = gradient_and_loss(detach_target_hiddens=False)
    assert same == loss
    assert max(jax.tree.leaves(jax.tree.map(lambda x, y: float(abs(x - y).max()), joined, alone))) > 1e-4
    assert gradient_and_loss(prophet_train_length=5)[1] != loss


def test_the_target_does_not_depend_on_the_prophet():
    first = train_prophet.make_models(train_prophet.TrainProphetConfig(target=TARGET, prophet=TARGET))
    other = dataclasses.replace(TARGET, depth=1, dim=8)
    second = train_prophet.make_models(train_prophet.TrainProphetConfig(target=TARGET, prophet=other))
    jax.tree.map(np.testing.assert_array_equal, first["target"], second["target"])


def tiny_config_of() -> train_draft.TrainDraftConfig:
    return train_draft.TrainDraftConfig(target=TARGET, draft=dataclasses.replace(TARGET, depth=1))


@pytest.mark.parametrize("own", [False, True])
def test_distillation_teaches_the_draft_alone(own: bool):
    """Its gradient reaches the draft and leaves the target's as it was."""
    plain = tiny_config_of()
    taught = dataclasses.replace(plain, distillation=dataclasses.replace(OWN, own_samples=own, weight=3.0))
    models, tokens = train_draft.make_models(plain), jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 12)))
    losses = (train_draft.make_loss_fn(config) for config in (plain, taught))
    gradients = (jax.jit(jax.grad(lambda models, loss=loss: loss(models, tokens)[0])) for loss in losses)
    before, after = (gradient(models) for gradient in gradients)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), before["target"], after["target"])
    moved = jax.tree.leaves(jax.tree.map(lambda x, y: float(abs(x - y).max()), before["draft"], after["draft"]))
    assert min(moved) > 1e-6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: train_early_exit.TrainEarlyExitConfig(target=TARGET), "target.early_exit_layer must be a layer, got"),
        (
            lambda: train_draft.TrainDraftConfig(draft=dataclasses.replace(TARGET, early_exit_layer=1)),
            "draft.early_exit_layer must be None, got 1: only train_early_exit trains exits",
        ),
        (lambda: train_early_exit.TrainEarlyExitConfig(early_exit_loss_weight=-1.0), "early_exit_loss_weight must be"),
        (lambda: train_prophet.TrainProphetConfig(prophet_train_length=2), "prophet_train_length must be above num_l"),
        (
            lambda: train_prophet.TrainProphetConfig(num_leading_start_tokens=0),
            "num_leading_start_tokens must be at least 1, got 0",
        ),
        (lambda: train_prophet.TrainProphetConfig(prophet_loss_weight=float("nan")), "prophet_loss_weight must be at"),
        (
            lambda: train_prophet.TrainProphetConfig(prophet=dataclasses.replace(TARGET, vocab_size=300)),
            "target.vocab_size and prophet.vocab_size must be the same, got 256 and 300",
        ),
        (lambda: DistillationConfig(weight=-0.1), "distillation.weight must be at least 0, got -0.1"),
        (lambda: DistillationConfig(own_samples=True), "distillation.own_samples must come with a distillation.weight"),
        (
            lambda: train_draft.TrainDraftConfig(distillation=dataclasses.replace(OWN, prompt_length=300)),
            "distillation.prompt_length must be at most sequence_length = 256, got 300",
        ),
        (lambda: DistillationConfig(prompt_length=0), "distillation.prompt_length must be at least 1, got 0"),
    ],
)
def test_bad_input(make: Any, message: str):
    with pytest.raises(ValueError, match=message):
        make()
