"""What a sweep found.

`frame` is the tidy table of runs (`lora_engine.runs.runs_frame`); `cells` has one row a configuration and `best`
one a rank or a rank and alpha, with the columns of `lora_engine.sweeps.summarize_cells` and `best_over`."""

import math

import pandas as pd
import plotly.graph_objects as go
from formatting import byte_unit, format_bytes, format_integer, format_loss, format_number, format_ratio, plural

from charts.common import BLUE, GREY, ORANGE, base_layout, empty_figure, faded, rank_axis

Cells = dict[tuple[float, float], object]

WAITING = "The first finished run starts this chart."


def plot_loss_by_rank(best: pd.DataFrame, *, recommended: int | None = None) -> go.Figure:
    """Evaluation loss against rank, best over alpha and learning rate, band over seeds."""
    if best.empty:
        return empty_figure(WAITING)
    figure = go.Figure()
    seeds = int(best["num_seeds"].max())
    if seeds > 1:
        figure.add_scatter(
            x=[*best["r"], *reversed(list(best["r"]))],
            y=[*best["eval_loss_max"], *reversed(list(best["eval_loss_min"]))],
            fill="toself",
            fillcolor=faded(ORANGE, 0.22),
            mode="lines",
            line={"width": 0},
            name=f"spread over {plural(seeds, 'seed')}",
            hoverinfo="skip",
        )
    figure.add_scatter(
        x=best["r"],
        y=best["eval_loss"],
        mode="lines+markers",
        name="best over alpha and learning rate" + (", mean" if seeds > 1 else ""),
        line={"color": ORANGE, "width": 2.5},
        marker={"size": 8},
        customdata=[
            [
                format_number(row["lora_alpha"]),
                format_number(row["lr"]),
                format_loss(row["eval_loss_min"]),
                format_loss(row["eval_loss_max"]),
                plural(int(row["num_seeds"]), "seed"),
            ]
            for row in best.to_dict("records")
        ],
        hovertemplate="Rank %{x}: %{y:.4f}<br>alpha %{customdata[0]}, learning rate %{customdata[1]}"
        "<br>%{customdata[2]} to %{customdata[3]} over %{customdata[4]}<extra></extra>",
    )
    chosen = best[best["r"] == recommended]
    if len(chosen):
        figure.add_scatter(
            x=chosen["r"],
            y=chosen["eval_loss"],
            mode="markers+text",
            marker={"size": 15, "color": ORANGE},
            text=[f"<b>rank {recommended}</b>"],
            textposition="top center",
            showlegend=False,
            hoverinfo="skip",
        )
    base_layout(figure, x="Rank (r)", y="Evaluation loss (nats a token)", showlegend=seeds > 1)
    return rank_axis(figure, best["r"])


def pareto_table(cells: pd.DataFrame) -> pd.DataFrame:
    """Columns trainable_parameters, eval_loss, r, lora_alpha, lr, num_seeds, on_front; smallest first."""
    columns = ["trainable_parameters", "eval_loss", "r", "lora_alpha", "lr", "num_seeds"]
    table = cells.loc[cells["eval_loss"].notna(), columns]
    table = table.sort_values(["trainable_parameters", "eval_loss"], ignore_index=True)
    before = table["eval_loss"].cummin().shift(fill_value=float("inf"))
    return table.assign(on_front=table["eval_loss"] < before)


def plot_pareto(table: pd.DataFrame) -> go.Figure:
    """Loss against trainable parameters; the line joins what nothing smaller beats."""
    if table.empty:
        return empty_figure(WAITING)
    figure = go.Figure()
    front = table[table["on_front"]]
    hover = (
        "%{customdata[0]} parameters, loss %{y:.4f}<br>rank %{customdata[1]}, alpha %{customdata[2]}, "
        "learning rate %{customdata[3]}<extra></extra>"
    )

    def detail(rows: pd.DataFrame) -> list[list[str]]:
        return [
            [format_integer(n), format_number(r), format_number(a), format_number(lr)]
            for n, r, a, lr in zip(rows["trainable_parameters"], rows["r"], rows["lora_alpha"], rows["lr"], strict=True)
        ]

    rest = table[~table["on_front"]]
    if len(rest):
        figure.add_scatter(
            x=rest["trainable_parameters"],
            y=rest["eval_loss"],
            mode="markers",
            name="beaten by something smaller",
            marker={"size": 8, "color": GREY, "symbol": "circle-open", "line": {"width": 1.5}},
            customdata=detail(rest),
            hovertemplate=hover,
        )
    figure.add_scatter(
        x=front["trainable_parameters"],
        y=front["eval_loss"],
        mode="lines+markers+text",
        name="Pareto front",
        line={"color": ORANGE, "width": 2, "shape": "hv"},
        marker={"size": 10, "color": ORANGE},
        text=[f"r {format_number(r)}" for r in front["r"]],
        textposition="top right",
        customdata=detail(front),
        hovertemplate=hover,
    )
    base_layout(figure, x="Trainable parameters", y="Evaluation loss (nats a token)", showlegend=len(rest) > 0)
    ticks = sorted(set(table["trainable_parameters"]))
    # Room for the labels beside the first and the last point; a log axis takes exponents.
    figure.update_xaxes(type="log", showgrid=False, range=[math.log10(ticks[0]) - 0.12, math.log10(ticks[-1]) + 0.2])
    if len(ticks) <= 6:
        figure.update_xaxes(tickvals=ticks, ticktext=[f"{t:,.0f}" for t in ticks])
    return figure


