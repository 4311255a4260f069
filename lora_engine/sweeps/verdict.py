"""What a comparison found: one row a method, and what the rows say, in words."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from lora_engine.sweeps.comparison import CellView, ComparisonSpec, choose_rates, find_cell, loss_of, make_cell

METHOD_WORDS = {
    "lora": "LoRA",
    "full": "full fine-tuning",
    "head": "the task head alone",
    "bottleneck": "adapter layers",
    "prefix": "prefix tuning",
    "ia3": "(IA)^3",
}


def summarize_methods(
    spec: ComparisonSpec, runs: Sequence[CellView], inference: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """One row a method, in the order of `spec`; plain JSON types, None where it is not known (yet).

    `lr` is the chosen rate, `lr_at_edge` whether it is the lowest or highest of several tried, `tried` the search.
    `eval_loss_after`, `eval_accuracy`, `eval_macro_f1` are means over the `num_seeds` finished seeds whose loss is a
    number, with `_min`, `_max` and (loss) `_std`, the sample standard deviation; `num_diverged` counts the others.
    `step_seconds` is their median, `peak_bytes` their largest, `confusion_matrix` their sum. `inference` is what
    `lora_engine.inference` measured: its figures of a method are added."""
    rates = choose_rates(spec, runs)
    rows = []
    for entry in spec.entries:
        lr = rates.get(entry.name)
        tried = [
            {"lr": rate, "eval_loss_after": loss_of(find_cell(runs, make_cell(spec, entry, rate, spec.seeds[0])))}
            for rate in entry.lrs
        ]
        cells = [find_cell(runs, make_cell(spec, entry, lr, seed)) for seed in spec.seeds] if lr is not None else []
        done = [cell for cell in cells if cell is not None and cell.status == "done"]
        row: dict[str, Any] = {
            "method": entry.name,
            "steps": entry.steps,
            "lr": lr,
            "lr_at_edge": len(entry.lrs) > 1 and lr in (min(entry.lrs), max(entry.lrs)),
            "tried": tried,
            "num_planned": len(spec.seeds),
            **_figures([cell for cell in done if loss_of(cell) is not None]),
            "num_diverged": sum(loss_of(cell) is None for cell in done),
            "errors": sorted({error for cell in runs if (error := _error_of(cell, entry.name))}),
        }
        measured = ((inference or {}).get("methods") or {}).get(entry.name) or {}
        rows.append(row | {key: measured.get(key) for key in INFERENCE_KEYS})
    return rows


INFERENCE_KEYS = (
    "inference_seconds_per_token", "inference_ratio", "merged_seconds_per_token", "merged_ratio",
    "merged_within_noise", "mergeable", "merge_max_abs_diff", "merge_loss_diff",
)  # fmt: skip
_MEANS = ("eval_loss_before", "eval_loss_after", "eval_accuracy", "eval_macro_f1", "seconds", "tokens_per_second")


def _figures(done: Sequence[CellView]) -> dict[str, Any]:
    results = [cell.result or {} for cell in done]
    figures: dict[str, Any] = {"num_seeds": len(done), "run_ids": [cell.id for cell in done]}
    for key in _MEANS:
        values = [float(result[key]) for result in results if result.get(key) is not None]
        figures[key] = statistics.fmean(values) if values else None
        if key in ("eval_loss_after", "eval_accuracy"):
            figures[f"{key}_min"], figures[f"{key}_max"] = (min(values), max(values)) if values else (None, None)
            figures[f"{key}_std"] = statistics.stdev(values) if len(values) > 1 else None
    first: Mapping[str, Any] = results[0] if results else {}
    prediction = (done[0].prediction or {}) if done else {}
    steps = [float(result["step_seconds"]) for result in results if result.get("step_seconds") is not None]
    figures["step_seconds"] = statistics.median(steps) if steps else None
    figures["peak_bytes"] = max((result.get("peak_bytes") or 0 for result in results), default=None)
    for key in ("trainable_parameters", "total_parameters", "peak_kind", "adapter_bytes", "device", "classes"):
        figures[key] = first.get(key)
    figures["predicted_peak_bytes"] = prediction.get("peak_bytes")
    figures["predicted_terms"] = prediction.get("terms")
    matrices = [result["confusion_matrix"] for result in results if result.get("confusion_matrix")]
    figures["confusion_matrix"] = (
        [[sum(values) for values in zip(*lines, strict=True)] for lines in zip(*matrices, strict=True)]
        if matrices
        else None
    )
    return figures


def _error_of(cell: CellView, method: str) -> str | None:
    error = getattr(cell, "error", None)
    return error if error and cell.config["method"]["method"] == method else None


def noise_of(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Standard deviation of the loss over seeds, pooled over `rows`; None where no method has two seeds."""
    squares = [
        (row["num_seeds"] - 1, row["eval_loss_after_std"] ** 2)
        for row in rows
        if row["eval_loss_after_std"] is not None
    ]
    degrees = sum(n for n, _ in squares)
    return math.sqrt(sum(n * square for n, square in squares) / degrees) if degrees else None


