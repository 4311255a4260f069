"""What merging changes in the answers of a model: nothing in exact arithmetic, a rounding in fewer bits."""

from dataclasses import dataclass
from typing import Any

import torch

from lora_engine.methods import METHODS
from lora_engine.training.batches import Batch
from lora_engine.training.loss import labelled_loss_sum


@dataclass(frozen=True)
class MergeDifference:
    """`max_abs_logit_diff`: the largest difference of any logit. Losses in nats per label, before and after merging.
    `max_abs_logit` gives the size of the logits themselves."""

    max_abs_logit_diff: float
    max_abs_logit: float
    loss_unmerged: float
    loss_merged: float

    @property
    def loss_diff(self) -> float:
        return self.loss_merged - self.loss_unmerged


@torch.no_grad()
def merge_difference(model: Any, batch: Batch, *, method: str = "lora") -> MergeDifference:
    """Merge `model`, compare its answers on `batch`, and unmerge it again, in evaluation mode; run it inside the
    run's `autocast_of`.

    Raises NotMergeableError for a method, or a base, that no weight can absorb."""
    was_training = model.training
    model.eval()
    unmerged, loss_unmerged = _answers(model, batch)
    METHODS[method].merge(model)
    try:
        merged, loss_merged = _answers(model, batch)
    finally:
        METHODS[method].unmerge(model)
        model.train(was_training)
    return MergeDifference(
        max_abs_logit_diff=float((merged - unmerged).abs().max()),
        max_abs_logit=float(unmerged.abs().max()),
        loss_unmerged=loss_unmerged,
        loss_merged=loss_merged,
    )


def _answers(model: Any, batch: Batch) -> tuple[torch.Tensor, float]:
    """(logits in float32, loss)."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.float()
    return logits, float(labelled_loss_sum(model, batch)) / batch.num_labels
