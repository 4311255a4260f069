"""The steps of a pack on fixed buffers, for a CUDA graph: `training.steps.StaticSteps` with a first dimension of N."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from lora_engine.data import Encoded
from lora_engine.training.batches import HOST, Batch, padded_length, rows_of_step
from lora_engine.training.graphs import StaticStep, to_device, without_device_checks
from lora_engine.training.pack_batches import PackBatch, PackBatches
from lora_engine.training.pack_loss import pack_losses
from lora_engine.training.pack_step import PackedSteps, clip_rows
from lora_engine.training.steps import static_refusal


class StaticPackedSteps:
    """In the place of `packed.step`, with the same results. `launch` does not wait for them.

    All batches have one shape: as long as the longest row, and as many labels as the configs' own largest batches have
    together; padded labels weigh nothing. Where a graph turns out to be impossible, `reason` says why and the steps
    are those of `packed`."""

    def __init__(self, packed: PackedSteps, train_rows: Sequence[Encoded], pad_id: int) -> None:
        self.packed, self.pad_id = packed, pad_id
        self.batches = PackBatches(packed.rows, train_rows, pad_id, HOST)
        self.length = padded_length(max(self.batches.lengths))
        self.num_labels = sum(self._most_labels(i) for i in range(len(packed.rows)))
        # Holds `packed` and not this object: a pack's memory goes with the last reference to it.
        self._function = partial(_packed_step, packed, train_rows[0].label is not None)
        capture = packed.device.type == "cuda"
        self.lrs = torch.zeros(
            len(packed.rows), dtype=torch.float32 if capture else torch.float64, device=packed.device
        )
        self._hold_lrs()
        self.reason: str | None = None
        self._capture = capture
        self._step: StaticStep | None = None

    def _hold_lrs(self) -> None:
        for group, lr in zip(self.packed.optimizer.param_groups, self.lrs.unbind(), strict=True):
            group["lr"], group["capturable"] = lr, True

    def _most_labels(self, config: int) -> int:
        """Of a batch in the whole run of one config."""
        train, labels = self.packed.rows[config].config.train, self.batches.labels
        batches = (rows_of_step(len(labels), train.batch_size, step, train.seed) for step in range(train.steps))
        return max(1, *(sum(labels[i] for i in picked) for picked in batches))

    @property
    def captured(self) -> bool:
        return self._step is not None and self._step.captured

    def step(self, steps: Sequence[int], lrs: Sequence[float]) -> tuple[list[float], list[float], list[int]]:
        """As `PackedSteps.step`."""
        if self.reason:
            return self.packed.step(steps, lrs)
        measured, num_tokens = self.launch(steps, lrs)
        losses, norms = measured.tolist()
        return losses, norms, num_tokens

    def launch(self, steps: Sequence[int], lrs: Sequence[float]) -> tuple[Tensor, list[int]]:
        """(losses and gradient norms (2, N) on the device, tokens read by each). Not once there is a `reason`."""
        (packed_batch,) = self.batches.step(steps)
        values = self._values(packed_batch, lrs)
        if self._step is None:
            inputs = [torch.empty_like(value, device=self.packed.device) for value in values[:-1]]
            self._step = StaticStep(self._function, [*inputs, self.lrs], capture=self._capture)
        with without_device_checks():
            (measured,) = self._step(*(to_device(value, self.packed.device) for value in values))
        if self._capture and self._step.reason:
            self.reason, self._step = self._step.reason, None
        return measured, packed_batch.num_tokens

    def _values(self, packed: PackBatch, lrs: Sequence[float]) -> tuple[Tensor, ...]:
        """What `_packed_step` takes, on the host."""
        batch, own = packed.batch, packed.batch.input_ids.shape[1]
        wider, more = (0, self.length - own), (0, self.num_labels - batch.num_labels)
        input_ids = nn.functional.pad(batch.input_ids, wider, value=self.pad_id)
        rates = torch.tensor(list(lrs), dtype=self.lrs.dtype)
        if batch.positions is None:
            assert batch.attention_mask is not None
            mask = nn.functional.pad(batch.attention_mask, wider)
            return input_ids, mask, batch.targets, packed.owners, packed.weights, rates
        # Positions count through rows that are longer now. A padded label is token 0's, of class 0, with no weight.
        positions = batch.positions + batch.positions // own * (self.length - own)
        padded = (nn.functional.pad(value, more) for value in (positions, batch.targets, packed.owners, packed.weights))
        return input_ids, *padded, rates


def _packed_step(
    it: PackedSteps,
    is_classifier: bool,
    input_ids: Tensor,
    attention: Tensor,
    targets: Tensor,
    owners: Tensor,
    weights: Tensor,
    _lrs: Tensor,
) -> tuple[Tensor]:
    """(2, N). `attention`: a classifier's attention mask, else the labels' positions."""
    positions, mask = (None, attention) if is_classifier else (attention, None)
    batch = PackBatch(Batch(input_ids, positions, targets, 0, mask), owners, weights, [0] * len(it.rows))
    it.pack.zero_grad()
    with it.autocast:
        total, each = pack_losses(it.model, batch)
    total.backward()
    norms = clip_rows(it.pack.gradients, it.limits)
    it.optimizer.step()
    return (torch.stack((each, norms.double())),)


def static_pack_refusal(packed: PackedSteps) -> str | None:
    """Why the steps of a pack are not made of fixed buffers; None when they are."""
    return static_refusal(packed.rows[0].config.train, packed.device)
