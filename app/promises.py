"""The five promises of low rank, each with the figure that your runs give it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from formatting import format_bytes, format_integer, format_percent, format_times, significant

NOT_MEASURED = "not measured"
HOLDS, FAILS, OPEN = "holds here", "does not hold here", "open"
NO_FULL = "full fine-tuning was not in this comparison"


@dataclass(frozen=True)
class Promise:
    """`figure` is the number, `note` what it is of, `verdict` one of HOLDS, FAILS, OPEN."""

    title: str
    figure: str
    note: str
    verdict: str


def promises(rows: Sequence[Mapping[str, Any]], inference: Mapping[str, Any] | None) -> list[Promise]:
    """Fewer weights, less time, less memory, easy merge, no overhead: LoRA's figures beside full fine-tuning's."""
    found = {row["method"]: row for row in rows if row["num_seeds"]}
    lora, full = found.get("lora"), found.get("full")
    if lora is None:
        return []
    return [
        _weights(lora),
        _against_full("Less training time", "step_seconds", lora, full, lambda s: f"{significant(s)} s a step"),
        _against_full("Lower memory", "peak_bytes", lora, full, lambda b: f"{format_bytes(b)} at the peak, measured"),
        _merge(lora),
        _overhead(lora, inference),
    ]


def _weights(lora: Mapping[str, Any]) -> Promise:
    trained, total = lora["trainable_parameters"], lora["total_parameters"]
    note = f"{format_integer(trained)} of {format_integer(total)} parameters trained"
    return Promise("Fewer weights", format_percent(100 * trained / total), note, HOLDS if trained < total else FAILS)


def _against_full(title: str, key: str, lora: Mapping[str, Any], full: Mapping[str, Any] | None, words: Any) -> Promise:
    if full is None or not full[key] or not lora[key]:
        return Promise(title, NOT_MEASURED, NO_FULL if full is None else "no figure", OPEN)
    ratio = lora[key] / full[key]
    note = f"{words(lora[key])}; full fine-tuning {words(full[key]).split(',')[0]}"
    return Promise(title, format_times(ratio), note, HOLDS if ratio < 1 else FAILS)


def _merge(lora: Mapping[str, Any]) -> Promise:
    difference = lora["merge_max_abs_diff"]
    if difference is None:
        return Promise("Easy merge", NOT_MEASURED, "inference is measured when all runs are done", OPEN)
    note = f"largest change of a logit by merging; the evaluation loss changes by {lora['merge_loss_diff']:.1e}"
    # A thousandth of a nat is what the tables show.
    return Promise("Easy merge", f"{difference:.1e}", note, HOLDS if abs(lora["merge_loss_diff"]) < 1e-3 else FAILS)


def _overhead(lora: Mapping[str, Any], inference: Mapping[str, Any] | None) -> Promise:
    if lora["merged_ratio"] is None or not inference:
        return Promise("No overhead", NOT_MEASURED, "inference is measured when all runs are done", OPEN)
    low, high = inference["noise_low"], inference["noise_high"]
    note = (
        f"the base's time a {inference['unit']}, merged; {format_times(lora['inference_ratio'])} unmerged. "
        f"The base against itself: {low:.2f} to {high:.2f} times"
    )
    return Promise(
        "No overhead", f"{lora['merged_ratio']:.2f} times", note, HOLDS if lora["merged_within_noise"] else FAILS
    )
