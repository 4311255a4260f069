"""LoRA on parameters that no Linear holds: experts stacked in one tensor, routers (PEFT's target_parameters).

The update is added to the weight before the module runs, so a step forms one tensor of the weight's size for each
adapted parameter. Laid out and named as PEFT's ParamWrapper (peft/tuners/lora/layer.py): A holds the experts one after
another, B their ranks interleaved.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lora_engine import core
from lora_engine.calc.matching import name_rule, shown
from lora_engine.config import LoraConfig
from lora_engine.errors import ConfigError, TargetError


class Factor(nn.Module):
    """Holds one factor, so that its saved name is PEFT's `lora_A.weight`."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(values)


class LoraParameter(nn.Module):
    """`base_layer` with its parameter W (E, out, in), (E, in, out) or (out, in) replaced by W + s B_e A_e.

    A (E r, in) and B (out, r E): expert e has rows e r ... of A and every E-th column of B. Several parameters of one
    module are wrapped one around the other; `path` leads from `base_layer` to the module itself."""

    def __init__(self, base_layer: nn.Module, path: str, parameter: str, config: LoraConfig, *, name: str, seed: int):
        super().__init__()
        config = config.at(name)
        self.base_layer, self.path = base_layer, f"{path}{parameter}"
        weight = self._weight()
        self.num_experts = weight.shape[0] if weight.dim() == 3 else 1
        self.transposed = weight.dim() == 3 and getattr(self._owner(), "is_transposed", False)
        out, inner = (int(n) for n in weight.shape[-2:])
        if self.transposed:
            out, inner = inner, out
        A = core.init_A(config.r * self.num_experts, inner, seed=seed, name=name)
        B = core.init_B(out, config.r * self.num_experts)
        self.lora_A = Factor(torch.from_numpy(A).to(weight.device))
        self.lora_B = Factor(torch.from_numpy(B).to(weight.device))
        self.r = config.r
        self.scaling = core.scaling_factor(config.r, config.lora_alpha, use_rslora=config.use_rslora)
        self.scale = 1.0
        self.base_weight: Tensor | None = None
        self.train(base_layer.training)

    @property
    def merged(self) -> bool:
        return self.base_weight is not None

    def factors(self) -> dict[str, nn.Parameter]:
        """What is trained, by PEFT's name inside the module."""
        return {"lora_A.weight": self.lora_A.weight, "lora_B.weight": self.lora_B.weight}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.merged or self.scale == 0.0:
            return self.base_layer(*args, **kwargs)
        weight = self._weight()
        return functional_call(self.base_layer, {self.path: weight + self.delta_W().to(weight.dtype)}, args, kwargs)

    def delta_W(self) -> Tensor:
        """The update in the parameter's own shape, float32."""
        A = self.lora_A.weight.view(self.num_experts, self.r, -1)  # (E, r, in)
        B = self.lora_B.weight.view(-1, self.r, self.num_experts).permute(2, 0, 1)  # (E, out, r)
        update = self.scaling * self.scale * (B @ A)  # (E, out, in)
        return (update.transpose(1, 2) if self.transposed else update).reshape(self._weight().shape)

    @torch.no_grad()
    def merge(self) -> None:
        """W + delta_W into the base; W is kept aside, so unmerge restores every bit."""
        if self.merged:
            return
        weight = self._weight()
        self.base_weight = weight.detach().to("cpu", copy=True)
        weight.copy_((weight.float() + self.delta_W()).to(weight.dtype))

    @torch.no_grad()
    def unmerge(self) -> None:
        if self.base_weight is None:
            return
        self._weight().copy_(self.base_weight)
        self.base_weight = None

    def _owner(self) -> nn.Module:
        return self.base_layer.get_submodule(self.path.rpartition(".")[0])

    def _weight(self) -> nn.Parameter:
        return self.base_layer.get_parameter(self.path)


def inject_parameters(model: nn.Module, config: LoraConfig, *, seed: int) -> int:
    """Wrap the modules whose parameters `config.target_parameters` names, in place; returns how many parameters.

    Raises TargetError for vectors and for weights of adapted modules, ConfigError for DoRA and dropout."""
    rule, targets, found = name_rule(config.target_parameters), shown(config.target_parameters), 0
    for module_name, module in list(model.named_modules()):
        if isinstance(module, Factor):
            continue
        owner = module_name.removesuffix(".base_layer")
        wanted = [name for name, _ in module.named_parameters(recurse=False) if rule.test(f"{owner}.{name}")]
        for depth, name in enumerate(wanted):
            full = f"{owner}.{name}"
            if owner != module_name:
                allowed = "parameters of modules that target_modules leaves alone"
                raise TargetError(f"target_parameters is {targets}, which matches {full!r}; allowed: {allowed}.")
            if module.get_parameter(name).dim() not in (2, 3):
                allowed = "parameters of two or three dimensions"
                raise TargetError(f"target_parameters is {targets}, which matches {full!r}; allowed: {allowed}.")
            if config.use_dora or config.lora_dropout:
                argument = "use_dora" if config.use_dora else "lora_dropout"
                allowed = f"{'False' if config.use_dora else 0} where {full} is adapted, a parameter of no Linear"
                raise ConfigError(argument, getattr(config, argument), allowed)
            parent_name, _, child = module_name.rpartition(".")
            parent = model.get_submodule(parent_name)
            wrapped = LoraParameter(getattr(parent, child), "base_layer." * depth, name, config, name=full, seed=seed)
            setattr(parent, child, wrapped)
            found += 1
    return found