def heatmap_table(frame: pd.DataFrame, best: pd.DataFrame) -> pd.DataFrame:
    """One row a cell: r, lora_alpha, eval_loss (NaN before), lr, done, running, total (runs)."""
    counts = frame.groupby(["r", "lora_alpha"], as_index=False).agg(
        total=("status", "size"),
        done=("status", lambda s: int((s == "done").sum())),
        running=("status", lambda s: int((s == "running").sum())),
    )
    return counts.merge(best[["r", "lora_alpha", "eval_loss", "lr"]], on=["r", "lora_alpha"], how="left")


def plot_heatmap(table: pd.DataFrame) -> go.Figure:
    """Loss over rank and alpha; dotted lines join cells of equal alpha / r."""
    ranks, alphas = sorted(set(table["r"])), sorted(set(table["lora_alpha"]))
    cell: Cells = {
        (float(r), float(a)): row for r, a, row in zip(table["r"], table["lora_alpha"], table.itertuples(), strict=True)
    }
    z = [[_loss(cell.get((r, a))) for r in ranks] for a in alphas]
    known = [v for line in z for v in line if v is not None]
    decimals = telling_decimals(known)
    figure = go.Figure()
    figure.add_heatmap(
        z=z,
        x=list(range(len(ranks))),
        y=list(range(len(alphas))),
        zmin=min(known) if known else 0,
        zmax=max(known) if known else 1,
        colorscale="Cividis",
        showscale=bool(known),
        colorbar={"title": {"text": "loss"}, "thickness": 12},
        xgap=3,
        ygap=3,
        text=[[_cell_text(v, decimals) for v in line] for line in z],
        texttemplate="%{text}" if known else None,
        customdata=[[_cell_hover(r, a, cell.get((r, a))) for r in ranks] for a in alphas],
        hovertemplate="%{customdata}<extra></extra>",
    )
    _waiting_marks(figure, ranks, alphas, cell)
    _equal_ratio_lines(figure, ranks, alphas, cell)
    base_layout(figure, height=170 + 52 * len(alphas), x="Rank (r)", y="Scaling (alpha)", showlegend=False)
    figure.update_xaxes(
        tickvals=list(range(len(ranks))),
        ticktext=[format_number(r) for r in ranks],
        range=[-0.5, len(ranks) - 0.5],
        showgrid=False,
        zeroline=False,
    )
    figure.update_yaxes(
        tickvals=list(range(len(alphas))),
        ticktext=[format_number(a) for a in alphas],
        range=[-0.5, len(alphas) - 0.5],
        showgrid=False,
        zeroline=False,
    )
    return figure


def _loss(row: object) -> float | None:
    value = getattr(row, "eval_loss", float("nan"))
    return None if value != value else float(value)  # NaN is not itself


def _cell_text(value: float | None, decimals: int) -> str:
    return "" if value is None else f"{value:.{decimals}f}"


def telling_decimals(values: list[float], *, least: int = 2, most: int = 4) -> int:
    """As few decimals as tell the values apart."""
    for decimals in range(least, most):
        if len({f"{value:.{decimals}f}" for value in values}) == len(set(values)):
            return decimals
    return most


def _cell_hover(r: float, alpha: float, row: object) -> str:
    head = f"Rank {format_number(r)}, alpha {format_number(alpha)}, alpha / r = {format_ratio(alpha / r)}"
    if row is None:
        return f"{head}<br>not in this sweep"
    value = _loss(row)
    loss = "" if value is None else f"<br>loss {value:.4f} at learning rate {format_number(getattr(row, 'lr', None))}"
    return f"{head}{loss}<br>{getattr(row, 'done', 0)} of {plural(getattr(row, 'total', 0), 'run')} done"


