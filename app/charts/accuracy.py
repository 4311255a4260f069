"""How good the predictions of memory were: predicted against measured, and the errors."""

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from formatting import byte_unit, format_bytes, format_integer, format_percent

from charts.common import GREY, METHOD_COLOURS, chart_layout

KIND_WORDS = {"allocated": "allocated on the card", "tracked": "tensor bytes on the CPU"}
KIND_SYMBOLS = {"allocated": "circle", "tracked": "circle-open"}
ERROR_COLUMNS = ("low_percent", "high_percent", "runs")
STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
MOST_BINS = 24


def plot_predicted_measured(table: pd.DataFrame) -> go.Figure:
    """A point a run on the diagonal of a perfect prediction. `table`: `accuracy_frame`'s columns."""
    both = [*table["predicted_bytes"], *table["measured_bytes"]]
    low, high = float(min(both)), float(max(both))
    divisor, unit = byte_unit(high)
    log = high / low > 20
    edges = [low / 1.3, high * 1.3] if log else [0.0, high * 1.08]
    traces: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "x": [edge / divisor for edge in edges],
            "y": [edge / divisor for edge in edges],
            "mode": "lines",
            "line": {"color": GREY, "width": 1.5, "dash": "dash"},
            "hoverinfo": "skip",
            "showlegend": False,
        }
    ]
    groups: list[tuple[Any, pd.DataFrame]] = list(table.groupby(["method", "kind"], sort=True))
    kinds = sorted(set(table["kind"]))
    named: set[str] = set()
    for (method, kind), rows in groups:
        traces.append(
            {
                "type": "scatter",
                "x": [value / divisor for value in rows["predicted_bytes"]],
                "y": [value / divisor for value in rows["measured_bytes"]],
                "mode": "markers",
                "name": str(method),
                "legendgroup": str(method),
                "showlegend": table["method"].nunique() > 1 and method not in named,
                "marker": {
                    "size": 9,
                    "color": METHOD_COLOURS.get(str(method), GREY),
                    "symbol": KIND_SYMBOLS.get(str(kind), "circle"),
                    "line": {"width": 1.5, "color": METHOD_COLOURS.get(str(method), GREY)},
                },
                "customdata": [_hover(row) for _, row in rows.iterrows()],
                "hovertemplate": "%{customdata}<extra></extra>",
            }
        )
        named.add(method)
    word = f", {KIND_WORDS.get(kinds[0], kinds[0])}" if len(kinds) == 1 else ""
    layout = chart_layout(height=420, x=f"Predicted peak ({unit})", y=f"Measured peak{word} ({unit})")
    layout["annotations"] = [
        {
            "x": 1,
            "y": 0.02,
            "xref": "paper",
            "yref": "paper",
            "text": "dashed: as predicted ",
            "showarrow": False,
            "xanchor": "right",
            "yanchor": "bottom",
            "font": {"size": 11},
        }
    ]
    span = [_place(edge / divisor, log) for edge in edges]
    for axis in ("xaxis", "yaxis"):
        layout[axis] |= {"range": span} | (_log_ticks(*span) if log else {"rangemode": "tozero"})
    return go.Figure({"data": traces, "layout": layout})


def _log_ticks(low: float, high: float) -> dict[str, Any]:
    """Ticks at 1, 2 and 5 of each decade, at 1 alone over more than three; `low` and `high` are logarithms."""
    digits = (1, 2, 5) if high - low <= 3 else (1,)
    values = [d * 10.0**p for p in range(math.floor(low), math.ceil(high) + 1) for d in digits]
    shown = [value for value in values if low <= math.log10(value) <= high]
    return {"type": "log", "tickvals": shown, "ticktext": [f"{value:g}" for value in shown]}


def _place(value: float, log: bool) -> float:
    return math.log10(value) if log else value


