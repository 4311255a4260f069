"""Loss curves of one run and of several."""

from collections.abc import Mapping

import pandas as pd
import plotly.graph_objects as go
from formatting import format_loss, format_number

from charts.common import BLUE, DASHES, ORANGE, SERIES, base_layout, empty_figure

SMOOTHING = 0.25  # weight of the newest step in the smoothed line


def plot_curves(steps: pd.DataFrame, evals: pd.DataFrame, *, num_steps: int) -> go.Figure:
    """Training loss a step (faint) and smoothed, evaluation loss as marks. `steps`: step, train_loss;
    `evals`: step, eval_loss."""
    if steps.empty and evals.empty:
        return empty_figure("The curve starts with the first step.", height=340)
    figure = go.Figure()
    if len(steps):
        smooth = steps["train_loss"].ewm(alpha=SMOOTHING).mean()
        figure.add_scatter(
            x=steps["step"],
            y=steps["train_loss"],
            mode="lines",
            name="training, each step",
            line={"color": ORANGE, "width": 1},
            opacity=0.45,
            hovertemplate="Step %{x}<br>training loss %{y:.4f}<extra></extra>",
        )
        figure.add_scatter(
            x=steps["step"],
            y=smooth,
            mode="lines",
            name="training, smoothed",
            line={"color": ORANGE, "width": 2.5},
            hovertemplate="Step %{x}<br>smoothed %{y:.4f}<extra></extra>",
        )
    if len(evals):
        figure.add_scatter(
            x=evals["step"],
            y=evals["eval_loss"],
            mode="lines+markers",
            name="evaluation",
            line={"color": BLUE, "width": 2},
            marker={"size": 8, "color": BLUE},
            hovertemplate="Step %{x}<br>evaluation loss %{y:.4f}<extra></extra>",
        )
    base_layout(figure, height=340, x="Step", y="Loss (nats a token)")
    figure.update_xaxes(range=[-0.01 * num_steps, num_steps * 1.01])
    return figure


def overlay_table(evals: pd.DataFrame, names: Mapping[str, str]) -> pd.DataFrame:
    """Columns run_id, name, step, eval_loss for the runs in `names`, in their order."""
    kept = evals[evals["run_id"].isin(list(names))].copy()
    kept["name"] = kept["run_id"].map(names)
    order = {run_id: i for i, run_id in enumerate(names)}
    kept = kept.sort_values(["run_id", "step"], key=lambda c: c.map(order) if c.name == "run_id" else c)
    return kept[["run_id", "name", "step", "eval_loss"]].reset_index(drop=True)


def plot_overlay(table: pd.DataFrame) -> go.Figure:
    """Evaluation loss of several runs in one plot."""
    if table.empty:
        return empty_figure("These runs have no evaluations yet.")
    figure = go.Figure()
    for i, (run_id, rows) in enumerate(table.groupby("run_id", sort=False)):
        figure.add_scatter(
            x=rows["step"],
            y=rows["eval_loss"],
            mode="lines+markers",
            name=str(rows["name"].iloc[0]),
            line={"color": SERIES[i % len(SERIES)], "width": 2, "dash": DASHES[i // len(SERIES) % len(DASHES)]},
            marker={"size": 6},
            customdata=[[run_id, format_loss(v)] for v in rows["eval_loss"]],
            hovertemplate="%{customdata[0]}<br>step %{x}: %{customdata[1]}<extra></extra>",
        )
    many = table["run_id"].nunique() > 1
    base_layout(figure, x="Step", y="Evaluation loss (nats a token)", showlegend=many)
    return figure


def curve_name(r: float, alpha: float, lr: float, seed: int) -> str:
    """How one run is called in a legend."""
    return f"r {format_number(r)}, alpha {format_number(alpha)}, lr {format_number(lr)}, seed {seed}"
