"""Batches of a pack: config i's sequences follow those of config i - 1, each by its own seed and step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lora_engine.data import Encoded
from lora_engine.data.encode import num_trained
from lora_engine.training.batches import Batch, evaluation_batches, make_batch, rows_of_step

if TYPE_CHECKING:
    from lora_engine.training.pack import PackRow


@dataclass(frozen=True)
class PackBatch:
    """`batch` holds the sequences of all configs; `owners` (labels,) says whose each label is, `weights` (labels,) is
    1 / number of that config's labels in the whole step; `num_tokens` of each config."""

    batch: Batch
    owners: Tensor
    weights: Tensor
    num_tokens: list[int]


class PackBatches:
    """Makes them for `rows`, all of one batch size."""

    def __init__(
        self, rows: "Sequence[PackRow]", train_rows: Sequence[Encoded], pad_id: int, device: torch.device
    ) -> None:
        self.rows, self.train_rows, self.pad_id, self.device = rows, train_rows, pad_id, device
        self.lengths = [len(row.input_ids) for row in train_rows]
        self.labels = [1 if row.label is not None else num_trained(row) for row in train_rows]

    def step(self, steps: Sequence[int]) -> list[PackBatch]:
        """The micro-batches of optimizer step steps[i] of config i."""
        train = self.rows[0].config.train
        micros: list[list[list[int]]] = [
            [
                rows_of_step(
                    len(self.train_rows), train.batch_size, step * train.accumulation + k, row.config.train.seed
                )
                for row, step in zip(self.rows, steps, strict=True)
            ]
            for k in range(train.accumulation)
        ]
        totals = [
            max(1, sum(self.labels[i] for micro in micros for i in micro[config])) for config in range(len(self.rows))
        ]
        return [self._make(micro, totals) for micro in micros]

    def _make(self, picked: list[list[int]], totals: list[int]) -> PackBatch:
        batch = make_batch([self.train_rows[i] for rows in picked for i in rows], self.pad_id, self.device)
        counts = torch.tensor([sum(self.labels[i] for i in rows) for rows in picked])
        owners = torch.arange(len(picked)).repeat_interleave(counts)
        weights = torch.tensor([1 / total for total in totals], dtype=sum_dtype(self.device))[owners].to(self.device)
        num_tokens = [sum(self.lengths[i] for i in rows) for rows in picked]
        return PackBatch(batch, owners.to(self.device), weights, num_tokens)

    def plain_evaluation(self, rows: Sequence[Encoded]) -> list[Batch]:
        """As a single run evaluates."""
        return evaluation_batches(rows, self.rows[0].config.train, self.pad_id, self.device)

    def evaluation(self, rows: Sequence[Encoded]) -> list[Batch]:
        """Every batch once for each config."""
        return [repeat_batch(batch, len(self.rows)) for batch in self.plain_evaluation(rows)]


def sum_dtype(device: torch.device) -> torch.dtype:
    """The widest type that `device` sums in."""
    return torch.float32 if device.type == "mps" else torch.float64


def repeat_batch(batch: Batch, size: int) -> Batch:
    """`size` copies of `batch`, one after another."""
    positions = batch.positions
    if positions is not None:
        starts = batch.input_ids.numel() * torch.arange(size, device=positions.device)
        positions = (starts.unsqueeze(1) + positions).flatten()
    mask = batch.attention_mask
    return Batch(
        batch.input_ids.repeat(size, 1),
        positions,
        batch.targets.repeat(size),
        batch.num_tokens * size,
        None if mask is None else mask.repeat(size, 1),
    )
