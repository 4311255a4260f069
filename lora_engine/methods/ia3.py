"""(IA)^3 (Liu et al. 2022, section 3.3): learned scales on keys, values and the inner activations of the MLP.

    k = l_k * (W_k x);  v = l_v * (W_v x);  h = W_out (l_ff * f(W_in x))        l_k, l_v (kv_width,), l_ff (inner,)

Scales start at one, so training starts from the base model, and merge into the weights. Laid out and named as in
PEFT; like there, a map that gives queries, keys and values at once is scaled whole.
"""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_engine.config import IA3Config
from lora_engine.errors import NotMergeableError, TargetError
from lora_engine.methods.places import MLP_OUTPUTS, replace_module, sublayer_outputs, transformer_layers
from lora_engine.methods.quantized import QuantizedLinear, device_of, features_of

# Within a layer; the first that fits.
_KEYS_AND_VALUES = (
    ("self_attn.k_proj", "self_attn.v_proj"), ("attention.self.key", "attention.self.value"),
    ("attention.k_lin", "attention.v_lin"), ("attention.attn.k", "attention.attn.v"),
    ("attn.k_proj", "attn.v_proj"), ("attn.attention.k_proj", "attn.attention.v_proj"),
    ("attn.c_attn",), ("attention.query_key_value",), ("self_attention.query_key_value",), ("self_attn.qkv_proj",),
    ("attn.Wqkv",),
)  # fmt: skip


class IA3Layer(nn.Module):
    """`base_layer` with scales on its outputs, or on its inputs when it is `is_feedforward`."""

    def __init__(self, base_layer: nn.Module, *, is_feedforward: bool) -> None:
        super().__init__()
        self.base_layer, self.is_feedforward = base_layer, is_feedforward
        self.stores_in_out = isinstance(base_layer, Conv1D)
        in_features, out_features = features_of(base_layer)
        shape = (1, in_features) if is_feedforward else (out_features, 1)
        self.ia3_l = nn.Parameter(torch.ones(shape, device=device_of(base_layer)))
        self.base_weights: dict[str, Tensor] = {}
        self.train(base_layer.training)

    def forward(self, x: Tensor) -> Tensor:
        if self.base_weights:
            merged: Tensor = self.base_layer(x)
            return merged
        scales = self.ia3_l.flatten()
        if self.is_feedforward:
            h: Tensor = self.base_layer(x * scales.to(x.dtype))
            return h
        h = self.base_layer(x)
        return h * scales.to(h.dtype)

    @torch.no_grad()
    def merge(self) -> None:
        """The scales into weight and bias; both are kept aside, so unmerge restores every bit."""
        if self.base_weights:
            return
        if isinstance(self.base_layer, QuantizedLinear):
            raise NotMergeableError(
                f"precision is {self.base_layer.precision!r}; (IA)^3 is merged into weights that are not packed: "
                "allowed fp32, fp16, bf16, mixed-fp16, mixed-bf16."
            )
        named = dict(self.base_layer.named_parameters())
        self.base_weights = {name: p.detach().to("cpu", copy=True) for name, p in named.items()}
        scales = self.ia3_l.t() if self.stores_in_out else self.ia3_l
        named["weight"].copy_((named["weight"].float() * scales).to(named["weight"].dtype))
        if "bias" in named and not self.is_feedforward:
            named["bias"].copy_((named["bias"].float() * self.ia3_l.flatten()).to(named["bias"].dtype))

    @torch.no_grad()
    def unmerge(self) -> None:
        for name, value in self.base_weights.items():
            self.base_layer.get_parameter(name).copy_(value)
        self.base_weights = {}


def inject(model: nn.Module, config: IA3Config, *, seed: int = 0) -> nn.Module:  # noqa: ARG001
    """Freeze `model` and scale its keys, values and MLPs, in place. Raises TargetError for an unknown architecture."""
    feedforward = sublayer_outputs(model, MLP_OUTPUTS, "MLP")
    keys_and_values = [name for layer in transformer_layers(model) for name in _keys_and_values(model, *layer)]
    model.requires_grad_(False)
    for name in keys_and_values + feedforward:
        layer = IA3Layer(model.get_submodule(name), is_feedforward=name in feedforward)
        replace_module(model, name, layer)
    return model


def _keys_and_values(model: nn.Module, name: str, layer: nn.Module) -> list[str]:
    inside = {path for path, module in layer.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    for places in _KEYS_AND_VALUES:
        if inside.issuperset(places):
            return [f"{name}.{place}" for place in places]
    raise TargetError(
        f"model is a {type(model).__name__}, in which keys and values were not found; "
        f"allowed: layers with {' or '.join(' and '.join(places) for places in _KEYS_AND_VALUES)}."
    )


def _layers(model: nn.Module) -> dict[str, IA3Layer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, IA3Layer)}


def state_dict(model: nn.Module) -> dict[str, Tensor]:
    """`<module>.ia3_l` of every scaled module."""
    return {f"{name}.ia3_l": layer.ia3_l.detach() for name, layer in _layers(model).items()}


@torch.no_grad()
def load_state_dict(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy `state` into the scales. Raises KeyError when one is missing."""
    for name, layer in _layers(model).items():
        layer.ia3_l.copy_(state[f"{name}.ia3_l"])


def merge(model: nn.Module) -> None:
    """Multiply every weight by its scales; inference then costs what the base costs."""
    for layer in _layers(model).values():
        layer.merge()


def unmerge(model: nn.Module) -> None:
    """Restore every base weight bit for bit."""
    for layer in _layers(model).values():
        layer.unmerge()