def _waiting_marks(figure: go.Figure, ranks: list[float], alphas: list[float], cell: Cells) -> None:
    for word, running in (("running", True), ("queued", False)):
        spots = [
            (i, j)
            for j, a in enumerate(alphas)
            for i, r in enumerate(ranks)
            if (row := cell.get((r, a))) is not None
            and _loss(row) is None
            and bool(getattr(row, "running", 0)) == running
        ]
        if spots:
            figure.add_scatter(
                x=[i for i, _ in spots],
                y=[j for _, j in spots],
                mode="text",
                text=[word] * len(spots),
                textfont={"color": ORANGE if running else GREY},
                hoverinfo="skip",
            )


def _equal_ratio_lines(figure: go.Figure, ranks: list[float], alphas: list[float], cell: Cells) -> None:
    by_ratio: dict[float, list[tuple[int, int]]] = {}
    for i, r in enumerate(ranks):
        for j, a in enumerate(alphas):
            if (r, a) in cell:
                by_ratio.setdefault(round(a / r, 9), []).append((i, j))
    for ratio, spots in by_ratio.items():
        if len(spots) < 2:
            continue
        figure.add_scatter(
            x=[i for i, _ in spots],
            y=[j - 0.32 for _, j in spots],
            mode="lines",
            line={"color": "white", "width": 1.2, "dash": "dot"},
            opacity=0.8,
            hoverinfo="skip",
            name=f"alpha / r = {format_ratio(ratio)}",
        )


def cost_by_rank_table(frame: pd.DataFrame) -> pd.DataFrame:
    """For each rank: r, seconds, seconds_low, seconds_high, peak_bytes, predicted_peak_bytes, runs."""
    done = frame[(frame["status"] == "done") & frame["seconds"].notna()]
    return (
        done.groupby("r", as_index=False)
        .agg(
            seconds=("seconds", "median"),
            seconds_low=("seconds", "min"),
            seconds_high=("seconds", "max"),
            peak_bytes=("peak_bytes", "max"),
            predicted_peak_bytes=("predicted_peak_bytes", "max"),
            runs=("seconds", "size"),
        )
        .sort_values("r", ignore_index=True)
    )


def plot_time_by_rank(table: pd.DataFrame) -> go.Figure:
    """Median seconds a run against rank, whiskers from the fastest to the slowest run."""
    if table.empty:
        return empty_figure(WAITING)
    figure = go.Figure()
    figure.add_scatter(
        x=table["r"],
        y=table["seconds"],
        mode="lines+markers",
        line={"color": ORANGE, "width": 2},
        marker={"size": 8},
        error_y={
            "type": "data",
            "symmetric": False,
            "array": table["seconds_high"] - table["seconds"],
            "arrayminus": table["seconds"] - table["seconds_low"],
            "color": ORANGE,
            "thickness": 1.2,
        },
        customdata=[plural(int(n), "run") for n in table["runs"]],
        hovertemplate="Rank %{x}: %{y:.1f} s, median of %{customdata}<extra></extra>",
    )
    base_layout(figure, height=300, x="Rank (r)", y="Time a run, measured (s)", showlegend=False)
    figure.update_yaxes(rangemode="tozero")
    return rank_axis(figure, table["r"])


def plot_memory_by_rank(table: pd.DataFrame) -> go.Figure:
    """Peak memory against rank, measured beside predicted."""
    if table.empty:
        return empty_figure(WAITING)
    columns = {"peak_bytes": ("measured", ORANGE, "solid"), "predicted_peak_bytes": ("predicted", BLUE, "dash")}
    largest = pd.to_numeric(table[list(columns)].max(axis=None))
    divisor, unit = byte_unit(float(largest) if pd.notna(largest) else 1.0)
    figure = go.Figure()
    for column, (word, colour, dash) in columns.items():
        values = pd.to_numeric(table[column])
        if values.notna().any():
            figure.add_scatter(
                x=table["r"],
                y=values / divisor,
                mode="lines+markers",
                name=word,
                line={"color": colour, "width": 2, "dash": dash},
                marker={"size": 8},
                customdata=[format_bytes(v) for v in values],
                hovertemplate=f"Rank %{{x}}: %{{customdata}} {word}<extra></extra>",
            )
    base_layout(figure, height=300, x="Rank (r)", y=f"Peak memory ({unit})")
    figure.update_yaxes(rangemode="tozero")
    return rank_axis(figure, table["r"])
