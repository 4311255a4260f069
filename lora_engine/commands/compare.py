"""compare: several methods on the same data, each at its best of a few learning rates, over seeds."""

import argparse
import time
from dataclasses import replace
from functools import partial
from typing import Any

from tqdm import tqdm

from lora_engine.assets_path import absolute_model
from lora_engine.calc import load_shape
from lora_engine.calc.predict import predict_run
from lora_engine.commands.requests import Output, data_of, loop_of, method_of
from lora_engine.comparisons import comparer, is_active, read_cells, read_comparison, start_comparison
from lora_engine.config import METHOD_CONFIGS, LoraConfig, MethodConfig, RunConfig, default_lr
from lora_engine.errors import ConfigError, RunFailedError
from lora_engine.runs import Ledger, default_home
from lora_engine.sweeps import cancel_sweep, evaluated_at_quarters
from lora_engine.sweeps.comparison import ComparisonSpec
from lora_engine.sweeps.sizes import plan_comparison
from lora_engine.text import bytes_text, count_text, table_text


def compare(arguments: argparse.Namespace) -> Output:
    ledger = Ledger(default_home())
    methods = parse_methods(arguments)
    lrs = parse_rates(arguments.lrs, [method.method for method in methods])
    dataset, rows = data_of(ledger, arguments)
    train = loop_of(arguments, rows, lr=default_lr("lora", rows.num_classes), seed=0)
    train = replace(evaluated_at_quarters(train), eval_examples=arguments.eval_rows)
    base = RunConfig(model=absolute_model(arguments.model), data=dataset, method=LoraConfig(), train=train)
    spec = plan_comparison(
        base,
        methods,
        load_shape(base.model),
        seeds=arguments.seeds,
        lrs=lrs,
        match=arguments.match,
        num_classes=rows.num_classes,
    )
    comparison_id = start_comparison(ledger, spec, comparer(ledger), partial(predict_run, rows=rows))
    _follow(ledger, comparison_id, spec, quiet=arguments.json)
    payload = read_comparison(ledger, comparison_id)
    if all(row["eval_loss_after"] is None for row in payload["methods"]):
        errors = [error for row in payload["methods"] for error in row["errors"]]
        why = errors[0] if errors else "no run finished yet; the same command goes on with it."
        raise RunFailedError(f"comparison {comparison_id} is {payload['status']}: {why}")
    return payload, text_of(payload)


def parse_methods(arguments: argparse.Namespace) -> list[MethodConfig]:
    """The configs of --methods, each from the flags that belong to it. Raises ConfigError."""
    names = [name.strip() for name in arguments.methods.split(",") if name.strip()]
    allowed = f"names of {', '.join(METHOD_CONFIGS)}, each once, separated by commas"
    if not names or len(set(names)) != len(names) or not set(names) <= set(METHOD_CONFIGS):
        raise ConfigError("methods", arguments.methods, allowed)
    return [method_of(argparse.Namespace(**vars(arguments) | {"method": name})) for name in names]


def parse_rates(text: str, methods: list[str]) -> dict[str, tuple[float, ...]]:
    """ "1e-3,3e-3" for every method, or "lora:1e-3,3e-3;full:1e-4,3e-4"; nothing for an empty text."""
    allowed = "numbers separated by commas, for all methods or as lora:1e-3,3e-3;full:1e-4,3e-4"
    rates: dict[str, tuple[float, ...]] = {}
    for part in filter(None, (part.strip() for part in text.split(";"))):
        name, colon, values = part.rpartition(":")
        try:
            numbers = tuple(dict.fromkeys(float(value) for value in values.split(",") if value.strip()))
        except ValueError:
            raise ConfigError("lrs", text, allowed) from None
        names = [name.strip()] if colon else methods
        if not numbers or not set(names) <= set(methods):
            raise ConfigError("lrs", text, allowed)
        rates |= dict.fromkeys(names, numbers)
    return rates


def text_of(payload: dict[str, Any]) -> str:
    """The table and what it says."""
    headings = ["method", "trained", "learning rate", "loss before", "loss after", "seeds from .. to", "accuracy"]
    headings += ["s a step", "peak memory", "ms a token", "merged", "merge changes logits by"]
    lines = [
        [
            row["method"],
            count_text(row["trainable_parameters"]),
            _number(row["lr"], "g"),
            _number(row["eval_loss_before"], ".3f"),
            _number(row["eval_loss_after"], ".3f"),
            f"{_number(row['eval_loss_after_min'], '.3f')} .. {_number(row['eval_loss_after_max'], '.3f')}",
            _number(row["eval_accuracy"], ".3f"),
            _number(row["step_seconds"], ".3g"),
            bytes_text(row["peak_bytes"]),
            _milliseconds(row["inference_seconds_per_token"]),
            _milliseconds(row["merged_seconds_per_token"]),
            "" if row["merge_max_abs_diff"] is None else f"{row['merge_max_abs_diff']:.1e}",
        ]
        for row in payload["methods"]
    ]
    parts = [table_text(headings, lines), payload["conclusion"]]
    parts.append(f"Comparison {payload['comparison_id']} is {payload['status']}. {payload['search']}.")
    inference = payload["inference"]
    if inference:
        parts.append(
            f"A {inference['unit']} takes the base {_milliseconds(inference['base_seconds_per_token'])} ms; the base "
            f"against itself varies from {inference['noise_low']:.3f} to {inference['noise_high']:.3f} times."
        )
    parts += payload["notes"]
    if payload["error"]:
        parts.append(f"Inference was not measured: {payload['error']}")
    return "\n\n".join(parts)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1000 * seconds:.3g}"


def _follow(ledger: Ledger, comparison_id: str, spec: ComparisonSpec, *, quiet: bool) -> None:
    """Wait for the comparison, with a progress bar on standard error; Ctrl-C cancels it."""
    total = sum(entry.steps * (len(entry.lrs) + len(spec.seeds) - 1) for entry in spec.entries)
    try:
        with tqdm(total=total, unit="step", disable=quiet) as bar:
            while True:
                _, runs = read_cells(ledger, comparison_id)
                bar.n = sum(run.last_step or 0 for run in runs)
                running = next((run for run in runs if run.status == "running"), None)
                if running:
                    method, lr = running.config["method"]["method"], running.config["train"]["lr"]
                    seed = running.config["train"]["seed"]
                    bar.set_description(f"{method}, learning rate {lr:g}, seed {seed}", refresh=False)
                elif bar.n:
                    bar.set_description("measuring inference", refresh=False)
                bar.refresh()
                if not is_active(ledger, comparison_id):
                    return
                time.sleep(0.2)
    except KeyboardInterrupt:
        cancel_sweep(ledger, comparison_id)
        raise
