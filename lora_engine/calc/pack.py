"""Peak memory of a packed step: N configs on one base (methods.packed), in bytes, term by term.

The base is there once. Each config adds 16 bytes a padded parameter in float32 (itself, its gradient, two moments; all
of them alive throughout, since they lie in the pack's buffers) and the activations of its own sequences.
"""

from dataclasses import replace

from lora_engine.calc.memory import ADAPTER_WIDTHS, WIDTHS, MemoryEstimate, Settings, estimate
from lora_engine.calc.plans import make_plan
from lora_engine.calc.structure import ModelShape
from lora_engine.config import LoraConfig
from lora_engine.errors import ConfigError

# Whose label it is (8) and its weight (8), beside token id, position and target.
_LABEL_BYTES = 16


def estimate_pack(shape: ModelShape, method: LoraConfig, size: int, settings: Settings) -> MemoryEstimate:
    """One step of `size` configs as `estimate` gives it of one run; `method.r` is the rank that all are padded to, and
    `settings.batch_size` sequences are each config's own.

    Raises ConfigError for a size below one, TargetError."""
    if size < 1:
        raise ConfigError("size", size, "a whole number of at least 1")
    widths = WIDTHS[settings.precision]
    # Gradients are held from step to step, as between micro-batches.
    together = replace(settings, batch_size=size * settings.batch_size, accumulation=max(2, settings.accumulation))
    one = estimate(shape, method, together, loss_in_place=True)
    plan = make_plan(shape, method, weight_width=widths.weight, adapter_width=ADAPTER_WIDTHS[settings.adapter_dtype])
    more = size - 1
    terms = dict(one.terms)
    for name in ("adapter", "gradients", "optimizer"):
        terms[name] *= size
    if widths.compute < ADAPTER_WIDTHS[settings.adapter_dtype]:
        # The factors in the type of the products: of all layers, or of the one that is made once more.
        copied = plan.trained
        if settings.checkpointing:
            copied = plan.trained // shape.num_layers if one.moment == "backward" else 0
        terms["activations"] += more * widths.compute * copied
    terms["overhead"] += _LABEL_BYTES * together.batch_size * settings.seq_length
    added = sum(terms.values()) - one.peak_bytes
    return replace(
        one,
        terms=terms,
        peak_bytes=one.peak_bytes + added,
        low_bytes=one.low_bytes + added,
        high_bytes=one.high_bytes + added,
        gradient_bytes=size * one.gradient_bytes,
    )


def bytes_per_config(shape: ModelShape, method: LoraConfig, settings: Settings, *, size: int = 2) -> int:
    """What the last of `size` configs adds."""
    larger, smaller = (estimate_pack(shape, method, n, settings) for n in (size, size - 1))
    return larger.peak_bytes - smaller.peak_bytes
