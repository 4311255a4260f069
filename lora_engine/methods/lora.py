"""LoRA in torch: frozen Linear or Conv1D plus a trained low-rank branch, fused in one autograd node.

Initial values and merges come from `lora_engine.core`, so there is one definition of LoRA; saved
names are PEFT's (`lora_A.weight`, `lora_B.weight`, `lora_magnitude_vector.weight` with DoRA).
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_engine import core
from lora_engine.calc.experts import FUSED, Reading, read_targets
from lora_engine.calc.matching import ALIASES, select_by_config, shown
from lora_engine.config import LoraConfig
from lora_engine.errors import TargetError
from lora_engine.methods.lora_parameters import Factor, LoraParameter, inject_parameters
from lora_engine.methods.quantized import QuantizedLinear, device_of, features_of, frozen_linear, quantize


class _LowRankLinear(torch.autograd.Function):
    """h = x W0^T + bias + s (x A^T) B^T with W0 frozen (core.forward and core.backward).

    One node instead of five: x is saved once, beside s A x^T (r, n), from which B's gradient follows without another
    scaling; no gradient of W0 is ever formed and the two products of each direction are added in place. A packed W0 is
    dequantised in forward and again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        base: Tensor | QuantizedLinear,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scaling: float,
    ) -> Tensor:
        # rows (n, in), weight (out, in), A (r, in), B (out, r) -> (n, out). Two dimensions only: a
        # view made in here could not be added to in place, as Falcon does.
        packed = isinstance(base, QuantizedLinear)
        weight = base.dequantize(rows.dtype) if isinstance(base, QuantizedLinear) else base
        # The thin products are taken with r as their rows: on the CPU up to six times as fast as with r columns.
        low = (A @ rows.t()).mul_(scaling)  # (r, n)
        h = rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())
        h.addmm_(low.t(), B.t())
        ctx.save_for_backward(rows, low, None if packed else weight, A, B)
        ctx.scaling, ctx.packed = scaling, base if packed else None
        return h

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        rows, low, weight, A, B = ctx.saved_tensors
        g = grads[0]
        g_low = (B.t() @ g.t()).mul_(ctx.scaling)  # (r, n)
        grad_x = grad_A = grad_B = None
        if ctx.needs_input_grad[0]:
            if ctx.packed is not None:
                weight = ctx.packed.dequantize(g.dtype)
            grad_x = (g @ weight).addmm_(g_low.t(), A)
        if ctx.needs_input_grad[3]:
            grad_A = g_low @ rows
        if ctx.needs_input_grad[4]:
            grad_B = (low @ g).t()
        return grad_x, None, None, grad_A, grad_B, None


