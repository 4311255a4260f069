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
from lora_engine.training.base import PRECISION_PLANS, autocast_of
from lora_engine.training.batches import Batch, evaluation_batches, make_batch, rows_of_step
from lora_engine.training.checkpoint import load_tensors, optimizer_tensors, restore_optimizer, save_tensors
from lora_engine.training.loss import evaluate, labelled_loss_sum
from lora_engine.training.measure import PeakMemory


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


def heaviest_step(rows: Sequence[Encoded], config: TrainConfig) -> int:
    """Which step to measure: the longest batch of the first hundred, and not the very first step, since
    the optimizer's state exists from the second on."""
    lengths = [len(row.input_ids) for row in rows]

    def longest(step: int) -> int:
        micros = range(step * config.accumulation, (step + 1) * config.accumulation)
        return max(lengths[i] for m in micros for i in rows_of_step(len(rows), config.batch_size, m, config.seed))

    return max(range(1, min(config.steps, 100)), key=longest, default=0)


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
    autocast = autocast_of(config, device)
    memory = PeakMemory(model, optimizer, device)
    eval_batches = evaluation_batches(eval_rows, config, pad_id, device)
    eval_every = config.eval_every or max(1, config.steps // 10)

    def run_eval(step: int) -> float:
        with autocast:
            loss = evaluate(model, eval_batches)
        callbacks.on_eval(step, loss)
        return loss

    if state.eval_loss_before is None:
        state.eval_loss_before = run_eval(0)
    model.train()
    measured = heaviest_step(train_rows, config)
    for step in range(state.step, config.steps):
        if callbacks.should_stop():
            state.stopped = True
            break
        began = time.perf_counter()
        batches = [
            make_batch(
                [train_rows[i] for i in rows_of_step(len(train_rows), config.batch_size, micro, config.seed)],
                pad_id,
                device,
            )
            for micro in range(step * config.accumulation, (step + 1) * config.accumulation)
        ]
        torch.manual_seed((config.seed << 24) + step)  # dropout's stream
        with memory.watch() if step == measured else contextlib.nullcontext():
            loss, grad_norm = _step(model, batches, optimizer, scaler, autocast, named, config, lr_at(config, step))
        state.step = step + 1
        state.tokens += sum(batch.num_tokens for batch in batches)
        state.seconds += time.perf_counter() - began
        state.peak_bytes = max(state.peak_bytes, memory.peak_bytes)
        callbacks.on_step(StepReport(state.step, loss, lr_at(config, step), grad_norm, state.tokens, state.seconds))
        if state.step % eval_every == 0 and state.step < config.steps:
            run_eval(state.step)
        if checkpoint and state.step % config.checkpoint_every == 0 and state.step < config.steps:
            _save(checkpoint, named, optimizer, scaler, state)
    state.peak_kind, state.reserved_bytes = memory.kind, memory.reserved_bytes
    if state.stopped and checkpoint:
        _save(checkpoint, named, optimizer, scaler, state)
    if not state.stopped:
        state.eval_loss_after = run_eval(state.step)
    return state


def _step(
    model: Any,
    batches: Sequence[Batch],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    autocast: Any,
    named: dict[str, nn.Parameter],
    config: TrainConfig,
    lr: float,
) -> tuple[float, float]:
    """One optimizer step over its micro-batches: (mean loss, gradient norm before clipping)."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    num_labels = max(1, sum(batch.num_labels for batch in batches))
    total = 0.0
    for batch in batches:
        with autocast:
            # The mean over all labelled tokens of the step, however they fall into micro-batches.
            loss = labelled_loss_sum(model, batch) / num_labels
        scaler.scale(loss).backward()
        total += float(loss.detach())
    scaler.unscale_(optimizer)
    limit = config.max_grad_norm or float("inf")
    grad_norm = float(nn.utils.clip_grad_norm_(named.values(), limit))
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return total, grad_norm


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
