"""Seconds and watt-hours of a step on a card, from its operations and what the card's data sheet promises."""

from lora_engine.calc.gpus import Gpu
from lora_engine.config import PRECISIONS
from lora_engine.errors import ConfigError

# What a well-fed card reaches of its peak in fine-tuning; PaLM's training reached 46 % (Chowdhery et al. 2022,
# appendix B). Small batches and small models reach far less.
UTILISATION = 0.4


def peak_flops_per_second(card: Gpu, precision: str, *, tf32: bool = False) -> float:
    """The rate of `card`'s matrix products in `precision`. Quantised weights are multiplied in 16 bits: the faster
    of float16 and bfloat16. float32 products use TF32 only when asked to, as in torch. Raises ConfigError."""
    if precision not in PRECISIONS:
        raise ConfigError("precision", precision, f"one of {', '.join(PRECISIONS)}")
    if precision == "fp32":
        return card.tf32_flops_per_second if tf32 else card.fp32_flops_per_second
    if precision.endswith("fp16"):
        return card.fp16_flops_per_second
    if precision.endswith("bf16"):
        return card.bf16_flops_per_second
    return max(card.fp16_flops_per_second, card.bf16_flops_per_second)


def estimate_step_seconds(
    flops: float,
    card: Gpu,
    precision: str,
    utilisation: float = UTILISATION,
    *,
    moved_bytes: float = 0.0,
    tf32: bool = False,
) -> float:
    """Seconds for `flops` operations at `utilisation` of the peak; never less than moving `moved_bytes` (the weights
    once forward, once back) through the card's memory takes. Raises ConfigError."""
    if not 0.0 < utilisation <= 1.0:
        raise ConfigError("utilisation", utilisation, "a number above 0, up to 1")
    for argument, amount in (("flops", flops), ("moved_bytes", moved_bytes)):
        if amount < 0:
            raise ConfigError(argument, amount, "a number of at least 0")
    computing = flops / (peak_flops_per_second(card, precision, tf32=tf32) * utilisation)
    return max(computing, moved_bytes / card.bandwidth_bytes_per_second)


def estimate_energy_watt_hours(seconds: float, card: Gpu, load: float = 1.0) -> float:
    """Watt-hours of `card` busy for `seconds` at `load` of its power limit (1: an upper bound, which long training
    comes near). The card alone: the computer around it and its cooling are not in it. Raises ConfigError."""
    if not 0.0 < load <= 1.0:
        raise ConfigError("load", load, "a number above 0, up to 1")
    if seconds < 0:
        raise ConfigError("seconds", seconds, "a number of at least 0")
    return seconds * load * card.power_watts / 3600
