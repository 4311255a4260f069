"""Cross-entropy on the labelled rows only, taken before the output head where the model allows; and how often a
classifier is right."""

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from lora_engine.calc.structure import PLAIN_HEADS
from lora_engine.training.batches import Batch


def labelled_loss_sum(model: Any, batch: Batch) -> Tensor:
    """Sum of -log p(label) in nats over the labelled tokens, float32 scalar (float64 for a float64 model)."""
    return nn.functional.cross_entropy(labelled_logits(model, batch), batch.targets, reduction="sum")


def labelled_logits(model: Any, batch: Batch) -> Tensor:
    """(labels, classes) in float32, or float64 for a float64 model: what the labelled tokens are guessed from.

    Half-masked prompts with a large vocabulary make the head the dearest layer; dropping unlabelled
    rows before it skips that work and the memory of their logits. A classifier's labels are one to a sequence."""
    if batch.positions is None:
        logits = class_logits(model, batch)
    elif model.config.model_type in PLAIN_HEADS:
        hidden = model.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        logits = model.get_output_embeddings()(hidden.flatten(0, 1).index_select(0, batch.positions))
    else:
        logits = model(input_ids=batch.input_ids, use_cache=False).logits.flatten(0, 1).index_select(0, batch.positions)
    return logits if logits.dtype == torch.float64 else logits.float()


@torch.no_grad()
def evaluate(model: Any, batches: list[Batch], loss_sum: Callable[[Any, Batch], Tensor] = labelled_loss_sum) -> float:
    """Mean loss in nats per labelled token over `batches`, in evaluation mode; the device is waited for once."""
    was_training = model.training
    model.eval()
    labelled = [batch for batch in batches if batch.num_labels]
    losses = [loss_sum(model, batch) for batch in labelled]
    model.train(was_training)
    if not losses:
        return float("nan")
    return float(sum(torch.stack(losses).tolist()) / sum(batch.num_labels for batch in labelled))


def class_logits(model: Any, batch: Batch) -> Tensor:
    """(sequences, classes)."""
    more = {"use_cache": False} if _takes_cache(model.__class__) else {}
    logits: Tensor = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **more).logits
    return logits


@lru_cache(maxsize=16)
def _takes_cache(kind: type) -> bool:
    """Whether the model keeps keys and values for a next token unless told not to; encoders have none."""
    return "use_cache" in inspect.signature(kind.forward).parameters  # type: ignore[attr-defined]


@torch.no_grad()
def confusion_matrix(model: Any, batches: list[Batch], num_classes: int) -> list[list[int]]:
    """How many sequences of class i (row) were taken for class j (column), in evaluation mode."""
    was_training = model.training
    model.eval()
    matrix = torch.zeros(num_classes, num_classes, dtype=torch.long)
    for batch in batches:
        chosen = class_logits(model, batch).argmax(-1)
        for true, guess in zip(batch.targets.tolist(), chosen.tolist(), strict=True):
            matrix[true, guess] += 1
    model.train(was_training)
    rows: list[list[int]] = matrix.tolist()
    return rows


def accuracy(matrix: list[list[int]]) -> float:
    """Share of sequences on the diagonal of a confusion matrix."""
    return sum(row[i] for i, row in enumerate(matrix)) / sum(map(sum, matrix))


def macro_f1(matrix: list[list[int]]) -> float:
    """Mean over classes of 2 TP / (2 TP + FP + FN), over those that occur or were guessed."""
    scores = []
    for i, row in enumerate(matrix):
        occurred, guessed = sum(row), sum(other[i] for other in matrix)
        if occurred + guessed:
            scores.append(2 * row[i] / (occurred + guessed))
    return sum(scores) / len(scores)
