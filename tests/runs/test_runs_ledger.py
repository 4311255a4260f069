"""The ledger's rules, one at a time."""

import math
import os
import sqlite3
import stat
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from lora_engine.config import DataConfig, RunConfig, TrainConfig, to_dict
from lora_engine.errors import ConfigError, InputError, NotFoundError
from lora_engine.runs import Ledger, default_home, this_process
from lora_engine.runs.ids import new_id

CONFIG = to_dict(RunConfig(data=DataConfig(path="a.csv"), train=TrainConfig(steps=5)))
DEAD = (2**22 + 1, 1.0)  # a pid above every system's maximum


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "home")


def new_run(ledger: Ledger) -> str:
    return ledger.create_run(CONFIG, prediction={"peak_bytes": 7}, num_steps=5)


def step(ledger: Ledger, run_id: str, number: int, loss: float = 1.0) -> None:
    ledger.record_step(run_id, number, train_loss=loss, lr=1e-3, grad_norm=0.5, tokens=8 * number, seconds=0.1 * number)


def run_with_status(ledger: Ledger, status: str) -> str:
    run_id = new_run(ledger)
    if status in ("running", "done", "failed"):
        assert ledger.claim_run(run_id, *this_process())
    if status in ("done", "failed"):
        ledger.finish_run(run_id, status, result={} if status == "done" else None, error=None)
    if status == "cancelled":
        ledger.request_cancel(run_id)
    if status == "interrupted":
        ledger.claim_run(run_id, *DEAD)
    assert ledger.get_run(run_id).status == status
    return run_id


def test_default_home_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORA_EXPLORER_HOME", str(tmp_path / "here"))
    assert default_home() == tmp_path / "here"
    assert not (tmp_path / "here").exists()
    monkeypatch.delenv("LORA_EXPLORER_HOME")
    assert default_home().name == "lora-explorer"


@pytest.mark.skipif(os.name == "nt", reason="no modes")
def test_home_is_made_for_its_owner_only(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "deep" / "home")
    assert stat.S_IMODE(ledger.home.stat().st_mode) == 0o700


def test_ids_sort_by_age_and_are_safe() -> None:
    ids = [new_id("r") for _ in range(500)]
    assert ids == sorted(ids)
    assert len({i[9:] for i in ids}) == 500
    assert all(i.isascii() and i.isalnum() and i == i.lower() and len(i) == 15 for i in ids)


ZEROS = "0" * 14


@pytest.mark.parametrize(
    "bad", ["", "../../etc/passwd", "r/../x", f"R{ZEROS}", f"r{ZEROS}\n", f"s{ZEROS}", "r" + "٣" * 14, None, 3]
)
def test_malformed_run_ids_touch_nothing(ledger: Ledger, bad: str) -> None:
    for call in (ledger.run_folder, ledger.get_run, ledger.delete_run, ledger.requeue, ledger.request_cancel):
        with pytest.raises(NotFoundError, match="run is .*; allowed: the id of a run in this ledger"):
            call(bad)


def test_unknown_ids_are_named(ledger: Ledger) -> None:
    unknown = new_id("r")
    for call in (ledger.get_run, ledger.delete_run, ledger.requeue, ledger.request_cancel):
        with pytest.raises(NotFoundError, match=unknown):
            call(unknown)
    with pytest.raises(NotFoundError):
        step(ledger, unknown, 1)
    with pytest.raises(NotFoundError):
        ledger.finish_run(unknown, "done", result={})
    with pytest.raises(NotFoundError):
        ledger.get_sweep(new_id("s"))
    with pytest.raises(NotFoundError):
        ledger.delete_sweep(new_id("s"))
    with pytest.raises(NotFoundError):
        ledger.create_run(CONFIG, sweep_id=new_id("s"), num_steps=5)
    assert not ledger.claim_run(unknown, *this_process())


def test_a_run_from_start_to_end(ledger: Ledger) -> None:
    run_id = new_run(ledger)
    record = ledger.get_run(run_id)
    assert (record.status, record.config, record.prediction, record.num_steps) == (
        "queued",
        CONFIG,
        {"peak_bytes": 7},
        5,
    )
    assert (record.last_step, record.last_train_loss, record.last_eval_loss) == (None, None, None)
    assert (record.started, record.finished, record.result, record.error) == (None, None, None, None)
    assert abs(datetime.fromisoformat(record.created).timestamp() - datetime.now(UTC).timestamp()) < 60
    assert ledger.run_folder(run_id) == ledger.home / "runs" / run_id

    assert ledger.claim_run(run_id, *this_process())
    assert not ledger.claim_run(run_id, *this_process())
    ledger.note_progress(run_id, "training")
    ledger.record_eval(run_id, 0, eval_loss=3.0, tokens=0)
    step(ledger, run_id, 1, 2.5)
    step(ledger, run_id, 2, 2.25)
    record = ledger.get_run(run_id)
    assert (record.status, record.progress, record.pid) == ("running", "training", os.getpid())
    assert (record.last_step, record.last_train_loss, record.last_eval_loss) == (2, 2.25, 3.0)

    ledger.finish_run(run_id, "done", result={"eval_loss_after": 2.0}, error=None)
    record = ledger.get_run(run_id)
    assert (record.status, record.result, record.is_final) == ("done", {"eval_loss_after": 2.0}, True)
    assert record.created_seconds <= record.started_seconds <= record.finished_seconds  # type: ignore[operator]
    assert not ledger.claim_run(run_id, *this_process())
    with pytest.raises(InputError, match="which is done; allowed: a run that is not done"):
        ledger.finish_run(run_id, "failed", error="late")


