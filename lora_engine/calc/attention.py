"""What the products of attention keep: with a fused kernel, and where the scores are tensors of their own.

A fused kernel keeps its inputs, its output and a logsumexp. Scores are tensors with eager attention; and inside
scaled_dot_product_attention where no fused kernel will do: the CPU's has no dropout, so torch falls back to
_scaled_dot_product_attention_math (aten/src/ATen/native/transformers/attention.cpp):

    attn = softmax(s q (s k)^T), s = head_dim^(-1/4), of float32 copies where q and k are half precision
    attn = attn * noise, noise 0 or 1 / (1 - p) in the type of attn
    out = attn v

Backward reads s q, s k and v as the matrix product wants them (copies, as heads are not apart in memory), softmax's
result, the noise, and the dropped attn. Eager attention is the same, written out in Python.
"""

from dataclasses import dataclass

from lora_engine.calc.step import Step
from lora_engine.calc.structure import ModelShape


@dataclass(frozen=True)
class Scores:
    """Bytes where scores (batch, heads, s, s) are tensors: `width` of a value of q, k, v and of the products,
    `softmax` of a value of its result; per score `saved` until backward, and `forward` at most on the way up."""

    width: int
    softmax: int
    saved: int
    forward: int

    def passing(self, query_values: int, scores: int) -> int:
        """Bytes per token that the products' backward holds beside what is saved; `scores` of a token."""
        # The second product's: gradients at the output, at v and at the scores that it read.
        product = self.width * (2 * query_values + scores)
        # Softmax's: gradients at its output and input; what the product read, the gradient at its output and v are
        # gone by then, the gradient at v has come.
        return max(product, scores * (3 * self.softmax - self.saved) - self.width * query_values)


def scores_of(shape: ModelShape, step: Step) -> Scores | None:
    """How `step` treats scores; None where a fused kernel keeps them to itself."""
    c, mixed = step.widths.compute, step.widths.mixed
    if not step.eager:
        if not (shape.attention_dropout and step.device == "cpu"):
            return None
        return Scores(width=4, softmax=4, saved=12, forward=12)
    # Autocast computes softmax in float32; the CPU's leaves it in half precision.
    narrow = shape.model_type in _NARROW_SOFTMAX and not (mixed and step.device == "cuda")
    softmax = c if narrow else 4
    if shape.attention_dropout:
        # Dropout makes what the product reads, out of a copy in the products' type that nothing else needs.
        mask = step.dropout_mask(c)
        saved, dropping = softmax + mask + c, (softmax if softmax == c else softmax + c) + mask + c
    else:
        saved = softmax if softmax == c else softmax + c
        dropping = 0
    # The masked scores, their float32 copy and softmax's result.
    made = 2 * c if softmax == c == 2 else 8 if step.widths.stream == 4 else 8 + c
    return Scores(c, softmax, saved, max(made, dropping))


def attention_saved(shape: ModelShape, step: Step) -> int:
    """Bytes per token that the products of attention keep."""
    q, kv, c = shape.query_width, shape.kv_width, step.widths.compute
    scores = scores_of(shape, step)
    if scores is not None:
        # k and v repeated to every head or put in order; the scores come on top.
        capped = c if shape.softcap else 0
        total = scores.width * 3 * q + shape.num_heads * step.seq_length * (scores.saved + capped)
        if not step.eager and step.tokens == step.seq_length and shape.fused_qkv and scores.width == c:
            total += c * (q + kv)  # of one sequence v needs no copy: a view, which keeps the fused map's whole output
        return total
    if shape.model_type == "falcon" and 1 < shape.num_kv_heads < shape.num_heads:
        kv = q  # Falcon's grouped heads are broadcast to full width before attention
    # Rotated q and k are new tensors; v stays a view, so a fused map's whole output stays with it.
    fused = (q + kv) if shape.fused_qkv and shape.rotary else 0
    # scaled_dot_product_attention keeps q, k, v, its output and a float32 logsumexp per head.
    return c * (q + 2 * kv + fused + q) + 4 * shape.num_heads


# Softmax in the type of the scores; the others compute it in float32. Autocast does so for all.
_NARROW_SOFTMAX = ("bert", "deberta-v2", "distilbert", "falcon", "gpt2", "modernbert", "roberta", "t5")
