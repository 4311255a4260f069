"""kill -9 in the middle of a pack: every row goes on bit-identically. A cancelled row leaves, the others go on."""

import os
import random
import signal
import sys
import time

import pytest

from lora_engine.assets_path import asset_path
from lora_engine.config import DataConfig, LoraConfig, RunConfig, TrainConfig
from lora_engine.executors import InlineExecutor, LocalExecutor
from lora_engine.runs import Ledger, evals_frame, steps_frame
from lora_engine.sweeps import SweepSpec, cancel_sweep, resume_sweep, start_sweep

STEPS = 16
BASE = RunConfig(
    data=DataConfig(path=str(asset_path("datasets/customer_support.jsonl"))),
    method=LoraConfig(target_modules="attention"),
    train=TrainConfig(
        steps=STEPS, batch_size=2, max_length=32, checkpoint_every=3, eval_every=4, eval_examples=4, device="cpu"
    ),
)
SPEC = SweepSpec(base=BASE, rs=(1, 2), lora_alphas=(6.0,), lrs=(1e-2, 1e-3), seeds=(0,), packed="always")


@pytest.fixture
def ledger(home):
    return Ledger(home)


def wait_until(condition, seconds=180.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def records_of(ledger, sweep_id):
    return ledger.list_runs(sweep_id=sweep_id)[::-1]


def least_step(ledger, sweep_id):
    return min(record.last_step or 0 for record in records_of(ledger, sweep_id))


def left_behind(ledger, record):
    steps, evals = steps_frame(ledger, [record.id]), evals_frame(ledger, [record.id])
    return (
        list(zip(steps["step"], steps["train_loss"], steps["grad_norm"], strict=True)),
        list(zip(evals["step"], evals["eval_loss"], strict=True)),
        (ledger.run_folder(record.id) / "adapter" / "adapter_model.safetensors").read_bytes(),
        record.result["sample"],
        record.result["pack"]["size"],
    )


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("early_exit", [False, True])
def test_kills_in_the_middle_of_a_pack_leave_no_trace_in_any_row(ledger, early_exit):
    spec = SweepSpec.from_dict(SPEC.to_dict() | {"early_exit": early_exit})
    peaceful = start_sweep(ledger, spec, InlineExecutor(ledger.home))
    assert ledger.get_sweep(peaceful).status == "done"

    rng = random.Random(0)
    executor = LocalExecutor(ledger.home)
    sweep_id = start_sweep(ledger, spec, executor)
    for _kill in range(2 if early_exit else 3):
        goal = min(STEPS - 1, max(r.last_step or 0 for r in records_of(ledger, sweep_id)) + rng.randint(2, 6))
        wait_until(lambda goal=goal: max(r.last_step or 0 for r in records_of(ledger, sweep_id)) >= goal)
        running = [record for record in records_of(ledger, sweep_id) if record.status == "running"]
        assert running, "the sweep was over before the last kill"
        os.kill(running[0].pid, signal.SIGKILL)
        wait_until(lambda: ledger.get_sweep(sweep_id).status == "interrupted")
        assert resume_sweep(ledger, sweep_id, executor)
    wait_until(lambda: ledger.get_sweep(sweep_id).status == "done")

    for ours, theirs in zip(records_of(ledger, peaceful), records_of(ledger, sweep_id), strict=True):
        assert (ours.status, ours.dropped) == (theirs.status, theirs.dropped)
        if ours.dropped:
            assert ours.result == theirs.result
        else:
            assert left_behind(ledger, ours) == left_behind(ledger, theirs)
    assert not ledger.pack_folder(sweep_id).exists()


@pytest.mark.timeout(600)
def test_a_cancelled_row_leaves_the_pack_and_can_go_on_alone(ledger):
    executor = LocalExecutor(ledger.home)
    sweep_id = start_sweep(ledger, SPEC, executor)
    wait_until(lambda: least_step(ledger, sweep_id) >= 2)
    first, *others = records_of(ledger, sweep_id)
    executor.cancel(first.id)
    wait_until(lambda: ledger.get_run(first.id).status == "cancelled")
    wait_until(lambda: all(ledger.get_run(other.id).status == "done" for other in others))
    assert {ledger.get_run(other.id).result["pack"]["size"] for other in others} == {3}
    reached = ledger.get_run(first.id).last_step
    assert 2 <= reached < STEPS
    assert resume_sweep(ledger, sweep_id, InlineExecutor(ledger.home), cancelled=True) == [first.id]
    record = ledger.get_run(first.id)
    assert (record.status, record.result["pack"]["size"]) == ("done", 1)
    assert list(steps_frame(ledger, [first.id])["step"]) == list(range(1, STEPS + 1))


@pytest.mark.timeout(600)
def test_a_cancelled_sweep_stops_every_row_and_resumes(ledger):
    executor = LocalExecutor(ledger.home)
    sweep_id = start_sweep(ledger, SPEC, executor)
    wait_until(lambda: least_step(ledger, sweep_id) >= 2)
    cancel_sweep(ledger, sweep_id)
    wait_until(lambda: ledger.get_sweep(sweep_id).status == "cancelled")
    stopped = [record.last_step for record in records_of(ledger, sweep_id)]
    assert all(2 <= step < STEPS for step in stopped)
    resume_sweep(ledger, sweep_id, InlineExecutor(ledger.home), cancelled=True)
    for record in records_of(ledger, sweep_id):
        assert record.status == "done"
        assert list(steps_frame(ledger, [record.id])["step"]) == list(range(1, STEPS + 1))
