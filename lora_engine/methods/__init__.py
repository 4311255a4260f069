"""The techniques, one file each, behind one seam.

A method module has
    inject(model, config, *, seed) -> model      what is trainable afterwards has requires_grad
    state_dict(model) -> dict[str, Tensor]       of what was trained, and nothing else
    load_state_dict(model, state)
    merge(model), unmerge(model)                 NotMergeableError where no weight can absorb it
"""

from types import ModuleType

from torch import nn

from lora_engine.config import MethodConfig
from lora_engine.methods import full, lora

METHODS: dict[str, ModuleType] = {
    "lora": lora,
    "full": full,
}


def inject(model: nn.Module, config: MethodConfig, *, seed: int = 0) -> nn.Module:
    """Apply the method of `config` to `model`, in place."""
    injected: nn.Module = METHODS[config.method].inject(model, config, seed=seed)
    return injected


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What the optimizer gets, in the model's order."""
    return [p for p in model.parameters() if p.requires_grad]
