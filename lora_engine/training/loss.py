"""Cross-entropy on the labelled rows only, taken before the output head where the model allows."""

from typing import Any

import torch
from torch import Tensor, nn

from lora_engine.calc.structure import PLAIN_HEADS
from lora_engine.training.batches import Batch


def labelled_loss_sum(model: Any, batch: Batch) -> Tensor:
    """Sum of -log p(label) in nats over the labelled tokens, float32 scalar.

    Half-masked prompts with a large vocabulary make the head the dearest layer; dropping unlabelled
    rows before it skips that work and the memory of their logits."""
    if model.config.model_type in PLAIN_HEADS:
        hidden = model.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        logits = model.get_output_embeddings()(hidden.flatten(0, 1).index_select(0, batch.positions))
    else:
        logits = model(input_ids=batch.input_ids, use_cache=False).logits.flatten(0, 1).index_select(0, batch.positions)
    return nn.functional.cross_entropy(logits.float(), batch.targets, reduction="sum")


@torch.no_grad()
def evaluate(model: Any, batches: list[Batch]) -> float:
    """Mean loss in nats per labelled token over `batches`, in evaluation mode."""
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for batch in batches:
        num = batch.num_labels
        if num:
            total += float(labelled_loss_sum(model, batch))
            count += num
    model.train(was_training)
    return total / count if count else float("nan")
