"""count, memory, data: answers without training."""

import argparse
from dataclasses import asdict
from typing import Any

from lora_engine.calc import ModelShape, count_parameters, estimate_memory, fit_gpus, load_shape
from lora_engine.commands.requests import Output, file_of, method_of, model_folder
from lora_engine.data import check_dataset, classes_text, load_tokenizer
from lora_engine.errors import UnknownArchitectureError
from lora_engine.text import bytes_text, table_text

MOMENTS = {
    "loss": "while the loss is computed, before any gradient exists",
    "head": "as backward leaves the output head",
    "backward": "on the way back through the layers",
    "embedding": "as backward reaches the embedding",
    "optimizer": "while the optimizer updates the weights",
}


def shape_of(model: str) -> ModelShape:
    """The model's shape. Raises InputError; where only the formulas are missing, it says what works without them."""
    try:
        return load_shape(model)
    except UnknownArchitectureError as error:
        raise UnknownArchitectureError(f"{str(error).removesuffix('.')}; or trace it: lora-explorer trace.") from error


def count(arguments: argparse.Namespace) -> Output:
    shape = shape_of(arguments.model)
    counted = count_parameters(shape, method_of(arguments))
    payload = {
        "model": shape.name,
        "total_parameters": counted.total_parameters,
        "trainable_parameters": counted.trainable_parameters,
        "trainable_percent": counted.trainable_percent,
        "modules": [asdict(module) for module in counted.modules],
        "notes": list(counted.notes),
    }
    rows = [
        [m.name, m.count, m.in_features, m.out_features, f"{m.trainable_parameters:,}", m.formula.partition(" = ")[0]]
        for m in counted.modules
    ]
    lines = [
        f"{shape.name}: {counted.trainable_parameters:,} of {counted.total_parameters:,} parameters are trained "
        f"({counted.trainable_percent:.3g} %).",
        table_text(["module", "count", "in", "out", "trainable", "formula"], rows),
        *counted.notes,
    ]
    return payload, "\n".join(lines)


def memory(arguments: argparse.Namespace) -> Output:
    shape, method = shape_of(arguments.model), method_of(arguments)
    settings: dict[str, Any] = {
        "precision": arguments.precision,
        "batch_size": arguments.batch,
        "seq_length": arguments.seq,
        "optimizer": arguments.optimizer,
        "checkpointing": arguments.checkpointing,
        "attention": arguments.attention,
        "accumulation": arguments.accumulation,
        "adapter_dtype": arguments.adapter_dtype,
    }
    estimate = estimate_memory(shape, method, **settings, device=arguments.device)
    gpus = fit_gpus(shape, method, **settings)
    payload = {
        "model": shape.name,
        "terms": dict(estimate.terms),
        "moment": estimate.moment,
        "peak_bytes": estimate.peak_bytes,
        "low_bytes": estimate.low_bytes,
        "high_bytes": estimate.high_bytes,
        "gradient_bytes": estimate.gradient_bytes,
        "inference_bytes": estimate.inference_bytes,
        "notes": list(estimate.notes),
        "gpus": [asdict(gpu) for gpu in gpus],
    }
    lines = [
        f"{shape.name}: {bytes_text(estimate.peak_bytes)} to train (predicted; "
        f"{bytes_text(estimate.low_bytes)} to {bytes_text(estimate.high_bytes)}), "
        f"{bytes_text(estimate.inference_bytes)} to run.",
        f"Highest {MOMENTS[estimate.moment]}; all gradients take {bytes_text(estimate.gradient_bytes)}.",
        table_text(["term", "memory"], [[name, bytes_text(value)] for name, value in estimate.terms.items()]),
        table_text(
            ["card", "memory", "fits", "largest batch"],
            [[g.name, bytes_text(g.memory_bytes), "yes" if g.fits else "no", g.max_batch] for g in gpus],
        ),
        *estimate.notes,
    ]
    return payload, "\n\n".join(lines)


def data(arguments: argparse.Namespace) -> Output:
    report = check_dataset(
        file_of(arguments.file), load_tokenizer(model_folder(arguments.model)), max_length=arguments.seq
    )
    payload = report.to_dict()
    lines = [
        f"{arguments.file}: {payload['format']}, {payload['rows']} rows, task {payload['task']}.",
        f"{payload['examples']} examples, {payload['tokens']:,} tokens, {len(payload['dropped'])} rows dropped.",
        *(f"  row {drop['row']}: {drop['reason']}" for drop in payload["dropped"][:10]),
        *([f"{classes_text(report.classes)}."] if report.classes else []),
        *payload["warnings"],
    ]
    return payload, "\n".join(lines)
