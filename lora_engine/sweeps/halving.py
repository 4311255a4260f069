"""Early exit: successive halving over a grid (Jamieson and Talwalkar 2016), its decisions and its bill.

At a quarter and at half of the steps the better half of the cells goes on. Seeds of a cell stay together and are judged
by their mean loss. Pure: losses in, decisions out; the same losses give the same decision, so a sweep that was
interrupted decides again as it would have."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from lora_engine.config import TrainConfig
from lora_engine.errors import ConfigError
from lora_engine.sweeps.advice import AXES, best_over

RUNGS = (0.25, 0.5)  # shares of the steps
Cell = tuple[int, float, float]
"""(r, lora_alpha, lr)."""


@dataclass(frozen=True)
class Standing:
    """Where a cell stands at a rung: its mean loss over seeds (infinite where one is no number), its rank from 1 of
    `of` cells, and whether it goes on."""

    loss: float
    rank: int
    of: int
    kept: bool


def rung_steps(train: TrainConfig) -> tuple[int, ...]:
    """The evaluations that decide: the first at or after each share of RUNGS, and before the end.

    Runs are evaluated there anyway, so a sweep with early exit costs no evaluation more."""
    every = train.eval_every or max(1, train.steps // 10)
    steps = {math.ceil(share * train.steps / every) * every for share in RUNGS}
    return tuple(sorted(step for step in steps if step < train.steps))


def judge(losses: Mapping[Cell, Sequence[float]]) -> dict[Cell, Standing]:
    """Every cell's standing from its seeds' losses at one rung. Half of the cells, rounded up, is kept.

    Equal losses: the smaller rank, then alpha, then rate. Raises ConfigError for a cell without a loss."""
    for cell, values in losses.items():
        if not values:
            raise ConfigError("losses", f"none of {cell}", "at least one loss for each cell")
    means = {cell: _mean(values) for cell, values in losses.items()}
    ordered = sorted(means, key=lambda cell: (means[cell], cell))
    kept = math.ceil(len(ordered) / 2)
    return {
        cell: Standing(means[cell], position + 1, len(ordered), position < kept)
        for position, cell in enumerate(ordered)
    }


def trained_share(train: TrainConfig, num_cells: int) -> float:
    """Share of the full grid's steps that a sweep with early exit trains."""
    cells, reached, done = num_cells, 0, 0
    for step in (*rung_steps(train), train.steps):
        done += cells * (step - reached)
        cells, reached = math.ceil(cells / 2), step
    return done / (num_cells * train.steps)


@dataclass(frozen=True, kw_only=True)
class EarlyExitBill:
    """What early exit saved and what it gave up.

    `seconds_saved` are seconds of steps: of runs that were resumed to the end as measured, of others at the median
    step of the finished runs (None without any). `best_was_dropped`, `regret` (nats, loss of the best kept cell minus
    that of the best cell of the full grid, never below 0), `best` and `best_kept` (r, lora_alpha, lr, eval_loss) are
    None while some dropped run was not trained to the end: nobody knows them then."""

    num_runs: int
    num_dropped: int
    num_dropped_finished: int
    steps_saved: int
    steps_planned: int
    seconds_saved: float | None
    best_was_dropped: bool | None
    regret: float | None
    best: dict[str, float] | None
    best_kept: dict[str, float] | None

    @property
    def complete(self) -> bool:
        """Whether every dropped run was trained to the end afterwards."""
        return self.num_dropped_finished == self.num_dropped

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {**vars(self), "complete": self.complete}


def early_exit_bill(frame: pd.DataFrame) -> EarlyExitBill:
    """The bill of a sweep's `runs_frame`. Raises ConfigError for a table without the early-exit columns."""
    needed = (*AXES, "status", "steps", "seconds", "eval_loss_after", "early_exit_step")
    for column in needed:
        if column not in frame.columns:
            raise ConfigError("frame", list(frame.columns), f"a table of runs with the column {column}")
    dropped = frame[frame["early_exit_step"].notna()]
    finished = dropped[dropped["status"] == "done"]
    left = dropped["steps"] - dropped["early_exit_step"]
    whole = bool(len(finished) == len(dropped)) and bool(frame["status"].isin(["done", "failed"]).all())
    known = len(dropped) > 0 and whole
    best = _best(frame) if known else None
    best_kept = _best(frame.drop(index=dropped.index)) if known else None
    decided = best is not None and best_kept is not None
    return EarlyExitBill(
        num_runs=len(frame),
        num_dropped=len(dropped),
        num_dropped_finished=len(finished),
        steps_saved=int(left.sum()),
        steps_planned=int(frame["steps"].sum()),
        seconds_saved=_seconds(frame, dropped),
        best_was_dropped=_is_in(best, dropped) if decided and best else None,
        regret=max(0.0, best_kept["eval_loss"] - best["eval_loss"]) if best and best_kept else None,
        best=best if decided else None,
        best_kept=best_kept if decided else None,
    )


def _seconds(frame: pd.DataFrame, dropped: pd.DataFrame) -> float | None:
    done = frame[(frame["status"] == "done") & frame["seconds"].notna()]
    if dropped.empty:
        return 0.0
    typical = (done["seconds"] / done["steps"]).median()
    each = (dropped["seconds"] / dropped["steps"]).where(dropped["status"] == "done").fillna(typical)
    saved = (each * (dropped["steps"] - dropped["early_exit_step"])).sum(skipna=False)
    return float(saved) if pd.notna(saved) else None


def _best(frame: pd.DataFrame) -> dict[str, float] | None:
    table = best_over(frame, "r")
    if table.empty:
        return None
    row = table.sort_values("eval_loss", kind="stable").iloc[0]
    return {"r": int(row["r"])} | {key: float(row[key]) for key in ("lora_alpha", "lr", "eval_loss")}


def _is_in(cell: Mapping[str, float], rows: pd.DataFrame) -> bool:
    same = pd.Series(True, index=rows.index)
    for axis in AXES:
        same &= rows[axis] == cell[axis]
    return bool(same.any())


def _mean(values: Sequence[float]) -> float:
    mean = math.fsum(values) / len(values) if all(map(math.isfinite, values)) else math.inf
    return mean if math.isfinite(mean) else math.inf
