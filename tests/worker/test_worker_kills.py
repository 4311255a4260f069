"""kill -9 at random moments: every step is there once, and the curve is that of a run left in peace."""

import os
import random
import signal
import sys
import time

import pytest

from lora_engine.assets_path import asset_path
from lora_engine.config import DataConfig, LoraConfig, RunConfig, TrainConfig, to_dict
from lora_engine.executors import InlineExecutor, LocalExecutor
from lora_engine.runs import Ledger, evals_frame, steps_frame

STEPS = 24


@pytest.fixture
def ledger(home):
    return Ledger(home)


@pytest.fixture
def config():
    return RunConfig(
        data=DataConfig(path=str(asset_path("datasets/customer_support.jsonl"))),
        method=LoraConfig(r=4, lora_alpha=6),
        train=TrainConfig(
            steps=STEPS, batch_size=4, max_length=64, checkpoint_every=5, eval_every=8, eval_examples=8, device="cpu"
        ),
    )


def wait_until(condition, seconds=120.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def curve(ledger, run_id):
    steps = steps_frame(ledger, [run_id])
    evals = evals_frame(ledger, [run_id])
    return (
        list(zip(steps["step"], steps["train_loss"], steps["grad_norm"], strict=True)),
        list(zip(evals["step"], evals["eval_loss"], strict=True)),
    )


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@pytest.mark.timeout(600)
def test_ten_kills_leave_no_trace_in_the_curve(ledger, config):
    peaceful = ledger.create_run(to_dict(config), num_steps=STEPS)
    InlineExecutor(ledger.home).submit([peaceful])
    expected = curve(ledger, peaceful)
    assert [step for step, *_ in expected[0]] == list(range(1, STEPS + 1))

    rng = random.Random(0)
    run_id = ledger.create_run(to_dict(config), num_steps=STEPS)
    executor = LocalExecutor(ledger.home)
    kills = 0
    while kills < 10:
        executor.submit([run_id])
        # Some kills come while torch is being imported, most in the middle of the steps.
        if kills % 3 == 0:
            wait_until(lambda: ledger.get_run(run_id).status == "running")
            time.sleep(rng.random())
        else:
            goal = min(STEPS - 1, (ledger.get_run(run_id).last_step or 0) + rng.randint(1, 4))
            wait_until(lambda goal=goal: (ledger.get_run(run_id).last_step or 0) >= goal)
        record = ledger.get_run(run_id)
        if record.status == "done":
            pytest.fail("the run was over before the tenth kill")
        os.kill(record.pid, signal.SIGKILL)
        kills += 1
        wait_until(lambda: ledger.get_run(run_id).status == "interrupted")
        ledger.requeue(run_id)
    executor.submit([run_id])
    wait_until(lambda: ledger.get_run(run_id).status == "done")

    assert curve(ledger, run_id) == expected
    for name in ("adapter_model.safetensors",):
        files = [ledger.run_folder(r) / "adapter" / name for r in (peaceful, run_id)]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_a_cancelled_run_stops_keeps_its_steps_and_resumes(ledger, config):
    run_id = ledger.create_run(to_dict(config), num_steps=STEPS)
    executor = LocalExecutor(ledger.home)
    executor.submit([run_id])
    wait_until(lambda: (ledger.get_run(run_id).last_step or 0) >= 3)
    executor.cancel(run_id)
    wait_until(lambda: ledger.get_run(run_id).status == "cancelled")
    reached = ledger.get_run(run_id).last_step
    assert 3 <= reached < STEPS
    ledger.requeue(run_id)
    InlineExecutor(ledger.home).submit([run_id])
    record = ledger.get_run(run_id)
    assert record.status == "done"
    assert list(steps_frame(ledger, [run_id])["step"]) == list(range(1, STEPS + 1))


def test_a_failing_run_says_why_and_the_next_one_is_done(ledger, config, tmp_path):
    broken = to_dict(config)
    broken["data"]["path"] = str(tmp_path / "gone.jsonl")
    bad = ledger.create_run(broken, num_steps=STEPS)
    short = to_dict(config)
    short["train"]["steps"] = 2
    good = ledger.create_run(short, num_steps=2)
    InlineExecutor(ledger.home).submit([bad, good])
    assert ledger.get_run(bad).status == "failed"
    assert "gone.jsonl" in ledger.get_run(bad).error
    assert ledger.get_run(good).status == "done"


def test_two_workers_never_do_the_same_run(ledger, config):
    short = to_dict(config)
    short["train"]["steps"] = 2
    runs = [ledger.create_run(short, num_steps=2) for _ in range(3)]
    executors = [LocalExecutor(ledger.home) for _ in range(2)]
    for executor in executors:
        executor.submit(runs)
    wait_until(lambda: all(ledger.get_run(r).status == "done" for r in runs))
    time.sleep(0.5)
    for run_id in runs:
        assert list(steps_frame(ledger, [run_id])["step"]) == [1, 2]