@pytest.mark.parametrize(
    ("status", "claimable", "after_cancel", "after_requeue"),
    [
        ("queued", True, "cancelled", "queued"),
        ("running", False, "running", None),
        ("interrupted", True, "cancelled", "queued"),
        ("cancelled", False, "cancelled", "queued"),
        ("failed", False, "failed", "queued"),
        ("done", False, "done", None),
    ],
)
def test_what_may_follow_what(
    ledger: Ledger, status: str, claimable: bool, after_cancel: str, after_requeue: str | None
) -> None:
    assert ledger.claim_run(run_with_status(ledger, status), *this_process()) is claimable

    run_id = run_with_status(ledger, status)
    ledger.request_cancel(run_id)
    assert ledger.get_run(run_id).status == after_cancel
    assert ledger.cancel_requested(run_id) is (status == "running")

    run_id = run_with_status(ledger, status)
    if after_requeue is None:
        with pytest.raises(InputError, match=f"which is {status}; allowed: one that is interrupted"):
            ledger.requeue(run_id)
    else:
        assert ledger.requeue(run_id) is (status != "queued")
        assert ledger.get_run(run_id).status == after_requeue


def test_a_step_recorded_twice_appears_once(ledger: Ledger) -> None:
    run_id = new_run(ledger)
    step(ledger, run_id, 1, 2.0)
    step(ledger, run_id, 1, 1.5)
    ledger.record_eval(run_id, 1, eval_loss=4.0, tokens=1)
    ledger.record_eval(run_id, 1, eval_loss=5.0, tokens=1)
    assert [row[1:3] for row in ledger.read_steps([run_id])] == [(1, 1.5)]
    assert ledger.read_evals([run_id]) == [(run_id, 1, 5.0, 1)]


def test_forget_after(ledger: Ledger) -> None:
    run_id, other = new_run(ledger), new_run(ledger)
    for number in (1, 2, 3):
        step(ledger, run_id, number)
        step(ledger, other, number)
        ledger.record_eval(run_id, number, eval_loss=1.0)
    ledger.record_eval(run_id, 0, eval_loss=1.0)
    ledger.forget_after(run_id, 2)
    assert [row[1] for row in ledger.read_steps([run_id])] == [1, 2]
    assert [row[1] for row in ledger.read_evals([run_id])] == [0, 1, 2]
    ledger.forget_after(run_id, -1)
    assert ledger.read_steps([run_id]) == ledger.read_evals([run_id]) == []
    assert len(ledger.read_steps([other])) == 3


def test_diverged_losses_come_back_as_nan(ledger: Ledger) -> None:
    run_id = new_run(ledger)
    step(ledger, run_id, 1, math.nan)
    ledger.record_eval(run_id, 0, eval_loss=math.nan)
    ledger.finish_run(run_id, "done", result={"eval_loss_after": math.nan, "sample": {"before": "a"}})
    record = ledger.get_run(run_id)
    assert math.isnan(record.last_train_loss)  # type: ignore[arg-type]
    assert math.isnan(record.last_eval_loss)  # type: ignore[arg-type]
    assert math.isnan(record.result["eval_loss_after"])  # type: ignore[index]
    assert record.to_dict()["result"] == {"eval_loss_after": None, "sample": {"before": "a"}}


def test_listing_is_newest_first_and_filters(ledger: Ledger) -> None:
    a, b = new_run(ledger), new_run(ledger)
    sweep_id, cells = ledger.create_sweep({"rs": [1]}, [(CONFIG, None), (CONFIG, {"peak_bytes": 1})])
    ledger.request_cancel(a)
    assert [r.id for r in ledger.list_runs()] == [*reversed(cells), b, a]
    assert [r.id for r in ledger.list_runs(sweep_id=sweep_id)] == cells[::-1]
    assert [r.id for r in ledger.list_runs(status="cancelled")] == [a]
    with pytest.raises(ConfigError, match="status is 'lost'; allowed: one of queued"):
        ledger.list_runs(status="lost")
    sweep = ledger.get_sweep(sweep_id)
    assert (sweep.spec, sweep.run_ids, sweep.status) == ({"rs": [1]}, tuple(cells), "queued")
    assert ledger.list_sweeps() == [sweep]
    assert [r.num_steps for r in ledger.list_runs(sweep_id=sweep_id)] == [5, 5]


def test_a_sweep_is_created_whole_or_not_at_all(ledger: Ledger) -> None:
    with pytest.raises(KeyError):
        ledger.create_sweep({}, [(CONFIG, None), ({}, None)])
    assert ledger.list_sweeps() == []
    assert ledger.list_runs() == []