class LoraLayer(nn.Module):
    """`base_layer` with its low-rank branch; stands where the base layer stood.

    The adapter is float32 whatever the base; products run in the dtype of the activations, so a
    half-precision base saves no float32 copy of them. With DoRA (Liu et al. 2024, section 4.3) the layer's rows keep
    a trained length m:  h = m / ||W0 + s B A||_c * (x W0^T + s (x A^T) B^T) + bias, the norm without a gradient."""

    def __init__(self, base_layer: nn.Module, config: LoraConfig, *, name: str, seed: int) -> None:
        super().__init__()
        config = config.at(name)
        self.base_layer = base_layer
        self.in_features, self.out_features = features_of(base_layer)
        A = core.init_A(config.r, self.in_features, seed=seed, name=name)
        B = core.init_B(self.out_features, config.r)
        device = device_of(base_layer)
        self.lora_A = Factor(torch.from_numpy(A).to(device))
        self.lora_B = Factor(torch.from_numpy(B).to(device))
        self.r = config.r
        self.scaling = core.scaling_factor(config.r, config.lora_alpha, use_rslora=config.use_rslora)
        self.lora_magnitude_vector: Factor | None = None
        if config.use_dora:
            self.lora_magnitude_vector = Factor(torch.linalg.vector_norm(self._weight().detach().float(), dim=1))
        self.scale = 1.0
        self.lora_dropout = config.lora_dropout
        # W0 while merged: the weight, or the bytes of a packed one.
        self.base_weight: Tensor | dict[str, Tensor] | None = None
        self.train(base_layer.training)

    @property
    def merged(self) -> bool:
        return self.base_weight is not None

    def factors(self) -> dict[str, nn.Parameter]:
        """What is trained, by PEFT's name inside the module."""
        held = {"lora_A": self.lora_A, "lora_B": self.lora_B, "lora_magnitude_vector": self.lora_magnitude_vector}
        return {f"{name}.weight": factor.weight for name, factor in held.items() if factor is not None}

    def forward(self, x: Tensor) -> Tensor:
        if self.merged or self.scale == 0.0:
            base: Tensor = self.base_layer(x)
            return base
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        base_layer: Any = self.base_layer
        bias = None if base_layer.bias is None else base_layer.bias.to(dtype)
        A, B = self.lora_A.weight.to(dtype), self.lora_B.weight.to(dtype)
        x = x.to(dtype)
        weight = base_layer if isinstance(base_layer, QuantizedLinear) else self._weight().to(dtype)
        dropout = self.lora_dropout if self.training else 0.0
        with torch.autocast(x.device.type, enabled=False):
            if self.lora_magnitude_vector is not None:
                h = self._dora(x, weight, A, B, dropout)
                return h if bias is None else h + bias
            scaling = self.scaling * self.scale
            if dropout:
                dropped = nn.functional.dropout(x, dropout)
                return frozen_linear(x, weight, bias) + scaling * ((dropped @ A.t()) @ B.t())
            return _low_rank_linear(x, weight, bias, A, B, scaling)

    def _dora(self, x: Tensor, weight: Tensor | QuantizedLinear, A: Tensor, B: Tensor, dropout: float) -> Tensor:
        """Without the bias, which keeps its length. The dial goes straight from the base's weight to the trained."""
        assert self.lora_magnitude_vector is not None
        factor = (self.lora_magnitude_vector.weight / self._norms()).to(x.dtype)  # (out,)
        if dropout:
            # As in PEFT: the base sees x, all that training adds to it sees the dropped x.
            dropped = nn.functional.dropout(x, dropout)
            adapted = _low_rank_linear(dropped, weight, None, A, B, self.scaling)
            h = frozen_linear(x - dropped, weight) + factor * adapted
        else:
            h = factor * _low_rank_linear(x, weight, None, A, B, self.scaling)
        if self.scale == 1.0:
            return h
        base = frozen_linear(x, weight)
        return base + self.scale * (h - base)

    @torch.no_grad()
    def _norms(self) -> Tensor:
        """||W0 + s B A||_c, (out_features,), by its three products: nothing of the weight's size is formed in float32.

        |w + s b A|^2 = |w|^2 + 2 s (w A^T) b^T + s^2 b (A A^T) b^T for each row w of W0 and b of B."""
        A, B, s = self.lora_A.weight, self.lora_B.weight, self.scaling
        weight = self._weight().to(A.dtype)  # (out, in)
        squares = torch.linalg.vector_norm(weight, dim=1).square()
        squares += 2 * s * ((weight @ A.t()) * B).sum(dim=1) + s * s * ((B @ (A @ A.t())) * B).sum(dim=1)
        return squares.clamp_min(torch.finfo(A.dtype).tiny).sqrt()

    def _weight(self) -> Tensor:
        """The base's weight, (out_features, in_features)."""
        weight: Tensor = self.base_layer.weight  # type: ignore[assignment]
        return weight.t() if isinstance(self.base_layer, Conv1D) else weight

    def delta_W(self) -> Tensor:
        """(out_features, in_features), in float32."""
        A, B = _numpy(self.lora_A.weight), _numpy(self.lora_B.weight)
        if self.lora_magnitude_vector is None:
            return torch.from_numpy(core.delta_W(A, B, self.scaling * self.scale))
        W0 = self._base_values()
        trained = core.merge_dora(W0, A, B, _numpy(self.lora_magnitude_vector.weight), self.scaling)
        return torch.from_numpy(self.scale * (trained - W0))

    def _base_values(self) -> np.ndarray:
        """W0 (out_features, in_features) in float32, while merged the one put aside."""
        if isinstance(self.base_layer, QuantizedLinear):
            assert not isinstance(self.base_weight, Tensor)
            return _numpy(self.base_layer.dequantize(torch.float32, self.base_weight))
        kept = self.base_layer.weight if self.base_weight is None else self.base_weight
        assert isinstance(kept, Tensor)
        return _numpy(kept.t() if isinstance(self.base_layer, Conv1D) else kept)

    @torch.no_grad()
    def merge(self) -> None:
        """W0 + delta_W into the base layer; W0 is kept aside, so unmerge restores every bit.

        A packed W0 is packed again. It lies on the values of its own blocks, so in NF4 nearly all of an update that is
        small against their distance is rounded away: `unpack_model` first where that matters."""
        if self.merged:
            return
        if isinstance(self.base_layer, QuantizedLinear):
            packed = self.base_layer
            merged = packed.dequantize(torch.float32) + self.delta_W().to(packed.device)
            self.base_weight = {name: value.to("cpu", copy=True) for name, value in packed.state.items()}
            packed.load(quantize(merged, packed.precision))
            return
        weight: Any = self.base_layer.weight
        update = self.delta_W().t() if isinstance(self.base_layer, Conv1D) else self.delta_W()
        self.base_weight = weight.detach().to("cpu", copy=True)
        weight.copy_((weight.float() + update.to(weight.device)).to(weight.dtype))

    @torch.no_grad()
    def unmerge(self) -> None:
        if self.base_weight is None:
            return
        if isinstance(self.base_weight, dict):
            assert isinstance(self.base_layer, QuantizedLinear)
            self.base_layer.load(self.base_weight)
        else:
            weight: Any = self.base_layer.weight
            weight.copy_(self.base_weight)
        self.base_weight = None


