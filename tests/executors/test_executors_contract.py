"""One suite for every executor. The worker is a small real script, started as the real one is."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from lora_engine.config import DataConfig, RunConfig, to_dict
from lora_engine.errors import NotFoundError
from lora_engine.executors import Executor, InlineExecutor, LocalExecutor
from lora_engine.runs import Ledger

CONFIG = to_dict(RunConfig(data=DataConfig(path="a.csv")))
ROOT = Path(__file__).parents[2]

# Takes its runs one after another, a step every few milliseconds, as the real one does.
WORKER = """
import argparse, os, sys, time
from lora_engine.runs import Ledger, this_process

parser = argparse.ArgumentParser()
parser.add_argument("--home")
parser.add_argument("run_ids", nargs="+")
arguments = parser.parse_args()
ledger = Ledger(arguments.home)
print("worker", os.getpid(), flush=True)
for run_id in arguments.run_ids:
    if not ledger.claim_run(run_id, *this_process()):
        continue
    record = ledger.get_run(run_id)
    for step in range((record.last_step or 0) + 1, record.num_steps + 1):
        if ledger.cancel_requested(run_id):
            ledger.finish_run(run_id, "cancelled")
            break
        ledger.record_step(run_id, step, train_loss=1.0, lr=1.0, grad_norm=1.0, tokens=1, seconds=1.0)
        time.sleep(0.01)
    else:
        ledger.finish_run(run_id, "done", result={"pid": os.getpid(), "cwd": os.getcwd()})
