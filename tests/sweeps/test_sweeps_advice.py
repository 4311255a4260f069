"""Advice on tables made by hand, with exact expectations."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from lora_engine.errors import ConfigError, InputError
from lora_engine.runs import Ledger, runs_frame
from lora_engine.sweeps import advise, best_over, summarize_cells

NAN = math.nan


def table(*rows: tuple[float, ...], **columns: Any) -> pd.DataFrame:
    """Rows of (r, alpha, lr, seed, loss), all done."""
    frame = pd.DataFrame(list(rows), columns=["r", "lora_alpha", "lr", "seed", "eval_loss_after"])
    return frame.assign(status="done", method="lora", **columns)


def two_seeds(r: int, loss: float, half_gap: float, alpha: float = 8.0, lr: float = 1e-3) -> list[tuple[float, ...]]:
    """Mean `loss`; the sample standard deviation of two values is their gap / sqrt(2)."""
    return [(r, alpha, lr, 0, loss - half_gap), (r, alpha, lr, 1, loss + half_gap)]


HALF_GAP = 0.03 / math.sqrt(2)  # a standard deviation of 0.03


def test_the_smallest_rank_within_noise() -> None:
    frame = table(
        *two_seeds(1, 4.10, HALF_GAP),
        *two_seeds(4, 3.94, HALF_GAP),
        *two_seeds(8, 3.95, HALF_GAP),
        *two_seeds(16, 3.93, HALF_GAP),
    )
    advice = advise(frame)
    assert (advice.r, advice.lora_alpha, advice.lr, advice.noise_known) == (4, 8.0, 1e-3, True)
    assert advice.noise == pytest.approx(0.03)
    assert advice.reason == "Rank 4 is enough: 3.94 against 3.93 at rank 16, and seeds differ by 0.03."
    assert list(advice.table["r"]) == [1, 4, 8, 16]


def test_alpha_and_lr_are_the_best_of_that_rank() -> None:
    frame = table(
        *two_seeds(2, 5.00, HALF_GAP, alpha=8, lr=1e-3),
        *two_seeds(2, 3.91, HALF_GAP, alpha=16, lr=3e-3),
        *two_seeds(2, 4.50, HALF_GAP, alpha=16, lr=1e-3),
        *two_seeds(2, 4.40, HALF_GAP, alpha=8, lr=3e-3),
        *two_seeds(8, 3.90, HALF_GAP, alpha=8, lr=1e-3),
        *two_seeds(8, 3.95, HALF_GAP, alpha=8, lr=3e-3),
        *two_seeds(8, 3.92, HALF_GAP, alpha=16, lr=1e-3),
        *two_seeds(8, 9.00, 2.0, alpha=16, lr=3e-3),
    )
    advice = advise(frame)
    assert (advice.r, advice.lora_alpha, advice.lr) == (2, 16.0, 3e-3)
    # The wild cell at rank 8 is not one that competes, and does not drown the noise.
    assert advice.noise == pytest.approx(0.03)
    assert advice.reason == "Rank 2 is enough: 3.91 against 3.90 at rank 8, and seeds differ by 0.03."


def test_a_higher_rank_that_is_needed() -> None:
    frame = table(*two_seeds(1, 4.5, HALF_GAP), *two_seeds(8, 3.9, HALF_GAP), *two_seeds(16, 3.92, HALF_GAP))
    assert advise(frame).reason == "Rank 8 is needed: 3.90 against 4.50 at rank 1, and seeds differ by 0.03."
    frame = table(*two_seeds(1, 4.5, HALF_GAP), *two_seeds(8, 3.9, HALF_GAP))
    assert advise(frame).reason == (
        "Rank 8 is needed: 3.90 against 4.50 at rank 1, and seeds differ by 0.03. "
        "It is the highest rank tried, so a higher one may do better still."
    )


def test_the_lowest_rank_is_the_best() -> None:
    frame = table(*two_seeds(1, 3.90, HALF_GAP), *two_seeds(8, 3.95, HALF_GAP), *two_seeds(4, 3.97, HALF_GAP))
    advice = advise(frame)
    assert advice.r == 1
    assert advice.reason == (
        "Rank 1 is enough: 3.90, no higher rank does better (3.95 at rank 8), and seeds differ by 0.03."
    )


def test_one_seed_says_that_the_noise_is_unknown() -> None:
    frame = table((2, 8, 1e-3, 0, 3.96), (4, 8, 1e-3, 0, 3.94), (8, 8, 1e-3, 0, 3.92), (1, 8, 1e-3, 0, 4.2))
    advice = advise(frame)
    assert (advice.r, advice.noise_known) == (4, False)
    assert advice.noise == pytest.approx(0.0392)
    assert (
        advice.reason
        == (
            "Rank 4 is enough: 3.94 against 3.92 at rank 8, and with one seed the noise is unknown, "
            "so 1% of the loss (0.04) stands in for it."
        )
        or advice.r == 2
    )
    assert advise(frame[frame["r"] != 2]).r == 4


def test_one_rank_only() -> None:
    advice = advise(table(*two_seeds(8, 3.94, HALF_GAP), *two_seeds(8, 3.90, HALF_GAP, alpha=16)))
    assert (advice.r, advice.lora_alpha) == (8, 16.0)
    assert advice.reason == "Only rank 8 gave a loss: 3.90, and seeds differ by 0.03. Other ranks would tell more."


def test_diverged_runs_are_named_and_left_out() -> None:
    frame = table(
        *two_seeds(4, 3.94, HALF_GAP, lr=1e-2),
        (4, 16, 1e-2, 0, 3.0),  # lucky: its other seed diverged
        (4, 16, 1e-2, 1, NAN),
        *two_seeds(16, 3.93, HALF_GAP, lr=1e-2),
        (16, 16, 1e-2, 0, math.inf),
        (16, 16, 1e-2, 1, NAN),
    )
    advice = advise(frame)
    assert (advice.r, advice.lora_alpha, advice.lr) == (4, 8.0, 1e-2)
    assert advice.reason == (
        "Rank 4 is enough: 3.94 against 3.93 at rank 16, and seeds differ by 0.03. Diverged and left out: "
        "rank 4 at alpha 16, learning rate 0.01, seed 1, rank 16 at alpha 16, learning rate 0.01, seed 0 and "
        "rank 16 at alpha 16, learning rate 0.01, seed 1."
    )
    more = pd.concat([frame, table((16, 32, 1e-2, 0, NAN), (16, 32, 1e-2, 1, NAN))])
    assert advise(more).reason.endswith("learning rate 0.01, seed 1 and 2 more.")


def test_a_rank_where_everything_diverged_is_left_out() -> None:
    advice = advise(table(*two_seeds(1, 4.0, HALF_GAP), (8, 8, 1e-3, 0, NAN), (8, 8, 1e-3, 1, NAN)))
    assert advice.r == 1
    assert list(advice.table["r"]) == [1]
    assert advice.reason == (
        "Only rank 1 gave a loss: 4.00, and seeds differ by 0.03. Other ranks would tell more. Diverged and left out: "
        "rank 8 at alpha 8, learning rate 0.001, seed 0 and rank 8 at alpha 8, learning rate 0.001, seed 1."
    )


def test_missing_cells_are_counted() -> None:
    rows = [*two_seeds(4, 3.94, HALF_GAP), *two_seeds(16, 3.93, HALF_GAP), *two_seeds(4, 4.2, 0.01, alpha=16)]
    advice = advise(table(*rows, (16, 16, 1e-3, 0, 4.3)))
    assert advice.reason == (
        "Rank 4 is enough: 3.94 against 3.93 at rank 16, and seeds differ by 0.03. 1 of 8 runs of the grid is missing."
    )


def test_cells_with_different_numbers_of_seeds_pool_by_degrees_of_freedom() -> None:
    frame = table(
        (1, 8, 1e-3, 0, 4.0), (1, 8, 1e-3, 1, 4.1), (1, 8, 1e-3, 2, 4.2),  # variance 0.01, two degrees
        (2, 8, 1e-3, 0, 3.0), (2, 8, 1e-3, 1, 3.2),  # variance 0.02, one degree
        (4, 8, 1e-3, 0, 3.5),
    )  # fmt: skip
    assert advise(frame).noise == pytest.approx(math.sqrt((2 * 0.01 + 0.02) / 3))


def test_losses_closer_than_two_decimals_are_told_apart() -> None:
    frame = table(*two_seeds(1, 0.1012, 0.0004), *two_seeds(2, 0.1010, 0.0004))
    assert advise(frame).reason == "Rank 1 is enough: 0.1012 against 0.1010 at rank 2, and seeds differ by 0.0006."


def test_equal_seeds_have_no_noise() -> None:
    advice = advise(table(*two_seeds(1, 4.0, 0.0), *two_seeds(2, 4.0, 0.0), *two_seeds(4, 4.0, 0.0)))
    assert (advice.r, advice.noise) == (1, 0.0)
    assert advice.reason == (
        "Rank 1 is enough: 4.00, no higher rank does better (4.00 at rank 2), and seeds differ by 0.00."
    )


def test_only_done_lora_runs_count() -> None:
    frame = table(*two_seeds(4, 3.94, HALF_GAP), *two_seeds(8, 3.93, HALF_GAP), (1, 8, 1e-3, 0, 1.0), (NAN,) * 5)
    frame.loc[frame["r"] == 1, "status"] = "failed"
    frame.loc[frame["r"].isna(), "method"] = "full"
    assert advise(frame).r == 4


def test_best_over() -> None:
    frame = table(
        *two_seeds(1, 4.0, 0.1, alpha=8, lr=1e-3),
        *two_seeds(1, 3.8, 0.2, alpha=8, lr=1e-2),
        *two_seeds(1, 3.9, 0.1, alpha=16, lr=1e-3),
        *two_seeds(2, 3.7, 0.1, alpha=16, lr=1e-3),
        (2, 16, 1e-2, 0, 1.0),
        (2, 16, 1e-2, 1, NAN),
        (2, 8, 1e-3, 0, NAN),
        seconds=3.0,
    )
    best = best_over(frame, "r")
    assert list(best.columns) == [
        "r", "lora_alpha", "lr", "eval_loss", "eval_loss_std", "eval_loss_min", "eval_loss_max", "num_seeds",
        "num_diverged", "seconds",
    ]  # fmt: skip
    first = best.iloc[0].to_dict()
    assert (first["r"], first["lora_alpha"], first["lr"], first["num_seeds"], first["seconds"]) == (1, 8, 1e-2, 2, 3.0)
    assert [first[f"eval_loss{end}"] for end in ("", "_std", "_min", "_max")] == pytest.approx(
        [3.8, 0.4 / math.sqrt(2), 3.6, 4.0]
    )
    assert list(zip(best["r"], best["eval_loss"].round(6), strict=True)) == [(1, 3.8), (2, 3.7)]
    cells = best_over(frame, ("r", "lora_alpha"))
    assert list(zip(cells["r"], cells["lora_alpha"], cells["lr"], strict=True)) == [
        (1, 8.0, 1e-2),
        (1, 16.0, 1e-3),
        (2, 16.0, 1e-3),
    ]
    assert summarize_cells(frame)["num_diverged"].sum() == 2
    with pytest.raises(ConfigError, match="by is 'rank'; allowed: one of r, lora_alpha, lr"):
        best_over(frame, "rank")


def test_nothing_to_advise_on(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="frame has no finished LoRA run"):
        advise(runs_frame(Ledger(tmp_path)))
    with pytest.raises(InputError, match="not a number in all 2 runs, so they diverged: try a lower learning rate"):
        advise(table((1, 8, 1, 0, NAN), (2, 8, 1, 0, NAN)))
    with pytest.raises(ConfigError, match="with the column lr"):
        advise(pd.DataFrame({"r": [1], "lora_alpha": [1.0]}))


def test_models_and_datasets_are_not_mixed() -> None:
    frame = table(*two_seeds(1, 4.0, HALF_GAP), *two_seeds(2, 3.0, HALF_GAP), data=["a.csv"] * 2 + ["b.csv"] * 2)
    with pytest.raises(ConfigError, match="frame is 'runs of a.csv, b.csv'; allowed: runs of one model on one dataset"):
        advise(frame)


def test_to_dict_is_json() -> None:
    advice = advise(table((1, 8, 1e-3, 0, 4.0), (2, 8, 1e-3, 0, 3.0)))
    values = json.loads(json.dumps(advice.to_dict(), allow_nan=False))
    assert (values["r"], values["lora_alpha"], values["lr"], values["reason"]) == (2, 8.0, 1e-3, advice.reason)
    assert values["table"][0]["eval_loss_std"] is None
    assert isinstance(values["table"][0]["r"], int)


def test_the_package_needs_neither_torch_nor_the_ledger() -> None:
    code = "import sys, lora_engine.sweeps; print({'torch', 'transformers', 'lora_engine.runs'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
