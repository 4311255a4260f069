"""Starting and resuming, on a real ledger and with an executor that only takes notes."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from lora_engine.config import DataConfig, LoraConfig, RunConfig, TrainConfig, run_config_from_dict
from lora_engine.errors import NotFoundError, TargetError
from lora_engine.runs import Ledger, this_process
from lora_engine.sweeps import SweepSpec, cancel_sweep, expand_grid, resume_sweep, start_sweep

BASE = RunConfig(data=DataConfig(path="a.csv"), train=TrainConfig(steps=3))
SPEC = SweepSpec(base=BASE, rs=(1, 2, 4), lora_alphas=(8.0,), seeds=(0, 1))
DEAD = (2**22 + 1, 1.0)


class Notebook:
    """An executor that starts nothing; `worker` is who it says will come."""

    def __init__(self, ledger: Ledger, worker: tuple[int, float] | None = None) -> None:
        self.ledger, self.worker = ledger, worker
        self.submitted: list[list[str]] = []

    def submit(self, run_ids: Sequence[str]) -> None:
        self.submitted.append(list(run_ids))
        if self.worker:
            self.ledger.assign_worker(run_ids, *self.worker)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path)


def rank_of(config: RunConfig) -> int:
    assert isinstance(config.method, LoraConfig)
    return config.method.r


def finish(ledger: Ledger, run_id: str, status: str = "done") -> None:
    assert ledger.claim_run(run_id, *this_process())
    ledger.finish_run(run_id, status, result={} if status == "done" else None)


def test_start(ledger: Ledger) -> None:
    executor = Notebook(ledger)
    sweep_id = start_sweep(ledger, SPEC, executor, lambda config: {"trainable_parameters": 10 * rank_of(config)})
    sweep = ledger.get_sweep(sweep_id)
    assert executor.submitted == [list(sweep.run_ids)]
    assert SweepSpec.from_dict(sweep.spec) == SPEC
    records = ledger.list_runs(sweep_id=sweep_id)[::-1]
    assert [run_config_from_dict(record.config) for record in records] == expand_grid(SPEC)
    assert [record.prediction for record in records] == [{"trainable_parameters": 10 * r} for r in (1, 2, 4, 1, 2, 4)]
    assert {(record.status, record.num_steps) for record in records} == {("queued", 3)}


def test_a_prediction_that_fails_leaves_nothing_behind(ledger: Ledger) -> None:
    def predict(config: RunConfig) -> dict[str, int]:
        raise TargetError(f"target_modules is {config.model!r}; allowed: something else.")

    executor = Notebook(ledger)
    with pytest.raises(TargetError):
        start_sweep(ledger, SPEC, executor, predict)
    assert (ledger.list_sweeps(), ledger.list_runs(), executor.submitted) == ([], [], [])


def test_resume_after_the_worker_was_killed_half_way(ledger: Ledger) -> None:
    executor = Notebook(ledger, DEAD)
    sweep_id = start_sweep(ledger, SPEC, executor)
    a, b, c, d, e, f = ledger.get_sweep(sweep_id).run_ids
    finish(ledger, a)
    finish(ledger, b, "failed")
    ledger.claim_run(c, *DEAD)  # killed in the middle of this one
    ledger.request_cancel(d)
    assert ledger.get_sweep(sweep_id).status == "interrupted"

    executor = Notebook(ledger, this_process())
    assert resume_sweep(ledger, sweep_id, executor) == [c, e, f]
    assert executor.submitted == [[c, e, f]]
    assert ledger.get_run(a).status == "done"
    # The new worker lives: asking again, from another tab, adds nothing.
    assert resume_sweep(ledger, sweep_id, executor) == []
    assert ledger.claim_run(c, *this_process())
    assert resume_sweep(ledger, sweep_id, executor) == []
    assert executor.submitted == [[c, e, f]]

    assert resume_sweep(ledger, sweep_id, executor, failed=True, cancelled=True) == [b, d]
    for run_id in (b, d, e, f):
        finish(ledger, run_id)
    ledger.finish_run(c, "done", result={})
    assert ledger.get_sweep(sweep_id).status == "done"
    assert resume_sweep(ledger, sweep_id, executor, failed=True, cancelled=True) == []


def test_resume_without_known_workers_submits_what_is_queued(ledger: Ledger) -> None:
    executor = Notebook(ledger)
    sweep_id = start_sweep(ledger, SPEC, executor)
    run_ids = list(ledger.get_sweep(sweep_id).run_ids)
    finish(ledger, run_ids[0])
    ledger.claim_run(run_ids[1], *this_process())
    assert resume_sweep(ledger, sweep_id, executor) == run_ids[2:]


def test_cancel(ledger: Ledger) -> None:
    sweep_id = start_sweep(ledger, SPEC, Notebook(ledger))
    a, b, *rest = ledger.get_sweep(sweep_id).run_ids
    finish(ledger, a)
    ledger.claim_run(b, *this_process())
    assert cancel_sweep(ledger, sweep_id) == [b, *rest]
    assert [r.status for r in ledger.list_runs(sweep_id=sweep_id)] == ["cancelled"] * 4 + ["running", "done"]
    assert ledger.cancel_requested(b)
    ledger.finish_run(b, "cancelled")
    assert ledger.get_sweep(sweep_id).status == "cancelled"


def test_unknown_sweeps_are_named(ledger: Ledger) -> None:
    for call in (lambda: resume_sweep(ledger, "s1", Notebook(ledger)), lambda: cancel_sweep(ledger, "s1")):
        with pytest.raises(NotFoundError, match="sweep is 's1'; allowed: the id of a sweep"):
            call()


def test_runs_that_early_exit_dropped_are_over_until_they_are_asked_for(ledger: Ledger) -> None:
    sweep_id = start_sweep(ledger, SPEC, Notebook(ledger))
    a, b, c, *rest = ledger.get_sweep(sweep_id).run_ids
    finish(ledger, a)
    for run_id in (b, c):
        assert ledger.claim_run(run_id, *this_process())
    ledger.finish_run(b, "cancelled", result={"early_exit": {"step": 1}})
    ledger.finish_run(c, "cancelled")
    for run_id in rest:
        finish(ledger, run_id)
    executor = Notebook(ledger, this_process())
    assert resume_sweep(ledger, sweep_id, executor, cancelled=True, dropped=False) == [c]
    finish(ledger, c)
    assert ledger.get_sweep(sweep_id).status == "done"
    assert resume_sweep(ledger, sweep_id, executor, cancelled=True) == [b]
