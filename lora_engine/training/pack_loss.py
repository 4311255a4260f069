"""Losses of a pack: the sum of each config's own token mean, and each of them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_engine.training.batches import Batch
from lora_engine.training.loss import labelled_logits
from lora_engine.training.pack_batches import PackBatch, sum_dtype


class _WeightedCrossEntropy(torch.autograd.Function):
    """w_t * -log softmax(z_t)[y_t] of each label t.  dz_t = w_t (softmax(z_t) - onehot(y_t)), made in the place of the
    log-probabilities: one tensor of the logits' size where cross_entropy's own backward has three."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        # logits (labels, classes), targets and weights (labels,) -> (labels,)
        log_p = torch.log_softmax(logits, dim=1)
        ctx.save_for_backward(log_p, targets, weights)
        return log_p.gather(1, targets.unsqueeze(1)).squeeze(1).neg_().mul_(weights)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        log_p, targets, weights = ctx.saved_tensors
        scale = (weights * grads[0]).unsqueeze(1)
        grad = log_p.exp_().mul_(scale)
        return grad.scatter_add_(1, targets.unsqueeze(1), -scale), None, None


def pack_losses(model: Any, packed: PackBatch) -> tuple[Tensor, Tensor]:
    """(sum over configs of each one's share of its token mean, to go backward from; the same of each config (N,))."""
    logits = labelled_logits(model, packed.batch)
    weighted: Tensor = _WeightedCrossEntropy.apply(logits, packed.batch.targets, packed.weights.to(logits.dtype))
    each = torch.zeros(len(packed.num_tokens), dtype=sum_dtype(logits.device), device=logits.device)
    return weighted.sum(), each.index_add_(0, packed.owners, weighted.detach().to(each.dtype))


@torch.no_grad()
def evaluate_pack(model: Any, batches: Sequence[Batch], size: int) -> list[float]:
    """`evaluate` of each of `size` configs, over batches that hold every sequence once for each."""
    was_training = model.training
    model.eval()
    totals, count = None, 0
    for batch in batches:
        if not batch.num_labels:
            continue
        losses = nn.functional.cross_entropy(labelled_logits(model, batch), batch.targets, reduction="none")
        sums = losses.view(size, -1).sum(dim=1)
        totals = sums if totals is None else totals + sums
        count += batch.num_labels // size
    model.train(was_training)
    if totals is None:
        return [float("nan")] * size
    means: list[float] = (totals / count).tolist()
    return means
