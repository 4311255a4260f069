"""The map of a sweep: evaluation loss over rank and alpha, while it runs and afterwards.

`frame` is the tidy table of runs (`lora_engine.runs.runs_frame`), `best` the table of `best_over(frame, ("r",
"lora_alpha"))`. Cells are placed by their position on each axis, not by value, so that all are equally large."""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from formatting import format_number, format_ratio, plural

from charts.common import GREY, ORANGE, base_layout
from charts.iso import draw_iso_lines

Cells = dict[tuple[float, float], Any]
Runs = Sequence[Any]  # rows of the frame, with dropped and steps_done

HEIGHT = 190  # of what is around the cells
FINAL, SO_FAR, DROPPED = "final", "so far", "dropped"
OVER = ("done", "failed", "cancelled")
COLUMNS = (
    "r", "lora_alpha", "state", "eval_loss", "lr", "share", "dropped_step", "dropped_loss",
    "done", "running", "dropped", "total",
)  # fmt: skip


def heatmap_table(frame: pd.DataFrame, best: pd.DataFrame) -> pd.DataFrame:
    """One row a cell of rank and alpha, with COLUMNS.

    state: "final" when all its runs are over and one gave a loss, "so far" when it has an evaluation and goes on,
    "dropped" when early exit stopped all of it, else what its runs are: "running", "queued", "failed", ...
    eval_loss: final, the best of `best`; so far, the lowest over learning rates of the mean over seeds of each
    run's latest evaluation; else NaN. lr is where. share: of its steps that are done. dropped_step and dropped_loss
    are of the learning rate that went furthest. done, running, dropped and total count runs."""
    finals = {(row["r"], row["lora_alpha"]): row for row in best.to_dict("records")}
    rows = frame.assign(dropped=is_dropped(frame), steps_done=steps_done(frame)).to_dict("records")
    # Plain loops: a grid has hundreds of runs, and pandas takes milliseconds for each small group.
    cells: dict[tuple[float, float], list[Any]] = {}
    for row in rows:
        cells.setdefault((row["r"], row["lora_alpha"]), []).append(row)
    table = []
    for (r, alpha), runs in sorted(cells.items()):
        cell = {"r": r, "lora_alpha": alpha} | _counts(runs)
        over = all(run["status"] in OVER for run in runs)
        if over and (r, alpha) in finals:
            found = finals[r, alpha]
            cell |= {"state": FINAL, "eval_loss": found["eval_loss"], "lr": found["lr"]}
        else:
            cell |= _gone(runs) if over else _so_far(runs)
        table.append(cell)
    return pd.DataFrame(table, columns=list(COLUMNS))


def is_dropped(frame: pd.DataFrame) -> "pd.Series[bool]":
    """Which runs early exit has stopped; one that was trained to its end afterwards is not among them."""
    return (frame["status"] == "cancelled") & frame["early_exit_step"].notna()


def steps_done(frame: pd.DataFrame) -> "pd.Series[float]":
    """Steps of each run; a run that is done has all of them, whatever was written down."""
    return frame["last_step"].fillna(0.0).where(frame["status"] != "done", frame["steps"])


def _counts(runs: Runs) -> dict[str, Any]:
    return {
        "share": sum(run["steps_done"] for run in runs) / max(1, sum(run["steps"] for run in runs)),
        "done": sum(run["status"] == "done" for run in runs),
        "running": sum(run["status"] == "running" for run in runs),
        "dropped": sum(run["dropped"] for run in runs),
        "total": len(runs),
    }


def _gone(runs: Runs) -> dict[str, Any]:
    """A cell in which nothing more happens and nothing came out."""
    by_rate: dict[float, list[Any]] = {}
    for run in runs:
        if run["dropped"]:
            by_rate.setdefault(run["lr"], []).append(run)
    if not by_rate:
        statuses = [run["status"] for run in runs]
        # Done and still no loss: it was not a number.
        return {"state": "diverged" if "done" in statuses else str(statuses[0])}
    ends = [
        (-fmean(run["early_exit_step"] for run in same), fmean(run["early_exit_loss"] for run in same), lr)
        for lr, same in by_rate.items()
    ]
    step, loss, lr = min(ends)
    return {"state": DROPPED, "lr": lr, "dropped_step": -step, "dropped_loss": loss}


def _so_far(runs: Runs) -> dict[str, Any]:
    by_rate: dict[float, list[float]] = {}
    for run in runs:
        loss = run["eval_loss_after"] if run["status"] == "done" else run["last_eval_loss"]
        begun = run["status"] == "done" or run["last_eval_step"] > 0  # step 0 is the base model's
        if begun and math.isfinite(loss) and not run["dropped"]:
            by_rate.setdefault(run["lr"], []).append(loss)
    if not by_rate:
        statuses = [run["status"] for run in runs]
        return {"state": next((s for s in ("running", "queued", "interrupted") if s in statuses), statuses[0])}
    loss, lr = min((fmean(losses), lr) for lr, losses in by_rate.items())
    return {"state": SO_FAR, "eval_loss": loss, "lr": lr}


