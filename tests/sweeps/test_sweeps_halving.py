"""Early exit: who goes on, and what it cost, on tables made by hand."""

import math
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_engine.config import TrainConfig
from lora_engine.errors import ConfigError
from lora_engine.sweeps import advise, early_exit_bill, judge, rung_steps, trained_share

finite = st.floats(0, 10, allow_nan=False)


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ({"steps": 40}, (12, 20)),  # evaluated every 4 steps
        ({"steps": 60}, (18, 30)),
        ({"steps": 10}, (3, 5)),
        ({"steps": 100, "eval_every": 40}, (40, 80)),
        ({"steps": 100, "eval_every": 60}, (60,)),
        ({"steps": 100, "eval_every": 100}, ()),
        ({"steps": 1}, ()),
    ],
)
def test_rungs_are_evaluations(train: dict[str, Any], expected: tuple[int, ...]) -> None:
    assert rung_steps(TrainConfig(**train)) == expected


@given(st.dictionaries(st.tuples(st.integers(1, 9), finite, finite), st.lists(finite, min_size=1, max_size=3)))
def test_the_better_half_goes_on(losses: dict[Any, list[float]]) -> None:
    standings = judge(losses)
    kept = [s.loss for s in standings.values() if s.kept]
    dropped = [s.loss for s in standings.values() if not s.kept]
    assert len(kept) == math.ceil(len(losses) / 2)
    assert all(a <= b for a in kept for b in dropped)
    assert sorted(s.rank for s in standings.values()) == list(range(1, len(losses) + 1))
    assert judge(dict(reversed(losses.items()))) == standings


def test_a_cell_is_judged_by_all_its_seeds_and_a_diverged_one_comes_last() -> None:
    a, b, c = (1, 8.0, 0.1), (2, 8.0, 0.1), (4, 8.0, 0.1)
    standings = judge({a: [1.0, 4.0], b: [2.0, 2.2], c: [0.5, math.nan]})
    assert [standings[cell].rank for cell in (a, b, c)] == [2, 1, 3]
    assert standings[c].loss == math.inf
    assert (standings[b].of, standings[b].kept, standings[c].kept) == (3, True, False)
    with pytest.raises(ConfigError, match="at least one loss for each cell"):
        judge({a: []})


def test_share_of_steps_trained() -> None:
    # 8 cells to step 12, 4 to step 20, 2 to step 40.
    assert trained_share(TrainConfig(steps=40), 8) == pytest.approx((8 * 12 + 4 * 8 + 2 * 20) / (8 * 40))
    assert trained_share(TrainConfig(steps=40), 1) == 1.0


def run(r: int, loss: float | None, *, dropped_at: float = math.nan, status: str = "done") -> dict[str, Any]:
    return {
        "status": status, "method": "lora", "model": "m", "data": "d", "r": r, "lora_alpha": 8.0, "lr": 0.1, "seed": 0,
        "steps": 40, "seconds": math.nan if loss is None else 20.0,
        "eval_loss_after": math.nan if loss is None else loss, "early_exit_step": dropped_at,
    }  # fmt: skip


def test_the_bill_before_the_full_grid_was_trained() -> None:
    frame = pd.DataFrame([
        run(1, 2.0), run(2, 1.5), run(4, None, dropped_at=12, status="cancelled"),
        run(8, None, dropped_at=20, status="cancelled"),
    ])  # fmt: skip
    bill = early_exit_bill(frame)
    assert (bill.num_runs, bill.num_dropped, bill.num_dropped_finished, bill.complete) == (4, 2, 0, False)
    assert (bill.steps_saved, bill.steps_planned) == (28 + 20, 160)
    assert bill.seconds_saved == pytest.approx(0.5 * 48)
    assert (bill.best_was_dropped, bill.regret, bill.best) == (None, None, None)
    advice = advise(frame)
    assert advice.r == 2  # dropped runs have no say, and are not called missing
    assert advice.reason.endswith("Early exit dropped 2 runs that were behind.")
    assert "missing" not in advice.reason


@pytest.mark.parametrize(("dropped_loss", "was_dropped", "regret"), [(1.2, True, 0.3), (1.7, False, 0.0)])
def test_the_bill_afterwards(dropped_loss: float, was_dropped: bool, regret: float) -> None:
    frame = pd.DataFrame([run(1, 2.0), run(2, 1.5), run(4, 3.0, dropped_at=12), run(8, dropped_loss, dropped_at=20)])
    bill = early_exit_bill(frame)
    assert bill.complete
    assert bill.best_was_dropped is was_dropped
    assert bill.regret == pytest.approx(regret)
    assert bill.best_kept is not None
    assert bill.best_kept["r"] == 2
    assert bill.seconds_saved == pytest.approx(24.0)
    assert bill.to_dict()["complete"] is True


def test_without_any_dropped_run_nothing_was_saved() -> None:
    bill = early_exit_bill(pd.DataFrame([run(1, 2.0)]))
    assert (bill.num_dropped, bill.steps_saved, bill.seconds_saved, bill.regret) == (0, 0, 0.0, None)
    with pytest.raises(ConfigError, match="a table of runs with the column early_exit_step"):
        early_exit_bill(pd.DataFrame([run(1, 2.0)]).drop(columns="early_exit_step"))
