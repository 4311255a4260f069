"""Everything the dial can show, as text and coordinates: the browser only looks it up."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from charts.common import TERM_COLOURS, TERM_WORDS
from formatting import (
    format_bytes,
    format_count,
    format_integer,
    format_number,
    format_percent,
    format_ratio,
    format_times,
)

# The drawing's canvas, in SVG user units.
CANVAS_WIDTH, CANVAS_HEIGHT, GAP = 640.0, 250.0, 74.0
TOP, LABELS, HAIRLINE = 8.0, 46.0, 1.5


@dataclass(frozen=True)
class FullCost:
    """Full fine-tuning, to compare with; bytes."""

    total_parameters: int
    peak_bytes: int
    terms: Mapping[str, int]
    precision: str
    checkpoint_bytes: int


@dataclass(frozen=True)
class DrawnModule:
    """The weight that is drawn: name, how many of its kind are adapted, shape (out_features, in_features)."""

    name: str
    count: int
    in_features: int
    out_features: int


def dial_table(
    rows: Sequence[Mapping[str, Any]],
    full: FullCost,
    module: DrawnModule,
    *,
    r: int,
    lora_alpha: float,
    alphas: Sequence[float],
    keep_ratio: bool,
    use_rslora: bool,
    precision: str,
) -> dict[str, Any]:
    """The lookup table. `rows` is the engine's rank table; `alphas` the positions of the alpha dial."""
    ranks = [int(row["r"]) for row in rows]
    ratio = lora_alpha / r
    kept = [ratio * rank for rank in ranks]
    positions = sorted({*alphas, float(lora_alpha), *(kept if keep_ratio else ())})
    largest = max(full.peak_bytes, *(int(row["peak_bytes"]) for row in rows))
    return {
        "ranks": [_rank_entry(row, full, module, largest, max(ranks), precision) for row in rows],
        "rank_index": ranks.index(r),
        "alphas": [{"value": a, "label": format_number(a)} for a in positions],
        "alpha_index": positions.index(float(lora_alpha)),
        "kept_alpha_index": [positions.index(a) for a in kept] if keep_ratio else None,
        "scaling": [[format_ratio(a / (rank**0.5 if use_rslora else rank)) for a in positions] for rank in ranks],
        "scaling_word": "alpha / √r" if use_rslora else "alpha / r",
        "figure_words": ["Trainable parameters", "Share of the model", "Memory to train, predicted", "Adapter file"],
        "full_bar": _bar(full.terms, largest),
        "full_peak": format_bytes(full.peak_bytes),
        "full_word": "Full fine-tuning" + ("" if full.precision == precision else f", {full.precision}"),
        "terms": [{"key": key, "word": TERM_WORDS[key], "colour": colour} for key, colour in TERM_COLOURS.items()],
        "canvas": f"0 0 {CANVAS_WIDTH:g} {CANVAS_HEIGHT:g}",
        "module": module_text(module),
    }


def module_text(module: DrawnModule) -> str:
    """Which weight is drawn, in words."""
    return f"{module.name}, 1 of {module.count}" if module.count > 1 else module.name


def answer(row: Mapping[str, Any], full: FullCost, precision: str) -> str:
    """The one sentence at the top of the page."""
    other = "" if full.precision == precision else f" in {full.precision}"
    return (
        f"LoRA at rank {row['r']} trains {format_count(row['trainable_parameters'])} of "
        f"{format_count(full.total_parameters)} parameters ({format_percent(row['trainable_percent'])}) "
        f"and needs {format_bytes(row['peak_bytes'])} to train where full fine-tuning{other} needs "
        f"{format_bytes(full.peak_bytes)}."
    )


