"""The packed loop: the steps of N runs of `training.loop` in one forward and one backward.

Everything that makes a run a run of its own stays its own: batches by its seed, learning rate by its schedule,
clipping by its norm, weight decay, callbacks, state. The loss is the sum of each config's own token mean, so that
gradients are those of separate runs.
"""

import contextlib
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lora_engine.config import LoraConfig, RunConfig
from lora_engine.data import Encoded
from lora_engine.errors import ConfigError
from lora_engine.methods.packed import Pack, eject_pack, inject_pack
from lora_engine.methods.places import task_head_names
from lora_engine.training.base import PRECISION_PLANS, autocast_of
from lora_engine.training.loop import LoopState, StepReport, build_optimizer, lr_at
from lora_engine.training.loss import evaluate
from lora_engine.training.measure import PeakMemory
from lora_engine.training.pack_batches import PackBatches, evaluate_pack, pack_losses
from lora_engine.training.steps import heaviest_step


@dataclass
class PackRow:
    """One run among others. `tensors`: its `parameter.*` and `optimizer.*` as its own checkpoint.safetensors would hold
    them, on the host (None: it has not begun). `head`: the first values of its task head. Rows of the same `pack`
    number share a pass; after an out-of-memory error there are more packs than before."""

    name: str
    config: RunConfig
    state: LoopState = field(default_factory=LoopState)
    tensors: dict[str, Tensor] | None = None
    head: Mapping[str, Tensor] | None = None
    pack: int = 0

    @property
    def method(self) -> LoraConfig:
        method = self.config.method
        if not isinstance(method, LoraConfig):
            raise ConfigError("method", method.method, "lora in a pack")
        return method

    def is_done(self, until_step: int | None) -> bool:
        last = self.config.train.steps if until_step is None else min(until_step, self.config.train.steps)
        return self.state.stopped or self.state.step >= last


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
            held[0].go()
            failed = False
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or len(rows) == 1:
                raise
            failed = True
        finally:
            # The rows' values are those of the last finished step: a step that fails has not reached the optimizer.
            if held:
                held[0].leave()
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
        self.loop, self.rows, self.model = loop, rows, loop.model
        self.train = rows[0].config.train
        heads = [row.head for row in rows]
        states = [_parameters(row) for row in rows]
        self.pack: Pack = inject_pack(
            loop.model,
            [row.method for row in rows],
            seeds=[row.config.train.seed for row in rows],
            heads=None if any(head is None for head in heads) else [head for head in heads if head is not None],
            states=states,
        )
        self.device = self.pack.parameters.device
        self.optimizer = pack_optimizer(self.pack, rows)
        self.autocast = autocast_of(self.train, self.device)
        self.batches = PackBatches(rows, loop.train_rows, loop.pad_id, self.device)
        self.eval_batches = self.batches.evaluation(loop.eval_rows)
        limits = [row.config.train.max_grad_norm or float("inf") for row in rows]
        self.limits = torch.tensor(limits, device=self.device, dtype=self.pack.parameters.dtype)
        self.memory = PeakMemory(loop.model, self.optimizer, self.device)

    def go(self) -> None:
        rows, calls, train = self.rows, self.loop.callbacks, self.train
        self._first_eval()
        self.model.train()
        measured = heaviest_step(self.loop.train_rows, train)
        while True:
            for row in rows:
                row.state.stopped = calls.should_stop(row)
            if any(row.is_done(self.loop.until_step) for row in rows):
                break
            began = time.perf_counter()
            lrs = [lr_at(row.config.train, row.state.step) for row in rows]
            with self.memory.watch() if rows[0].state.step == measured else contextlib.nullcontext():
                losses, norms, num_tokens = self._step(lrs)
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
                self.leave()
                self.loop.checkpoint(self.loop.rows)

    def _step(self, lrs: Sequence[float]) -> tuple[list[float], list[float], list[int]]:
        """One optimizer step of every row: losses, gradient norms before clipping, tokens read."""
        for group, lr in zip(self.optimizer.param_groups, lrs, strict=True):
            group["lr"] = lr
        batches = self.batches.step([row.state.step for row in self.rows])
        self.pack.zero_grad()
        losses = torch.zeros(len(self.rows), device=self.device, dtype=torch.float64)
        for batch in batches:
            with self.autocast:
                total, each = pack_losses(self.model, batch)
            total.backward()
            losses += each
        norms = clip_rows(self.pack.gradients, self.limits)
        self.optimizer.step()
        read = torch.stack((losses, norms.double())).tolist()  # one transfer for all rows
        num_tokens = [sum(batch.num_tokens[i] for batch in batches) for i in range(len(self.rows))]
        return read[0], read[1], num_tokens

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
                self.pack.set_enabled(False)
                with self.autocast:
                    self.loop.base_eval_loss = evaluate(self.model, self.batches.plain_evaluation(self.loop.eval_rows))
                self.pack.set_enabled(True)
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
        with self.autocast:
            return evaluate_pack(self.model, self.eval_batches, len(self.rows))

    @torch.no_grad()
    def leave(self) -> None:
        """Every row's values into its `tensors`, on the host."""
        parameters = self.pack.parameters.cpu()
        states = [
            {key: value.cpu() for key, value in self.optimizer.state[p].items() if value is not None}
            for p in self.pack.rows
        ]
        for i, row in enumerate(self.rows):
            named = self.pack.unpadded(parameters[i], i)
            tensors = {f"parameter.{name}": value.clone() for name, value in named.items()}
            for key, value in states[i].items():
                per_parameter = self.pack.unpadded(value, i).values() if value.dim() else [value] * len(named)
                tensors |= {f"optimizer.{k}.{key}": part.clone() for k, part in enumerate(per_parameter)}
            row.tensors = tensors