"""

ENDLESS = 100_000


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    ledger = Ledger(tmp_path / "home")
    yield ledger
    for record in ledger.list_runs(status="running"):  # workers of a test that failed
        assert record.pid is not None
        psutil.Process(record.pid).kill()


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    return [sys.executable, str(script)]


@pytest.fixture(params=[InlineExecutor, LocalExecutor])
def executor(request: pytest.FixtureRequest, ledger: Ledger, command: list[str]) -> Executor:
    built: Executor = request.param(ledger.home, command=command)
    return built


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def statuses(ledger: Ledger, run_ids: list[str]) -> list[str]:
    return [ledger.get_run(run_id).status for run_id in run_ids]


def begun(ledger: Ledger, run_id: str) -> bool:
    return (ledger.get_run(run_id).last_step or 0) >= 3


def new_runs(ledger: Ledger, number: int, num_steps: int = 3) -> list[str]:
    return [ledger.create_run(CONFIG, num_steps=num_steps) for _ in range(number)]


def test_submitted_runs_get_done_in_one_process(ledger: Ledger, executor: Executor) -> None:
    run_ids = new_runs(ledger, 2)
    executor.submit(run_ids)
    wait_for(lambda: statuses(ledger, run_ids) == ["done", "done"])
    results = [ledger.get_run(run_id).result or {} for run_id in run_ids]
    assert results[0]["pid"] == results[1]["pid"] != os.getpid()
    assert results[0]["cwd"] == str(Path.cwd())
    assert f"worker {results[0]['pid']}" in (ledger.home / "worker.log").read_text()


def test_nothing_to_do_starts_nothing(ledger: Ledger, executor: Executor) -> None:
    executor.submit([])
    assert not (ledger.home / "worker.log").exists()


def test_done_and_cancelled_runs_are_left_alone(ledger: Ledger, executor: Executor) -> None:
    first, second, third = new_runs(ledger, 3)
    executor.cancel(second)
    executor.submit([first, second, third])
    wait_for(lambda: statuses(ledger, [first, second, third]) == ["done", "cancelled", "done"])
    result = ledger.get_run(first).result
    fourth = new_runs(ledger, 1)
    executor.submit([first, second, *fourth])
    wait_for(lambda: statuses(ledger, fourth) == ["done"])
    assert ledger.get_run(first).result == result
    assert ledger.read_steps([second]) == []


def test_an_interrupted_run_is_taken_up(ledger: Ledger, executor: Executor) -> None:
    (run_id,) = new_runs(ledger, 1)
    ledger.claim_run(run_id, 2**22 + 1, 1.0)
    assert statuses(ledger, [run_id]) == ["interrupted"]
    executor.submit([run_id])
    wait_for(lambda: statuses(ledger, [run_id]) == ["done"])


def test_ids_are_checked_before_anything_starts(ledger: Ledger, executor: Executor) -> None:
    for bad in ("--help", "../x", "r1"):
        with pytest.raises(NotFoundError, match="allowed: the id of a run"):
            executor.submit([bad])
        with pytest.raises(NotFoundError):
            executor.cancel(bad)
    assert not (ledger.home / "worker.log").exists()


# The detached one alone.


def test_cancelling_a_running_run(ledger: Ledger, command: list[str]) -> None:
    executor = LocalExecutor(ledger.home, command=command)
    first, second = new_runs(ledger, 2, ENDLESS)
    executor.submit([first, second])
    wait_for(lambda: begun(ledger, first))
    assert ledger.get_run(second).waits_for_worker
    executor.cancel(second)
    executor.cancel(first)
    assert statuses(ledger, [second]) == ["cancelled"]
    wait_for(lambda: statuses(ledger, [first]) == ["cancelled"])


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_killed_worker_leaves_an_interrupted_run_that_resumes(ledger: Ledger, command: list[str]) -> None:
    executor = LocalExecutor(ledger.home, command=command)
    first, second = new_runs(ledger, 2, 40)
    executor.submit([first, second])
    wait_for(lambda: begun(ledger, first))
    pid = ledger.get_run(first).pid
    assert pid is not None
    assert os.getsid(pid) == pid != os.getsid(0)
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: statuses(ledger, [first]) == ["interrupted"], 5)
    wait_for(lambda: not psutil.pid_exists(pid), 5)  # no zombie stays behind
    assert statuses(ledger, [second]) == ["queued"]
    assert not ledger.get_run(second).waits_for_worker
    executor.submit([first, second])
    wait_for(lambda: statuses(ledger, [first, second]) == ["done", "done"])
    assert [row[1] for row in ledger.read_steps([first])] == list(range(1, 41))


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_the_worker_outlives_whoever_started_it(ledger: Ledger, command: list[str], tmp_path: Path) -> None:
    (run_id,) = new_runs(ledger, 1, ENDLESS)
    launcher = tmp_path / "launcher.py"
    launcher.write_text(
        "import sys, time\n"
        "from lora_engine.executors import LocalExecutor\n"
        "LocalExecutor(sys.argv[1], command=sys.argv[3:]).submit([sys.argv[2]])\n"
        "time.sleep(60)\n"
    )
    arguments = [sys.executable, str(launcher), str(ledger.home), run_id, *command]
    with subprocess.Popen(arguments, start_new_session=True) as process:
        wait_for(lambda: begun(ledger, run_id))
        os.killpg(process.pid, signal.SIGKILL)  # the launcher and all that is in its group
    step = ledger.get_run(run_id).last_step or 0
    wait_for(lambda: (ledger.get_run(run_id).last_step or 0) > step + 3)
    assert statuses(ledger, [run_id]) == ["running"]
    ledger.request_cancel(run_id)
    wait_for(lambda: statuses(ledger, [run_id]) == ["cancelled"])


def test_the_default_command_is_the_worker(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    class Recorder:
        pid = 2**22 + 1

        def __init__(self, command: list[str], **_: object) -> None:
            started.append(command)

        def wait(self) -> int:
            return 0

    monkeypatch.setattr(subprocess, "Popen", Recorder)
    (run_id,) = new_runs(ledger, 1)
    LocalExecutor(ledger.home).submit([run_id])
    assert started == [[sys.executable, "-P", "-m", "lora_engine.worker", "--home", str(ledger.home), run_id]]
