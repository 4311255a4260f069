"""The product of a packed layer: one frozen GEMM and N low-rank branches in one autograd node.

Factors' gradients go straight into the pack's buffer, added to what earlier micro-batches left there.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_engine.methods.quantized import QuantizedLinear


class _PackedLinear(torch.autograd.Function):
    """h_i = x_i W0^T + bias + s_i (x_i A_i^T) B_i^T (methods.lora's node, batched over i).

    Saved: x, and s_i A_i x_i^T (N, R, n), from which B's gradient follows without another scaling. Products are taken
    with the rank in front, and B is kept so too: a CPU's small GEMMs run up to four times as fast that way round.
    scaling keeps its own type, as a separate run's does: in bfloat16 it would be off by up to 2^-9."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        base: Tensor | QuantizedLinear,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scaling: Tensor,
    ) -> Tensor:
        # rows (N n, in), weight (out, in), A (N, R, in), B (N, out, R), scaling (N, 1, 1) -> (N n, out). Two
        # dimensions only: a view made in here could not be added to in place.
        size = len(A)
        packed = isinstance(base, QuantizedLinear)
        weight = base.dequantize(rows.dtype) if isinstance(base, QuantizedLinear) else base
        a, b = A.to(rows.dtype), B.to(rows.dtype)
        low = torch.bmm(a, rows.view(size, -1, rows.shape[1]).transpose(1, 2)).mul_(scaling)
        h = rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())
        h.view(size, -1, h.shape[1]).baddbmm_(low.transpose(1, 2), b.transpose(1, 2))
        ctx.save_for_backward(rows, low, None if packed else weight, a, b, scaling)
        ctx.packed, ctx.factors = base if packed else None, (A, B)
        return h

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        rows, low, weight, a, b, scaling = ctx.saved_tensors
        size = len(a)
        g = grads[0]
        x3, g3 = rows.view(size, -1, rows.shape[1]), g.reshape(size, -1, g.shape[1])
        g_low = torch.bmm(b.transpose(1, 2), g3.transpose(1, 2)).mul_(scaling)  # (N, R, n)
        A, B = ctx.factors
        A.grad.add_(torch.bmm(g_low, x3))
        B.grad.add_(torch.bmm(low, g3).transpose(1, 2))
        grad_x = None
        if ctx.needs_input_grad[0]:
            if ctx.packed is not None:
                weight = ctx.packed.dequantize(g.dtype)
            grad_x = g @ weight
            grad_x.view(size, -1, grad_x.shape[1]).baddbmm_(g_low.transpose(1, 2), a)
        return grad_x, None, None, None, None, None


def compute_dtype(x: Tensor) -> torch.dtype:
    """What products with x run in: autocast's type, else x's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def packed_linear(x: Tensor, base_layer: Any, A: Tensor, B: Tensor, scaling: Tensor) -> Tensor:
    """x (N b, ..., in) -> (N b, ..., out), config i having the i-th run of b."""
    dtype = compute_dtype(x)
    bias = None if base_layer.bias is None else base_layer.bias.to(dtype)
    weight = base_layer if isinstance(base_layer, QuantizedLinear) else _weight(base_layer).to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        flat = x.to(dtype).reshape(-1, x.shape[-1])
        h: Tensor = _PackedLinear.apply(flat, weight, bias, A, B, scaling)
    return h.view(*x.shape[:-1], h.shape[-1])


def _weight(layer: nn.Module) -> Tensor:
    weight: Any = layer.weight
    transposed: Tensor = weight.t() if isinstance(layer, Conv1D) else weight
    return transposed