def _parameters(row: PackRow) -> dict[str, Tensor] | None:
    if row.tensors is None:
        return None
    prefix = "parameter."
    return {name[len(prefix) :]: value for name, value in row.tensors.items() if name.startswith(prefix)}


@torch.no_grad()
def pack_optimizer(pack: Pack, rows: Sequence[PackRow]) -> torch.optim.Optimizer:
    """The optimizer of separate runs over the rows of `pack`, each a group with its own lr and weight decay.

    AdamW's state is made here and not at the first step, which then takes no memory that could be lacking halfway."""
    groups = [
        {"params": [p], "lr": row.config.train.lr, "weight_decay": row.config.train.weight_decay}
        for p, row in zip(pack.rows, rows, strict=True)
    ]
    optimizer = build_optimizer(groups, rows[0].config.train)
    if rows[0].config.train.optimizer == "sgd":
        return optimizer
    moments = {key: torch.zeros_like(pack.parameters) for key in ("exp_avg", "exp_avg_sq")}
    for i, (p, row) in enumerate(zip(pack.rows, rows, strict=True)):
        state: dict[str, Tensor] = {key: value[i] for key, value in moments.items()}
        step = torch.zeros((), dtype=torch.float32, device=p.device)
        for key, value in state.items():
            for k, part in enumerate(pack.unpadded(value, i).values()):
                if row.tensors and f"optimizer.{k}.{key}" in row.tensors:
                    part.copy_(row.tensors[f"optimizer.{k}.{key}"])
        if row.tensors and "optimizer.0.step" in row.tensors:
            step.copy_(row.tensors["optimizer.0.step"])
        optimizer.state[p] = {"step": step, **state}
    return optimizer


@torch.no_grad()
def clip_rows(gradients: Tensor, limits: Tensor) -> Tensor:
    """`clip_grad_norm_` of each row of gradients (N, P) by its own limit (N,); the norms before, (N,)."""
    norms = torch.linalg.vector_norm(gradients, dim=1)
    gradients.mul_((limits / (norms + 1e-6)).clamp_(max=1.0).unsqueeze(1))
    return norms


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that the device, or the host, has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return "out of memory" in text or "can't allocate memory" in text or "not enough memory" in text
