"""Encoded examples to tensors, in an order that depends on (seed, step) alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora_engine.config import TrainConfig
from lora_engine.data import IGNORED, Encoded

HOST = torch.device("cpu")


@dataclass(frozen=True)
class Batch:
    """input_ids (sequences, length), and what is trained on: `positions` (n,), indices into the flattened tokens
    whose next token is a label, and `targets` (n,), those labels.

    Positions are found where the rows are made, on the host: a mask on the device would make every step wait for
    the number of its labels. Rows are padded on the right, where causal attention never looks, so no attention mask
    is needed. For a classifier `positions` is None, `targets` (sequences,) holds one class each, and attention_mask
    (sequences, length) is 0 on the padding, where an encoder would look. `rows` are what it was made of."""

    input_ids: Tensor
    positions: Tensor | None
    targets: Tensor
    num_tokens: int
    attention_mask: Tensor | None = None
    rows: tuple[Encoded, ...] | None = None

    @property
    def num_labels(self) -> int:
        return self.targets.numel()

    def to(self, device: torch.device) -> "Batch":
        """A copy on `device`, or this one if it is there."""
        if self.input_ids.device == device:
            return self
        moved: dict[str, Any] = {name: v.to(device) for name, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def padded_length(num_tokens: int) -> int:
    """`num_tokens` rounded up to 8."""
    return -(-num_tokens // 8) * 8


def make_batch(rows: Sequence[Encoded], pad_id: int, device: torch.device = HOST) -> Batch:
    """Pad `rows` on the right to the longest, rounded up to 8."""
    longest = max(len(row.input_ids) for row in rows)
    length = padded_length(longest)
    input_ids = torch.full((len(rows), length), pad_id, dtype=torch.long)
    num_tokens = sum(len(row.input_ids) for row in rows)
    if rows[0].label is not None:
        mask = torch.zeros_like(input_ids)
        for i, row in enumerate(rows):
            input_ids[i, : len(row.input_ids)] = torch.as_tensor(row.input_ids)
            mask[i, : len(row.input_ids)] = 1
        classes = torch.tensor([row.label for row in rows])
        return Batch(input_ids.to(device), None, classes.to(device), num_tokens, mask.to(device), tuple(rows))
    labels = torch.full((len(rows), length), IGNORED, dtype=torch.long)
    for i, row in enumerate(rows):
        input_ids[i, : len(row.input_ids)] = torch.as_tensor(row.input_ids)
        labels[i, : len(row.labels)] = torch.as_tensor(row.labels)
    return replace(label_batch(input_ids, labels, device, num_tokens=num_tokens), rows=tuple(rows))


def label_batch(input_ids: Tensor, labels: Tensor, device: torch.device, *, num_tokens: int | None = None) -> Batch:
    """A batch from host tensors (sequences, length); `labels` as transformers takes them, -100 where nothing is."""
    following = torch.full_like(labels, IGNORED)
    following[:, :-1] = labels[:, 1:]
    following = following.flatten()
    positions = (following != IGNORED).nonzero().flatten()
    return Batch(
        input_ids.to(device),
        positions.to(device),
        following[positions].to(device),
        input_ids.numel() if num_tokens is None else num_tokens,
    )


def evaluation_batches(rows: Sequence[Encoded], config: TrainConfig, pad_id: int, device: torch.device) -> list[Batch]:
    """The first `eval_examples` rows, whatever the batch size, so that losses of different runs compare."""
    kept = rows[: config.eval_examples]
    return [make_batch(kept[i : i + config.batch_size], pad_id, device) for i in range(0, len(kept), config.batch_size)]


def rows_of_step(num_rows: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Indices of the rows of micro-step `step` (from 0): a new permutation each time round.

    A function of its arguments alone, so a resumed run sees what the interrupted one would have."""
    picked: list[int] = []
    position = step * batch_size
    while len(picked) < batch_size:
        epoch, offset = divmod(position, num_rows)
        taken = _order(num_rows, seed, epoch)[offset : offset + batch_size - len(picked)].tolist()
        picked += taken
        position += len(taken)
    return picked


@lru_cache(maxsize=64)
def _order(num_rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(num_rows)
