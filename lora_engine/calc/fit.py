"""What fits: cards, the largest batch, sequence and rank, and what to change when a step does not.

Everything here asks `estimate_memory` and nothing else; `settings` are its keyword arguments and go to it as they
are. A room is the bytes that tensors may take: the card's memory without RESERVED_BYTES.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

from lora_engine.calc.gpus import GPUS, MAX_BATCH, RESERVED_BYTES
from lora_engine.calc.memory import MemoryEstimate, Settings, estimate_memory
from lora_engine.calc.structure import ModelShape
from lora_engine.config import FullConfig, LoraConfig, MethodConfig
from lora_engine.errors import ConfigError, TargetError

DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(Settings)}
MAX_SEQ_LENGTH = 2**20  # for a model whose config names no limit
SHORTEST = 64  # tokens; nobody wants to be told to train on less


@dataclass(frozen=True)
class GpuFit:
    """Whether the step fits. `verdict`: "yes" when even the high end does, "tight" when only the estimate or
    the low end does, "no". `max_batch` is the largest batch whose estimate fits, 0 when none does."""

    name: str
    memory_bytes: int
    fits: bool
    max_batch: int
    verdict: str


@dataclass(frozen=True)
class Change:
    """One thing to change. `words` says it, `cost` what it is paid with; `method` and `settings` are what to ask
    `estimate_memory` for, `settings` holding only what differs."""

    words: str
    cost: str
    method: MethodConfig
    settings: dict[str, Any]
    saved_bytes: int
    peak_bytes: int
    fits: bool


def card_room(memory_bytes: int) -> int:
    """What a card of `memory_bytes` leaves for tensors."""
    return memory_bytes - RESERVED_BYTES


def verdict(memory: MemoryEstimate, room: int) -> str:
    """ "yes" when even the high end of the interval fits, "tight" when the low end does, else "no"."""
    return "yes" if memory.high_bytes <= room else "tight" if memory.low_bytes <= room else "no"


def fit_gpus(shape: ModelShape, method: MethodConfig, **settings: Any) -> list[GpuFit]:
    """Each card of GPUS against `estimate_memory` with these `settings`. One card, nothing offloaded.

    Raises ConfigError, TargetError."""
    memory = estimate_memory(shape, method, **settings)
    peaks = _Peaks(lambda batch: estimate_memory(shape, method, **(settings | {"batch_size": batch})).peak_bytes)
    peaks.known[settings.get("batch_size", DEFAULTS["batch_size"])] = memory.peak_bytes
    fits = []
    for gpu in GPUS:
        room = card_room(gpu.memory_bytes)
        fits.append(
            GpuFit(
                gpu.name,
                gpu.memory_bytes,
                memory.peak_bytes <= room,
                peaks.largest(room, MAX_BATCH),
                verdict(memory, room),
            )
        )
    return fits


def max_batch(
    shape: ModelShape, method: MethodConfig, room_bytes: int, *, limit: int = MAX_BATCH, **settings: Any
) -> int:
    """The largest batch up to `limit` whose peak is at most `room_bytes`; 0 when one sequence is too much."""
    return _Peaks(
        lambda batch: estimate_memory(shape, method, **(settings | {"batch_size": batch})).peak_bytes
    ).largest(room_bytes, limit)


def max_seq_length(shape: ModelShape, method: MethodConfig, room_bytes: int, *, limit: int = 0, **settings: Any) -> int:
    """The longest sequence whose peak is at most `room_bytes`; 0 when one token is too much.

    Up to `limit`; 0 means the model's context."""
    return _Peaks(
        lambda length: estimate_memory(shape, method, **(settings | {"seq_length": length})).peak_bytes
    ).largest(room_bytes, limit or shape.max_positions or MAX_SEQ_LENGTH)


def max_rank(shape: ModelShape, method: MethodConfig, room_bytes: int, *, limit: int = 0, **settings: Any) -> int:
    """The largest LoRA rank whose peak is at most `room_bytes`; 0 when rank 1 is too much.

    Up to `limit`; 0 means the widest module's smaller side, beyond which a rank adds parameters only. Raises
    ConfigError for a method without a rank."""
    if not isinstance(method, LoraConfig):
        raise ConfigError("method", method.method, "lora, the method that has a rank")
    widest = max((min(x.in_features, x.out_features) for x in shape.linears if x.per_layer), default=1)
    return _Peaks(lambda r: estimate_memory(shape, replace(method, r=r), **settings).peak_bytes).largest(
        room_bytes, limit or widest
    )


class _Peaks:
    """Peaks by size (a batch, a length, a rank), each asked for once. A peak never falls as its size grows."""

    def __init__(self, peak: Callable[[int], int]) -> None:
        self.peak, self.known = peak, dict[int, int]()

    def at(self, size: int) -> int:
        if size not in self.known:
            self.known[size] = self.peak(size)
        return self.known[size]

    def largest(self, room: int, limit: int) -> int:
        """The largest size from 1 to `limit` whose peak is at most `room`, 0 when none is.

        Peaks are nearly straight lines, so the line between the ends of the bracket lands on the answer and one
        more estimate proves it; every third step halves the bracket, in case the line is bent."""
        if self.at(1) > room:
            return 0
        if self.at(limit) <= room:
            return limit
        low = max(size for size, peak in self.known.items() if peak <= room)
        high = min(size for size, peak in self.known.items() if peak > room)
        turn = 0
        while high - low > 1:
            turn += 1
            rise = self.known[high] - self.known[low]
            guess = low + (room - self.known[low]) * (high - low) // rise if turn % 3 else (low + high) // 2
            guess = min(max(guess, low + 1), high - 1)
            if self.at(guess) <= room:
                low = guess
            else:
                high = guess
        return low


