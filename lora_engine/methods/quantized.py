"""Frozen maps in int8 and NF4: packed bytes in the place of weights, read anew in every pass.

`lora_engine.core.quantize` is the reference. The same operations run on the CPU and on CUDA; they go through a weight
in pieces, so that little lives beside the bytes and the one dequantised weight at work, and nothing dequantised is
kept for backward.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_engine.core import quantize as core

QUANTIZED_PRECISIONS = ("int8", "nf4", "nf4-dq")

# Values worked on at once; multiples of BLOCK * NESTED_BLOCK.
_PIECE = {"cpu": 2**16}
_LARGE_PIECE = 2**22

State = Mapping[str, Tensor]


def _byte_pairs() -> Tensor:
    """(256,): the two float32 values of every packed byte, as one int64 so that a look-up moves both."""
    code = torch.from_numpy(core.NF4_CODE)
    return torch.stack((code.repeat_interleave(16), code.repeat(16)), dim=1).view(torch.int64).squeeze(1)


_CONSTANTS = {
    "pairs": _byte_pairs(),
    "nf4_midpoints": torch.from_numpy(core.midpoints(core.NF4_CODE)),
    "dynamic_code": torch.from_numpy(core.dynamic_code()),
    "dynamic_slots": torch.from_numpy(core.dynamic_slots()),
}


def _constant(name: str, device: torch.device) -> Tensor:
    return _CONSTANTS[name] if device.type == "cpu" else _constant_on(name, device)


@lru_cache(maxsize=64)
def _constant_on(name: str, device: torch.device) -> Tensor:
    return _CONSTANTS[name].to(device)


def _piece(device: torch.device) -> int:
    return _PIECE.get(device.type, _LARGE_PIECE)


@torch.no_grad()
def quantize(weight: Tensor, precision: str) -> dict[str, Tensor]:
    """What is stored of weight (out_features, in_features), on its device.

    int8: codes int8 (out, in), absmax float32 (out,). nf4: codes uint8 (ceil(n / 2),), absmax float32 (blocks of 64,).
    nf4-dq: absmax uint8 instead, nested_absmax float32 (blocks of 256,), offset float32 ()."""
    if precision == "int8":
        return _quantize_int8(weight)
    state = _quantize_nf4(weight.reshape(-1))
    return state | _quantize_absmax(state["absmax"]) if precision == "nf4-dq" else state


def _quantize_int8(weight: Tensor) -> dict[str, Tensor]:
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    absmax = torch.empty(weight.shape[0], device=weight.device)
    rows = max(1, _piece(weight.device) // weight.shape[1])
    for start in range(0, weight.shape[0], rows):
        part = weight[start : start + rows].float()
        largest = part.abs().amax(dim=1)
        absmax[start : start + rows] = largest
        codes[start : start + rows] = (part / torch.where(largest > 0, largest, 1.0)[:, None]).mul_(127.0).round_()
    return {"codes": codes, "absmax": absmax}


def _quantize_nf4(values: Tensor) -> dict[str, Tensor]:
    n, device = values.numel(), values.device
    codes = torch.empty(-(-n // 2), dtype=torch.uint8, device=device)
    absmax = torch.empty(-(-n // core.BLOCK), device=device)
    for start in range(0, n, _piece(device)):
        part = _padded(values[start : start + _piece(device)].float(), core.BLOCK)  # (blocks, 64)
        largest = part.abs().amax(dim=1)
        scaled = part * (1.0 / largest.clamp_min(1e-38))[:, None]
        found = torch.bucketize(scaled, _constant("nf4_midpoints", device), out_int32=True).flatten().to(torch.uint8)
        first = start // 2
        count = min(found.numel() // 2, codes.numel() - first)
        codes[first : first + count] = (found[0 : 2 * count : 2] << 4) | found[1 : 2 * count : 2]
        absmax[start // core.BLOCK :][: largest.numel()] = largest
    return {"codes": codes, "absmax": absmax}


def _quantize_absmax(absmax: Tensor) -> dict[str, Tensor]:
    offset = absmax.mean()
    part = _padded(absmax - offset, core.NESTED_BLOCK)  # (blocks, 256)
    nested = part.abs().amax(dim=1)
    inverse = 1.0 / torch.where(nested > 0, nested, 1.0)
    scaled = torch.where(nested[:, None] > 0, part * inverse[:, None], -1.0).flatten()[: absmax.numel()]
    index = ((scaled + 1.0) * ((core.GRID - 1) / 2) + 0.5).floor().int().clamp(0, core.GRID - 1)
    codes = _constant("dynamic_slots", absmax.device).index_select(0, index)
    return {"absmax": codes, "nested_absmax": nested, "offset": offset}


def _padded(values: Tensor, size: int) -> Tensor:
    return nn.functional.pad(values, (0, -values.numel() % size)).view(-1, size)


@torch.no_grad()
def dequantize(state: State, precision: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The weight, (out_features, in_features): computed in float32, rounded to `dtype` once."""
    codes, absmax = state["codes"], state["absmax"]
    out = torch.empty(shape, dtype=dtype, device=codes.device)
    if precision == "int8":
        rows = max(1, _piece(codes.device) // shape[1])
        for start in range(0, shape[0], rows):
            part = codes[start : start + rows].float()
            out[start : start + rows] = part.mul_(absmax[start : start + rows, None]).mul_(float(core.INT8_STEP))
        return out
    flat = out.view(-1)
    pairs = _constant("pairs", codes.device)
    for start in range(0, flat.numel(), _piece(codes.device)):
        place = flat[start : start + _piece(codes.device)]
        packed = codes[start // 2 : (start + place.numel() + 1) // 2].int()
        part = pairs.index_select(0, packed).view(torch.float32)[: place.numel()]
        del packed
        first = start // core.BLOCK
        scales = absmax[first : first - (-place.numel() // core.BLOCK)]
        if precision == "nf4-dq":
            scales = _constant("dynamic_code", codes.device).index_select(0, scales.int())
            nested = state["nested_absmax"][first // core.NESTED_BLOCK :]
            scales = _scaled(scales, nested, core.NESTED_BLOCK).add_(state["offset"])
        place.copy_(_scaled(part, scales, core.BLOCK))
    return out


def _scaled(values: Tensor, scales: Tensor, size: int) -> Tensor:
    """Each run of `size` values times its scale, in place."""
    whole = values.numel() // size
    values[: whole * size].view(whole, size).mul_(scales[:whole, None])
    if whole * size < values.numel():
        values[whole * size :].mul_(scales[whole])
    return values


class QuantizedLinear(nn.Linear):
    """A frozen Linear or Conv1D, its weight packed in buffers as `quantize` gives them; a Conv1D is turned to
    (out_features, in_features). The bias stays as it was.

    A Linear to everyone who asks, as in bitsandbytes: `weight` is dequantised at each reading, to the type it had."""

    bias: nn.Parameter | None  # type: ignore[assignment]

    def __init__(self, layer: nn.Linear | Conv1D, precision: str, device: torch.device | None = None) -> None:
        nn.Module.__init__(self)
        self.was_conv1d = isinstance(layer, Conv1D)
        weight: Tensor = layer.weight.detach()
        self.dtype = weight.dtype
        weight = weight.to(device if device is not None else weight.device)
        weight = weight.t() if self.was_conv1d else weight
        self.out_features, self.in_features = (int(n) for n in weight.shape)
        self.precision = precision
        self.names: list[str] = []
        for name, value in quantize(weight, precision).items():
            self.names.append(name)
            self.register_buffer(name, value)
        bias = layer.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().to(weight.device), requires_grad=False)
        self.train(layer.training)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.dequantize(self.dtype)

    @property
    def state(self) -> dict[str, Tensor]:
        """The packed weight, by buffer."""
        return {name: self.get_buffer(name) for name in self.names}

    @property
    def device(self) -> torch.device:
        return self.get_buffer("codes").device

    def dequantize(self, dtype: torch.dtype, state: State | None = None) -> Tensor:
        """The weight, (out_features, in_features), or that of a `state` put aside."""
        shape = (self.out_features, self.in_features)
        if state is not None:
            state = {name: value.to(self.device) for name, value in state.items()}
        return dequantize(state or self.state, self.precision, shape, dtype)

    @torch.no_grad()
    def load(self, state: State) -> None:
        """Take another packed weight."""
        for name, value in state.items():
            self.get_buffer(name).copy_(value)

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        with torch.autocast(x.device.type, enabled=False):
            return frozen_linear(x.to(dtype), self, None if self.bias is None else self.bias.to(dtype))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, precision={self.precision}"


class _QuantizedProduct(torch.autograd.Function):
    """h = x W^T + bias; backward reads the weight anew and nothing else, so nothing is kept."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, layer: QuantizedLinear, bias: Tensor | None) -> Tensor:
        # rows (n, in) -> (n, out)
        ctx.layer = layer
        weight = layer.dequantize(rows.dtype)
        return rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, None, None]:
        g = grads[0]
        return (g @ ctx.layer.dequantize(g.dtype) if ctx.needs_input_grad[0] else None), None, None


def frozen_linear(x: Tensor, weight: Tensor | QuantizedLinear, bias: Tensor | None = None) -> Tensor:
    """x (..., in) -> (..., out) by a frozen weight, as it is or packed."""
    if isinstance(weight, Tensor):
        return nn.functional.linear(x, weight, bias)
    rows: Tensor = _QuantizedProduct.apply(x.reshape(-1, x.shape[-1]), weight, bias)
    return rows.view(*x.shape[:-1], rows.shape[-1])


def quantize_model(model: nn.Module, precision: str, device: torch.device | None = None) -> nn.Module:
    """Put a QuantizedLinear in the place of every Linear and Conv1D inside the layers, in place, one after another and
    on `device` (None: where each is), so that no two copies of the model exist. Embeddings, norms, stacked experts
    and what stands outside the layers stay as they are."""
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.ModuleList):
            continue
        for path, layer in list(module.named_modules(prefix=name)):
            if isinstance(layer, nn.Linear | Conv1D) and not isinstance(layer, QuantizedLinear):
                parent, _, child = path.rpartition(".")
                setattr(model.get_submodule(parent), child, QuantizedLinear(layer, precision, device))
    return model


@torch.no_grad()
def unpack_model(model: nn.Module) -> nn.Module:
    """Inverse of `quantize_model` up to rounding, in place: layers of the packed weights' values, in the type that the
    model was read in. What an update is merged into without being rounded away."""
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, QuantizedLinear):
            continue
        weight = layer.weight
        shape = (layer.in_features, layer.out_features)
        if layer.was_conv1d:
            plain: Any = Conv1D(*reversed(shape))
            weight = weight.t().contiguous()
        else:
            plain = nn.Linear(*shape, bias=layer.bias is not None, device="meta")
        plain.weight = nn.Parameter(weight, requires_grad=False)
        plain.bias = layer.bias
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, plain.train(layer.training))
    return model


def device_of(layer: nn.Module) -> torch.device:
    """Where the weight of a linear layer is, packed or not."""
    if isinstance(layer, QuantizedLinear):
        return layer.device
    weight: Any = layer.weight
    device: torch.device = weight.device
    return device


def features_of(layer: nn.Module) -> tuple[int, int]:
    """(in_features, out_features)."""
    if isinstance(layer, Conv1D):  # GPT-2 stores (in, out)
        rows, columns = layer.weight.shape
        return int(rows), int(columns)
    assert isinstance(layer, nn.Linear)
    return layer.in_features, layer.out_features


def num_parameters(model: nn.Module) -> int:
    """Of the whole model; a packed weight counts its values."""
    packed = sum(x.in_features * x.out_features for x in model.modules() if isinstance(x, QuantizedLinear))
    return packed + sum(p.numel() for p in model.parameters())


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and of the packed weights; a tied weight counts once."""
    packed = (t for x in model.modules() if isinstance(x, QuantizedLinear) for t in x.state.values())
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *packed))
