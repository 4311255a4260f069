"""The packed loop: the steps of N runs of `training.loop` in one forward and one backward.

Everything that makes a run a run of its own stays its own: batches by its seed, learning rate by its schedule,
clipping by its norm, weight decay, callbacks, state. The loss is the sum of each config's own token mean, so that
gradients are those of separate runs.
"""

import contextlib
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lora_engine.data import Encoded
from lora_engine.errors import ConfigError
from lora_engine.methods.packed import eject_pack
from lora_engine.methods.places import task_head_names
from lora_engine.training.base import PRECISION_PLANS
from lora_engine.training.graphs import without_device_checks
from lora_engine.training.loop import StepReport, heaviest_step, lr_at
from lora_engine.training.loss import evaluate
from lora_engine.training.memory_limits import is_out_of_memory
from lora_engine.training.pack_graphs import StaticPackedSteps, static_pack_refusal
from lora_engine.training.pack_loss import evaluate_pack
from lora_engine.training.pack_step import PackedSteps, PackRow


@dataclass(frozen=True)
class PackCallbacks:
    """What the packed loop tells and asks, of one row each; each may stay as it is. `on_pack` is told of the rows of
    every pack that is formed, and `on_halved` of those that were together when memory ran out."""

    on_step: Callable[[PackRow, StepReport], None] = lambda _row, _report: None
    on_eval: Callable[[PackRow, int, float], None] = lambda _row, _step, _loss: None
    should_stop: Callable[[PackRow], bool] = lambda _row: False
    on_pack: Callable[[Sequence[PackRow]], None] = lambda _rows: None
    on_halved: Callable[[Sequence[PackRow]], None] = lambda _rows: None


def train_pack(
    model: Any,
    rows: Sequence[PackRow],
    train_rows: Sequence[Encoded],
    eval_rows: Sequence[Encoded],
    *,
    pad_id: int,
    until_step: int | None = None,
    size: int | None = None,
    callbacks: PackCallbacks | None = None,
    checkpoint: Callable[[list[PackRow]], None] | None = None,
) -> list[PackRow]:
    """Train `rows` to their last step, or to optimizer step `until_step`, in packs of at most `size`; the same rows
    come back, their `tensors` filled. `model` is the bare base before and after, its bits unchanged.

    Rows differ in r, lora_alpha, use_rslora, lr, weight_decay, warm-up, schedule, clipping, steps and seed. One that is
    done or told to stop leaves, and the others form a new pack. When memory runs out, a pack is halved and both halves
    go on from the last finished step. `checkpoint` gets all rows, every `checkpoint_every` steps of a pack, `tensors`
    filled: a call with rows restored from them goes on bit-identically.

    `state.notes["pack"]`: `size` (of the row's last pack), `seconds` (spent in steps by the packs it was in; its own
    `state.seconds` is its share) and `peak_bytes`. Raises ConfigError for settings that must be equal and are not."""
    for row in rows:
        row.state.stopped = False
    loop = _Loop(model, list(rows), train_rows, eval_rows, pad_id, until_step, callbacks or PackCallbacks(), checkpoint)
    _check(rows)
    loop.split(size)
    while True:
        waiting = [row for row in loop.rows if not row.is_done(until_step)]
        if not waiting:
            return loop.rows
        together = [row for row in waiting if row.pack == waiting[0].pack]
        if not loop.run(together):
            loop.halve(together)


_EQUAL = (
    "batch_size", "accumulation", "max_length", "precision", "device", "optimizer", "checkpointing", "eval_every",
    "eval_examples", "checkpoint_every",
)  # fmt: skip


def _check(rows: Sequence[PackRow]) -> None:
    first = rows[0].config.train if rows else None
    for row in rows:
        for name in _EQUAL:
            if getattr(row.config.train, name) != getattr(first, name):
                allowed = f"{getattr(first, name)!r}, as in the other rows of the pack"
                raise ConfigError(name, getattr(row.config.train, name), allowed)
        if PRECISION_PLANS[row.config.train.precision].scaled:
            raise ConfigError("precision", row.config.train.precision, "in a pack a precision without loss scaling")