def cheapest_changes(
    shape: ModelShape, method: MethodConfig, room_bytes: int, settings: dict[str, Any]
) -> list[Change]:
    """Single changes that make the step smaller, the one that saves most first.

    What has a degree (batch, sequence, rank) is changed as little as makes the step fit, or as much as is
    sensible when that is not enough. Raises ConfigError, TargetError for the step as it is."""
    now = estimate_memory(shape, method, **settings).peak_bytes
    changes = []
    for words, cost, candidates in _candidates(method, DEFAULTS | settings):
        found = None
        for value, other, changed in candidates:
            try:
                peak = estimate_memory(shape, other, **settings | changed).peak_bytes
            except (ConfigError, TargetError):
                continue  # a combination that this model or method does not have
            fits = peak <= room_bytes
            found = Change(words.format(value), cost, other, changed, now - peak, peak, fits)
            if fits:
                break
        if found and found.saved_bytes > 0:
            changes.append(found)
    return sorted(changes, key=lambda change: -change.saved_bytes)


def changes_until_it_fits(
    shape: ModelShape, method: MethodConfig, room_bytes: int, settings: dict[str, Any]
) -> list[Change]:
    """Changes to make one after the other, the least painful first, until the step fits; [] when it does already.

    Each counts on those before it: `method` and `peak_bytes` are after all of them, `saved_bytes` is its own. The last
    one's `fits` is False when all of them together are not enough."""
    plan: list[Change] = []
    done: set[str] = set()
    if estimate_memory(shape, method, **settings).peak_bytes <= room_bytes:
        return plan
    while not (plan and plan[-1].fits):
        offered = [c for c in cheapest_changes(shape, method, room_bytes, settings) if c.words not in done]
        if not offered:
            break
        best = min(offered, key=lambda change: _PAIN.index(change.cost))
        method, settings = best.method, settings | best.settings
        done.add(best.words)
        # int8 and then NF4 is NF4.
        plan = [p for p in plan if not p.settings or not p.settings.keys() <= best.settings.keys()] + [best]
    return plan


def confidence_text(fit: GpuFit, memory_text: str, level_percent: float) -> str:
    """The verdict in words, for intervals that hold with `level_percent`: "fits 16 GiB with 95 %"."""
    words = {"yes": "fits", "tight": "may or may not fit", "no": "does not fit"}[fit.verdict]
    return f"{words} {memory_text}" + ("" if fit.verdict == "tight" else f" with {level_percent:g} %")


TIME = "about a third more time for each step"
SMALL_STEPS = "a little more time for each step"
STATES = "optimizer states in 8 bits"
HALF = "weights and sums in 16 bits"
EIGHT = "weights rounded to 8 bits, slower products"
FOUR = "weights rounded to 4 bits, slower products"
FEWER = "less that can be learned"
CUT = "longer texts are cut"
LESS = "another method: usually a little below full fine-tuning"
# From what costs nothing but time to what changes the result.
_PAIN = (SMALL_STEPS, TIME, STATES, HALF, EIGHT, FOUR, LESS, FEWER, CUT)

_Candidate = tuple[object, MethodConfig, dict[str, Any]]


def _candidates(method: MethodConfig, at: dict[str, Any]) -> Iterable[tuple[str, str, list[_Candidate]]]:
    """(words, cost, [(what to name, method, settings that differ)]), gentlest candidate first."""

    def ways(argument: str, values: Iterable[object]) -> list[_Candidate]:
        return [(value, method, {argument: value}) for value in values]

    if not at["checkpointing"]:
        yield "Turn on gradient checkpointing", TIME, ways("checkpointing", [True])
    precision = at["precision"]
    if precision in ("fp32", "mixed-fp16", "mixed-bf16"):
        yield "Train in bfloat16", HALF, ways("precision", ["bf16"])
    if not isinstance(method, FullConfig):
        if precision not in ("int8", "nf4", "nf4-dq"):
            yield "Hold the frozen weights in int8", EIGHT, ways("precision", ["int8"])
        if precision not in ("nf4", "nf4-dq"):
            yield "Hold the frozen weights in NF4 (QLoRA)", FOUR, ways("precision", ["nf4"])
        if precision == "nf4":
            yield "Quantise NF4's scales as well (double quantisation)", FOUR, ways("precision", ["nf4-dq"])
    if at["optimizer"] == "adamw":
        yield "Use 8-bit AdamW", STATES, ways("optimizer", ["adamw8bit"])
    batch, accumulation = at["batch_size"], at["accumulation"]
    smaller: list[_Candidate] = [
        (size, method, {"batch_size": size, "accumulation": accumulation * (batch // size)})
        for size in range(batch - 1, 0, -1)
        if batch % size == 0
    ]
    if smaller:
        yield f"Micro-batches of {{}} instead of {batch}, accumulated to the same batch", SMALL_STEPS, smaller
    lengths = _halvings(at["seq_length"], SHORTEST)
    if lengths:
        yield "Shorten sequences to {} tokens", CUT, ways("seq_length", lengths)
    if isinstance(method, LoraConfig):
        ranks: list[_Candidate] = [(r, replace(method, r=r), {}) for r in _halvings(method.r, 1)]
        if ranks:
            yield "Lower the rank to {}", FEWER, ranks
        if method.target_modules != "attention":
            yield "Adapt attention only", FEWER, [("", replace(method, target_modules="attention"), {})]
    if isinstance(method, FullConfig):
        yield "Train LoRA (r = {}) instead of every weight", LESS, [(16, LoraConfig(r=16), {})]


def _halvings(value: int, least: int) -> list[int]:
    values = []
    while (value := value // 2) >= least:
        values.append(value)
    return values
