"""One optimizer step, in two ways with the same results: micro-batches as they come, or fixed buffers that a CUDA graph
can be made of (`training.graphs`). Neither waits for the device: what a step measured stays there until it is read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lora_engine.config import TrainConfig
from lora_engine.data import IGNORED, Encoded
from lora_engine.methods.quantized import QUANTIZED_PRECISIONS
from lora_engine.training.base import PRECISION_PLANS, autocast_of
from lora_engine.training.batches import Batch, padded_length, rows_of_step
from lora_engine.training.graphs import READ_BACK_STEPS, StaticStep, to_device
from lora_engine.training.loss import labelled_loss_sum

LossSum = Callable[[Any, Batch], Tensor]


@dataclass
class Trained:
    """What a step works on. `loss_sum` is `labelled_loss_sum` or something that gives the same."""

    model: Any
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    config: TrainConfig
    loss_sum: LossSum = labelled_loss_sum
    device: torch.device = field(init=False)
    autocast: Any = field(init=False)

    def __post_init__(self) -> None:
        self.device = self.parameters[0].device
        self.autocast = autocast_of(self.config, self.device)

    def clip(self) -> Tensor:
        """The gradients' norm before they are clipped."""
        return nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm or float("inf"))


class Steps(Protocol):
    """`measured`: the step whose memory is measured. `read_back`: how many steps may wait to be read. `graph`: whether
    a CUDA graph is replayed, or why not."""

    measured: int
    read_back: int

    @property
    def graph(self) -> str: ...

    def __call__(self, batches: Sequence[Batch], lr: float) -> Tensor:
        """(n,): the summands of the step's loss, then its gradient norm; on the device. `batches` are on the host."""


class OrdinarySteps:
    """Micro-batches as they come, of any length."""

    def __init__(self, trained: Trained, rows: Sequence[Encoded], reason: str) -> None:
        self.trained, self.graph = trained, reason
        self.measured = heaviest_step(rows, trained.config)
        # The CPU has done a step when the call returns.
        self.read_back = READ_BACK_STEPS if trained.device.type == "cuda" else 1

    def __call__(self, batches: Sequence[Batch], lr: float) -> Tensor:
        it = self.trained
        for group in it.optimizer.param_groups:
            group["lr"] = lr
        num_labels = max(1, sum(batch.num_labels for batch in batches))
        losses = []
        for batch in batches:
            with it.autocast:
                # The mean over all labelled tokens of the step, however they fall into micro-batches.
                loss = it.loss_sum(it.model, batch.to(it.device)) / num_labels
            it.scaler.scale(loss).backward()
            losses.append(loss.detach())
        it.scaler.unscale_(it.optimizer)
        norm = it.clip()
        it.scaler.step(it.optimizer)
        it.scaler.update()
        it.optimizer.zero_grad(set_to_none=True)
        return torch.stack([*losses, norm])


class StaticSteps:
    """One micro-batch a step, padded to one of a few lengths and to a fixed number of labels: of the padding's labels
    nothing is learnt. Once the graph is found impossible, `OrdinarySteps`."""

    def __init__(self, trained: Trained, rows: Sequence[Encoded], pad_id: int) -> None:
        self.trained, self.pad_id = trained, pad_id
        # Elsewhere the same without a graph.
        self.capture = trained.device.type == "cuda"
        self.read_back = READ_BACK_STEPS
        self.num_labels, self.measured = static_sizes(rows, trained.config)
        # Holds what is trained and not this object: a graph's memory goes with the last reference to it.
        self._function = partial(_static_step, trained, rows[0].label is not None)
        self.steps: dict[int, StaticStep] = {}
        self._ordinary = OrdinarySteps(trained, rows, "")
        # On CUDA the fused kernel wants it in float32; elsewhere it is read as it is.
        self.lr = torch.zeros((), dtype=torch.float32 if self.capture else torch.float64, device=trained.device)
        for group in trained.optimizer.param_groups:
            group["lr"], group["capturable"] = self.lr, True

    @property
    def graph(self) -> str:
        if self._ordinary.graph:
            return self._ordinary.graph
        return "captured" if any(step.captured for step in self.steps.values()) else "not yet captured"

    def __call__(self, batches: Sequence[Batch], lr: float) -> Tensor:
        if self._ordinary.graph:
            return self._ordinary(batches, lr)
        (batch,) = batches
        length = next(size for size in self.num_labels if size >= batch.input_ids.shape[1])
        values = static_values(
            batch, length, self.num_labels[length], self.pad_id, self.lr.new_tensor(lr, device="cpu")
        )
        if length not in self.steps:
            inputs = [torch.empty_like(value, device=self.trained.device) for value in values[:-1]]
            first = next(iter(self.steps.values()), None)
            self.steps[length] = StaticStep(self._function, [*inputs, self.lr], capture=self.capture, pool=first)
        step = self.steps[length]
        (result,) = step(*(to_device(value, self.trained.device) for value in values))
        if self.capture and step.reason:
            # A capture that failed half way has left gradients.
            self._ordinary.graph = step.reason
            self.trained.optimizer.zero_grad(set_to_none=True)
            self.steps.clear()
        return result


