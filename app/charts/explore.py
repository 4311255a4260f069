"""What a rank costs: memory by precision, parameters against rank."""

import math
from collections.abc import Iterable, Mapping

import pandas as pd
import plotly.graph_objects as go
from formatting import byte_unit, format_bytes, format_integer, format_percent

from charts.common import BLUE, ORANGE, TERM_COLOURS, TERM_WORDS, VERMILION, base_layout, rank_axis


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
    totals = table.groupby(["precision", "method"], sort=False)["bytes"].sum()
    largest = float(totals.max()) if len(totals) else 1.0
    divisor, unit = byte_unit(largest)
    places = _places(list(totals.index))
    figure = go.Figure()
    for term, colour in TERM_COLOURS.items():
        of_term = table[table["term"] == term].set_index(["precision", "method"])["bytes"]
        values = {pair: float(of_term.get(pair, 0)) for pair in places}
        if not any(values.values()):
            continue
        figure.add_bar(
            y=list(places.values()),
            x=[v / divisor for v in values.values()],
            width=0.4,
            orientation="h",
            name=TERM_WORDS[term],
            marker={"color": colour, "line": {"width": 0}},
            customdata=[
                [_bar_name(pair, lora_word), format_bytes(v), format_integer(v), format_bytes(totals[pair])]
                for pair, v in values.items()
            ],
            hovertemplate=f"%{{customdata[0]}}<br>{TERM_WORDS[term]}: %{{customdata[1]}} (%{{customdata[2]}} bytes)"
            "<br>together %{customdata[3]}<extra></extra>",
        )
    figure.add_scatter(
        y=list(places.values()),
        x=[totals[pair] / divisor for pair in places],
        mode="text",
        text=[f" {lora_word if m == 'lora' else 'full'}, {format_bytes(totals[p, m])}" for p, m in places],
        textposition="middle right",
        textfont={"size": 11},
        hoverinfo="skip",
        showlegend=False,
        cliponaxis=False,
    )
    with_card = card_bytes is not None and card_bytes <= 1.45 * largest
    precisions = list(dict.fromkeys(precision for precision, _ in places))
    middles = [[y for (p, _), y in places.items() if p == precision] for precision in precisions]
    base_layout(figure, height=140 + 23 * len(places), x=f"Peak memory to train, predicted ({unit})", y="Precision")
    figure.update_layout(barmode="stack", legend={"traceorder": "normal", "font": {"size": 12}, "entrywidth": 82})
    # Room on the right for the text behind the longest bar.
    figure.update_xaxes(range=[0, largest / divisor * 1.5], showgrid=False)
    figure.update_yaxes(
        tickvals=[sum(ys) / len(ys) for ys in middles],
        ticktext=[f"<b>{p}</b>" if p == current else p for p in precisions],
        range=[max(places.values()) + (1.3 if with_card else 0.5), -0.5],
        showgrid=False,
        zeroline=False,
    )
    if with_card:
        edge = (card_bytes or 0) / divisor
        figure.add_vline(x=edge, line={"width": 1.5, "dash": "dash", "color": VERMILION})
        figure.add_annotation(
            x=edge,
            y=0,
            yref="paper",
            yanchor="bottom",
            xanchor="left" if edge < largest / divisor else "right",
            showarrow=False,
            text=f" {card_name} ",
        )
    return figure


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
    figure = go.Figure()
    detail = [
        [format_integer(n), format_percent(p)]
        for n, p in zip(table["trainable_parameters"], table["trainable_percent"], strict=True)
    ]
    hover = "Rank %{x}<br>%{customdata[0]} parameters<br>%{customdata[1]} of the model<extra></extra>"
    figure.add_scatter(
        x=table["r"],
        y=table["trainable_parameters"],
        mode="lines+markers",
        name=f"LoRA, {target_word}",
        line={"color": ORANGE, "width": 2},
        marker={"size": 6, "color": ORANGE, "symbol": "circle-open", "line": {"width": 1.5}},
        customdata=detail,
        hovertemplate=hover,
    )
    chosen = table[table["r"] == r]
    if len(chosen):
        figure.add_scatter(
            x=chosen["r"],
            y=chosen["trainable_parameters"],
            mode="markers+text",
            name="yours",
            marker={"size": 14, "color": ORANGE},
            text=[f"<b>rank {r}: {format_integer(chosen['trainable_parameters'].iloc[0])}</b>"],
            textposition="top left" if r > 8 else "bottom right",
            customdata=[detail[int(chosen.index[0])]],
            hovertemplate=hover,
        )
    figure.add_hline(y=full_parameters, line={"color": BLUE, "width": 1.5, "dash": "dash"})
    figure.add_annotation(
        x=0,
        xref="paper",
        xanchor="left",
        y=math.log10(max(full_parameters, 1)),
        yanchor="bottom",
        showarrow=False,
        text=f"the whole model: {format_integer(full_parameters)}",
    )
    base_layout(figure, height=420, x="Rank (r)", y="Trainable parameters", showlegend=False)
    figure.update_yaxes(type="log", dtick=1, exponentformat="B")
    return rank_axis(figure, table["r"])
