"""Telling the living from the dead."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from lora_engine.config import DataConfig, RunConfig, to_dict
from lora_engine.runs import Ledger, is_alive, this_process
from lora_engine.runs.processes import process_identity
from lora_engine.runs.records import derive_sweep_status
from lora_engine.runs.schema import transaction

CONFIG = to_dict(RunConfig(data=DataConfig(path="a.csv")))
SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path)


def claimed(ledger: Ledger, pid: int, create_time: float) -> str:
    run_id = ledger.create_run(CONFIG, num_steps=60)
    assert ledger.claim_run(run_id, pid, create_time)
    return run_id


def test_a_living_worker_keeps_its_run(ledger: Ledger) -> None:
    run_id = claimed(ledger, *this_process())
    assert ledger.reconcile() == []
    assert ledger.get_run(run_id).status == "running"


def test_a_worker_that_is_gone(ledger: Ledger) -> None:
    with subprocess.Popen(SLEEP) as process:
        run_id = claimed(ledger, process.pid, psutil.Process(process.pid).create_time())
        assert ledger.reconcile() == []
        process.kill()
    assert ledger.reconcile() == [run_id]
    assert ledger.reconcile() == []
    assert ledger.get_run(run_id).status == "interrupted"


@pytest.mark.skipif(os.name == "nt", reason="no zombies")
def test_a_zombie_is_dead(ledger: Ledger) -> None:
    with subprocess.Popen(SLEEP) as process:
        watched = psutil.Process(process.pid)
        run_id = claimed(ledger, process.pid, watched.create_time())
        process.kill()
        # Wait for its end without taking note of it.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert watched.status() == psutil.STATUS_ZOMBIE
        assert ledger.list_runs()[0].status == "interrupted"
        assert ledger.get_run(run_id).status == "interrupted"


@pytest.mark.parametrize("shift", [-1.0, -0.02, 0.02, 3600.0])
def test_a_stranger_with_the_same_pid(ledger: Ledger, shift: float) -> None:
    pid, create_time = this_process()
    run_id = claimed(ledger, pid, create_time + shift)
    assert ledger.reconcile() == [run_id]


@pytest.mark.skipif(process_identity(os.getpid()) is None, reason="the system has no steadier identity")
def test_setting_the_clock_kills_nobody(ledger: Ledger) -> None:
    run_id = claimed(ledger, *this_process())
    with transaction(ledger.path, write=True) as connection:
        # As psutil would see it after the clock was set forward by a second.
        connection.execute("UPDATE runs SET create_time = create_time - 1")
    assert ledger.reconcile() == []
    with transaction(ledger.path, write=True) as connection:
        connection.execute("UPDATE runs SET identity = 'another boot:1'")
    assert ledger.reconcile() == [run_id]


def test_nonsense_is_dead() -> None:
    assert not is_alive(None, None)
    assert not is_alive(-5, 0.0)
    assert not is_alive(2**70, 0.0)


def test_a_cancelled_run_whose_worker_died_is_cancelled(ledger: Ledger) -> None:
    with subprocess.Popen(SLEEP) as process:
        run_id = claimed(ledger, process.pid, psutil.Process(process.pid).create_time())
        ledger.request_cancel(run_id)
        process.kill()
    record = ledger.get_run(run_id)
    assert record.status == "cancelled"
    assert record.finished is not None


def test_a_queued_run_outlives_its_launcher(ledger: Ledger) -> None:
    sweep_id, (a, b) = ledger.create_sweep({}, [(CONFIG, None)] * 2)
    assert ledger.get_sweep(sweep_id).status == "queued"
    with subprocess.Popen(SLEEP) as process:
        worker = (process.pid, psutil.Process(process.pid).create_time())
        ledger.assign_worker([a, b], *worker)
        assert ledger.get_run(b).waits_for_worker
        assert ledger.get_sweep(sweep_id).status == "queued"
        ledger.claim_run(a, *worker)
        ledger.finish_run(a, "done", result={})
        # Between two cells nothing is running, but the sweep is.
        assert ledger.get_sweep(sweep_id).status == "running"
        process.kill()
    record = ledger.get_run(b)
    assert (record.status, record.waits_for_worker) == ("queued", False)
    assert ledger.get_sweep(sweep_id).status == "interrupted"


def test_reconcile_leaves_a_run_that_was_taken_again(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    run_id = claimed(ledger, 2**22 + 1, 1.0)

    def another_worker_is_faster(*_: object) -> bool:
        with transaction(ledger.path, write=True) as connection:
            connection.execute("UPDATE runs SET pid = ?, create_time = ?", this_process())
        return False

    monkeypatch.setattr("lora_engine.runs.ledger.is_alive", another_worker_is_faster)
    assert ledger.reconcile() == []
    monkeypatch.undo()
    assert ledger.get_run(run_id).status == "running"


@pytest.mark.parametrize(
    ("statuses", "waiting", "expected"),
    [
        ("queued queued", (None, None), "queued"),
        ("queued queued", (True, True), "queued"),
        ("queued queued", (False, False), "interrupted"),
        ("running queued", (None, None), "running"),
        ("done queued", (None, True), "running"),
        ("done queued", (None, False), "interrupted"),
        ("done queued", (None, None), "queued"),
        ("interrupted queued", (None, False), "interrupted"),
        ("interrupted running", (None, None), "running"),
        ("done done", (None, None), "done"),
        ("done failed", (None, None), "done"),
        ("failed failed", (None, None), "failed"),
        ("done cancelled", (None, None), "cancelled"),
        ("cancelled interrupted", (None, None), "interrupted"),
    ],
)
def test_status_of_a_sweep(statuses: str, waiting: tuple[bool | None, ...], expected: str) -> None:
    assert derive_sweep_status(statuses.split(), waiting) == expected
