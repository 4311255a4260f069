"""The tidy tables: a row for everything, the same types whether full or empty."""

import math
from pathlib import Path

import pandas as pd
import pytest

from lora_engine.config import DataConfig, FullConfig, LoraConfig, RunConfig, TrainConfig, to_dict
from lora_engine.runs import (
    Ledger,
    accuracy_frame,
    evals_frame,
    prediction_errors,
    records_frame,
    runs_frame,
    steps_frame,
    this_process,
)
from lora_engine.runs.frames import ACCURACY_COLUMNS, EVAL_COLUMNS, RUN_COLUMNS, STEP_COLUMNS

RESULT = {
    "trainable_parameters": 10,
    "total_parameters": 100,
    "eval_loss_before": 5.0,
    "eval_loss_after": 4.0,
    "steps": 7,
    "seconds": 2.0,
    "step_seconds": 0.3,
    "tokens_per_second": 50.0,
    "peak_bytes": 2**40,
    "peak_kind": "tracked",
    "predicted_peak_bytes": 2**41,
    "adapter_bytes": 40,
    "device": "cpu",
}
LORA = RunConfig(
    data=DataConfig(path="/somewhere/notes.csv"),
    method=LoraConfig(r=8, lora_alpha=12, target_modules=("q_proj", "v_proj")),
    train=TrainConfig(steps=7, seed=3, lr=1e-3, batch_size=4, accumulation=2, max_length=64),
)
FULL = RunConfig(model="other", data=DataConfig(path=r"C:\data\notes.csv"), method=FullConfig())


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path)


def dtypes(frame: pd.DataFrame) -> dict[str, str]:
    return {str(name): str(dtype) for name, dtype in frame.dtypes.items()}


def test_runs(ledger: Ledger) -> None:
    done = ledger.create_run(to_dict(LORA), prediction={"peak_bytes": 1, "trainable_parameters": 11}, num_steps=7)
    ledger.claim_run(done, *this_process())
    ledger.finish_run(done, "done", result=RESULT)
    queued = ledger.create_run(to_dict(LORA), prediction={"peak_bytes": 1, "trainable_parameters": 11}, num_steps=7)
    full = ledger.create_run(to_dict(FULL), num_steps=60)

    frame = runs_frame(ledger)
    assert dtypes(frame) == RUN_COLUMNS
    assert list(frame["run_id"]) == [done, queued, full]
    rows = frame.set_index("run_id")

    row = rows.loc[done]
    expected = {
        "status": "done", "model": "embedded", "data": "notes.csv", "data_path": "/somewhere/notes.csv",
        "method": "lora", "r": 8, "lora_alpha": 12, "scaling": 1.5, "targets": "q_proj,v_proj", "lr": 1e-3, "seed": 3,
        "steps": 7, "batch_size": 8, "max_length": 64, "precision": "fp32", "device": "cpu",
        "trainable_parameters": 10, "eval_loss_before": 5.0, "eval_loss_after": 4.0, "seconds": 2.0,
        "tokens_per_second": 50.0, "peak_bytes": 2**40, "predicted_peak_bytes": 2**41, "adapter_bytes": 40,
    }  # fmt: skip
    assert {key: row[key] for key in expected} == expected
    assert row["wall_seconds"] >= 0
    assert row["created"].timestamp() == pytest.approx(ledger.get_run(done).created_seconds, abs=1e-3)
    assert pd.isna(row["sweep_id"])

    row = rows.loc[queued]
    assert (row["trainable_parameters"], row["predicted_peak_bytes"], row["device"]) == (11, 1, "auto")
    unknown = ["eval_loss_before", "eval_loss_after", "seconds", "wall_seconds", "peak_bytes", "adapter_bytes"]
    assert row[unknown].isna().all()

    row = rows.loc[full]
    assert (row["method"], row["data"], row["model"]) == ("full", "notes.csv", "other")
    assert row[["r", "lora_alpha", "scaling", "targets", "trainable_parameters"]].isna().all()


def test_runs_of_one_sweep_in_grid_order(ledger: Ledger) -> None:
    ledger.create_run(to_dict(LORA), num_steps=7)
    sweep_id, run_ids = ledger.create_sweep({}, [(to_dict(LORA), None)] * 3)
    frame = runs_frame(ledger, sweep_id)
    assert list(frame["run_id"]) == run_ids
    assert set(frame["sweep_id"]) == {sweep_id}


