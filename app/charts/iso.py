"""Lines of equal scaling over a map of rank and alpha: alpha / r, or alpha / sqrt(r) with rsLoRA."""

import math
from collections.abc import Iterable, Sequence

import pandas as pd
import plotly.graph_objects as go
from formatting import format_ratio

MOST_LINES = 10
POWERS = {"alpha / r": 1.0, "alpha / √r": 0.5}
# Half axes of the hole left around a cell's text, in cells.
_HOLE = (0.3, 0.28)
_SAMPLES = 48


def iso_table(ranks: Iterable[float], alphas: Iterable[float], *, power: float) -> pd.DataFrame:
    """Vertices of the lines alpha = scaling * r**power; columns scaling, x, y, r, lora_alpha, from left to right.

    x and y are places on the map: the i-th rank is at x = i, and between two ranks log r runs evenly. Drawn are the
    scalings that several cells share; where fewer than two are shared, the powers of two that cross the map."""
    ranks, alphas = sorted(set(ranks)), sorted(set(alphas))
    rows = []
    for scaling in _scalings(ranks, alphas, power):
        for x, y in _vertices(scaling, ranks, alphas, power):
            rows.append((scaling, x, y, value_at(x, ranks), value_at(y, alphas)))
    return pd.DataFrame(rows, columns=["scaling", "x", "y", "r", "lora_alpha"])


def place_of(value: float, values: Sequence[float]) -> float:
    """Where `value` lies on an axis on which values[i] is at i: even in its logarithm in between, and beyond the
    ends as in the outermost interval."""
    logs = [math.log2(v) for v in values]
    if len(logs) == 1:
        return math.log2(value) - logs[0]
    i = next((i for i in range(1, len(logs) - 1) if math.log2(value) < logs[i]), len(logs) - 1)
    return i - 1 + (math.log2(value) - logs[i - 1]) / (logs[i] - logs[i - 1])


def value_at(place: float, values: Sequence[float]) -> float:
    """Inverse of `place_of`."""
    logs = [math.log2(v) for v in values]
    if len(logs) == 1:
        return float(2 ** (logs[0] + place))
    i = next((i for i in range(1, len(logs) - 1) if place < i), len(logs) - 1)
    return float(2 ** (logs[i - 1] + (place - i + 1) * (logs[i] - logs[i - 1])))


def _scalings(ranks: Sequence[float], alphas: Sequence[float], power: float) -> list[float]:
    counts: dict[float, int] = {}
    for r in ranks:
        for alpha in alphas:
            scaling = float(f"{alpha / r**power:.9g}")
            counts[scaling] = counts.get(scaling, 0) + 1
    chosen = sorted(scaling for scaling, count in counts.items() if count > 1)
    if len(chosen) < 2:
        low = value_at(-0.4, alphas) / value_at(len(ranks) - 0.6, ranks) ** power
        high = value_at(len(alphas) - 0.6, alphas) / value_at(-0.4, ranks) ** power
        chosen = [2.0**k for k in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)]
    return chosen[:: math.ceil(len(chosen) / MOST_LINES)] if chosen else []


def _vertices(
    scaling: float, ranks: Sequence[float], alphas: Sequence[float], power: float
) -> list[tuple[float, float]]:
    """Where the line enters the map, bends and leaves it. It bends only at places of ranks and alphas."""
    right, top = len(ranks) - 0.5, len(alphas) - 0.5
    found = set()
    for x in (-0.5, *range(len(ranks)), right):
        y = place_of(scaling * value_at(x, ranks) ** power, alphas)
        if -0.5 <= y <= top:
            found.add((round(x, 9), round(y, 9)))
    for y in (-0.5, *range(len(alphas)), top):
        x = place_of((value_at(y, alphas) / scaling) ** (1 / power), ranks)
        if -0.5 <= x <= right:
            found.add((round(x, 9), round(y, 9)))
    return sorted(found)


def draw_iso_lines(figure: go.Figure, iso: pd.DataFrame, word: str, num_ranks: int, num_alphas: int) -> None:
    """Dotted lines that leave the middle of each cell free, each with its value where it leaves the map."""
    for scaling, line in iso.groupby("scaling", sort=True):
        xs, ys = _with_holes(list(line["x"]), list(line["y"]), num_ranks, num_alphas)
        # White and dark in turns: to be seen on every colour of the map and on both themes.
        for colour, dash in (("#5A6166", "4px,4px"), ("#FFFFFF", "0px,4px,4px,0px")):
            figure.add_scatter(
                x=xs,
                y=ys,
                mode="lines",
                line={"color": colour, "width": 1.6, "dash": dash},
                hoverinfo="skip",
                name=f"{word} = {format_ratio(float(scaling))}",  # type: ignore[arg-type]
            )
        x, y = line["x"].iloc[-1], line["y"].iloc[-1]
        at_top = y >= num_alphas - 0.5 - 1e-6
        figure.add_annotation(
            x=x,
            y=y,
            text=format_ratio(float(scaling)),  # type: ignore[arg-type]
            showarrow=False,
            xanchor="center" if at_top else "left",
            yanchor="bottom" if at_top else "middle",
            font={"size": 11},
        )
    if not iso.empty:
        figure.add_annotation(
            text=word, xref="paper", yref="paper", x=0, y=1, xanchor="right", yanchor="bottom", showarrow=False,
            font={"size": 11},
        )  # fmt: skip


def _with_holes(
    xs: Sequence[float], ys: Sequence[float], num_ranks: int, num_alphas: int
) -> tuple[list[float | None], list[float | None]]:
    """The polyline, interrupted (None) around the centre of each cell."""
    out_x: list[float | None] = []
    out_y: list[float | None] = []
    for i in range(len(xs) - 1):
        for k in range(_SAMPLES + 1):
            share = k / _SAMPLES
            x, y = xs[i] + share * (xs[i + 1] - xs[i]), ys[i] + share * (ys[i + 1] - ys[i])
            column, row = min(max(round(x), 0), num_ranks - 1), min(max(round(y), 0), num_alphas - 1)
            covered = ((x - column) / _HOLE[0]) ** 2 + ((y - row) / _HOLE[1]) ** 2 < 1
            out_x.append(None if covered else x)
            out_y.append(None if covered else y)
    return out_x, out_y