def plot_heatmap(
    table: pd.DataFrame, *, iso: pd.DataFrame | None = None, iso_word: str = "alpha / r", ink: str | None = None
) -> go.Figure:
    """Loss over rank and alpha. Paler cells are not finished; `iso` (`iso_table`) are lines of equal scaling; `ink` is
    the colour of text on pale cells."""
    ranks, alphas = sorted(set(table["r"])), sorted(set(table["lora_alpha"]))
    cells: Cells = {(row["r"], row["lora_alpha"]): row for row in table.to_dict("records")}
    known = [float(v) for v in table["eval_loss"].dropna()]
    decimals = telling_decimals(known)
    figure = go.Figure()
    for state, opacity in ((FINAL, 1.0), (SO_FAR, 0.5)):
        lines = [[_if_state(cells.get((r, a)), state) for r in ranks] for a in alphas]
        if state == SO_FAR and not any(cell for line in lines for cell in line):
            continue
        figure.add_heatmap(
            z=[[cell and cell["eval_loss"] for cell in line] for line in lines],
            x=list(range(len(ranks))),
            y=list(range(len(alphas))),
            coloraxis="coloraxis",
            xgap=3,
            ygap=3,
            opacity=opacity,
            hoverinfo="skip",
        )
    if iso is not None:
        draw_iso_lines(figure, iso, iso_word, len(ranks), len(alphas))
    _texts(figure, ranks, alphas, cells, decimals, ink)
    base_layout(
        figure,
        height=HEIGHT + 54 * len(alphas),
        x="Rank (r)",
        y="Scaling (alpha)",
        showlegend=False,
        coloraxis={
            "colorscale": "Cividis",
            "cmin": min(known, default=0.0),
            "cmax": max(known, default=1.0),
            "showscale": bool(known),
            # Below: on a narrow screen the cells need the width.
            "colorbar": {
                "title": {"text": "loss", "side": "right"},
                "thickness": 10,
                "orientation": "h",
                "yref": "container",
                "y": 0,
                "yanchor": "bottom",
                "nticks": 4,
                "tickangle": 0,
            },
        },
    )
    figure.update_xaxes(**_category_axis(ranks))
    figure.update_yaxes(**_category_axis(alphas))
    if iso is not None and not iso.empty:
        figure.update_layout(margin={"t": 34, "r": 34})
    return figure


def telling_decimals(values: Sequence[float], *, least: int = 2, most: int = 4) -> int:
    """As few decimals as tell the values apart."""
    for decimals in range(least, most):
        if len({f"{value:.{decimals}f}" for value in values}) == len(set(values)):
            return decimals
    return most


def _if_state(cell: Any, state: str) -> Any:
    return cell if cell is not None and cell["state"] == state else None


def _category_axis(values: Sequence[float]) -> dict[str, Any]:
    return {
        "tickvals": list(range(len(values))),
        "ticktext": [format_number(v) for v in values],
        "range": [-0.5, len(values) - 0.5],
        "showgrid": False,
        "zeroline": False,
    }


def _texts(
    figure: go.Figure, ranks: list[float], alphas: list[float], cells: Cells, decimals: int, ink: str | None
) -> None:
    """What is written on the cells, a trace a colour, and what is said of each on hover."""
    known = [cell["eval_loss"] for cell in cells.values() if cell["state"] in (FINAL, SO_FAR)]
    by_colour: dict[str | None, list[tuple[int, int, str, str]]] = {}
    for j, alpha in enumerate(alphas):
        for i, r in enumerate(ranks):
            cell = cells.get((r, alpha))
            if cell is not None:
                place = (i, j, cell_text(cell, decimals), cell_hover(cell))
                by_colour.setdefault(_text_colour(cell, known, ink), []).append(place)
    for colour, places in by_colour.items():
        figure.add_scatter(
            x=[i for i, _, _, _ in places],
            y=[j for _, j, _, _ in places],
            mode="text",
            text=[text for _, _, text, _ in places],
            textfont={"size": 11.5} | ({"color": colour} if colour else {}),
            customdata=[hover for _, _, _, hover in places],
            hovertemplate="%{customdata}<extra></extra>",
            cliponaxis=False,
        )


def _text_colour(cell: Any, known: Sequence[float], ink: str | None) -> str | None:
    """White on the dark half of the scale, near-black on the light one; `ink` on pale cells."""
    if cell["state"] == FINAL:
        low, high = min(known), max(known)
        return "#FFFFFF" if high == low or (cell["eval_loss"] - low) / (high - low) < 0.55 else "#14181A"
    if cell["state"] == SO_FAR:
        return ink
    return ORANGE if cell["state"] == "running" else GREY


def cell_text(cell: Any, decimals: int) -> str:
    """A loss, marked while it is not final; or the word for why there is none."""
    if cell["state"] == FINAL:
        return f"{cell['eval_loss']:.{decimals}f}"
    if cell["state"] == SO_FAR:
        return f"<i>{cell['eval_loss']:.{decimals}f}</i><br>{cell['share']:.0%}"
    if cell["state"] == DROPPED:
        return f"✕<br>step {format_number(cell['dropped_step'])}"
    if cell["state"] == "running":
        return f"running<br>{cell['share']:.0%}"
    return str(cell["state"])


def cell_hover(cell: Any) -> str:
    """All that is known of a cell."""
    r, alpha = cell["r"], cell["lora_alpha"]
    lines = [
        f"Rank {format_number(r)}, alpha {format_number(alpha)}",
        f"alpha / r = {format_ratio(alpha / r)}, alpha / √r = {format_ratio(alpha / math.sqrt(r))}",
    ]
    if cell["state"] in (FINAL, SO_FAR):
        so_far = f" so far, {cell['share']:.0%} of its steps" if cell["state"] == SO_FAR else ""
        lines.append(f"loss {cell['eval_loss']:.4f}{so_far}, at learning rate {format_number(cell['lr'])}")
    elif cell["state"] == DROPPED:
        lines.append(
            f"stopped early at step {format_number(cell['dropped_step'])} with a loss of {cell['dropped_loss']:.4f}, "
            f"at learning rate {format_number(cell['lr'])}"
        )
    counts = f"{cell['done']} of {plural(int(cell['total']), 'run')} done"
    lines.append(counts + (f", {cell['dropped']} stopped early" if cell["dropped"] else ""))
    return "<br>".join(lines)
