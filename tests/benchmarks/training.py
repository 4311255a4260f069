"""How long `lora-explorer train` takes from the shell."""

import contextlib
import io
import json
import tempfile
import time
from typing import Any

from benchmarks.machine import summary

from lora_engine.assets_path import asset_path


def run_command(repeats: int = 3) -> dict[str, Any]:
    """60 steps of the embedded model at r 8, alpha 16 on each bundled dataset: wall seconds and losses."""
    from lora_engine.cli import main

    figures = {}
    for name in ("short_stories.txt", "customer_support.jsonl", "records_to_sentences.csv"):
        seconds, payload = [], {}
        for _ in range(repeats):
            with tempfile.TemporaryDirectory() as home:
                printed = io.StringIO()
                began = time.perf_counter()
                with contextlib.redirect_stdout(printed):
                    main(["train", "--data", str(asset_path(f"datasets/{name}")), "--json", "--home", home])
                seconds.append(time.perf_counter() - began)
                payload = json.loads(printed.getvalue())
        kept = ("eval_loss_before", "eval_loss_after", "peak_bytes", "predicted_peak_bytes", "tokens_per_second")
        figures[name] = {"wall_seconds": summary(seconds)} | {key: payload[key] for key in kept}
    return figures
