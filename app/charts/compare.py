"""What a comparison of methods found.

`rows` is the list of `lora_engine.sweeps.verdict.summarize_methods`, one dict a method."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from formatting import byte_unit, format_bytes, format_integer, format_loss, format_number, plural, significant

from charts.common import (
    GREY,
    METHOD_COLOURS,
    ORANGE,
    SKY,
    TERM_COLOURS,
    TERM_WORDS,
    base_layout,
    empty_figure,
    faded,
)

Rows = Sequence[Mapping[str, Any]]

METHOD_NAMES = {
    "lora": "LoRA",
    "full": "Full fine-tuning",
    "head": "Head only",
    "bottleneck": "Adapter layers",
    "prefix": "Prefix tuning",
    "ia3": "(IA)³",
    "base": "Base model",
}
WAITING = "The first finished run starts this chart."
LOSS_AXIS = "Evaluation loss (nats)"


def method_colour(method: str) -> str:
    """A method's colour on every page; one that has none there is sky blue."""
    return METHOD_COLOURS.get(method, SKY)


def methods_pareto_table(rows: Rows) -> pd.DataFrame:
    """method, trainable_parameters, eval_loss, loss_low, loss_high, num_seeds, lr, on_front; smallest first."""
    columns = ["method", "trainable_parameters", "eval_loss", "loss_low", "loss_high", "num_seeds", "lr"]
    table = pd.DataFrame(
        [
            (
                row["method"],
                row["trainable_parameters"],
                row["eval_loss_after"],
                row["eval_loss_after_min"],
                row["eval_loss_after_max"],
                row["num_seeds"],
                row["lr"],
            )
            for row in rows
            if row["eval_loss_after"] is not None
        ],
        columns=columns,
    )
    table = table.sort_values(["trainable_parameters", "eval_loss"], ignore_index=True)
    before = table["eval_loss"].astype("float64").cummin().shift(fill_value=float("inf"))
    return table.assign(on_front=table["eval_loss"] < before)


def plot_methods_pareto(table: pd.DataFrame) -> go.Figure:
    """Loss against trainable parameters, a point a method with its spread; a line joins what nothing smaller beats."""
    if table.empty:
        return empty_figure(WAITING)
    figure = go.Figure()
    front = table[table["on_front"]]
    if len(front) > 1:
        figure.add_scatter(
            x=front["trainable_parameters"],
            y=front["eval_loss"],
            mode="lines",
            line={"color": GREY, "width": 1.5, "shape": "hv"},
            hoverinfo="skip",
            showlegend=False,
        )
    # Names stay inside the plot: the first leans right, the last left.
    places = ["top right", *["top center"] * (len(table) - 2), "top left"] if len(table) > 1 else ["top center"]
    for row, place in zip(table.to_dict("records"), places, strict=True):
        name = METHOD_NAMES.get(row["method"], row["method"])
        seeds = plural(int(row["num_seeds"]), "seed")
        figure.add_scatter(
            x=[row["trainable_parameters"]],
            y=[row["eval_loss"]],
            mode="markers+text",
            name=name,
            text=[name],
            textposition=place,
            marker={"size": 15 if row["method"] == "lora" else 11, "color": method_colour(row["method"])},
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [row["loss_high"] - row["eval_loss"]],
                "arrayminus": [row["eval_loss"] - row["loss_low"]],
                "color": method_colour(row["method"]),
                "thickness": 1.5,
            },
            hovertemplate=f"{name}: {row['eval_loss']:.4f}, mean of {seeds}<br>"
            f"{format_loss(row['loss_low'])} to {format_loss(row['loss_high'])} over them<br>"
            f"{format_integer(row['trainable_parameters'])} parameters, learning rate {format_number(row['lr'])}"
            "<extra></extra>",
        )
    base_layout(figure, x="Trainable parameters", y=LOSS_AXIS, showlegend=False)
    counts = table["trainable_parameters"]
    # A log axis takes exponents; room for the names beside the first and the last point.
    figure.update_xaxes(type="log", dtick=1, range=[math.log10(counts.min()) - 0.4, math.log10(counts.max()) + 0.4])
    return figure


