"""The ledger of runs and tidy tables from it. Torch-free."""

from lora_engine.runs.frames import (
    accuracy_frame,
    evals_frame,
    prediction_errors,
    records_frame,
    runs_frame,
    steps_frame,
)
from lora_engine.runs.home import default_home
from lora_engine.runs.ledger import Ledger
from lora_engine.runs.processes import is_alive, this_process
from lora_engine.runs.records import RunRecord, SweepRecord, finite_only
from lora_engine.runs.uploads import store_config, store_upload

__all__ = [
    "Ledger",
    "RunRecord",
    "SweepRecord",
    "accuracy_frame",
    "default_home",
    "evals_frame",
    "finite_only",
    "is_alive",
    "prediction_errors",
    "records_frame",
    "runs_frame",
    "steps_frame",
    "store_config",
    "store_upload",
    "this_process",
]
