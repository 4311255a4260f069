"""The one training loop. It knows a model, batches, settings and callbacks; no method and no screen."""

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_engine.config import TrainConfig
from lora_engine.data import Encoded
from lora_engine.training.base import PRECISION_PLANS
from lora_engine.training.batches import evaluation_batches, make_batch, rows_of_step
from lora_engine.training.checkpoint import load_tensors, optimizer_tensors, restore_optimizer, save_tensors
from lora_engine.training.graphs import without_device_checks
from lora_engine.training.loss import evaluate
from lora_engine.training.measure import PeakMemory
from lora_engine.training.prefix_cache import cached_prefix
from lora_engine.training.steps import Trained, build_steps
from lora_engine.training.steps import heaviest_step as heaviest_step


@dataclass(frozen=True)
class StepReport:
    """One optimizer step: loss in nats per labelled token, tokens read so far, seconds spent in steps so far."""

    step: int
    train_loss: float
    lr: float
    grad_norm: float
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Callbacks:
    """What the loop tells and asks; each may stay as it is."""

    on_step: Callable[[StepReport], None] = lambda _report: None
    on_eval: Callable[[int, float], None] = lambda _step, _loss: None
    should_stop: Callable[[], bool] = lambda: False


@dataclass
class LoopState:
    """What a checkpoint keeps beside tensors; the loop returns it."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    eval_loss_before: float | None = None
    eval_loss_after: float | None = None
    peak_bytes: int = 0
    peak_kind: str = ""
    reserved_bytes: int | None = None
    stopped: bool = False
    notes: dict[str, Any] = field(default_factory=dict)


def lr_at(config: TrainConfig, step: int) -> float:
    """Learning rate of optimizer step `step` (from 0): linear warm-up, then the schedule."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    factors = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
    return config.lr * factors[config.schedule]


def build_optimizer(
    parameters: Sequence[nn.Parameter] | Sequence[dict[str, Any]], config: TrainConfig
) -> torch.optim.Optimizer:
    """AdamW (fused) or SGD over the trainable parameters, or groups of them with settings of their own."""
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, fused=True)


def train(
    model: Any,
    train_rows: Sequence[Encoded],
    eval_rows: Sequence[Encoded],
    config: TrainConfig,
    *,
    pad_id: int,
    checkpoint: Path | None = None,
    state: LoopState | None = None,
    callbacks: Callbacks | None = None,
) -> LoopState:
    """Train what requires a gradient in `model`, from the checkpoint when there is one.

    Batches, dropout and learning rate depend on (seed, step) alone, so a resumed run is bit-identical
    to an uninterrupted one. Stops early, with a checkpoint, when `callbacks.should_stop()`."""
    callbacks = callbacks or Callbacks()
    state = state or LoopState()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    device = next(iter(named.values())).device
    optimizer = build_optimizer(list(named.values()), config)
    scaler = torch.amp.GradScaler(device.type, enabled=PRECISION_PLANS[config.precision].scaled)
    if checkpoint and checkpoint.exists():
        state = _restore(checkpoint, named, optimizer, scaler)
    trained = Trained(model, list(named.values()), optimizer, scaler, config)
    steps = build_steps(trained, train_rows, pad_id)
    memory = PeakMemory(model, optimizer, device)
    eval_batches = evaluation_batches(eval_rows, config, pad_id, device)
    eval_every = config.eval_every or max(1, config.steps // 10)
    reports = _Reports(state, memory, callbacks.on_step)

    def run_eval(step: int) -> float:
        with trained.autocast:
            loss = evaluate(model, eval_batches, trained.loss_sum)
        callbacks.on_eval(step, loss)
        return loss

    def is_due(every: int, step: int) -> bool:
        return step % every == 0 and step < config.steps

    with without_device_checks(), cached_prefix(trained, train_rows, eval_rows, pad_id) as prefix:
        if state.eval_loss_before is None:
            state.eval_loss_before = run_eval(0)
        model.train()
        for step in range(state.step, config.steps):
            if not reports.waiting and callbacks.should_stop():
                state.stopped = True
                break
            reports.begin()
            batches = [
                make_batch(
                    [train_rows[i] for i in rows_of_step(len(train_rows), config.batch_size, micro, config.seed)],
                    pad_id,
                )
                for micro in range(step * config.accumulation, (step + 1) * config.accumulation)
            ]
            torch.manual_seed((config.seed << 24) + step)  # dropout's stream
            lr = lr_at(config, step)
            with memory.watch() if step == steps.measured else contextlib.nullcontext():
                measured = steps(batches, lr)
            reports.add(step + 1, lr, sum(batch.num_tokens for batch in batches), measured)
            eval_due, save_due = is_due(eval_every, step + 1), is_due(config.checkpoint_every, step + 1)
            if len(reports.waiting) >= steps.read_back or eval_due or save_due or step + 1 == config.steps:
                reports.read()
            if eval_due:
                run_eval(step + 1)
            if checkpoint and save_due:
                _save(checkpoint, named, optimizer, scaler, state)
        state.peak_kind, state.reserved_bytes = memory.kind, memory.reserved_bytes
        state.notes["graph"] = steps.graph
        state.notes["prefix_cache"] = (
            prefix if isinstance(prefix, str) else {"layers": prefix.depth, "bytes": prefix.num_bytes}
        )
        if state.stopped and checkpoint:
            _save(checkpoint, named, optimizer, scaler, state)
        if not state.stopped:
            state.eval_loss_after = run_eval(state.step)
    return state


class _Reports:
    """Steps whose figures still lie on the device; reading them waits for the device, once for all."""

    def __init__(self, state: LoopState, memory: PeakMemory, on_step: Callable[[StepReport], None]) -> None:
        self.state, self.memory, self.on_step = state, memory, on_step
        self.waiting: list[tuple[int, float, int, Tensor]] = []
        self._began = 0.0

    def begin(self) -> None:
        if not self.waiting:
            self._began = time.perf_counter()

    def add(self, step: int, lr: float, num_tokens: int, measured: Tensor) -> None:
        self.waiting.append((step, lr, num_tokens, measured))

    def read(self) -> None:
        """Into the state, and on to who listens. A step's seconds are its share of those since the last look."""
        rows = torch.stack([measured for *_, measured in self.waiting]).tolist()
        seconds = (time.perf_counter() - self._began) / len(rows)
        waiting, self.waiting = self.waiting, []
        state = self.state
        for (step, lr, num_tokens, _), (*losses, norm) in zip(waiting, rows, strict=True):
            state.step = step
            state.tokens += num_tokens
            state.seconds += seconds
            state.peak_bytes = max(state.peak_bytes, self.memory.peak_bytes)
            self.on_step(StepReport(step, sum(losses), lr, norm, state.tokens, state.seconds))


def _save(
    path: Path,
    named: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    state: LoopState,
) -> None:
    tensors: dict[str, Tensor] = {f"parameter.{name}": p for name, p in named.items()}
    facts = {key: value for key, value in vars(state).items() if key != "stopped"}
    save_tensors(path, tensors | optimizer_tensors(optimizer), {"state": facts, "scaler": scaler.state_dict()})


@torch.no_grad()
def _restore(
    path: Path,
    named: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> LoopState:
    tensors, facts = load_tensors(path)
    for name, p in named.items():
        p.copy_(tensors[f"parameter.{name}"])
    restore_optimizer(optimizer, tensors)
    if facts["scaler"]:
        scaler.load_state_dict(facts["scaler"])
    return LoopState(**facts["state"])