def conclude(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the losses say of LoRA (without it: of the first method) beside the others; no more than that."""
    known = [row for row in rows if row["eval_loss_after"] is not None]
    if not known:
        return "No run has finished with a loss that is a number."
    anchor = next((row for row in known if row["method"] == "lora"), known[0])
    others = [row for row in known if row is not anchor]
    name = METHOD_WORDS[anchor["method"]]
    sentences = []
    full = next((row for row in others if row["method"] == "full"), None)
    if full is not None:
        share = 100 * anchor["trainable_parameters"] / full["trainable_parameters"]
        sentences.append(
            f"{_capital(_possessive(name))} loss ({anchor['eval_loss_after']:.3f}) {_against(anchor, full)} "
            f"full fine-tuning's ({full['eval_loss_after']:.3f}), with {share:.3g} % of the parameters trained."
        )
    else:
        sentences.append(f"{_capital(_possessive(name))} loss is {anchor['eval_loss_after']:.3f}.")
    rest = [row for row in others if row is not full]
    if rest:
        parts = [
            f"{_possessive(METHOD_WORDS[row['method']])} ({row['eval_loss_after']:.3f}) {_against(row, anchor, '')}"
            for row in sorted(rest, key=lambda row: row["eval_loss_after"])
        ]
        sentences.append(f"Against {_possessive(name)} loss: {'; '.join(parts)}.")
    sentences.append(_about_accuracy(known))
    noise = noise_of(known)
    seeds = max(row["num_seeds"] for row in known)
    if noise is None:
        sentences.append("With one seed, how much of a difference is chance is not known.")
    else:
        sentences.append(f"Over {seeds} seeds a loss varies by {noise:.2g} (standard deviation).")
    lost = [METHOD_WORDS[row["method"]] for row in rows if row["eval_loss_after"] is None]
    if lost:
        sentences.append(f"Without a finished loss: {', '.join(lost)}.")
    edge = [METHOD_WORDS[row["method"]] for row in known if row["lr_at_edge"]]
    if edge:
        sentences.append(f"At the edge of the learning rates tried, so perhaps better beyond: {', '.join(edge)}.")
    return " ".join(sentence for sentence in sentences if sentence)


def within_spread(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool | None:
    """Whether the mean losses of two methods differ by no more than their seeds do (`noise_of` the two)."""
    noise = noise_of([a, b])
    return None if noise is None else abs(a["eval_loss_after"] - b["eval_loss_after"]) <= noise


def _against(a: Mapping[str, Any], b: Mapping[str, Any], of: str = "of ") -> str:
    """ "is within the seeds' spread of", "is 0.12 higher than"."""
    gap = a["eval_loss_after"] - b["eval_loss_after"]
    if within_spread(a, b):
        return f"is within the seeds' spread {of}".strip()
    if gap == 0:
        return "equals" if of else "is equal"
    return f"is {abs(gap):.2g} {'higher' if gap > 0 else 'lower'}" + (" than" if of else "")


def _about_accuracy(rows: Sequence[Mapping[str, Any]]) -> str:
    labelled = [row for row in rows if row["eval_accuracy"] is not None]
    if not labelled:
        return ""
    parts = [f"{METHOD_WORDS[row['method']]} {100 * row['eval_accuracy']:.1f} %" for row in labelled]
    return f"Accuracy: {', '.join(parts)}."


def _possessive(word: str) -> str:
    return {"adapter layers": "adapter layers'", "the task head alone": "the task head's"}.get(word, f"{word}'s")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
