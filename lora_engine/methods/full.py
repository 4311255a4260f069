"""Full fine-tuning: every weight is trained. The yardstick."""

import torch
from torch import nn

from lora_engine.config import FullConfig
from lora_engine.errors import NotMergeableError


def inject(model: nn.Module, config: FullConfig, *, seed: int = 0) -> nn.Module:  # noqa: ARG001
    """Make every parameter trainable."""
    return model.requires_grad_(True)


def state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter once (a tied head is named by its embedding)."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def load_state_dict(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Copy `state` into the model. Raises KeyError when the names differ."""
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.copy_(state[name])


def merge(model: nn.Module) -> None:  # noqa: ARG001
    """Raises NotMergeableError: the weights themselves were trained."""
    raise NotMergeableError("Full fine-tuning has nothing to merge: the weights themselves were trained.")


unmerge = merge