def _rank_entry(
    row: Mapping[str, Any], full: FullCost, module: DrawnModule, largest: int, widest: int, precision: str
) -> dict[str, Any]:
    trained, peak, adapter = int(row["trainable_parameters"]), int(row["peak_bytes"]), int(row["adapter_bytes"])
    return {
        "value": int(row["r"]),
        "answer": answer(row, full, precision),
        "figures": [
            _figure(format_count(trained), f"{format_integer(trained)} parameters", trained, full.total_parameters),
            {
                "value": format_percent(row["trainable_percent"]),
                "exact": f"{format_integer(trained)} of {format_integer(full.total_parameters)}",
                "change": "full fine-tuning: 100 %",
            },
            _figure(format_bytes(peak), f"{format_integer(peak)} bytes, predicted", peak, full.peak_bytes),
            _figure(format_bytes(adapter), f"{format_integer(adapter)} bytes", adapter, full.checkpoint_bytes),
        ],
        "bar": _bar(row["terms"], largest),
        "peak": format_bytes(peak),
        "drawing": drawing(module, int(row["r"]), widest),
    }


def _figure(value: str, exact: str, ours: int, theirs: int) -> dict[str, str]:
    if ours <= 0 or theirs <= 0:
        change = "nothing to compare"
    elif ours <= theirs:
        change = f"{format_times(theirs / ours)} less than full"
    else:
        change = f"{format_times(ours / theirs)} more than full"
    return {"value": value, "exact": exact, "change": change}


def _bar(terms: Mapping[str, int], largest: int) -> list[dict[str, str]]:
    """One entry a term: its width in percent of the longest bar and its text."""
    return [
        {
            "width": f"{100 * terms.get(key, 0) / largest:.3f}%",
            "text": f"{TERM_WORDS[key]}: {format_bytes(terms.get(key, 0))}",
        }
        for key in TERM_COLOURS
    ]


def drawing(module: DrawnModule, r: int, widest: int) -> dict[str, Any]:
    """W0 (out x in), B (out x r) and A (r x in) to one scale, chosen once for all ranks."""
    rows, columns = module.out_features, module.in_features
    tall = CANVAS_HEIGHT - TOP - LABELS
    scale = min((CANVAS_WIDTH - 2 * GAP) / (2 * columns + widest), tall / max(rows, widest))
    width, height = columns * scale, rows * scale
    thin = max(r * scale, HAIRLINE)
    left = (CANVAS_WIDTH - (2 * width + thin + 2 * GAP)) / 2
    at_b, at_a = left + width + GAP, left + width + GAP + thin + GAP
    middle = TOP + max(height, r * scale) / 2
    a_height = max(r * scale, HAIRLINE)
    under = TOP + max(height, a_height) + 18
    return {
        "w0": _rect(left, middle - height / 2, width, height),
        "b": _rect(at_b, middle - height / 2, thin, height),
        "a": _rect(at_a, middle - a_height / 2, width, a_height),
        "plus": _place(left + width + GAP / 2, middle + 6),
        "dot": _place(at_b + thin + GAP / 2, middle + 6),
        "w0_text": _label(left + width / 2, under, "W₀ frozen", f"{rows:,} × {columns:,}"),
        "b_text": _label(at_b + thin / 2, under, "B trained", f"{rows:,} × {r:,}"),
        "a_text": _label(at_a + width / 2, under, "A trained", f"{r:,} × {columns:,}"),
        "words": f"To scale: W0 is {rows:,} by {columns:,}; B is {rows:,} by {r:,} and A is {r:,} by {columns:,}, "
        f"together {format_integer(r * (rows + columns))} numbers in place of {format_integer(rows * columns)}.",
    }


def _rect(x: float, y: float, width: float, height: float) -> dict[str, str]:
    return {"x": f"{x:.2f}", "y": f"{y:.2f}", "width": f"{width:.2f}", "height": f"{height:.2f}"}


def _place(x: float, y: float) -> dict[str, str]:
    return {"x": f"{x:.2f}", "y": f"{y:.2f}"}


def _label(x: float, y: float, name: str, size: str) -> dict[str, str]:
    return {"x": f"{x:.2f}", "y": f"{y:.2f}", "name": name, "size": size}
