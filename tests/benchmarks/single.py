"""One run: a step of our loop and a step of PEFT's, in turn in one process."""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from benchmarks.machine import summary
from benchmarks.peft_side import PlainLoop
from benchmarks.workload import PAD_ID, Workload
from transformers import PreTrainedModel, masking_utils

from lora_engine.methods import inject
from lora_engine.training.loop import Callbacks, StepReport, train

CASES = {"every token trained": 0, "half the prompt masked": 64}
PEFT_LOOPS = {"PEFT, torch's own choice of AdamW": False, "PEFT, fused AdamW": True}

# Our loop skips these while it runs (`training.graphs.without_device_checks`); PEFT's steps must not gain from it.
CHECKS: tuple[tuple[Any, str, Any], ...] = tuple(
    (owner, name, getattr(owner, name))
    for owner, name in (
        (masking_utils, "find_packed_sequence_indices"),
        (PreTrainedModel, "warn_if_padding_and_no_attention_mask"),
    )
)


def run_single(*, smoke: bool = False, repeats: int = 0) -> dict[str, Any]:
    """Steps of 8 x 128 tokens of the embedded model, r 8, alpha 16: median seconds and paired ratios.

    Our loop trains a whole run; after each of its steps PEFT takes the same step, with both of its AdamWs."""
    figures = {}
    for case, masked in CASES.items():
        work = Workload(num_configs=4, steps=repeats or 60, batch_size=8, length=128, masked=masked)
        if smoke:
            work = Workload(model="tiny Llama", num_configs=4, steps=4, batch_size=1, length=16, masked=masked // 8)
        figures[case] = _in_turn(work)
    return {"threads": torch.get_num_threads(), "cases": figures}


@contextmanager
def transformers_as_installed() -> Iterator[None]:
    """Undo what our loop has changed in transformers, for others."""
    ours = [getattr(owner, name) for owner, name, _ in CHECKS]
    for owner, name, original in CHECKS:
        setattr(owner, name, original)
    try:
        yield
    finally:
        for (owner, name, _), value in zip(CHECKS, ours, strict=True):
            setattr(owner, name, value)


def _in_turn(work: Workload) -> dict[str, Any]:
    config = work.configs[3]  # r 8
    loops = {name: PlainLoop(work.load(), config, work.rows, fused=fused) for name, fused in PEFT_LOOPS.items()}
    ours: list[float] = []
    theirs: dict[str, list[float]] = {name: [] for name in loops}
    differences: list[float] = []
    spent = 0.0

    def after_our_step(report: StepReport) -> None:
        nonlocal spent
        ours.append(report.seconds - spent)
        spent = report.seconds
        names = list(loops)
        with transformers_as_installed():
            for name in names if report.step % 2 else reversed(names):
                began = time.perf_counter()
                loss = float(loops[name].step(report.step - 1))
                theirs[name].append(time.perf_counter() - began)
                differences.append(abs(loss - report.train_loss))

    model = inject(work.load(), config.method, seed=config.train.seed)
    train(model, work.rows, [], config.train, pad_id=PAD_ID, callbacks=Callbacks(on_step=after_our_step))
    warm = slice(3, None) if len(ours) > 6 else slice(1, None)
    return {
        "our_seconds": summary(ours[warm]),
        "max_loss_difference": max(differences),
        "peft": {
            name: {
                "seconds": summary(seconds[warm]),
                "times_ours": summary([t / o for t, o in zip(seconds[warm], ours[warm], strict=True)]),
                "ratio_of_medians": statistics.median(seconds[warm]) / statistics.median(ours[warm]),
            }
            for name, seconds in theirs.items()
        },
    }
