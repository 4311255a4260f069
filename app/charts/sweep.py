"""What a sweep found.

`frame` is the tidy table of runs (`lora_engine.runs.runs_frame`); `cells` has one row a configuration and `best`
one a rank or a rank and alpha, with the columns of `lora_engine.sweeps.summarize_cells` and `best_over`."""

import math

import pandas as pd
import plotly.graph_objects as go
from formatting import byte_unit, format_bytes, format_integer, format_loss, format_number, plural

from charts.common import BLUE, GREY, GREY_BLUE, ORANGE, base_layout, empty_figure, faded, rank_axis

WAITING = "The first finished run starts this chart."
WIDE_RATIO = 4  # from this ratio on, small differences can only be seen on a log axis


def plot_loss_by_rank(best: pd.DataFrame, *, recommended: int | None = None, rate: float | None = None) -> go.Figure:
    """Evaluation loss against rank, best over alpha and learning rate (over alpha alone at a fixed `rate`), band over
    seeds."""
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
        name=_best_over(rate) + (", mean" if seeds > 1 else ""),
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


def _best_over(rate: float | None) -> str:
    if rate is None:
        return "best over alpha and learning rate"
    return f"best over alpha, learning rate {format_number(rate)} alone"


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


def cost_by_rank_table(frame: pd.DataFrame) -> pd.DataFrame:
    """For each rank: r, seconds, seconds_low, seconds_high, peak_bytes, predicted_peak_bytes, pack_peak_bytes, runs,
    shared (how many of the runs shared their passes with others; their seconds are equal shares)."""
    done = frame[(frame["status"] == "done") & frame["seconds"].notna()]
    done = done.assign(shared=done["pack_size"] > 1)
    return (
        done.groupby("r", as_index=False)
        .agg(
            seconds=("seconds", "median"),
            seconds_low=("seconds", "min"),
            seconds_high=("seconds", "max"),
            peak_bytes=("peak_bytes", "max"),
            predicted_peak_bytes=("predicted_peak_bytes", "max"),
            pack_peak_bytes=("pack_peak_bytes", "max"),
            shared=("shared", "sum"),
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
    what = "Share of the pass a run" if table["shared"].any() else "Time a run"
    base_layout(figure, height=300, x="Rank (r)", y=f"{what}, measured (s)", showlegend=False)
    figure.update_yaxes(rangemode="tozero")
    return rank_axis(figure, table["r"])


def decade_ticks(low: float, high: float) -> dict[str, list[float]]:
    """1, 2, 5, 10, ... from below `low` to above `high`: tick values of a log axis, in plain numbers."""
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    values = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    return {"tickvals": [v for v in values if low / 2.5 <= v <= high * 2.5]}


def plot_memory_by_rank(table: pd.DataFrame) -> go.Figure:
    """Peak memory against rank, measured beside predicted; of a pack also what all its runs took together."""
    if table.empty:
        return empty_figure(WAITING)
    alone = " alone" if table["shared"].any() else ""
    columns = {
        "peak_bytes": (f"measured{alone}", ORANGE, "solid"),
        "predicted_peak_bytes": (f"predicted{alone}", BLUE, "dash"),
        "pack_peak_bytes": ("whole pack, measured", GREY_BLUE, "dot"),
    }
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
    known = [float(v) for trace in figure.data for v in trace.y if v == v]
    if known and max(known) > WIDE_RATIO * min(known):
        figure.update_yaxes(type="log", **decade_ticks(min(known), max(known)))
    else:
        figure.update_yaxes(rangemode="tozero")
    return rank_axis(figure, table["r"])
