"""PyTorch mixtures of experts to compare against: the original package's, and Hugging Face's Mixtral block.

Needs the `bench` extra.
"""

# torch comes with the `bench` extra only.
# pyright: reportMissingImports=false

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np

# What must be installed.
MODULES = ("torch", "transformers", "st_moe_pytorch")
# So low that every token asks for its second expert, whatever is drawn: the original draws in evaluation too, and the
# two sides could not keep the same assignments otherwise.
ORIGINAL_THRESHOLDS = {"threshold_train": 1e-6, "threshold_eval": 1e-6}


def original_moe(dim: int, num_experts: int) -> Any:
    """The original package's `MoE` as it ships, thresholds apart: top 2, capacity 1.25 in training, 2 in evaluation."""
    import torch
    from st_moe_pytorch import MoE

    torch.manual_seed(0)
    return MoE(dim=dim, num_experts=num_experts, **ORIGINAL_THRESHOLDS)


def mixtral_block(dim: int, hidden: int, num_experts: int) -> Any:
    """Hugging Face's Mixtral block, its experts computed by grouped products."""
    import torch
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=dim,
        intermediate_size=hidden,
        num_local_experts=num_experts,
        num_experts_per_tok=2,
        router_jitter_noise=0.0,
        experts_implementation="grouped_mm",
    )
    torch.manual_seed(0)
    block = MixtralSparseMoeBlock(config)
    for weight in block.parameters():
        torch.nn.init.normal_(weight, std=0.05)
    return block


def weights(layer: Any) -> dict[str, np.ndarray]:
    """The layer's state dict as arrays."""
    return {name: tensor.detach().numpy().copy() for name, tensor in layer.state_dict().items()}


def timed_call(layer: Any, x: np.ndarray, *, backward: bool) -> Callable[[int], None]:
    """One forward in evaluation, or one forward and backward in training, of the layer on (B, N, D) hidden states.

    Backward, the loss is the sum of the squared outputs and, where the layer has one, its auxiliary loss; weights and
    input get new gradients.
    """
    import torch

    use_all_cores()
    layer.train(backward)
    hidden = torch.from_numpy(np.array(x)).requires_grad_(backward)

    def forward(repeat: int) -> None:
        with torch.inference_mode():
            layer(hidden)

    def forward_and_backward(repeat: int) -> None:
        layer.zero_grad(set_to_none=True)
        hidden.grad = None
        output = layer(hidden)
        if isinstance(output, torch.Tensor):
            loss = output.pow(2).sum()
        else:
            loss = output.outputs.pow(2).sum() + output.total_aux_loss.sum()
        loss.backward()

    return forward_and_backward if backward else forward


def original_call(dim: int, num_experts: int, shape: tuple[int, int], backward: bool) -> Callable[[int], None]:
    """A call of the original on inputs of its own, for a process of its own."""
    x = np.random.default_rng(0).standard_normal((*shape, dim), np.float32)
    return timed_call(original_moe(dim, num_experts), x, backward=backward)


def outputs(layer: Any, x: np.ndarray, *, train: bool) -> np.ndarray:
    """(B, N, D) outputs of one forward."""
    import torch

    with torch.inference_mode():
        output = layer.train(train)(torch.from_numpy(np.array(x)))
    return (output if isinstance(output, torch.Tensor) else output.outputs).numpy()


def assignments_kept(original: Any, x: np.ndarray, *, train: bool) -> int:
    """Assignments that the original's router keeps on (B, N, D) hidden states."""
    import torch

    with torch.inference_mode():
        combine_bnec = original.train(train).gate(torch.from_numpy(np.array(x)))[1]
        return int(combine_bnec.count_nonzero())


def use_all_cores() -> None:
    """As many threads as XLA has."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def versions() -> dict[str, str]:
    """The versions of what is compared against, and the threads torch uses."""
    import importlib.metadata

    import torch

    use_all_cores()
    packages = ("st-moe-pytorch", "transformers")
    return {
        "torch": torch.__version__,
        **{name: importlib.metadata.version(name) for name in packages},
        "torch_threads": str(torch.get_num_threads()),
    }