def _hover(row: pd.Series) -> str:
    rank = "" if pd.isna(row["r"]) else f", rank {int(row['r'])}"
    reserved = "" if pd.isna(row["reserved_bytes"]) else f"<br>reserved {format_bytes(row['reserved_bytes'])}"
    return (
        f"{row['run_id']}<br>{row['method']}{rank}, {row['precision']}, "
        f"{row['batch_size']} x {row['max_length']} tokens"
        f"<br>predicted {format_bytes(row['predicted_bytes'])} ({format_integer(row['predicted_bytes'])} bytes)"
        f"<br>measured {format_bytes(row['measured_bytes'])} ({format_integer(row['measured_bytes'])} bytes)"
        f"{reserved}<br>{signed_percent(row['error_percent'])}"
    )


def signed_percent(value: float) -> str:
    """+2.1 %, −0.40 %; 0 % is itself."""
    sign = "+" if value > 0 else "−" if value < 0 else ""
    return f"{sign}{format_percent(abs(value))}"


def error_table(errors: Sequence[float]) -> pd.DataFrame:
    """ERROR_COLUMNS a bin: evenly wide, an edge at 0, from the smallest error to the largest."""
    values = [float(error) for error in errors]
    if not values:
        return pd.DataFrame({"low_percent": [], "high_percent": [], "runs": []}).astype({"runs": "int64"})
    width = _bin_width(max(values) - min(values), len(values))
    first, last = math.floor(min(values) / width), math.floor(max(values) / width)
    counts = dict.fromkeys(range(first, last + 1), 0)
    for value in values:
        counts[math.floor(value / width)] += 1
    # Rounding takes the float dust off edges such as 3 * 0.1.
    rows = [(round(i * width, 9), round((i + 1) * width, 9), count) for i, count in counts.items()]
    return pd.DataFrame(rows, columns=list(ERROR_COLUMNS))


def _bin_width(span: float, count: int) -> float:
    """A round width that gives about sqrt(n) bins, never more than MOST_BINS."""
    wanted = max(span / max(5.0, math.sqrt(count)), span / MOST_BINS, 0.01)
    power = 10.0 ** math.floor(math.log10(wanted))
    return next(power * step for step in STEPS if power * step >= wanted * 0.999)


def plot_errors(table: pd.DataFrame, *, band: tuple[float, float] | None = None, band_text: str = "") -> go.Figure:
    """Runs by error, a bar a bin; the shaded `band` is the interval that predictions are given."""
    lows, highs = [float(v) for v in table["low_percent"]], [float(v) for v in table["high_percent"]]
    layout = chart_layout(height=420, x="Measured − predicted (% of predicted)", y="Runs")
    layout["showlegend"] = False
    layout["yaxis"] |= {"rangemode": "tozero", "tickformat": "d"}
    layout["shapes"] = [
        {"type": "line", "x0": 0, "x1": 0, "y0": 0, "y1": 1, "yref": "paper", "line": {"color": GREY, "dash": "dash"}}
    ]
    if band:
        layout["shapes"].append(
            {
                "type": "rect",
                "x0": band[0],
                "x1": band[1],
                "y0": 0,
                "y1": 1,
                "yref": "paper",
                "fillcolor": METHOD_COLOURS["base"],
                "opacity": 0.15,
                "line": {"width": 0},
                "layer": "below",
            }
        )
        layout["annotations"] = [
            {
                "x": 0.5,
                "y": 1,
                "xref": "paper",
                "yref": "paper",
                "yanchor": "bottom",
                "showarrow": False,
                "text": band_text,
            }
        ]
        layout["margin"] |= {"t": 30}
    bars = {
        "type": "bar",
        "x": [(low + high) / 2 for low, high in zip(lows, highs, strict=True)],
        "width": [high - low for low, high in zip(lows, highs, strict=True)],
        "y": [int(v) for v in table["runs"]],
        "marker": {"color": METHOD_COLOURS["full"], "line": {"width": 1, "color": "rgba(255,255,255,0.6)"}},
        "customdata": [
            f"{signed_percent(low)} to {signed_percent(high)}: {count} {'run' if count == 1 else 'runs'}"
            for low, high, count in zip(lows, highs, table["runs"], strict=True)
        ],
        "hovertemplate": "%{customdata}<extra></extra>",
    }
    return go.Figure({"data": [bars], "layout": layout})