def _static_step(
    it: Trained,
    is_classifier: bool,
    input_ids: Tensor,
    attention: Tensor,
    targets: Tensor,
    num_labels: Tensor,
    _lr: Tensor,
) -> tuple[Tensor]:
    """(2,): the loss and the gradient norm. `attention`: a classifier's attention mask, else the labels' positions."""
    positions, mask = (None, attention) if is_classifier else (attention, None)
    it.optimizer.zero_grad(set_to_none=True)
    with it.autocast:
        loss = it.loss_sum(it.model, Batch(input_ids, positions, targets, 0, mask)) / num_labels
    loss.backward()
    norm = it.clip()
    it.optimizer.step()
    it.optimizer.zero_grad(set_to_none=True)
    return (torch.stack([loss.detach(), norm]),)


def static_values(batch: Batch, length: int, num_labels: int, pad_id: int, lr: Tensor) -> tuple[Tensor, ...]:
    """What `_static_step` takes, on the host: `batch` with `length` tokens a row and `num_labels` labels."""
    own = batch.input_ids.shape[1]
    input_ids = nn.functional.pad(batch.input_ids, (0, length - own), value=pad_id)
    count = torch.tensor(float(max(1, batch.num_labels)))
    if batch.positions is None:
        assert batch.attention_mask is not None
        return input_ids, nn.functional.pad(batch.attention_mask, (0, length - own)), batch.targets, count, lr
    # Positions count through rows that are longer now.
    positions = batch.positions + batch.positions // own * (length - own)
    more = (0, num_labels - batch.num_labels)
    return (
        input_ids,
        nn.functional.pad(positions, more),
        nn.functional.pad(batch.targets, more, value=IGNORED),
        count,
        lr,
    )


def static_sizes(rows: Sequence[Encoded], config: TrainConfig) -> tuple[dict[int, int], int]:
    """({padded length: the most labels of a batch of it}, shortest first; a step with a batch of the longest, if there
    is one not the very first).

    Lengths are the longest batch's, its half and its quarter. They and the labels are those of the whole run, so that
    a resumed one pads as the interrupted one did."""
    lengths = [len(row.input_ids) for row in rows]
    labels = [1 if row.label is not None else sum(label != IGNORED for label in row.labels[1:]) for row in rows]
    batches = []
    for step in range(config.steps):
        picked = rows_of_step(len(rows), config.batch_size, step, config.seed)
        batches.append((padded_length(max(lengths[i] for i in picked)), sum(labels[i] for i in picked)))
    longest = max(length for length, _ in batches)
    sizes = sorted({padded_length(-(-longest // part)) for part in (1, 2, 4)})
    most: dict[int, int] = {}
    measured = 0
    for step, (length, count) in enumerate(batches):
        size = next(size for size in sizes if size >= length)
        most[size] = max(most.get(size, 1), count)
        if size == longest and step and not measured:
            measured = step
    return dict(sorted(most.items())), measured


def heaviest_step(rows: Sequence[Encoded], config: TrainConfig) -> int:
    """Which step to measure: the longest batch of the first hundred, and not the very first step, since
    the optimizer's state exists from the second on."""
    lengths = [len(row.input_ids) for row in rows]

    def longest(step: int) -> int:
        micros = range(step * config.accumulation, (step + 1) * config.accumulation)
        return max(lengths[i] for m in micros for i in rows_of_step(len(rows), config.batch_size, m, config.seed))

    return max(range(1, min(config.steps, 100)), key=longest, default=0)


def static_refusal(config: TrainConfig, device: torch.device) -> str | None:
    """Why the steps of a run are not made of fixed buffers; None when they are."""
    reasons = {
        "only CUDA has graphs": device.type != "cuda",
        "loss scaling looks at the gradients on the host": PRECISION_PLANS[config.precision].scaled,
        "gradient accumulation": config.accumulation > 1,
        "gradient checkpointing saves the state of the random numbers": config.checkpointing,
        "a quantised base": config.precision in QUANTIZED_PRECISIONS,
        "an optimizer other than AdamW": config.optimizer != "adamw",
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def build_steps(trained: Trained, rows: Sequence[Encoded], pad_id: int) -> Steps:
    """Fixed buffers where they pay, else micro-batches as they come."""
    reason = static_refusal(trained.config, trained.device)
    return StaticSteps(trained, rows, pad_id) if reason is None else OrdinarySteps(trained, rows, reason)
