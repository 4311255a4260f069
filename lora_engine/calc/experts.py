"""How PEFT reads the module names of mixture-of-experts models, whose experts transformers 5 stacks in parameters.

Up to transformers 4 each expert was modules of its own (w1, w2, w3; gate_proj, up_proj, down_proj). Adapters of that
time shall still load, so PEFT takes these names, and "all-linear", for the stacked parameters and the router; two maps
in one parameter get twice the rank and twice alpha. Source: peft/utils/transformers_weight_conversion.py,
_convert_peft_config_moe, and transformers/conversion_mapping.py for the model types.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from lora_engine.config import LoraConfig
from lora_engine.errors import TargetError

_MIXTRAL = {"gate": "gate.weight", "w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"}
_QWEN = {"gate": "gate.weight", "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"}
FUSED = "gate_up_proj"

_MIXTRAL_TYPES = ("mixtral", "minimax", "minimax_m2")
_QWEN_TYPES = (
    "afmoe", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe", "exaone_moe",
    "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "hunyuan_v1_moe", "longcat_flash", "olmoe",
    "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_text", "qwen3_omni_moe_thinker", "solar_open",
)  # fmt: skip
OLD_NAMES = dict.fromkeys(_MIXTRAL_TYPES, _MIXTRAL) | dict.fromkeys(_QWEN_TYPES, _QWEN)


@dataclass(frozen=True)
class Reading:
    """Target modules and parameters as PEFT takes them; `fused`: the rank of gate_up_proj is doubled."""

    target_modules: str | tuple[str, ...]
    target_parameters: tuple[str, ...]
    fused: bool = False


def read_targets(model_type: str, linear_names: Iterable[str], config: LoraConfig) -> Reading:
    """What `config` means in a model of this type whose linears, without the output head, have these names.

    A regular expression means the modules that it matches, and no parameters. Raises TargetError for half of a fused
    parameter."""
    old, targets = OLD_NAMES.get(model_type), config.target_modules
    every = isinstance(targets, str) and targets.lower() == "all-linear"
    if old is None or (isinstance(targets, str) and not every):
        return Reading(targets, config.target_parameters)
    if every:
        targets = tuple(dict.fromkeys(name.rpartition(".")[2] for name in linear_names)) + tuple(old)
    modules, found = [], {}
    for target in targets:
        name = next((name for name in old if target == name or target.endswith(f".{name}")), None)
        if name is None:
            modules.append(target)
        else:
            found[name] = old[name]
    halves = [name for name, new in old.items() if new == FUSED]
    present = [name for name in halves if name in found]
    if len(present) == 1:
        raise TargetError(
            f"target_modules has {present[0]!r} alone; allowed: {' and '.join(halves)} together, "
            f"which one parameter ({FUSED}) holds for all experts."
        )
    return Reading(
        tuple(modules), tuple(dict.fromkeys((*config.target_parameters, *found.values()))), len(present) == 2
    )