def loss_by_time_table(evals: pd.DataFrame, steps: pd.DataFrame, methods: Mapping[str, str]) -> pd.DataFrame:
    """method, run_id, step, seconds, eval_loss: each evaluation at the seconds its run had spent in steps by then.

    `methods` maps run_id to method."""
    spent = steps[["run_id", "step", "seconds"]]
    table = evals.merge(spent, on=["run_id", "step"], how="left")
    table["seconds"] = table["seconds"].where(table["step"] > 0, 0.0)
    table = table[table["run_id"].isin(list(methods)) & table["seconds"].notna()]
    table = table.assign(method=table["run_id"].map(dict(methods)))
    return table[["method", "run_id", "step", "seconds", "eval_loss"]].reset_index(drop=True)


def plot_loss_by_time(table: pd.DataFrame) -> go.Figure:
    """Loss against seconds in steps, a line a run; one colour a method."""
    if table.empty:
        return empty_figure(WAITING)
    figure = go.Figure()
    seen: set[str] = set()
    for (method, run_id), rows in table.groupby(["method", "run_id"], sort=False):
        name = METHOD_NAMES.get(str(method), str(method))
        figure.add_scatter(
            x=rows["seconds"],
            y=rows["eval_loss"],
            mode="lines+markers",
            name=name,
            legendgroup=str(method),
            showlegend=method not in seen,
            line={"color": method_colour(str(method)), "width": 1.6},
            marker={"size": 5},
            customdata=rows["step"],
            hovertemplate=f"{name}: %{{y:.4f}} after %{{x:.1f}} s, step %{{customdata}}<br>run {run_id}<extra></extra>",
        )
        seen.add(str(method))
    base_layout(figure, x="Time in training steps, measured (s)", y=LOSS_AXIS)
    figure.update_xaxes(rangemode="tozero")
    return figure


def method_memory_table(rows: Rows) -> pd.DataFrame:
    """method, term, bytes (predicted), and measured peak_bytes, a row a method and term."""
    return pd.DataFrame(
        [
            (row["method"], term, value, row["peak_bytes"])
            for row in rows
            for term, value in (row["predicted_terms"] or {}).items()
        ],
        columns=["method", "term", "bytes", "peak_bytes"],
    )


def plot_method_memory(table: pd.DataFrame) -> go.Figure:
    """Predicted memory by term, stacked, a bar a method; a mark where the measured peak was."""
    if table.empty:
        return empty_figure(WAITING)
    methods = list(dict.fromkeys(table["method"]))
    names = [METHOD_NAMES.get(method, method) for method in methods]
    divisor, unit = byte_unit(max(table.groupby("method")["bytes"].sum().max(), table["peak_bytes"].max()))
    figure = go.Figure()
    for term, colour in TERM_COLOURS.items():
        held = table[table["term"] == term].set_index("method")["bytes"].reindex(methods, fill_value=0)
        if held.sum():
            figure.add_bar(
                x=names,
                y=held / divisor,
                name=TERM_WORDS[term],
                marker={"color": colour},
                customdata=[format_bytes(value) for value in held],
                hovertemplate=f"%{{x}}: %{{customdata}} {TERM_WORDS[term].lower()}, predicted<extra></extra>",
            )
    measured = table.groupby("method")["peak_bytes"].first().reindex(methods)
    figure.add_scatter(
        x=names,
        y=measured / divisor,
        mode="markers",
        name="Measured peak",
        marker={"symbol": "line-ew", "size": 26, "line": {"width": 3, "color": GREY}},
        customdata=[format_bytes(value) for value in measured],
        hovertemplate="%{x}: %{customdata} measured<extra></extra>",
    )
    base_layout(figure, x="Method", y=f"Memory to train ({unit})", barmode="stack")
    return figure


def latency_table(rows: Rows, inference: Mapping[str, Any] | None) -> pd.DataFrame:
    """name, method, merged, milliseconds, ratio (to the base), ratio_low, ratio_high; the base first."""
    columns = ["name", "method", "merged", "milliseconds", "ratio", "ratio_low", "ratio_high"]
    timings = (inference or {}).get("timings") or {}
    wanted = [("base", "base", False)]
    for row in rows:
        wanted += [(row["method"], row["method"], False), (f"{row['method']} merged", row["method"], True)]
    lines = [
        (
            METHOD_NAMES.get(method, method) + (", merged" if merged else ""),
            method,
            merged,
            1000 * timings[key]["seconds_per_token"],
            timings[key]["ratio"],
            timings[key]["ratio_low"],
            timings[key]["ratio_high"],
        )
        for key, method, merged in wanted
        if key in timings
    ]
    return pd.DataFrame(lines, columns=columns)