def test_deleting(ledger: Ledger) -> None:
    run_id = run_with_status(ledger, "running")
    folder = ledger.run_folder(run_id)
    folder.mkdir(parents=True)
    (folder / "adapter").write_text("x")
    with pytest.raises(InputError, match="which is running; allowed: a run that is not running"):
        ledger.delete_run(run_id)
    step(ledger, run_id, 1)
    ledger.finish_run(run_id, "done", result={})
    ledger.delete_run(run_id)
    assert not folder.exists()
    assert ledger.list_runs() == []
    assert ledger.read_steps([run_id]) == []
    assert ledger.cancel_requested(run_id)  # whoever still works on it should stop


def test_deleting_sweeps(ledger: Ledger) -> None:
    sweep_id, (a, b) = ledger.create_sweep({}, [(CONFIG, None)] * 2)
    ledger.claim_run(a, *this_process())
    with pytest.raises(InputError, match=f"whose run '{a}' is running; cancel it first"):
        ledger.delete_sweep(sweep_id)
    assert len(ledger.list_runs()) == 2
    ledger.finish_run(a, "cancelled")
    ledger.delete_sweep(sweep_id)
    assert (ledger.list_runs(), ledger.list_sweeps()) == ([], [])

    sweep_id, (a, b) = ledger.create_sweep({}, [(CONFIG, None)] * 2)
    ledger.delete_run(a)
    assert ledger.get_sweep(sweep_id).run_ids == (b,)
    ledger.delete_run(b)
    assert ledger.list_sweeps() == []


def test_finish_knows_three_ends(ledger: Ledger) -> None:
    with pytest.raises(ConfigError, match="status is 'running'; allowed: done, failed or cancelled"):
        ledger.finish_run(new_run(ledger), "running")


def test_no_connection_stays_open(ledger: Ledger) -> None:
    new_run(ledger)
    # The last connection to leave folds the write-ahead log into the file and removes it.
    assert sorted(p.name for p in ledger.home.iterdir()) == ["ledger.sqlite3"]
    connection = sqlite3.connect(ledger.path)
    try:
        assert connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    finally:
        connection.close()


def test_kept_open_changes_nothing_but_the_speed(ledger: Ledger) -> None:
    run_id = new_run(ledger)
    with ledger.kept_open():
        step(ledger, run_id, 1)
        assert (ledger.home / "ledger.sqlite3-wal").exists()
        assert ledger.claim_run(run_id, *this_process())
        assert [row[1] for row in Ledger(ledger.home).read_steps([run_id])] == [1]
    assert not (ledger.home / "ledger.sqlite3-wal").exists()
    assert ledger.get_run(run_id).status == "running"


def test_the_ledger_alone_needs_no_pandas_and_no_torch() -> None:
    heavy = {"torch", "pandas", "transformers"}
    code = f"import sys, lora_engine.runs, lora_engine.executors; print({heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_a_step_of_several_runs_at_once(ledger: Ledger) -> None:
    runs = [ledger.create_run(CONFIG, num_steps=3) for _ in range(3)]
    ledger.record_steps([(run_id, 1, float(i), 0.1, 1.0, 10, 0.5) for i, run_id in enumerate(runs)])
    assert [row[:3] for row in ledger.read_steps(runs)] == sorted((run, 1, float(i)) for i, run in enumerate(runs))
    ledger.delete_run(runs[1])
    with pytest.raises(NotFoundError):
        ledger.record_steps([(run_id, 2, 1.0, 0.1, 1.0, 10, 0.5) for run_id in runs])
    assert len(ledger.read_steps(runs)) == 2  # all or none

    for run_id in (runs[0], runs[2]):
        assert ledger.claim_run(run_id, *this_process())
    ledger.request_cancel(runs[2])
    assert ledger.cancels_requested(runs) == {runs[1], runs[2]}


def test_a_run_that_early_exit_dropped_is_over_and_stays_known(ledger: Ledger) -> None:
    sweep_id, (kept, dropped) = ledger.create_sweep({}, [(CONFIG, None), (CONFIG, None)])
    for run_id in (kept, dropped):
        assert ledger.claim_run(run_id, *this_process())
    facts = {"early_exit": {"step": 2, "steps": 9, "eval_loss": math.nan, "rank": 2, "of": 2}}
    ledger.finish_run(dropped, "cancelled", result=facts)
    ledger.finish_run(kept, "done", result={})
    assert ledger.get_sweep(sweep_id).status == "done"
    assert ledger.get_run(dropped).dropped
    assert ledger.requeue(dropped)
    assert ledger.get_sweep(sweep_id).status == "queued"
    record = ledger.get_run(dropped)
    assert (record.dropped, (record.result or {})["early_exit"]["step"]) == (False, 2)

    folder = ledger.pack_folder(sweep_id)
    folder.mkdir(parents=True)
    ledger.delete_run(kept)
    assert folder.exists()
    ledger.delete_run(dropped)
    assert not folder.exists()
