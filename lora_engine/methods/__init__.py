"""The techniques, one file each, behind one seam.

A method module has
    inject(model, config, *, seed) -> model      what is trainable afterwards has requires_grad
    state_dict(model) -> dict[str, Tensor]       of what was trained, and nothing else
    load_state_dict(model, state)
    merge(model), unmerge(model)                 NotMergeableError where no weight can absorb it

A classifier's task head is new whatever the method, so the functions here add it to what is trained and saved.
"""

import copy
from types import ModuleType

import torch
from torch import Tensor, nn

from lora_engine.config import MethodConfig
from lora_engine.methods import bottleneck, full, head, ia3, lora, prefix
from lora_engine.methods.places import replace_module, task_head_names, task_head_parameters, train_module

METHODS: dict[str, ModuleType] = {
    "lora": lora,
    "full": full,
    "head": head,
    "bottleneck": bottleneck,
    "prefix": prefix,
    "ia3": ia3,
}


def inject(model: nn.Module, config: MethodConfig, *, seed: int = 0) -> nn.Module:
    """Apply the method of `config` to `model`, in place; a classifier's task head is trained along, itself unadapted.

    Raises TargetError where the method does not fit the model."""
    heads = {name: copy.deepcopy(model.get_submodule(name)) for name in task_head_names(model)}
    injected: nn.Module = METHODS[config.method].inject(model, config, seed=seed)
    for name, task_head in heads.items():
        replace_module(injected, name, task_head)
        train_module(injected, name)
    return injected


def state_dict(model: nn.Module, config: MethodConfig) -> dict[str, Tensor]:
    """What training changed in `model`: the method's own, and the task head."""
    state: dict[str, Tensor] = METHODS[config.method].state_dict(model)
    return state | {name: p.detach() for name, p in task_head_parameters(model)}


@torch.no_grad()
def load_state_dict(model: nn.Module, config: MethodConfig, state: dict[str, Tensor]) -> None:
    """Inverse of `state_dict` on a model that `config` was injected into. Raises KeyError when a name is missing."""
    METHODS[config.method].load_state_dict(model, state)
    load_task_head(model, state)


@torch.no_grad()
def load_task_head(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy a classifier's task head out of `state`. Raises KeyError when a name is missing."""
    for name, p in task_head_parameters(model):
        p.copy_(state[name])


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What the optimizer gets, in the model's order."""
    return [p for p in model.parameters() if p.requires_grad]
