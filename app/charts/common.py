"""What all charts share: one colour for one meaning (Okabe-Ito), one layout, ticks at the ranks."""

from collections.abc import Iterable
from typing import Any

import plotly.graph_objects as go

ORANGE, SKY, GREEN, YELLOW = "#E69F00", "#56B4E9", "#009E73", "#F0E442"
BLUE, VERMILION, PURPLE, GREY_BLUE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#7A8CA3", "#9A9A9A"

TERM_COLOURS = {
    "weights": GREY_BLUE,
    "adapter": ORANGE,
    "gradients": SKY,
    "optimizer": GREEN,
    "activations": YELLOW,
    "logits": VERMILION,
    "overhead": GREY,
}
TERM_WORDS = {
    "weights": "Base weights",
    "adapter": "Adapter",
    "gradients": "Gradients",
    "optimizer": "Optimizer",
    "activations": "Activations",
    "logits": "Logits",
    "overhead": "Overhead",
}
METHOD_COLOURS = {
    "lora": ORANGE,
    "full": BLUE,
    "head": GREEN,
    "bottleneck": PURPLE,
    "prefix": VERMILION,
    "base": GREY,
}
# For curves of several runs; the eighth and later repeat with another dash.
SERIES = (ORANGE, BLUE, GREEN, PURPLE, VERMILION, SKY, GREY_BLUE)
DASHES = ("solid", "dash", "dot", "dashdot")


def chart_layout(*, height: int = 360, x: str, y: str) -> dict[str, Any]:
    """Axis titles, margins, legend above the plot, no title: the page's heading is the title."""
    return {
        "height": height,
        "margin": {"l": 8, "r": 12, "t": 12, "b": 8},
        "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0, "title": {"text": ""}},
        "hoverlabel": {"align": "left"},
        "xaxis": {"title": {"text": x, "standoff": 8}, "automargin": True},
        "yaxis": {"title": {"text": y, "standoff": 8}, "automargin": True},
    }


def base_layout(figure: go.Figure, *, height: int = 360, x: str, y: str, **layout: Any) -> go.Figure:
    """Give `figure` the `chart_layout`, and `layout` beside it."""
    figure.update_layout(chart_layout(height=height, x=x, y=y) | layout)
    return figure


def rank_axis(figure: go.Figure, ranks: Iterable[float]) -> go.Figure:
    """A log axis with its ticks at the ranks themselves."""
    figure.update_xaxes(rank_ticks(ranks))
    return figure


def rank_ticks(ranks: Iterable[float]) -> dict[str, Any]:
    """What makes an axis one of ranks."""
    values = sorted({int(r) for r in ranks})
    return {"type": "log", "tickvals": values, "ticktext": [str(v) for v in values], "showgrid": False}


def faded(colour: str, alpha: float = 0.2) -> str:
    """#rrggbb to rgba() with `alpha`."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def empty_figure(text: str, *, height: int = 240) -> go.Figure:
    """A blank plot that says what will be here."""
    figure = go.Figure()
    figure.add_annotation(text=text, showarrow=False, xref="paper", yref="paper", x=0.5, y=0.5)
    figure.update_layout(height=height, margin={"l": 8, "r": 8, "t": 8, "b": 8})
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    return figure
