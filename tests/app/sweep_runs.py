"""Tables of a sweep's runs, made by hand, in the columns of `runs_frame`."""

import itertools

import pandas as pd

from lora_engine.runs.frames import RUN_COLUMNS

NAN = float("nan")


def grid(*, rs=(1, 4), alphas=(8.0, 16.0), lrs=(1e-3, 3e-3), seeds=(0, 1), **same):
    """A row a run, in grid order: done, 40 steps, loss lower with rank, higher with alpha, rate and seed.

    `same`: values of columns for all of them."""
    rows = [
        {
            "run_id": f"r{i}", "sweep_id": "s", "status": "done", "method": "lora", "model": "embedded", "r": float(r),
            "lora_alpha": alpha, "lr": lr, "seed": seed, "steps": 40, "last_step": 40.0, "last_eval_step": 40.0,
            "eval_loss_after": 4 - 0.1 * r + 0.01 * seed + alpha / 1000 + lr, "seconds": 2.0, "pack_seconds": NAN,
            "started_seconds": 100.0, "finished_seconds": 230.0, "trainable_parameters": 1000.0 * r,
        }
        | same
        for i, (seed, lr, alpha, r) in enumerate(itertools.product(seeds, lrs, alphas, rs))
    ]  # fmt: skip
    frame = pd.DataFrame(rows)
    for column, dtype in RUN_COLUMNS.items():
        if column not in frame.columns:
            frame[column] = pd.Series([NAN if dtype == "float64" else None] * len(frame), dtype=dtype_or_object(dtype))
    return frame


def dtype_or_object(dtype):
    return "float64" if dtype == "float64" else "object"


def change(frame, chosen, **values):
    """In place: these values in the rows of the mask."""
    for column, value in values.items():
        frame.loc[chosen, column] = value
    return frame


def drop(frame, chosen, *, step=10, loss=4.5):
    """In place: early exit stopped these."""
    return change(
        frame, chosen, status="cancelled", eval_loss_after=NAN, last_step=float(step), last_eval_step=float(step),
        last_eval_loss=loss, early_exit_step=float(step), early_exit_loss=loss, seconds=NAN,
    )  # fmt: skip
