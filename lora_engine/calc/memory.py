"""Peak memory of a training step, in bytes, term by term.

What the figures mean: bytes that tensors hold at the peak (torch.cuda.max_memory_allocated). The CUDA
context and what the allocator keeps aside are outside; `gpus.RESERVED_BYTES` stands for them there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from lora_engine.calc.blocks import Step, Widths
from lora_engine.calc.moments import moments
from lora_engine.calc.params import lora_file_bytes, trained_lora_parameters
from lora_engine.calc.plans import make_plan, optimizer_bytes
from lora_engine.calc.structure import ModelShape
from lora_engine.calc.targets import select_linears
from lora_engine.config import OPTIMIZERS, PRECISIONS, TRAINABLE_PRECISIONS, FullConfig, LoraConfig, MethodConfig
from lora_engine.errors import ConfigError, NotMergeableError

TERMS = ("weights", "adapter", "gradients", "optimizer", "activations", "logits", "overhead")
ATTENTIONS = ("sdpa", "eager")
RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)

# Bytes a value beside the unpacked weight itself, for pieces of UNPACKED_AT_ONCE values (methods.quantized).
UNPACKING = {"int8": 4, "nf4": 6, "nf4-dq": 6}
MERGEABLE = ("lora", "ia3")
ADAPTER_WIDTHS = {"fp32": 4, "bf16": 2, "fp16": 2}

# The estimated terms (activations, logits, overhead) are given +- this much. Stated, not calibrated.
UNCERTAINTY_PERCENT = 15

WIDTHS = {
    "fp32": Widths(4, 4, 4),
    "fp16": Widths(2, 2, 2),
    "bf16": Widths(2, 2, 2),
    "mixed-fp16": Widths(4, 2, 4),
    "mixed-bf16": Widths(4, 2, 4),
    # Quantised maps are computed in 16 bits; what is not quantised is stored so.
    "int8": Widths(2, 2, 2),
    "nf4": Widths(2, 2, 2),
    "nf4-dq": Widths(2, 2, 2),
}


@dataclass(frozen=True)
class MemoryEstimate:
    """`terms` has exactly the keys TERMS and sums up to `peak_bytes`: what is alive at the peak, which `moment` names
    ("loss", "head", "backward", "embedding", "optimizer"). While the loss is computed there are no gradients yet, so
    their term can be 0; `gradient_bytes` is what all of them take once they exist.

    `inference_bytes`: the merged model with a key-value cache for the batch and the last token's logits."""

    terms: dict[str, int]
    moment: str
    peak_bytes: int
    low_bytes: int
    high_bytes: int
    gradient_bytes: int
    inference_bytes: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Settings:
    """The arguments of `estimate_memory`, checked."""

    precision: str = "bf16"
    batch_size: int = 1
    seq_length: int = 512
    optimizer: str = "adamw"
    checkpointing: bool = False
    attention: str = "sdpa"
    labelled_share: float = 1.0
    accumulation: int = 1
    adapter_dtype: str = "fp32"

    def __post_init__(self) -> None:
        for argument, value, allowed in (
            ("precision", self.precision, PRECISIONS),
            ("optimizer", self.optimizer, OPTIMIZERS),
            ("attention", self.attention, ATTENTIONS),
            ("adapter_dtype", self.adapter_dtype, tuple(ADAPTER_WIDTHS)),
        ):
            if value not in allowed:
                raise ConfigError(argument, value, f"one of {', '.join(allowed)}")
        for argument, size, high in (
            ("batch_size", self.batch_size, 2**20),
            ("seq_length", self.seq_length, 2**24),
            ("accumulation", self.accumulation, 2**20),
        ):
            if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= high:
                raise ConfigError(argument, size, f"a whole number from 1 to {high}")
        if not 0.0 <= self.labelled_share <= 1.0:
            raise ConfigError("labelled_share", self.labelled_share, "a number from 0 to 1")


def estimate_memory(shape: ModelShape, method: MethodConfig, **settings: Any) -> MemoryEstimate:
    """Peak bytes of one training step; `settings` are the fields of `Settings`: `batch_size` sequences of
    `seq_length` tokens a micro-batch, `accumulation` micro-batches a step.

    Exact: weights, adapter, gradients, optimizer. Derived: activations (see `blocks`), logits, and overhead (what
    lives for a moment). LoRA as this engine trains it: adapters, their gradients and optimizer states in
    `adapter_dtype` on any base. Our loop takes logits on labelled rows only; `labelled_share` 1 is every row.

    `low_bytes` and `high_bytes` put UNCERTAINTY_PERCENT around the derived terms.

    Raises ConfigError for a value out of range or full fine-tuning of quantised weights, TargetError."""
    return estimate(shape, method, Settings(**settings))


