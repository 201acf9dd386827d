"""Trains a target with mixtures of experts and a dense draft beside it, then shows what speculative decoding gains.

    python -m experiments.train_moe              # the study: all `cpu` presets, one table, one figure
    python -m experiments.train_moe cpu          # one of them
    python -m experiments.train_moe cpu-equal-flops --output runs/dense

Every field can be set: `--experts.num-experts 16`, `--experts.every 1`; `cpu --help` lists them all.
Those of the study are listed by `python -m experiments.compare_experts --help`.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx

import spec_jax
from experiments import train_draft
from experiments.command_line import chosen_config
from experiments.config import as_json, differences
from experiments.decoding_run import DecodingRunConfig, decoding_task, shared_fields
from experiments.distillation import key_of
from experiments.expert_decoder import ExpertsConfig, forward, make_decoder, routing_reports, sum_of
from experiments.runtime import exit_with
from experiments.session import Origin, Task, run
from experiments.train_state import LossFn, Models
from experiments.upcycling import check_upcycling, upcycled
from spec_jax.losses import next_token_loss

KIND = "train_moe"
STRATEGY = dataclasses.replace(train_draft.STRATEGY, label="dense draft")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainMoEConfig(DecodingRunConfig):
    """A target with mixtures of experts, and a dense draft.

    Attributes:
      experts: the target's mixtures.
      draft: the model that drafts for the target.
      upcycle_from: output folder of a run with the same `draft`, `target`, `experts.every` and a dense `experts.kind`,
        whose weights this one starts from. `experts.hidden` must be as wide as the dense layers, and there may be no
        extra feed-forwards; see `experiments.upcycling`.
    """

    experts: ExpertsConfig = ExpertsConfig()  # noqa: RUF009 - immutable
    draft: spec_jax.DecoderConfig = spec_jax.DecoderConfig(depth=2)  # noqa: RUF009 - immutable
    upcycle_from: pathlib.Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_drafting("draft")
        self.experts.check(self.target)
        if self.upcycle_from is not None:
            check_upcycling(self.experts)


# What each variant of a preset changes in the mixtures, and what for. ST-MoE 2202.08906 studies the last five.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "equal-flops": ("Dense, of the same training FLOPs as `cpu`.", {"kind": "equal_flops"}),
    "equal-parameters": ("Dense, of the same number of weights as `cpu`.", {"kind": "equal_parameters"}),
    "no-z-loss": ("Without the router z-loss.", {"router_z_coef": 0.0}),
    "threshold-0.05": ("Second experts at lower gates.", {"threshold": 0.05}),
    "capacity-2": ("More room for each expert.", {"capacity_factor": 2.0}),
    "ff-before": ("The extra feed-forward before the mixture.", {"add_ff_before": True, "add_ff_after": False}),
    "ff-none": ("No extra feed-forward.", {"add_ff_after": False}),
}


def _presets() -> dict[str, tuple[str, TrainMoEConfig]]:
    cpu, enwik8 = (shared_fields(train_draft.PRESETS[name][1], TrainMoEConfig) for name in ("cpu", "enwik8"))
    cpu |= {
        "output": pathlib.Path("runs/moe_cpu"),
        "target": spec_jax.DecoderConfig(dim=128, depth=4, heads=4, dim_head=32),
        "draft": spec_jax.DecoderConfig(dim=64, depth=1, heads=2, dim_head=32),
        "steps": 240,
        "validate_every": 40,
        "validation_batches": 16,
        "sample_every": 120,
        "checkpoint_every": 120,
    }
    enwik8 |= {"output": pathlib.Path("runs/moe"), "experts": ExpertsConfig(num_experts=16)}
    presets = {
        "cpu": (
            "A small mixture on the standard library's source: a few minutes on two cores.",
            TrainMoEConfig(**cpu),
        ),
        "enwik8": (
            "`train_draft enwik8` with 16 experts in every second layer of the target.",
            TrainMoEConfig(**enwik8),
        ),
    }
    for name, (what, changes) in VARIANTS.items():
        changed = {"output": pathlib.Path(f"runs/moe_cpu_{name}"), "experts": ExpertsConfig(**changes)}
        presets[f"cpu-{name}"] = (what, TrainMoEConfig(**cpu | changed))
    return presets


PRESETS = _presets()


def make_models(config: TrainMoEConfig) -> dict[str, spec_jax.Decoder]:
    """Target and draft with fresh weights."""
    target_seed, draft_seed = jax.random.split(jax.random.key(config.seed))
    return {
        "target": make_decoder(config.target, config.experts, rngs=nnx.Rngs(target_seed)),
        "draft": spec_jax.Decoder(config.draft, rngs=nnx.Rngs(draft_seed)),
    }


def models_of(configuration: Mapping[str, Any]) -> dict[str, spec_jax.Decoder]:
    """The models that a checkpoint's configuration describes, with fresh weights."""
    target, draft = (spec_jax.DecoderConfig(**configuration[name]) for name in ("target", "draft"))
    return make_models(TrainMoEConfig(target=target, draft=draft, experts=ExpertsConfig(**configuration["experts"])))


