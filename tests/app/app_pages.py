"""Pages as Streamlit runs them, without a browser, and runs to show on them."""

import json
import os
from pathlib import Path

from streamlit.testing.v1 import AppTest

from lora_engine.config import DataConfig, LoraConfig, RunConfig, TrainConfig, to_dict
from lora_engine.runs import Ledger, store_upload

ROOT = Path(__file__).resolve().parents[2]
MAIN = ROOT / "app" / "main.py"
PAGES = (
    "views/explore.py",
    "views/finetune.py",
    "views/sweep.py",
    "views/compare.py",
    "views/runs.py",
    "views/accuracy.py",
)


PARCELS = [{"prompt": f"Where is parcel {i}", "completion": f"It left on day {i}."} for i in range(30)]


def parcels(home):
    """The name of a good file, now kept at home."""
    path = store_upload(home, "parcels.jsonl", "\n".join(json.dumps(row) for row in PARCELS).encode())
    return f"{path.parent.name}/{path.name}"


def open_page(page=PAGES[0], **parameters):
    app = AppTest.from_file(MAIN, default_timeout=60)
    for name, value in parameters.items():
        app.query_params[name] = value
    app.run()
    if page != PAGES[0]:
        app.switch_page(page).run()
    assert not app.exception, [e.value for e in app.exception]
    return app


def texts(app):
    return " ".join(str(e.value) for kind in (app.markdown, app.caption, app.subheader, app.header) for e in kind)


def finished_run(
    home, *, r=8, alpha=16.0, lr=3e-3, seed=0, loss=3.9, sweep=None, status="done", predicted=2**27, **more
):
    config = RunConfig(
        data=DataConfig(path="parcels.jsonl"),
        method=LoraConfig(r=r, lora_alpha=alpha),
        train=TrainConfig(lr=lr, seed=seed, steps=4),
    )
    ledger = Ledger(home)
    run_id = sweep or ledger.create_run(to_dict(config), prediction={"peak_bytes": predicted}, num_steps=4)
    ledger.claim_run(run_id, os.getpid(), 0.0)
    for step in range(1, 5):
        ledger.record_step(
            run_id, step, train_loss=5 - 0.2 * step, lr=lr, grad_norm=1.0, tokens=100 * step, seconds=step
        )
    ledger.record_eval(run_id, 0, eval_loss=6.0)
    ledger.record_eval(run_id, 4, eval_loss=loss)
    adapter = ledger.run_folder(run_id) / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}")
    result = {
        "trainable_parameters": 20_352 * r, "total_parameters": 3_148_224, "eval_loss_before": 6.0,
        "eval_loss_after": loss, "steps": 4, "seconds": 41.0 + r, "tokens_per_second": 900.0, "peak_bytes": 2**26,
        "peak_kind": "tracked", "predicted_peak_bytes": 2**27, "adapter_bytes": 80_000 * r, "adapter_path": "adapter",
        "device": "cpu", "step_seconds": 10.0,
        "sample": {"prompt": "Where is parcel 3", "before": " <b>bold</b>", "after": " It left."},
    }  # fmt: skip
    ledger.finish_run(run_id, status, result=result | more if status == "done" else None, error=None)
    return run_id
