"""Where the methods put what they train: the layers of a transformers model, and its new task head."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_engine.errors import TargetError

# The last map of each sublayer, by its path within a layer: what it returns is added to the residual stream.
ATTENTION_OUTPUTS = (
    "self_attn.o_proj", "self_attn.out_proj", "self_attn.dense", "self_attention.dense", "attn.c_proj",
    "attn.out_proj", "attn.attention.out_proj", "attention.dense", "attention.output.dense", "attention.out_lin",
    "attention.attn.o", "attn.Wo",
)  # fmt: skip
MLP_OUTPUTS = (
    "mlp.down_proj", "mlp.c_proj", "mlp.dense_4h_to_h", "mlp.fc2", "mlp.fc_out", "fc2", "output.dense", "ffn.lin2",
    "mlp.Wo",
)  # fmt: skip


def transformer_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(full dotted name, module) of every transformer layer, in order. Raises TargetError."""
    num_layers = text_config(model).num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers and any(True for _ in module[0].children()):
            return [(f"{name}.{i}", layer) for i, layer in enumerate(module)]
    raise TargetError(
        f"model is a {type(model).__name__}, in which no list of {num_layers} layers was found; "
        "allowed: a transformer with one module per layer."
    )


def sublayer_outputs(model: nn.Module, places: tuple[str, ...], what: str) -> list[str]:
    """Full names of the map of every layer that is one of `places`. Raises TargetError, naming `what`."""
    found = []
    for name, layer in transformer_layers(model):
        modules = dict(layer.named_modules())
        path = next((place for place in places if isinstance(modules.get(place), nn.Linear | Conv1D)), None)
        if path is None:
            raise TargetError(
                f"model is a {type(model).__name__}, in which the output of the {what} was not found; "
                f"allowed: layers with one of {', '.join(places)}."
            )
        found.append(f"{name}.{path}")
    return found


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The self-attention of every layer, in order: the module that transformers' attention functions are handed.

    Raises TargetError where a model computes its attention by itself."""
    found = []
    for _, layer in transformer_layers(model):
        attention = next(
            (m for m in layer.modules() if "Attention" in type(m).__name__ and hasattr(m, "is_causal")), None
        )
        if attention is None or not getattr(model, "_supports_attention_backend", False):
            raise TargetError(
                f"model is a {type(model).__name__}, whose attention takes no key-value prefix; "
                "allowed: models on transformers' attention interface (Llama, GPT-2, BERT and most others)."
            )
        found.append(attention)
    return found


def text_config(model: Any) -> Any:
    """The part of the config that describes the language model."""
    return model.config.get_text_config()


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def task_head_names(model: nn.Module) -> list[str]:
    """What a classifier has beside its pretrained base (`score`, `classifier`); nothing for other models."""
    if not type(model).__name__.endswith("ForSequenceClassification"):
        return []
    return [
        name
        for name, child in model.named_children()
        if name != getattr(model, "base_model_prefix", "") and any(True for _ in child.parameters())
    ]


def task_head_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(full name, parameter) of the task head."""
    for head in task_head_names(model):
        for name, p in model.get_submodule(head).named_parameters():
            yield f"{head}.{name}", p


def train_module(model: nn.Module, name: str) -> None:
    """Make module `name` trainable, its weights in float32 whatever the base (see Float32Linear)."""
    for path, module in list(model.get_submodule(name).named_modules(prefix=name)):
        if isinstance(module, nn.Linear) and module.weight.dtype in (torch.float16, torch.bfloat16):
            replace_module(model, path, Float32Linear(module))
    model.get_submodule(name).requires_grad_(True)


class Float32Linear(nn.Module):
    """A trained Linear on a half-precision base: weights in float32, products in the dtype of the activations."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = nn.Parameter(linear.weight.detach().float())
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.weight.to(x.dtype), bias)