def estimate(
    shape: ModelShape, method: MethodConfig, settings: Settings, *, loss_in_place: bool = False
) -> MemoryEstimate:
    """`estimate_memory` with checked settings; `loss_in_place` as in `moments`."""
    if isinstance(method, FullConfig) and settings.precision not in TRAINABLE_PRECISIONS:
        raise ConfigError(
            "precision",
            settings.precision,
            f"{', '.join(TRAINABLE_PRECISIONS)} for full fine-tuning; quantised weights cannot be trained",
        )
    widths = WIDTHS[settings.precision]
    plan = make_plan(shape, method, weight_width=widths.weight, adapter_width=ADAPTER_WIDTHS[settings.adapter_dtype])
    step = Step(
        widths,
        settings.batch_size * settings.seq_length,
        settings.seq_length,
        settings.attention == "eager" or shape.softcap,
        UNPACKING.get(settings.precision, 0),
    )
    highest = max(
        moments(
            shape,
            plan,
            step,
            labelled_share=settings.labelled_share,
            checkpointing=settings.checkpointing,
            accumulation=settings.accumulation,
            loss_in_place=loss_in_place,
        ),
        key=lambda moment: moment.total,
    )
    weights = weight_bytes(shape, settings.precision)
    if plan.head and not shape.tied:
        weights -= widths.weight * plan.trained  # the head itself is trained
    terms = {
        "weights": weights,
        "adapter": plan.adapter_bytes,
        "gradients": highest.gradients,
        "optimizer": optimizer_bytes(shape, method, plan, settings.optimizer),
        "activations": highest.activations,
        "logits": highest.logits,
        "overhead": highest.overhead,
    }
    peak = sum(terms.values())
    margin = (highest.activations + highest.logits + highest.overhead) * UNCERTAINTY_PERCENT // 100
    return MemoryEstimate(
        terms=terms,
        moment=highest.name,
        peak_bytes=peak,
        low_bytes=peak - margin,
        high_bytes=peak + margin,
        gradient_bytes=plan.gradient_bytes,
        inference_bytes=sum(_inference_terms(shape, settings).values()),
        notes=_notes(shape, settings),
    )


def estimate_inference(
    shape: ModelShape, method: MethodConfig, *, merged: bool = True, **settings: Any
) -> dict[str, int]:
    """Bytes to run the model on `batch_size` sequences of `seq_length` tokens, by term: weights, adapter (0 when it is
    `merged`, or has become the weights), kv_cache, and activations with the last token's logits.

    Raises ConfigError, TargetError, and NotMergeableError for a method that no weight can absorb."""
    checked = Settings(**settings)
    widths = WIDTHS[checked.precision]
    plan = make_plan(shape, method, weight_width=widths.weight, adapter_width=widths.compute)
    terms = _inference_terms(shape, checked)
    if merged and method.method not in MERGEABLE:
        raise NotMergeableError(f"method is {method.method!r}; allowed for merging: {', '.join(MERGEABLE)}.")
    adapter = 0 if merged else plan.adapter_bytes
    return {"weights": terms["weights"], "adapter": adapter} | terms


@lru_cache(maxsize=256)
def weight_bytes(shape: ModelShape, precision: str) -> int:
    """Bytes of the stored weights. Quantised: the maps inside the layers; embeddings, norms, biases and
    whatever stands outside the layers stay in 16 bits.

    int8 (LLM.int8, Dettmers et al. 2022): a byte each and a float32 scale per row. nf4 (QLoRA, Dettmers et al.
    2023): half a byte each and a float32 scale per block of 64; nf4-dq: those scales in 8 bits, in blocks of 256
    with a float32 each and their mean (4.127 bits a weight)."""
    width = WIDTHS[precision].weight
    if precision not in ("int8", "nf4", "nf4-dq"):
        return width * shape.total_parameters
    total = width * shape.total_parameters
    for linear in shape.linears:
        if not linear.per_layer:
            continue
        n = linear.in_features * linear.out_features
        if precision == "int8":
            size = n + 4 * linear.out_features
        else:
            blocks = -(-n // 64)
            size = -(-n // 2) + (4 * blocks if precision == "nf4" else blocks + 4 * -(-blocks // 256) + 4)
        total += linear.count * (size - width * n)
    return total


def rank_table(
    shape: ModelShape, method: LoraConfig, ranks: Sequence[int] = RANKS, **settings: Any
) -> list[dict[str, Any]]:
    """For each rank: r, trainable_parameters, trainable_percent, peak_bytes, terms, adapter_bytes (what the
    dial looks up). `settings` are those of `estimate_memory`. Raises ConfigError, TargetError."""
    checked = Settings(**settings)
    selection = select_linears(shape, method)
    rows = []
    for r in ranks:
        config = replace(method, r=r)
        trained = trained_lora_parameters(selection, config)
        memory = estimate(shape, config, checked)
        rows.append(
            {
                "r": r,
                "trainable_parameters": trained,
                "trainable_percent": 100.0 * trained / shape.total_parameters,
                "peak_bytes": memory.peak_bytes,
                "terms": memory.terms,
                "adapter_bytes": lora_file_bytes(shape, selection, config),
            }
        )
    return rows


def _notes(shape: ModelShape, settings: Settings) -> tuple[str, ...]:
    notes = []
    if settings.seq_length > shape.max_positions:
        notes.append(f"{settings.seq_length} tokens are more than the model's context of {shape.max_positions}.")
    if shape.softcap and settings.attention == "sdpa":
        notes.append("This model's capped scores need eager attention, and so it is counted.")
    return tuple(notes)


def _inference_terms(shape: ModelShape, settings: Settings) -> dict[str, int]:
    widths = WIDTHS[settings.precision]
    tokens = settings.batch_size * settings.seq_length
    cache = 2 * shape.num_layers * shape.kv_width * widths.compute * tokens if shape.is_decoder else 0
    # One layer's activations pass by while the prompt is read; logits of the last token.
    passing = tokens * widths.compute * (2 * shape.hidden_size + 2 * shape.intermediate_size)
    logits = settings.batch_size * shape.vocab_size * widths.compute
    return {"weights": weight_bytes(shape, settings.precision), "kv_cache": cache, "activations": passing + logits}
