"""What a pack needs beside its loop: rows from configs, a size, what one run of a rank takes alone, texts and files."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_engine import methods
from lora_engine.config import RunConfig
from lora_engine.jobs import leave_behind
from lora_engine.methods import inject, lora, trainable_parameters
from lora_engine.methods.packed import eject_pack, inject_pack, refusal
from lora_engine.methods.places import task_head_parameters
from lora_engine.pack_files import Saved
from lora_engine.session import Loaded, restore_heads
from lora_engine.sweeps.packing import ALONE
from lora_engine.training.base import task_heads
from lora_engine.training.generate import generate_texts
from lora_engine.training.loop import Callbacks, LoopState, StepReport, heaviest_step, train
from lora_engine.training.memory_limits import is_out_of_memory
from lora_engine.training.pack_size import (
    USED_SHARE,
    PackPlan,
    choose_pack_size,
    even_size,
    free_memory,
    probe_pack,
    rows_that_fit,
)
from lora_engine.training.pack_step import PackRow

Heads = dict[int, Mapping[str, Tensor]]
"""A classifier's task head as it begins, by seed."""


def model_refusal(loaded: Loaded, config: RunConfig) -> str | None:
    """Why the model does not let runs of `config` share a pass."""
    return refusal(config.method, loaded.model)


def heads_of(loaded: Loaded, configs: Sequence[RunConfig]) -> Heads:
    """First values of the task head for each seed; nothing for a language model."""
    if not loaded.classes or not configs:
        return {}
    seeds = [config.train.seed for config in configs]
    folder, pad_id = loaded.base_folder, loaded.tokenizer.pad_id
    return dict(task_heads(folder, configs[0].train, seeds, classes=loaded.classes, pad_id=pad_id))


def make_row(run_id: str, config: RunConfig, saved: Saved | None, heads: Heads) -> PackRow:
    """A row from the beginning, or from where it was saved."""
    head = heads.get(config.train.seed)
    if saved is None:
        return PackRow(run_id, config, head=head)
    return PackRow(run_id, config, saved.state, saved.tensors, head, saved.pack)


def plan_size(loaded: Loaded, rows: Sequence[PackRow], packed: str) -> PackPlan:
    """How many rows a pack holds: measured for "auto", for "always" as many as fit into memory."""
    if len(rows) == 1:
        return PackPlan(1, {}, {}, ALONE)
    if packed == "auto":
        return choose_pack_size(loaded.model, rows, loaded.train_rows, pad_id=loaded.tokenizer.pad_id)
    dearest = sorted(rows, key=lambda row: -row.method.r)
    budget = int(USED_SHARE * free_memory(loaded.device))
    added: list[int] = []
    for size in (1, 2):
        probe = probe_pack(loaded.model, dearest[:size], loaded.train_rows, pad_id=loaded.tokenizer.pad_id, timed=0)
        if probe is None:
            return PackPlan(1, {}, {}, "memory ran out with two")
        added.append(probe.added_bytes)
    fits = rows_that_fit(budget, *added)
    if fits >= len(rows):
        return PackPlan(len(rows), {}, {}, "packed is always")
    return PackPlan(even_size(len(rows), fits), {}, {}, "packed is always; more would not fit into memory")


def measure_alone(loaded: Loaded, config: RunConfig) -> LoopState:
    """The peak memory of one step of `config` by itself, as a run alone measures it: two steps, thrown away."""
    measured = heaviest_step(loaded.train_rows, config.train)
    begin = LoopState(step=max(0, measured - 1), eval_loss_before=math.nan)
    seen: list[StepReport] = []
    calls = Callbacks(on_step=seen.append, should_stop=lambda: bool(seen) and seen[-1].step > measured)
    model = inject(loaded.model, config.method, seed=config.train.seed)
    try:
        return train(
            model, loaded.train_rows, [], config.train, pad_id=loaded.tokenizer.pad_id, state=begin, callbacks=calls
        )
    finally:
        _bare(loaded)


def texts_before(loaded: Loaded, heads: Heads) -> dict[int, str]:
    """The text before training by seed, for classifiers, whose head is the seed's; nothing for other models."""
    texts = {}
    for seed, head in heads.items():
        _load(dict(task_head_parameters(loaded.model)), head)
        texts[seed] = loaded.answer()
    restore_heads(loaded.model, loaded.heads)
    return texts


def texts_after(loaded: Loaded, rows: Sequence[PackRow]) -> list[str] | None:
    """The continuation of every trained row, all in one batch; None for a classifier, and where memory ran out."""
    if loaded.classes:
        return None
    try:
        inject_pack(
            loaded.model,
            [row.method for row in rows],
            seeds=[row.config.train.seed for row in rows],
            states=[trained(row) for row in rows],
        )
        return generate_texts(loaded.model, loaded.tokenizer, loaded.prompt_ids, len(rows))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None
    finally:
        eject_pack(loaded.model)
        loaded.model.eval()


def finish_row(
    loaded: Loaded, row: PackRow, folder: Path, *, before: str | None, after: str | None, alone: LoopState | None
) -> dict[str, Any]:
    """Write the adapter of a trained row as that of a run by itself; its result. `peak_bytes` is that of a step
    `alone`, measured before the pack (None: not measured)."""
    config = row.config
    model = inject(loaded.model, config.method, seed=config.train.seed)
    try:
        methods.load_state_dict(model, config.method, trained(row))
        trainable = sum(p.numel() for p in trainable_parameters(model))
        mine = loaded if before is None else dataclasses.replace(loaded, before=before)
        text = loaded.answer() if after is None else after
        result = leave_behind(config, folder, mine, row.state, trainable=trainable, after=text)
    finally:
        _bare(loaded)
    return result | {
        "peak_bytes": alone.peak_bytes or None if alone else None,
        "peak_kind": alone.peak_kind if alone else "",
        "reserved_bytes": alone.reserved_bytes if alone else None,
        "pack": dict(row.state.notes.get("pack") or {}),
    }


def trained(row: PackRow) -> dict[str, Tensor]:
    """The row's adapter (and task head) by full parameter name. A row that has not begun has none."""
    prefix = "parameter."
    return {name[len(prefix) :]: value for name, value in (row.tensors or {}).items() if name.startswith(prefix)}


def _bare(loaded: Loaded) -> None:
    lora.eject(loaded.model)
    restore_heads(loaded.model, loaded.heads)
    loaded.model.eval()


@torch.no_grad()
def _load(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        parameters[name].copy_(value)
