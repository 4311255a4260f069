"""A finished run's model, with the update scaled: 0 is the base, 1 the trained one."""

from pathlib import Path
from typing import Any

from lora_engine.config import LoraConfig, run_config_from_dict
from lora_engine.data import load_tokenizer, read_dataset, render_prompt
from lora_engine.errors import ConfigError
from lora_engine.export import load_adapter
from lora_engine.methods import lora
from lora_engine.training.base import load_base, resolve_device, resolve_model
from lora_engine.training.batches import make_batch
from lora_engine.training.generate import generate_text
from lora_engine.training.loss import evaluate
from lora_engine.training.run import ADAPTER, load_rows


def generate_from_run(
    config_dict: dict[str, Any],
    folder: Path,
    *,
    prompt: str,
    scale: float = 1.0,
    max_new_tokens: int = 48,
    temperature: float = 0.0,
    seed: int = 0,
    with_eval: bool = False,
) -> dict[str, Any]:
    """`text, scale`, and `eval_loss` on the run's own evaluation rows when asked for.

    Raises ConfigError for a scale other than 0 or 1 on a method that has no update to scale."""
    config = run_config_from_dict(config_dict)
    device = resolve_device(config.train.device)
    is_lora = isinstance(config.method, LoraConfig)
    if not is_lora and scale not in (0.0, 1.0):
        raise ConfigError("scale", scale, f"0 or 1 for method {config.method.method}")
    base_folder = resolve_model(config.model)
    use_base = is_lora or scale == 0.0
    model = load_base(base_folder if use_base else folder / ADAPTER, config.train, device)
    if is_lora:
        load_adapter(model, folder / ADAPTER)
        lora.set_scale(model, scale)
    tokenizer = load_tokenizer(base_folder)
    task = config.data.task or read_dataset(config.data.path, columns=config.data.columns).task
    text = generate_text(
        model,
        tokenizer,
        tokenizer.encode(render_prompt(prompt, tokenizer, task)),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    )
    payload: dict[str, Any] = {"text": text, "scale": scale}
    if with_eval:
        _, _, rows = load_rows(config.data, tokenizer, config.train.max_length)
        size = config.train.batch_size
        kept = rows[: config.train.eval_examples]
        batches = [make_batch(kept[i : i + size], tokenizer.pad_id, device) for i in range(0, len(kept), size)]
        payload["eval_loss"] = evaluate(model, batches)
    return payload
