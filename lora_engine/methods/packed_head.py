"""A classifier's task head in a pack: each config trains its own, from its own first values."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_engine.methods.packed_layout import Slot, aligned
from lora_engine.methods.packed_linear import compute_dtype
from lora_engine.methods.places import Float32Linear, task_head_names


class _IntoBuffer(torch.autograd.Function):
    """A parameter as it is, its gradient added to the pack's buffer: rows of it lie too far apart for autograd's own
    accumulation, which wants gradients packed tight."""

    @staticmethod
    def forward(ctx: Any, p: Tensor) -> Tensor:
        ctx.p = p
        return p.view_as(p)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> None:
        ctx.p.grad.add_(grads[0])


class PackedAffine(nn.Module):
    """N Linears, or N LayerNorms, in the place of one: weights (N, ...), biases (N, ...)."""

    def __init__(self, base_layer: nn.Module, size: int) -> None:
        super().__init__()
        self.base_layer, self.size = base_layer, size
        self.weight: nn.Parameter
        self.bias: nn.Parameter | None = None
        self.train(base_layer.training)

    def slots(self, name: str, start: int) -> list[Slot]:
        made: list[Slot] = []
        for child, p in self.base_layer.named_parameters():
            made.append(Slot(name, child, aligned(made[-1].stop) if made else start, tuple(p.shape)))
        return made

    def take(self, tensors: Sequence[nn.Parameter]) -> None:
        self.weight = tensors[0]
        self.bias = tensors[1] if len(tensors) > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        base: Any = self.base_layer
        rows = x.reshape(self.size, -1, x.shape[-1])  # (N, n, in)
        weight: Tensor = _IntoBuffer.apply(self.weight)
        bias: Tensor | None = None if self.bias is None else _IntoBuffer.apply(self.bias)
        if isinstance(base, nn.LayerNorm):
            normed = nn.functional.layer_norm(rows, base.normalized_shape, eps=base.eps)
            out = normed * weight.unsqueeze(1)
            if bias is not None:
                out = out + bias.unsqueeze(1)
            return out.to(x.dtype).view(x.shape)
        dtype = compute_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            weight = weight.to(dtype).transpose(1, 2)
            rows = rows.to(dtype)
            out = torch.bmm(rows, weight) if bias is None else torch.baddbmm(bias.to(dtype).unsqueeze(1), rows, weight)
        return out.view(*x.shape[:-1], out.shape[-1])


_KINDS = (nn.Linear, Float32Linear, nn.LayerNorm)


def unpackable_head(model: nn.Module) -> str | None:
    """Class of a module in the task head that holds parameters of its own and has no packed twin."""
    for head in task_head_names(model):
        for module in model.get_submodule(head).modules():
            if not isinstance(module, _KINDS) and any(True for _ in module.parameters(recurse=False)):
                return type(module).__name__
    return None


def pack_task_head(model: nn.Module, size: int) -> dict[str, PackedAffine]:
    """The packed twin of every module of the task head that holds parameters, by full name."""
    return {
        name: PackedAffine(module, size)
        for head in task_head_names(model)
        for name, module in model.get_submodule(head).named_modules(prefix=head)
        if isinstance(module, _KINDS)
    }
