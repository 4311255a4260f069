"""What a run leaves behind, and back again: what its method trained, or a whole model folder where it is all of it."""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_engine import methods
from lora_engine.config import FullConfig, LoraConfig, MethodConfig, to_dict
from lora_engine.errors import NotFoundError, TargetError
from lora_engine.export.peft_format import load_adapter, save_adapter
from lora_engine.methods.places import task_head_parameters, train_module

METHOD_CONFIG = "method_config.json"
TRAINED_WEIGHTS = "trained.safetensors"
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt",
    "vocab.txt", "tokenizer.model", "chat_template.jinja",
)  # fmt: skip


def save_trained(model: Any, config: MethodConfig, *, base_model: str, base_folder: Path, out: Path) -> int:
    """Write what `config`'s method trained into folder `out`; returns the bytes of its weights.

    LoRA: PEFT's two files, and a classifier's task head beside them. Full: a folder that transformers loads.
    Every other method: method_config.json and trained.safetensors."""
    out.mkdir(parents=True, exist_ok=True)
    if isinstance(config, FullConfig):
        model.save_pretrained(out, safe_serialization=True)
        for name in _TOKENIZER_FILES:
            if (base_folder / name).exists():
                shutil.copyfile(base_folder / name, out / name)
        return _weight_bytes(out)
    if isinstance(config, LoraConfig):
        save_adapter(model, config, base_model=base_model, out=out)
        state: dict[str, Tensor] = dict(task_head_parameters(model))
    else:
        facts = {"base_model_name_or_path": base_model, "config": to_dict(config)}
        (out / METHOD_CONFIG).write_text(json.dumps(facts, indent=2) + "\n")
        state = methods.state_dict(model, config)
    if state:
        tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
        save_file(tensors, out / TRAINED_WEIGHTS, metadata={"format": "pt"})
    return _weight_bytes(out)


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def is_whole_model(config: MethodConfig) -> bool:
    """Whether `save_trained` wrote a model folder, which is loaded in the place of the base."""
    return isinstance(config, FullConfig)


def load_trained(model: Any, config: MethodConfig, folder: Path) -> None:
    """Inject `config` into the base `model` and give it what `save_trained` wrote into `folder`.

    Raises NotFoundError when a file is missing, TargetError when it was made for another model."""
    if isinstance(config, LoraConfig):
        load_adapter(model, folder)
        heads = dict(task_head_parameters(model))
        if not heads:
            return
        for name in {name.partition(".")[0] for name in heads}:
            train_module(model, name)
    if not (folder / TRAINED_WEIGHTS).is_file():
        raise NotFoundError(f"adapter is {str(folder)!r}; allowed: a folder that holds {TRAINED_WEIGHTS}.")
    state = load_file(folder / TRAINED_WEIGHTS)
    try:
        if isinstance(config, LoraConfig):
            methods.load_task_head(model, state)
        else:
            methods.load_state_dict(methods.inject(model, config), config, state)
    except (KeyError, RuntimeError) as error:
        raise TargetError(f"adapter is {str(folder)!r}; it was made for another base model ({error}).") from error