def plot_latency(table: pd.DataFrame, *, unit: str, noise: tuple[float, float]) -> go.Figure:
    """Milliseconds a token, a bar a model; the band is how far the base differs from itself."""
    if table.empty:
        return empty_figure("Inference is measured when all runs are done.")
    figure = go.Figure()
    base = float(table["milliseconds"].iloc[0])
    figure.add_bar(
        y=table["name"],
        # The base's own time and a paired ratio: what slowed the machine for a while is in neither.
        x=base * table["ratio"],
        orientation="h",
        marker={
            "color": [
                faded(method_colour(method), 0.45) if merged else method_colour(method)
                for method, merged in zip(table["method"], table["merged"], strict=True)
            ]
        },
        customdata=[
            [significant(base * r), significant(r), significant(low), significant(high)]
            for r, low, high in zip(table["ratio"], table["ratio_low"], table["ratio_high"], strict=True)
        ],
        hovertemplate="%{y}: %{customdata[0]} ms, %{customdata[1]} times the base<br>"
        "nine of ten turns: %{customdata[2]} to %{customdata[3]} times<extra></extra>",
    )
    figure.add_vrect(
        x0=base * noise[0],
        x1=base * noise[1],
        fillcolor=faded(GREY, 0.4),
        line_width=0,
    )
    base_layout(figure, height=120 + 38 * len(table), x=f"Time a {unit} (ms)", y="", showlegend=False)
    figure.update_xaxes(rangemode="tozero")
    figure.update_yaxes(autorange="reversed")
    return figure


def confusion_table(matrix: Sequence[Sequence[int]], classes: Sequence[str]) -> pd.DataFrame:
    """true, guessed, sequences: a row a cell."""
    return pd.DataFrame(
        [
            (classes[i], classes[j], count)
            for i, line in enumerate(matrix)
            for j, count in enumerate(line)
        ],
        columns=["true", "guessed", "sequences"],
    )  # fmt: skip


def plot_confusion(table: pd.DataFrame) -> go.Figure:
    """How often each class (down) was taken for which (across)."""
    classes = list(dict.fromkeys(table["true"]))
    z = [[int(v) for v in table[table["true"] == name]["sequences"]] for name in classes]
    figure = go.Figure()
    figure.add_heatmap(
        x=classes,
        y=classes,
        z=z,
        zmin=0,
        colorscale="Cividis",
        showscale=False,
        xgap=3,
        ygap=3,
        text=[[f"{value:,}" for value in line] for line in z],
        texttemplate="%{text}" if len(classes) <= 12 else None,
        hovertemplate="%{y} taken for %{x}: %{z:,}<extra></extra>",
    )
    base_layout(figure, height=150 + 44 * min(12, len(classes)), x="Taken for", y="True class", showlegend=False)
    figure.update_yaxes(autorange="reversed")
    return figure


def plot_dial_curve(losses: Mapping[float, float], *, scale: float) -> go.Figure:
    """Evaluation loss along the dial, marked where the dial stands."""
    if not losses:
        return empty_figure("The loss at this place of the dial comes next.", height=260)
    figure = go.Figure()
    scales = sorted(losses)
    figure.add_scatter(
        x=scales,
        y=[losses[s] for s in scales],
        mode="lines+markers",
        line={"color": ORANGE, "width": 2},
        marker={"size": 6},
        hovertemplate="Scale %{x:g}: %{y:.4f}<extra></extra>",
    )
    if scale in losses:
        figure.add_scatter(
            x=[scale],
            y=[losses[scale]],
            mode="markers",
            marker={"size": 15, "color": ORANGE},
            hoverinfo="skip",
        )
    base_layout(figure, height=260, x="Scale of the update (0: base, 1: as trained)", y=LOSS_AXIS, showlegend=False)
    figure.update_xaxes(range=[-0.08, 2.08], dtick=0.5)
    return figure
