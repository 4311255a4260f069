"""What a run leaves behind: an adapter, or a whole model folder where every weight was trained."""

import shutil
from pathlib import Path
from typing import Any

from lora_engine.config import LoraConfig, MethodConfig
from lora_engine.export.peft_format import save_adapter

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt",
    "vocab.txt", "tokenizer.model", "chat_template.jinja",
)  # fmt: skip


def save_trained(model: Any, config: MethodConfig, *, base_model: str, base_folder: Path, out: Path) -> int:
    """Write what `config`'s method trained into folder `out`; returns the bytes of its weights."""
    if isinstance(config, LoraConfig):
        save_adapter(model, config, base_model=base_model, out=out)
    else:
        model.save_pretrained(out, safe_serialization=True)
        for name in _TOKENIZER_FILES:
            if (base_folder / name).exists():
                shutil.copyfile(base_folder / name, out / name)
    return sum(path.stat().st_size for path in out.glob("*.safetensors"))
