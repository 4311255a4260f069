"""Adapter layers (Houlsby et al. 2019; Pfeiffer et al. 2021): a small network after each sublayer's last map.

h = base(x);  h + W_up f(W_down h + b_down) + b_up        h (..., hidden), W_down (m, hidden), W_up (hidden, m)
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lora_engine import core
from lora_engine.config import BottleneckConfig
from lora_engine.errors import NotMergeableError
from lora_engine.methods.places import ATTENTION_OUTPUTS, MLP_OUTPUTS, replace_module, sublayer_outputs
from lora_engine.methods.quantized import device_of

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": nn.functional.gelu, "relu": nn.functional.relu}


class BottleneckLayer(nn.Module):
    """`base_layer` and the adapter behind it, before the residual is added (Houlsby et al. 2019, figure 2).

    W_up and both biases start at zero, so training starts from the base model bit for bit; W_down is Gaussian.
    The adapter is float32 whatever the base; products run in the dtype of the activations."""

    def __init__(
        self, base_layer: nn.Module, config: BottleneckConfig, hidden_size: int, *, name: str, seed: int
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        width = max(1, hidden_size // config.reduction_factor)
        device = device_of(base_layer)
        self.adapter_down = nn.Linear(hidden_size, width, device=device)
        self.adapter_up = nn.Linear(width, hidden_size, device=device)
        self.activation = _ACTIVATIONS[config.activation]
        with torch.no_grad():
            self.adapter_down.weight.copy_(torch.from_numpy(core.init_A(width, hidden_size, seed=seed, name=name)))
            for zero in (self.adapter_down.bias, self.adapter_up.weight, self.adapter_up.bias):
                zero.zero_()
        self.train(base_layer.training)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.base_layer(x)
        return h + _linear(self.activation(_linear(h, self.adapter_down)), self.adapter_up)


def _linear(x: Tensor, layer: nn.Linear) -> Tensor:
    return nn.functional.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


def inject(model: nn.Module, config: BottleneckConfig, *, seed: int = 0) -> nn.Module:
    """Freeze `model` and put adapter layers into it, in place. Raises TargetError for an unknown architecture."""
    names = sublayer_outputs(model, MLP_OUTPUTS, "MLP")
    if config.placement == "houlsby":
        names = [
            name
            for pair in zip(sublayer_outputs(model, ATTENTION_OUTPUTS, "attention"), names, strict=True)
            for name in pair
        ]
    model.requires_grad_(False)
    for name in names:
        base_layer = model.get_submodule(name)
        hidden_size = _width(base_layer)
        replace_module(model, name, BottleneckLayer(base_layer, config, hidden_size, name=name, seed=seed))
    return model


def _width(layer: Any) -> int:
    """Values that a Linear (out, in) or GPT-2's Conv1D (in, out) returns."""
    return layer.out_features if isinstance(layer, nn.Linear) else int(layer.weight.shape[1])


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        f"{name}.{child}.{parameter}": p
        for name, layer in model.named_modules()
        if isinstance(layer, BottleneckLayer)
        for child in ("adapter_down", "adapter_up")
        for parameter, p in layer.get_submodule(child).named_parameters()
    }


def state_dict(model: nn.Module) -> dict[str, Tensor]:
    """`<module>.adapter_down.weight` and `.bias`, `<module>.adapter_up.weight` and `.bias` of every adapter layer."""
    return {name: p.detach() for name, p in _trained(model).items()}


@torch.no_grad()
def load_state_dict(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy `state` into the adapter layers. Raises KeyError when one is missing."""
    for name, p in _trained(model).items():
        p.copy_(state[name])


def merge(model: nn.Module) -> None:  # noqa: ARG001
    """Raises NotMergeableError: a nonlinearity stands between the two maps."""
    raise NotMergeableError("Adapter layers cannot be merged: a nonlinearity stands between their two maps.")


unmerge = merge
