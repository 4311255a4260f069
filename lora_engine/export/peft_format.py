"""LoRA adapters as PEFT writes and reads them: adapter_config.json and adapter_model.safetensors."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_engine.calc import select_modules
from lora_engine.config import LoraConfig
from lora_engine.errors import NotFoundError, TargetError
from lora_engine.methods import lora

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

# PEFT wraps a model twice (PeftModel.base_model, LoraModel.model); its keys carry both names.
_PREFIX = "base_model.model."
_MAGNITUDE = ".lora_magnitude_vector.weight"


def save_adapter(model: nn.Module, config: LoraConfig, *, base_model: str, out: Path) -> Path:
    """Write the adapter of `model` into folder `out` (peft/utils/save_and_load.py); returns `out`."""
    out.mkdir(parents=True, exist_ok=True)
    state = {_peft_name(name): value.contiguous().cpu() for name, value in lora.state_dict(model).items()}
    save_file(state, out / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config, layers = lora.as_peft_reads(model, config), lora.lora_layers(model)
    facts: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        **_target_facts(model, config),
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "target_parameters": list(config.target_parameters) or None,
        "bias": "none",
        "fan_in_fan_out": any(_stores_in_out(layer.base_layer) for layer in layers.values()),
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }
    (out / ADAPTER_CONFIG).write_text(json.dumps(facts, indent=2) + "\n")
    return out


def load_adapter(model: nn.Module, folder: Path) -> LoraConfig:
    """Inject the adapter in `folder` into `model`, in place; returns its config.

    Raises NotFoundError when a file is missing, TargetError when it was made for another model or holds more than
    LoRA's factors, ConfigError for settings that this engine does not train."""
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise NotFoundError(f"adapter is {str(folder)!r}; allowed: a folder that holds {name}.")
    facts = json.loads((folder / ADAPTER_CONFIG).read_text())
    config = LoraConfig(
        r=facts["r"],
        lora_alpha=facts["lora_alpha"],
        lora_dropout=facts.get("lora_dropout", 0.0),
        use_rslora=facts.get("use_rslora", False),
        use_dora=facts.get("use_dora", False),
        target_modules=facts["target_modules"] or (),
        layers_to_transform=facts.get("layers_to_transform"),
        layers_pattern=facts.get("layers_pattern"),
        exclude_modules=facts.get("exclude_modules") or (),
        rank_pattern=facts.get("rank_pattern") or (),
        alpha_pattern=facts.get("alpha_pattern") or (),
        target_parameters=facts.get("target_parameters") or (),
    )
    state = {_own_name(name): value for name, value in load_file(folder / ADAPTER_WEIGHTS).items()}
    lora.inject(model, config)
    if unknown := state.keys() - lora.state_dict(model).keys():
        raise TargetError(
            f"adapter is {str(folder)!r}; it was made for another base model, or holds more than LoRA's factors "
            f"({min(unknown)})."
        )
    try:
        lora.load_state_dict(model, state)
    except (KeyError, RuntimeError) as error:
        raise TargetError(f"adapter is {str(folder)!r}; it was made for another base model ({error}).") from error
    return config


def _peft_name(name: str) -> str:
    # PEFT's files keep the name that a magnitude had when it was a parameter and no module.
    return _PREFIX + (name.removesuffix(".weight") if name.endswith(_MAGNITUDE) else name)


def _own_name(name: str) -> str:
    name = name.removeprefix(_PREFIX)
    return f"{name}.weight" if f"{name}.weight".endswith(_MAGNITUDE) else name


def _stores_in_out(layer: nn.Module) -> bool:
    return isinstance(layer, Conv1D) or getattr(layer, "was_conv1d", False)


def _target_facts(model: nn.Module, config: LoraConfig) -> dict[str, Any]:
    """What says which modules: a list as it was given; for an alias or a regular expression, the modules it found."""
    if isinstance(config.target_modules, str):
        found = {"target_modules": _short_targets(list(lora.lora_layers(model)), _linear_names(model))}
        return found | {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
    exclude, layers, pattern = config.exclude_modules, config.layers_to_transform, config.layers_pattern
    return {
        "target_modules": list(config.target_modules),
        "exclude_modules": (exclude if isinstance(exclude, str) else list(exclude)) or None,
        "layers_to_transform": list(layers) if isinstance(layers, tuple) else layers,
        "layers_pattern": list(pattern) if isinstance(pattern, tuple) else pattern,
    }


def _linear_names(model: nn.Module) -> list[str]:
    return [
        name.removesuffix(".base_layer")
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    ]


def _short_targets(adapted: list[str], names: list[str]) -> list[str]:
    """The last names of the adapted modules where these say it exactly, else their full names."""
    short = sorted({name.rpartition(".")[2] for name in adapted})
    return short if sorted(select_modules(names, short)) == sorted(adapted) else adapted