def make_loss_fn(config: TrainMoEConfig, *, train: bool = True) -> LossFn:
    """The sum of both models' losses and the target's auxiliary losses.

    The draft is trained apart: it changes nothing in the target.

    Args:
      config: the run's.
      train: whether the mixtures behave as in training, with randomness that is a function of the batch, or as in
        decoding, where there are no auxiliary losses.
    """

    def loss_fn(models: Models, tokens_bt: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        read_bt, next_bt = tokens_bt[:, :-1], tokens_bt[:, 1:]
        key = key_of(tokens_bt, config.seed) if train else None
        logits, outputs = forward(models["target"], read_bt, train=train, key=key)
        losses = {
            "target_loss": next_token_loss(logits, next_bt),
            "draft_loss": next_token_loss(models["draft"](read_bt).logits, next_bt),
        }
        total = losses["target_loss"] + losses["draft_loss"] + sum_of(out.total_aux_loss for out in outputs.values())
        return total, losses | routing_reports(outputs)

    return loss_fn


def origin(config: TrainMoEConfig) -> Origin | None:
    """The dense run that this one starts from, if any."""
    if config.upcycle_from is None:
        return None

    def dense_models(configuration: Mapping[str, Any]) -> Models:
        if (kind := configuration["kind"]) != KIND:
            raise ValueError(f"upcycle_from must be a run of {KIND}, got {config.upcycle_from}, a run of {kind}")
        return models_of(configuration)

    def convert(dense: Models) -> Models:
        for name in ("target", "draft"):
            if different := differences(as_json(dense[name].config), as_json(getattr(config, name))):
                fields = "; ".join(f"{name}.{difference}" for difference in different)
                raise ValueError(f"{name} must be that of {config.upcycle_from}, got other fields: {fields}")
        # The first two drew the dense run's weights.
        router_seed = jax.random.split(jax.random.key(config.seed), 3)[2]
        return {**dense, "target": upcycled(dense["target"], config.experts, rngs=nnx.Rngs(router_seed))}

    return Origin(argument="upcycle_from", output=config.upcycle_from, models_of=dense_models, convert=convert)


def task(config: TrainMoEConfig) -> Task:
    """What `session.run` needs to train this pair."""
    return decoding_task(
        config,
        STRATEGY,
        kind=KIND,
        make_models=lambda: make_models(config),
        loss_fn=make_loss_fn(config),
        validation_loss_fn=make_loss_fn(config, train=False),
        origin=origin(config),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the command line and runs."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments:
        from experiments import compare_experts  # It imports this module.

        return compare_experts.main([])
    config = chosen_config("train_moe", PRESETS, arguments, __doc__)
    return run(config, task(config))


if __name__ == "__main__":
    exit_with(main)
