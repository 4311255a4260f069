"""Making methods equal: the size of one, or its number of steps, so that it costs what the first one costs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from lora_engine.calc import ModelShape, count_parameters, estimate_memory, estimate_step_flops
from lora_engine.calc.devices import kernels_of
from lora_engine.calc.predict import shape_to_train
from lora_engine.config import (
    BottleneckConfig,
    LoraConfig,
    MethodConfig,
    PrefixConfig,
    RunConfig,
)
from lora_engine.errors import ConfigError
from lora_engine.sweeps.comparison import MATCHES, ComparisonSpec, Entry, default_rates

Cost = Callable[[MethodConfig], float]
SIZES = {"lora": "rank", "bottleneck": "reduction factor", "prefix": "prefix length"}


def plan_comparison(
    base: RunConfig,
    methods: Sequence[MethodConfig],
    shape: ModelShape,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    lrs: Mapping[str, Sequence[float]] | None = None,
    match: str = "steps",
    num_classes: int = 0,
) -> ComparisonSpec:
    """A comparison of `methods` with the loop of `base`, made equal in `match` to LoRA (else to the first method).

    "steps": as they are, equal steps. "parameters", "memory": the size of those that have one (SIZES) comes as near
    to the reference as it can, in trainable parameters or in predicted peak memory. "seconds": steps are scaled by
    predicted operations a step. `lrs`: method -> its rates (default `default_rates`). `num_classes`: those of the data
    (0: it is text to write). Raises ConfigError, TargetError.
    """
    if match not in MATCHES:
        raise ConfigError("match", match, f"one of {', '.join(MATCHES)}")
    reference = next((m for m in methods if isinstance(m, LoraConfig)), methods[0] if methods else base.method)
    shape = shape_to_train(shape, num_classes)
    fitted, notes = list(methods), []
    if match in ("parameters", "memory"):
        cost = _cost_of(match, base, shape)
        room = prefix_room(base, shape)
        fitted = [m if m is reference else fit_size(m, cost, cost(reference), shape.hidden_size, room) for m in methods]
        fixed = [m.method for m in methods if m is not reference and m.method not in SIZES]
        if fixed:
            notes.append(f"{', '.join(fixed)}: no size to choose, so not matched.")
    steps = {m.method: base.train.steps for m in methods}
    if match == "seconds":
        flops = {m.method: _step_flops(base, m, shape) for m in methods}
        steps = {
            name: max(1, round(base.train.steps * flops[reference.method] / value)) for name, value in flops.items()
        }
        notes.append("Steps are scaled by predicted operations a step.")
    for method in fitted:
        _check_room(base, method, shape)
    entries = tuple(
        Entry(
            method=method,
            lrs=tuple((lrs or {}).get(method.method) or default_rates(method.method, num_classes)),
            steps=steps[method.method],
        )
        for method in fitted
    )
    return ComparisonSpec(base=base, entries=entries, seeds=tuple(seeds), match=match, notes=tuple(notes))


def fit_size(method: MethodConfig, cost: Cost, wanted: float, hidden_size: int, room: int) -> MethodConfig:
    """`method` at the size whose cost is nearest to `wanted` (equal distance: the smaller one).

    `room` is how long a prefix may be beside the tokens."""
    candidates: list[MethodConfig]
    if isinstance(method, LoraConfig):
        ratio = method.lora_alpha / method.r
        candidates = [replace(method, r=r, lora_alpha=ratio * r) for r in range(1, hidden_size + 1)]
    elif isinstance(method, BottleneckConfig):
        # Several factors give one inner width; the smallest of each stands for it.
        widths = {max(1, hidden_size // factor): factor for factor in range(hidden_size, 0, -1)}
        candidates = [replace(method, reduction_factor=widths[width]) for width in sorted(widths)]
    elif isinstance(method, PrefixConfig):
        candidates = [replace(method, prefix_length=length) for length in range(1, max(1, room) + 1)]
    else:
        return method
    # Costs grow with the size: bisect for the first that is dear enough, then take the nearer neighbour.
    low, high = 0, len(candidates) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if cost(candidates[middle]) >= wanted else (middle + 1, high)
    near = candidates[max(0, low - 1) : low + 1]
    return min(near, key=lambda candidate: abs(cost(candidate) - wanted))


def _cost_of(match: str, base: RunConfig, shape: ModelShape) -> Cost:
    train = base.train
    if match == "parameters":
        return lambda method: count_parameters(shape, method).trainable_parameters
    return lambda method: (
        estimate_memory(
            shape,
            method,
            precision=train.precision,
            batch_size=train.batch_size,
            seq_length=train.max_length,
            optimizer=train.optimizer,
            checkpointing=train.checkpointing,
            device=kernels_of(train.device),
        ).peak_bytes
    )


def _step_flops(base: RunConfig, method: MethodConfig, shape: ModelShape) -> int:
    train = base.train
    return estimate_step_flops(
        shape,
        method,
        train.batch_size,
        train.max_length,
        accumulation=train.accumulation,
        checkpointing=train.checkpointing,
    )


def prefix_room(base: RunConfig, shape: ModelShape) -> int:
    """How long a prefix may be: in a causal model it takes places of the context."""
    causal = any(word in shape.architecture for word in ("CausalLM", "LMHead"))
    causal = causal or (shape.num_classes > 0 and shape.is_decoder)
    if not shape.max_positions or not causal:
        return shape.max_positions or base.train.max_length
    return max(0, shape.max_positions - base.train.max_length)


def _check_room(base: RunConfig, method: MethodConfig, shape: ModelShape) -> None:
    room = prefix_room(base, shape)
    if isinstance(method, PrefixConfig) and shape.max_positions and method.prefix_length > room:
        allowed = f"at most {room} beside {base.train.max_length} tokens in a context of {shape.max_positions}"
        raise ConfigError("prefix_length", method.prefix_length, allowed)
