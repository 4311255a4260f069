"""What a rank costs: memory by precision, parameters against rank."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from formatting import byte_unit, format_bytes, format_integer, format_percent

from charts.common import BLUE, ORANGE, TERM_COLOURS, TERM_WORDS, VERMILION, chart_layout, rank_ticks

MEMORY_COLUMNS = ("precision", "method", "term", "bytes")


def parameter_table(rows: Iterable[Mapping[str, object]]) -> pd.DataFrame:
    """Columns r, trainable_parameters, trainable_percent from a rank table; sorted by rank."""
    columns = ["r", "trainable_parameters", "trainable_percent"]
    frame = pd.DataFrame([{name: row[name] for name in columns} for row in rows], columns=columns)
    return frame.sort_values("r", ignore_index=True)


def plot_memory(
    table: pd.DataFrame, *, current: str, card_name: str = "", card_bytes: int | None = None, lora_word: str = "LoRA"
) -> go.Figure:
    """Stacked bars, full beside LoRA for each precision. `table`: precision, method ("full" | "lora"), term, bytes.

    The line at the card is drawn where it would not squeeze the bars to nothing."""
    sizes: dict[tuple[str, str], dict[str, float]] = {}
    for precision, method, term, size in zip(*(table[c] for c in MEMORY_COLUMNS), strict=True):
        sizes.setdefault((precision, method), {})[term] = float(size)
    totals = {pair: sum(terms.values()) for pair, terms in sizes.items()}
    largest = max(totals.values(), default=1.0)
    divisor, unit = byte_unit(largest)
    places = _places(list(totals))
    traces = [
        _term_bars(term, sizes, totals, places, divisor, lora_word)
        for term in TERM_COLOURS
        if any(terms.get(term) for terms in sizes.values())
    ]
    traces.append(
        {
            "type": "scatter",
            "x": [totals[pair] / divisor for pair in places],
            "y": list(places.values()),
            "mode": "text",
            "text": [f" {lora_word if m == 'lora' else 'full'}, {format_bytes(totals[p, m])}" for p, m in places],
            "textposition": "middle right",
            "textfont": {"size": 11},
            "hoverinfo": "skip",
            "showlegend": False,
            "cliponaxis": False,
        }
    )
    with_card = card_bytes is not None and card_bytes <= 1.45 * largest
    precisions = list(dict.fromkeys(precision for precision, _ in places))
    middles = [[y for (p, _), y in places.items() if p == precision] for precision in precisions]
    layout = chart_layout(height=140 + 23 * len(places), x=f"Peak memory to train, predicted ({unit})", y="Precision")
    layout["barmode"] = "stack"
    layout["legend"] |= {"traceorder": "normal", "font": {"size": 12}, "entrywidth": 82}
    # Room on the right for the text behind the longest bar.
    layout["xaxis"] |= {"range": [0, largest / divisor * 1.5], "showgrid": False}
    layout["yaxis"] |= {
        "tickvals": [sum(ys) / len(ys) for ys in middles],
        "ticktext": [f"<b>{p}</b>" if p == current else p for p in precisions],
        "range": [max(places.values(), default=0) + (1.3 if with_card else 0.5), -0.5],
        "showgrid": False,
        "zeroline": False,
    }
    if with_card:
        layout |= _card_line((card_bytes or 0) / divisor, card_name, left=(card_bytes or 0) < largest)
    return go.Figure({"data": traces, "layout": layout})


def _term_bars(
    term: str,
    sizes: Mapping[tuple[str, str], Mapping[str, float]],
    totals: Mapping[tuple[str, str], float],
    places: Mapping[tuple[str, str], float],
    divisor: int,
    lora_word: str,
) -> dict[str, Any]:
    values = {pair: sizes[pair].get(term, 0.0) for pair in places}
    word = TERM_WORDS[term]
    return {
        "type": "bar",
        "x": [value / divisor for value in values.values()],
        "y": list(places.values()),
        "width": 0.4,
        "orientation": "h",
        "name": word,
        "marker": {"color": TERM_COLOURS[term], "line": {"width": 0}},
        "customdata": [
            [_bar_name(pair, lora_word), format_bytes(value), format_integer(value), format_bytes(totals[pair])]
            for pair, value in values.items()
        ],
        "hovertemplate": f"%{{customdata[0]}}<br>{word}: %{{customdata[1]}} (%{{customdata[2]}} bytes)"
        "<br>together %{customdata[3]}<extra></extra>",
    }


def _card_line(edge: float, name: str, *, left: bool) -> dict[str, Any]:
    line = {"width": 1.5, "dash": "dash", "color": VERMILION}
    return {
        "shapes": [{"type": "line", "x0": edge, "x1": edge, "y0": 0, "y1": 1, "yref": "paper", "line": line}],
        "annotations": [
            {
                "x": edge,
                "y": 0,
                "yref": "paper",
                "yanchor": "bottom",
                "xanchor": "left" if left else "right",
                "showarrow": False,
                "text": f" {name} ",
            }
        ],
    }


def _places(pairs: list[tuple[str, str]]) -> dict[tuple[str, str], float]:
    """(precision, method) -> y: the bars of a precision touch, precisions stand apart."""
    places: dict[tuple[str, str], float] = {}
    y = 0.0
    for i, pair in enumerate(pairs):
        if i:
            y += 0.44 if pairs[i - 1][0] == pair[0] else 0.75
        places[pair] = y
    return places


def _bar_name(pair: tuple[str, str], lora_word: str) -> str:
    return f"{pair[0]}, {lora_word if pair[1] == 'lora' else 'full fine-tuning'}"


def plot_parameters(table: pd.DataFrame, *, r: int, full_parameters: int, target_word: str) -> go.Figure:
    """Trainable parameters against rank, log-log, with the current rank marked."""
    ranks, counts = [int(v) for v in table["r"]], [int(v) for v in table["trainable_parameters"]]
    detail = [[format_integer(n), format_percent(p)] for n, p in zip(counts, table["trainable_percent"], strict=True)]
    hover = "Rank %{x}<br>%{customdata[0]} parameters<br>%{customdata[1]} of the model<extra></extra>"
    traces: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "x": ranks,
            "y": counts,
            "mode": "lines+markers",
            "name": f"LoRA, {target_word}",
            "line": {"color": ORANGE, "width": 2},
            "marker": {"size": 6, "color": ORANGE, "symbol": "circle-open", "line": {"width": 1.5}},
            "customdata": detail,
            "hovertemplate": hover,
        }
    ]
    if r in ranks:
        i = ranks.index(r)
        traces.append(
            {
                "type": "scatter",
                "x": [r],
                "y": [counts[i]],
                "mode": "markers+text",
                "name": "yours",
                "marker": {"size": 14, "color": ORANGE},
                "text": [f"<b>rank {r}: {format_integer(counts[i])}</b>"],
                "textposition": "top left" if r > 8 else "bottom right",
                "customdata": [detail[i]],
                "hovertemplate": hover,
            }
        )
    layout = chart_layout(height=420, x="Rank (r)", y="Trainable parameters")
    layout["showlegend"] = False
    layout["xaxis"] |= rank_ticks(ranks)
    layout["yaxis"] |= {"type": "log", "dtick": 1, "exponentformat": "B"}
    line = {"color": BLUE, "width": 1.5, "dash": "dash"}
    layout["shapes"] = [
        {
            "type": "line",
            "xref": "paper",
            "x0": 0,
            "x1": 1,
            "y0": full_parameters,
            "y1": full_parameters,
            "line": line,
        }
    ]
    layout["annotations"] = [
        {
            "xref": "paper",
            "x": 0,
            "xanchor": "left",
            "y": math.log10(max(full_parameters, 1)),
            "yanchor": "bottom",
            "showarrow": False,
            "text": f"the whole model: {format_integer(full_parameters)}",
        }
    ]
    return go.Figure({"data": traces, "layout": layout})
