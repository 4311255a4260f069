"""How long `lora-explorer train` takes from the shell, and our step against PEFT's, interleaved in one process."""

import contextlib
import io
import json
import statistics
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


def step_against_peft(steps: int = 30) -> dict[str, Any]:
    """One training step of the embedded model, ours and PEFT's in turn: median seconds and the paired ratio."""
    import peft
    import torch

    from lora_engine.config import LoraConfig, TrainConfig
    from lora_engine.data import IGNORED
    from lora_engine.methods import inject, trainable_parameters
    from lora_engine.training.base import load_base, resolve_model
    from lora_engine.training.batches import label_batch
    from lora_engine.training.loss import labelled_loss_sum

    cpu = torch.device("cpu")
    folder = resolve_model("embedded")
    ours = inject(load_base(folder, TrainConfig(), cpu), LoraConfig())
    wanted = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(load_base(folder, TrainConfig(), cpu), wanted)
    optimizers = [torch.optim.AdamW(trainable_parameters(m), lr=1e-3, fused=m is ours) for m in (ours, theirs)]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 4000, (8, 128), generator=generator)
    figures = {}
    for name, masked in (("every token trained", 0), ("half the prompt masked", 64)):
        labels = ids.clone()
        labels[:, :masked] = IGNORED
        batch = label_batch(ids, labels, cpu)

        def our_step(batch: Any = batch) -> None:
            (labelled_loss_sum(ours, batch) / batch.num_labels).backward()
            optimizers[0].step()
            optimizers[0].zero_grad()

        def their_step(labels: Any = labels) -> None:
            theirs(input_ids=ids, labels=labels, use_cache=False).loss.backward()
            optimizers[1].step()
            optimizers[1].zero_grad()

        pairs = []
        for i in range(steps + 3):
            pair = []
            for step in (our_step, their_step) if i % 2 else (their_step, our_step):
                began = time.perf_counter()
                step()
                pair.append(time.perf_counter() - began)
            if i >= 3:
                pairs.append(pair if i % 2 else pair[::-1])
        figures[name] = {
            "our_seconds": statistics.median(p[0] for p in pairs),
            "peft_seconds": statistics.median(p[1] for p in pairs),
            "peft_over_ours": summary([p[1] / p[0] for p in pairs]),
        }
    return figures
