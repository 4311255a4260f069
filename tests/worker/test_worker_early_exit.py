"""Early exit through the real worker: half is dropped at each rung, and the whole grid can be had afterwards."""

import pytest

from lora_engine.assets_path import asset_path
from lora_engine.config import DataConfig, LoraConfig, RunConfig, TrainConfig
from lora_engine.executors import InlineExecutor
from lora_engine.runs import Ledger, runs_frame
from lora_engine.sweeps import SweepSpec, early_exit_bill, resume_sweep, start_sweep

CONFIG = RunConfig(
    data=DataConfig(path=str(asset_path("datasets/customer_support.jsonl"))),
    method=LoraConfig(target_modules="attention"),
    train=TrainConfig(steps=8, batch_size=2, max_length=32, eval_every=2, eval_examples=4, device="cpu"),
)
RUNGS = {2: 4, 4: 2}  # step -> cells that come to it


@pytest.mark.parametrize("packed", ["never", "always"])
def test_halving_and_the_full_grid_afterwards(home, packed):
    ledger, executor = Ledger(home), InlineExecutor(home)
    ways = {"packed": packed, "early_exit": True}
    spec = SweepSpec(base=CONFIG, rs=(1, 2), lora_alphas=(6.0,), lrs=(1e-2, 1e-4), seeds=(0, 1), **ways)
    sweep_id = start_sweep(ledger, spec, executor)
    records = ledger.list_runs(sweep_id=sweep_id)[::-1]
    assert ledger.get_sweep(sweep_id).status == "done"
    dropped = [record for record in records if record.dropped]
    assert [record.result["early_exit"]["step"] for record in dropped].count(2) == 4
    assert [record.result["early_exit"]["step"] for record in dropped].count(4) == 2
    evals = {(run_id, step): loss for run_id, step, loss, _ in ledger.read_evals([r.id for r in records])}
    for record in dropped:
        facts = record.result["early_exit"]
        assert record.last_step == facts["step"]
        assert facts["of"] == RUNGS[facts["step"]]
        assert facts["eval_loss"] == evals[record.id, facts["step"]]
        assert (ledger.run_folder(record.id) / "checkpoint.safetensors").exists()
    done = [record for record in records if record.status == "done"]
    cells = {(record.config["method"]["r"], record.config["train"]["lr"]) for record in done}
    assert (len(done), len(cells)) == (2, 1)  # both seeds of the one cell that is left
    bill = early_exit_bill(runs_frame(ledger, sweep_id))
    assert (bill.num_dropped, bill.steps_saved, bill.complete) == (6, 4 * 6 + 2 * 4, False)

    resumed = resume_sweep(ledger, sweep_id, executor, cancelled=True)
    assert sorted(resumed) == sorted(record.id for record in dropped)
    assert all(record.status == "done" for record in ledger.list_runs(sweep_id=sweep_id))
    bill = early_exit_bill(runs_frame(ledger, sweep_id))
    assert (bill.num_dropped, bill.complete) == (6, True)
    assert bill.regret is not None

    # A run that was dropped and resumed is the run that was never dropped.
    whole = start_sweep(ledger, SweepSpec.from_dict(spec.to_dict() | {"early_exit": False}), executor)
    for one, other in zip(records, ledger.list_runs(sweep_id=whole)[::-1], strict=True):
        losses = [ledger.get_run(run_id).result["eval_loss_after"] for run_id in (one.id, other.id)]
        assert losses[0] == pytest.approx(losses[1], abs=0 if packed == "never" else 1e-4)
