"""Transfer learning: the base is frozen, only a head is trained."""

from typing import Any

import torch
from torch import Tensor, nn

from lora_engine.config import HeadConfig
from lora_engine.errors import NotMergeableError, TargetError
from lora_engine.methods.places import task_head_names, text_config, train_module


def inject(model: Any, config: HeadConfig, *, seed: int = 0) -> nn.Module:  # noqa: ARG001
    """Freeze `model` but for its task head, or its output head where it has none.

    Raises TargetError when it has neither."""
    model.requires_grad_(False)
    names = task_head_names(model) or [_own_output_head(model)]
    for name in names:
        train_module(model, name)
    frozen: nn.Module = model
    return frozen


def _own_output_head(model: Any) -> str:
    """Name of the output head, given a weight of its own where it had the input embedding's.

    The config then says so too, or saving would drop the head and loading would tie it again."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head else None
    if head is None:
        raise TargetError(
            f"model is a {type(model).__name__}, which has no output head; allowed: a language model or a classifier."
        )
    if head.weight is model.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
        for config in (model.config, text_config(model)):
            config.tie_word_embeddings = False
        model.all_tied_weights_keys = {}
    return next(name for name, module in model.named_modules() if module is head)


def state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Weight, and bias where there is one, of the head."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def load_state_dict(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy `state` into the head. Raises KeyError when the names differ."""
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.copy_(state[name])


def merge(model: nn.Module) -> None:  # noqa: ARG001
    """Raises NotMergeableError: the head itself was trained."""
    raise NotMergeableError("A trained head has nothing to merge: its own weights were trained.")


unmerge = merge