@dataclass
class _Loop:
    """What every pack of one `train_pack` shares."""

    model: Any
    rows: list[PackRow]
    train_rows: Sequence[Encoded]
    eval_rows: Sequence[Encoded]
    pad_id: int
    until_step: int | None
    callbacks: PackCallbacks
    checkpoint: Callable[[list[PackRow]], None] | None
    base_eval_loss: float | None = None

    def split(self, size: int | None) -> None:
        """Number packs of at most `size` rows."""
        seen: dict[int, int] = {}
        numbers: dict[tuple[int, int], int] = {}
        for row in self.rows:
            place = seen.get(row.pack, 0)
            seen[row.pack] = place + 1
            key = (row.pack, place // size if size else 0)
            row.pack = numbers.setdefault(key, len(numbers))

    def halve(self, rows: list[PackRow]) -> None:
        self.callbacks.on_halved(rows)
        new = 1 + max(row.pack for row in self.rows)
        for row in rows[(len(rows) + 1) // 2 :]:
            row.pack = new

    def run(self, rows: list[PackRow]) -> bool:
        """Train one pack until a row leaves. False when memory ran out; everything of the step is let go of first."""
        held: list[_Running] = []
        try:
            held.append(_Running(self, rows))
            self.callbacks.on_pack(rows)
            with without_device_checks():
                held[0].go()
            failed = False
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or len(rows) == 1:
                raise
            failed = True
        finally:
            # The rows' values are those of the last finished step: a step that fails has not reached the optimizer.
            if held:
                held[0].steps.leave()
            eject_pack(self.model)
        held.clear()
        if failed:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return not failed


class _Running:
    """One pack while it trains."""

    def __init__(self, loop: _Loop, rows: list[PackRow]) -> None:
        self.loop, self.rows, self.model, self.train = loop, rows, loop.model, rows[0].config.train
        self.steps = PackedSteps(loop.model, rows, loop.train_rows, loop.pad_id)
        self.memory = self.steps.memory()
        self.step, self.measured = self.steps.step, heaviest_step(loop.train_rows, self.train)
        if static_pack_refusal(self.steps) is None:
            self.step = StaticPackedSteps(self.steps, loop.train_rows, loop.pad_id).step
            self.measured = rows[0].state.step  # all take the same; those of a graph that is replayed are not seen
        self.eval_batches = self.steps.batches.evaluation(loop.eval_rows)

    def go(self) -> None:
        rows, calls, train = self.rows, self.loop.callbacks, self.train
        self._first_eval()
        self.model.train()
        while True:
            for row in rows:
                row.state.stopped = calls.should_stop(row)
            if any(row.is_done(self.loop.until_step) for row in rows):
                break
            began = time.perf_counter()
            at = [row.state.step for row in rows]
            lrs = [lr_at(row.config.train, step) for row, step in zip(rows, at, strict=True)]
            with self.memory.watch() if at[0] == self.measured else contextlib.nullcontext():
                losses, norms, num_tokens = self.step(at, lrs)
            seconds = time.perf_counter() - began
            for i, row in enumerate(rows):
                state = row.state
                state.step += 1
                state.tokens += num_tokens[i]
                state.seconds += seconds / len(rows)
                self._note(row, seconds)
                report = StepReport(state.step, losses[i], lrs[i], norms[i], state.tokens, state.seconds)
                calls.on_step(row, report)
            self._evaluate([row for row in rows if self._is_due(row)])
            if self.loop.checkpoint and any(row.state.step % train.checkpoint_every == 0 for row in rows):
                self.steps.leave()
                self.loop.checkpoint(self.loop.rows)

    def _note(self, row: PackRow, seconds: float) -> None:
        note = row.state.notes.setdefault("pack", {"size": 0, "seconds": 0.0, "peak_bytes": 0})
        note["size"] = len(self.rows)
        note["seconds"] += seconds
        note["peak_bytes"] = max(note["peak_bytes"], self.memory.peak_bytes)
        row.state.peak_kind, row.state.reserved_bytes = self.memory.kind, self.memory.reserved_bytes

    def _is_due(self, row: PackRow) -> bool:
        every = row.config.train.eval_every or max(1, row.config.train.steps // 10)
        return row.state.step % every == 0 or row.state.step == row.config.train.steps

    def _first_eval(self) -> None:
        """Before the first step every adapter is zero, so that the base is evaluated once for all rows."""
        new = [row for row in self.rows if row.state.eval_loss_before is None]
        if not new:
            return
        if task_head_names(self.model):
            for row, loss in zip(self.rows, self._losses(), strict=True):
                if row in new:
                    row.state.eval_loss_before = loss
        else:
            if self.loop.base_eval_loss is None:
                self.steps.pack.set_enabled(False)
                with self.steps.autocast:
                    self.loop.base_eval_loss = evaluate(
                        self.model, self.steps.batches.plain_evaluation(self.loop.eval_rows)
                    )
                self.steps.pack.set_enabled(True)
            for row in new:
                row.state.eval_loss_before = self.loop.base_eval_loss
        for row in new:
            assert row.state.eval_loss_before is not None
            self.loop.callbacks.on_eval(row, 0, row.state.eval_loss_before)

    def _evaluate(self, due: list[PackRow]) -> None:
        if not due:
            return
        losses = dict(zip((row.name for row in self.rows), self._losses(), strict=True))
        for row in due:
            if row.state.step == row.config.train.steps:
                row.state.eval_loss_after = losses[row.name]
            self.loop.callbacks.on_eval(row, row.state.step, losses[row.name])

    def _losses(self) -> list[float]:
        with self.steps.autocast:
            return evaluate_pack(self.model, self.eval_batches, len(self.rows))