def _low_rank_linear(
    x: Tensor, weight: Tensor | QuantizedLinear, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float
) -> Tensor:
    """_LowRankLinear over the last dimension of x (..., in) -> (..., out)."""
    rows: Tensor = _LowRankLinear.apply(x.reshape(-1, x.shape[-1]), weight, bias, A, B, scaling)
    return rows.view(*x.shape[:-1], rows.shape[-1])


def inject(model: nn.Module, config: LoraConfig, *, seed: int = 0) -> nn.Module:
    """Freeze `model` and put a LoraLayer in the place of every target, in place; parameters that no Linear holds
    (`target_parameters`, experts) get a LoraParameter around their module.

    Raises TargetError when the targets match nothing that takes an adapter, ConfigError for DoRA or dropout on
    parameters."""
    config = as_peft_reads(model, config)
    names = target_names(model, config) if config.target_modules else []
    model.requires_grad_(False)
    for name in names:
        parent_name, _, child = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        setattr(parent, child, LoraLayer(model.get_submodule(name), config, name=name, seed=seed))
    found = inject_parameters(model, config, seed=seed) if config.target_parameters else 0
    if not names and not found:
        raise TargetError(f"target_parameters is {shown(config.target_parameters)}, which matches no parameter.")
    return model


def as_peft_reads(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """`config` with what PEFT makes of its names in a model whose experts are stacked (`calc.experts`)."""
    model_type = getattr(getattr(model, "config", None), "model_type", "")
    head = _output_head_name(model)
    linears = [name.removesuffix(".base_layer") for name, x in model.named_modules() if isinstance(x, nn.Linear)]
    reading = read_targets(model_type, [name for name in linears if name != head], config)
    if reading == Reading(config.target_modules, config.target_parameters):
        return config
    config = replace(config, target_modules=reading.target_modules, target_parameters=reading.target_parameters)
    if not reading.fused:
        return config
    key = rf".*\.{FUSED}"
    ranks, alphas = dict(config.rank_pattern), dict(config.alpha_pattern)
    return replace(
        config, rank_pattern=ranks | {key: 2 * config.r}, alpha_pattern=alphas | {key: 2 * config.lora_alpha}
    )


def target_names(model: nn.Module, config: LoraConfig) -> list[str]:
    """Full dotted names of the modules that `config` adapts, in the model's order."""
    head = _output_head_name(model)
    everything = [name for name, _ in model.named_modules() if name]
    fitting = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    if isinstance(config.target_modules, str) and config.target_modules.lower() in ALIASES:
        return select_by_config([n for n in everything if n in fitting], config, output_head=head)
    try:
        chosen = select_by_config(everything, config, output_head=head)
    except TargetError:
        if config.target_parameters:  # which may match what target_modules does not
            return []
        raise
    unfit = [name for name in chosen if name not in fitting]
    if unfit:
        kind = type(model.get_submodule(unfit[0])).__name__
        raise TargetError(f"target_modules matches {unfit[0]!r}, a {kind}; allowed: Linear and Conv1D modules.")
    return chosen


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Every LoraLayer by its full dotted name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def adapters(model: nn.Module) -> dict[str, LoraLayer | LoraParameter]:
    """Everything that inject put in, by its full dotted name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer | LoraParameter)}


def state_dict(model: nn.Module) -> dict[str, Tensor]:
    """`<module>.lora_A.weight` and `<module>.lora_B.weight` of every adapted module, and its
    `<module>.lora_magnitude_vector.weight` with DoRA."""
    return {
        f"{name}.{factor}": value.detach()
        for name, layer in adapters(model).items()
        for factor, value in layer.factors().items()
    }


@torch.no_grad()
def load_state_dict(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy `state` into the adapters. Raises KeyError when a factor is missing."""
    for name, layer in adapters(model).items():
        for factor, value in layer.factors().items():
            value.copy_(state[f"{name}.{factor}"])


def merge(model: nn.Module) -> None:
    """Add every update to its base weight; inference then costs what the base costs."""
    for layer in adapters(model).values():
        layer.merge()


def unmerge(model: nn.Module) -> None:
    """Restore every base weight bit for bit."""
    for layer in adapters(model).values():
        layer.unmerge()


@torch.no_grad()
def eject(model: nn.Module) -> nn.Module:
    """Inverse of `inject`, in place: the base's own modules, bit for bit as they were; what was trained is dropped."""
    unmerge(model)
    for name, layer in reversed(adapters(model).items()):  # what is wrapped twice is unwrapped from inside
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.base_layer)
    return model


def set_scale(model: nn.Module, scale: float) -> None:
    """The dial: 0 is the base model bit for bit, 1 the trained one."""
    for layer in adapters(model).values():
        layer.scale = scale


def _output_head_name(model: nn.Module) -> str | None:
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head else None
    return next((name for name, module in model.named_modules() if module is head), None)


def _numpy(tensor: Tensor) -> np.ndarray:
    values: np.ndarray = tensor.detach().float().cpu().numpy()
    return values
