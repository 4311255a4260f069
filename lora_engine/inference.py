"""Finished runs at inference: their models, what merging changes, and what a token costs."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_engine import export, methods
from lora_engine.config import RunConfig
from lora_engine.data import TextTokenizer, class_names, load_tokenizer
from lora_engine.errors import NotMergeableError
from lora_engine.jobs import ADAPTER, load_rows
from lora_engine.methods.ia3 import IA3Layer
from lora_engine.methods.lora import LoraLayer
from lora_engine.methods.places import replace_module
from lora_engine.training.base import autocast_of, load_base, resolve_device, resolve_model
from lora_engine.training.batches import Batch, evaluation_batches
from lora_engine.training.latency import BASE, BASE_AGAIN, compare_latency, time_generation, time_reading
from lora_engine.training.loss import evaluate

PROMPT_TOKENS = 16  # at most
NEW_TOKENS = 16
READINGS = 4
ROUNDS = 15


def load_run_model(
    config: RunConfig, folder: Path | None, tokenizer: TextTokenizer, classes: tuple[str, ...] = ()
) -> Any:
    """The model that the run in `folder` left, in evaluation mode; the base model without a folder."""
    device = resolve_device(config.train.device)
    base_folder = resolve_model(config.model)
    whole = folder is not None and export.is_whole_model(config.method)
    source = folder / ADAPTER if folder is not None and whole else base_folder
    model = load_base(source, config.train, device, classes=classes, pad_id=tokenizer.pad_id)
    if folder is not None and not whole:
        export.load_trained(model, config.method, folder / ADAPTER)
    return model.eval()


@torch.no_grad()
def logits_of(model: Any, batch: Batch) -> Tensor:
    """Logits for every token (sequences, length, vocab), a classifier's (sequences, classes); float32, on the host."""
    mask = {} if batch.attention_mask is None else {"attention_mask": batch.attention_mask}
    logits: Tensor = model(input_ids=batch.input_ids, **mask).logits.float().cpu()
    return logits


def measure_merge(model: Any, config: RunConfig, batches: list[Batch]) -> dict[str, Any]:
    """Merge `model`, in place, and say what that changed: `mergeable`, `merge_max_abs_diff` (of logits over the
    batches) and `merge_loss_diff` (evaluation loss, merged less unmerged). None where nothing can be merged."""
    autocast = autocast_of(config.train, next(model.parameters()).device)
    with autocast:
        before, loss_before = [logits_of(model, batch) for batch in batches[:1]], evaluate(model, batches)
    try:
        methods.METHODS[config.method.method].merge(model)
    except NotMergeableError:
        return {"mergeable": False, "merge_max_abs_diff": None, "merge_loss_diff": None}
    with autocast:
        after, loss_after = [logits_of(model, batch) for batch in batches[:1]], evaluate(model, batches)
    difference = max(float((a - b).abs().max()) for a, b in zip(before, after, strict=True))
    return {"mergeable": True, "merge_max_abs_diff": difference, "merge_loss_diff": loss_after - loss_before}


def unwrap_merged(model: Any) -> None:
    """Put every merged base layer back into its adapter's place: the model as an export would leave it."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer | IA3Layer):
            replace_module(model, name, module.base_layer)


def measure_inference(
    runs: Mapping[str, tuple[RunConfig, Path]],
    *,
    rounds: int = ROUNDS,
    note: Callable[[str], None] = lambda _text: None,
) -> dict[str, Any]:
    """Of each finished run (method -> its config and folder): merging and latency, in one process with the base.

    `base`, `base_again`: timings; `noise_low`, `noise_high`: the 5 % and 95 % of base again / base; `unit`: what a
    token is; `methods`: per method `inference_seconds_per_token`, `inference_ratio` (to the base), for mergeable ones
    the same of the merged model, and what `measure_merge` says."""
    config = next(iter(runs.values()))[0]
    tokenizer = load_tokenizer(resolve_model(config.model))
    dataset, _, eval_rows = load_rows(config.data, tokenizer, config.train.max_length)
    classes = class_names(dataset)
    device = resolve_device(config.train.device)
    batches = evaluation_batches(eval_rows, config.train, tokenizer.pad_id, device)
    prompt = torch.tensor([eval_rows[0].input_ids[:PROMPT_TOKENS]], device=device)

    def turn(model: Any, train: RunConfig) -> Callable[[], float]:
        timed = (
            partial(time_reading, num_times=READINGS) if classes else partial(time_generation, num_tokens=NEW_TOKENS)
        )

        def once() -> float:
            with autocast_of(train.train, device):
                return timed(model, prompt)

        return once

    turns: dict[str, Callable[[], float]] = {}
    for name in (BASE, BASE_AGAIN):
        turns[name] = turn(load_run_model(config, None, tokenizer, classes), config)
    figures: dict[str, dict[str, Any]] = {}
    for method, (run, folder) in runs.items():
        note(f"merging {method}")
        merged = load_run_model(run, folder, tokenizer, classes)
        figures[method] = measure_merge(merged, run, batches)
        turns[method] = turn(load_run_model(run, folder, tokenizer, classes), run)
        if figures[method]["mergeable"]:
            unwrap_merged(merged)
            turns[f"{method} merged"] = turn(merged, run)
    note("measuring latency")
    timings = compare_latency(turns, rounds=rounds)
    again = timings[BASE_AGAIN]
    for method, row in figures.items():
        row["inference_seconds_per_token"] = timings[method].seconds_per_token
        row["inference_ratio"] = timings[method].ratio
        if row["mergeable"]:
            merged_timing = timings[f"{method} merged"]
            row["merged_seconds_per_token"] = merged_timing.seconds_per_token
            row["merged_ratio"] = merged_timing.ratio
            row["merged_within_noise"] = again.ratio_low <= merged_timing.ratio <= again.ratio_high
    return {
        "base_seconds_per_token": timings[BASE].seconds_per_token,
        "noise_low": again.ratio_low,
        "noise_high": again.ratio_high,
        "unit": "read token" if classes else "generated token",
        "rounds": rounds,
        "timings": {name: asdict(timing) for name, timing in timings.items()},
        "methods": figures,
    }
