"""Whole jobs, put together from the floors below: a run from its config to its files, and text from a finished run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lora_engine import export
from lora_engine.config import LoraConfig, RunConfig, TrainConfig, run_config_from_dict, to_dict
from lora_engine.data import Encoded, class_names, encode_prompt, encode_text, load_tokenizer, read_dataset
from lora_engine.errors import ConfigError
from lora_engine.methods import inject, lora, trainable_parameters
from lora_engine.session import Loaded, Session, classify, load_rows, sample_prompt
from lora_engine.training.base import autocast_of, check_context, load_base, resolve_device, resolve_model
from lora_engine.training.batches import evaluation_batches
from lora_engine.training.generate import generate_text
from lora_engine.training.loop import Callbacks, LoopState, train
from lora_engine.training.loss import accuracy, confusion_matrix, evaluate, macro_f1

CHECKPOINT = "checkpoint.safetensors"
ADAPTER = "adapter"

__all__ = ["ADAPTER", "CHECKPOINT", "classify", "execute_run", "generate_from_run", "load_rows", "sample_prompt"]


def execute_run(
    config: RunConfig,
    folder: Path,
    *,
    callbacks: Callbacks | None = None,
    note: Callable[[str], None] = lambda _text: None,
    session: Session | None = None,
) -> tuple[LoopState, dict[str, Any]]:
    """Do the run in `folder` (checkpoint, adapter); (state, result), the result empty when it was stopped.

    With a `session`, runs on one base share what it loaded; what comes out is the same to the bit.
    Raises InputError for what the request got wrong."""
    folder.mkdir(parents=True, exist_ok=True)
    session = session or Session()
    loaded = session.open(config, note)
    try:
        finished = _execute(config, folder, loaded, callbacks, note)
    except Exception:
        session.forget()  # what became of the model is not known
        raise
    session.close(config)
    return finished


def _execute(
    config: RunConfig, folder: Path, loaded: Loaded, callbacks: Callbacks | None, note: Callable[[str], None]
) -> tuple[LoopState, dict[str, Any]]:
    model = inject(loaded.model, config.method, seed=config.train.seed)
    check_context(model, config.train)  # a prefix takes places of its own
    trainable = sum(p.numel() for p in trainable_parameters(model))
    if not trainable:
        raise ConfigError("method", to_dict(config.method), "a method with at least one parameter to train")

    note("training")
    state = train(
        model,
        loaded.train_rows,
        loaded.eval_rows,
        config.train,
        pad_id=loaded.tokenizer.pad_id,
        checkpoint=folder / CHECKPOINT,
        callbacks=callbacks,
    )
    if state.stopped:
        return state, {}

    note("writing a sample and the adapter")
    return state, leave_behind(config, folder, loaded, state, trainable=trainable, after=loaded.answer())


def leave_behind(
    config: RunConfig, folder: Path, loaded: Loaded, state: LoopState, *, trainable: int, after: str
) -> dict[str, Any]:
    """Write the adapter of the trained model in `loaded`; the run's result. `after` is its text."""
    model, device = loaded.model, loaded.device
    adapter_bytes = export.save_trained(
        model, config.method, base_model=config.model, base_folder=loaded.base_folder, out=folder / ADAPTER
    )
    prompt = loaded.tokenizer.decode(loaded.prompt_ids, skip_special=True)
    return {
        "method": config.method.method,
        "trainable_parameters": trainable,
        "total_parameters": loaded.num_parameters,
        "eval_loss_before": state.eval_loss_before,
        "eval_loss_after": state.eval_loss_after,
        **class_figures(model, loaded.eval_rows, loaded.classes, config.train, loaded.tokenizer.pad_id),
        "steps": state.step,
        "seconds": state.seconds,
        "step_seconds": state.seconds / max(1, state.step),
        "tokens_per_second": state.tokens / state.seconds if state.seconds else None,
        "peak_bytes": state.peak_bytes or None,  # not known of a run whose measured step was in a pack
        "peak_kind": state.peak_kind,
        "reserved_bytes": state.reserved_bytes,
        "adapter_bytes": adapter_bytes,
        "adapter_path": ADAPTER,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "sample": {"prompt": prompt, "before": loaded.before, "after": after},
    }


def class_figures(
    model: Any, eval_rows: list[Encoded], classes: tuple[str, ...], train: TrainConfig, pad_id: int
) -> dict[str, Any]:
    """`eval_accuracy, eval_macro_f1, classes, confusion_matrix` over the rows of the evaluation loss; nothing without
    classes."""
    if not classes:
        return {}
    device = next(model.parameters()).device
    with autocast_of(train, device):
        matrix = confusion_matrix(model, evaluation_batches(eval_rows, train, pad_id, device), len(classes))
    return {
        "eval_accuracy": accuracy(matrix),
        "eval_macro_f1": macro_f1(matrix),
        "classes": list(classes),
        "confusion_matrix": matrix,
    }


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
    """`text, scale`, and `eval_loss` on the run's own evaluation rows when asked for. A classifier's text is the label
    it gives to `prompt`, and `eval_accuracy` and `eval_macro_f1` come with its loss.

    Raises ConfigError for a scale other than 0 or 1 on a method that has no update to scale."""
    config = run_config_from_dict(config_dict)
    device = resolve_device(config.train.device)
    is_lora = isinstance(config.method, LoraConfig)
    if not is_lora and scale not in (0.0, 1.0):
        raise ConfigError("scale", scale, f"0 or 1 for method {config.method.method}")
    base_folder = resolve_model(config.model)
    tokenizer = load_tokenizer(base_folder)
    data = config.data
    dataset = read_dataset(data.path, task=data.task, columns=data.columns, encoding=data.encoding)
    classes = class_names(dataset)
    whole = export.is_whole_model(config.method)
    model = load_base(
        folder / ADAPTER if whole and scale else base_folder,
        config.train,
        device,
        classes=classes,
        pad_id=tokenizer.pad_id,
    )
    if (scale or is_lora) and not whole:
        export.load_trained(model, config.method, folder / ADAPTER)
    if is_lora:
        lora.set_scale(model, scale)
    if classes:
        text = classify(model, encode_text(prompt, tokenizer, config.train.max_length)[0], classes)
    else:
        text = generate_text(
            model,
            tokenizer,
            encode_prompt(prompt, tokenizer, dataset.task),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
        )
    payload: dict[str, Any] = {"text": text, "scale": scale}
    if with_eval:
        _, _, rows = load_rows(config.data, tokenizer, config.train.max_length)
        batches = evaluation_batches(rows, config.train, tokenizer.pad_id, device)
        with autocast_of(config.train, device):
            payload["eval_loss"] = evaluate(model, batches)
        figures = class_figures(model, rows, classes, config.train, tokenizer.pad_id)
        payload |= {key: figures[key] for key in ("eval_accuracy", "eval_macro_f1") if figures}
    return payload