def test_what_a_run_shared_and_how_far_it_is(ledger: Ledger) -> None:
    going, packed, dropped = (ledger.create_run(to_dict(LORA), num_steps=7) for _ in range(3))
    for run_id in (going, packed, dropped):
        ledger.claim_run(run_id, *this_process())
        ledger.record_step(run_id, 4, train_loss=2.0, lr=0.1, grad_norm=0.5, tokens=9, seconds=0.25)
        ledger.record_eval(run_id, 3, eval_loss=2.5)
    pack = {"size": 3, "seconds": 6.0, "peak_bytes": 2**30, "alone_step_seconds": 0.5, "reason": "three fit"}
    ledger.finish_run(packed, "done", result=RESULT | {"pack": pack})
    ledger.finish_run(dropped, "cancelled", result={"early_exit": {"step": 3, "eval_loss": 2.5}})
    frame = runs_frame(ledger)
    assert records_frame(ledger.list_runs()).equals(frame)
    assert dtypes(frame) == RUN_COLUMNS
    rows = frame.set_index("run_id")
    assert rows[["last_step", "last_eval_step", "last_eval_loss"]].to_numpy().tolist() == [[4, 3, 2.5]] * 3
    columns = ["pack_size", "pack_seconds", "pack_peak_bytes", "alone_step_seconds"]
    assert rows.loc[packed, columns].tolist() == [3, 6.0, 2**30, 0.5]
    assert rows.loc[packed, "pack_reason"] == "three fit"
    assert rows.loc[[going, dropped], columns].isna().all(axis=None)
    assert rows.loc[dropped, ["early_exit_step", "early_exit_loss"]].tolist() == [3, 2.5]
    assert rows.loc[going, ["early_exit_step", "finished_seconds"]].isna().all()
    assert rows.loc[packed, "finished_seconds"] >= rows.loc[packed, "started_seconds"]


def test_a_config_of_another_version_still_has_a_row(ledger: Ledger) -> None:
    ledger.create_run({"method": {"method": "telepathy", "strength": 3}}, num_steps=1)
    frame = runs_frame(ledger)
    assert dtypes(frame) == RUN_COLUMNS
    assert frame["method"][0] == "telepathy"
    assert frame[["model", "data", "lr", "scaling"]].isna().all(axis=None)


def test_steps_and_evals(ledger: Ledger) -> None:
    a, b = (ledger.create_run(to_dict(LORA), num_steps=7) for _ in range(2))
    for run_id, loss in ((b, math.nan), (a, 2.0), (a, 3.0)):
        ledger.record_step(run_id, 1, train_loss=loss, lr=0.1, grad_norm=0.5, tokens=9, seconds=0.25)
        ledger.record_eval(run_id, 0, eval_loss=loss, tokens=9)
    frame = steps_frame(ledger, [b, a])
    assert dtypes(frame) == STEP_COLUMNS
    assert next(frame.itertuples(index=False, name=None)) == (a, 1, 3.0, 0.1, 0.5, 9, 0.25)
    assert math.isnan(frame["train_loss"][1])
    frame = evals_frame(ledger, [a])
    assert dtypes(frame) == EVAL_COLUMNS
    assert list(frame.itertuples(index=False, name=None)) == [(a, 0, 3.0)]


def finish(ledger: Ledger, config: RunConfig, predicted: int | None, status: str = "done", **result: object) -> str:
    prediction = None if predicted is None else {"peak_bytes": predicted}
    run_id = ledger.create_run(to_dict(config), prediction=prediction, num_steps=7)
    ledger.claim_run(run_id, *this_process())
    ledger.finish_run(run_id, status, result=RESULT | result if status == "done" else None)
    return run_id


def test_accuracy_holds_what_was_written_before_against_what_was_measured(ledger: Ledger) -> None:
    cpu = finish(ledger, LORA, 1000, peak_bytes=1030)
    gpu = finish(ledger, FULL, 2000, peak_bytes=1900, peak_kind="allocated", reserved_bytes=2500, device="H100")
    finish(ledger, LORA, None)
    finish(ledger, LORA, 1000, peak_bytes=None)
    finish(ledger, LORA, 1000, status="failed")
    frame = accuracy_frame(ledger)
    assert dtypes(frame) == ACCURACY_COLUMNS
    assert list(frame["run_id"]) == [cpu, gpu]
    assert list(frame["error_percent"]) == pytest.approx([3.0, -5.0])
    assert list(frame["kind"]) == ["tracked", "allocated"]
    assert list(frame["measured_bytes"]) == [1030, 1900]
    assert math.isnan(frame["reserved_bytes"][0])
    assert frame["reserved_bytes"][1] == 2500
    assert (frame["r"][0], frame["batch_size"][0], frame["max_length"][0]) == (8, 4, 64)
    assert math.isnan(frame["r"][1])
    assert prediction_errors(ledger) == {"tracked": [pytest.approx(3.0)], "allocated": [pytest.approx(-5.0)]}


def test_empty_frames_have_the_same_types(ledger: Ledger) -> None:
    for frame, columns in (
        (runs_frame(ledger), RUN_COLUMNS),
        (steps_frame(ledger, []), STEP_COLUMNS),
        (evals_frame(ledger, []), EVAL_COLUMNS),
        (accuracy_frame(ledger), ACCURACY_COLUMNS),
    ):
        assert dtypes(frame) == columns
        assert len(frame) == 0
