"""What fits: inverse questions against the estimate they invert, changes against the estimate they promise."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_engine import calc
from lora_engine.calc import fit
from lora_engine.calc.gpus import GPUS, MAX_BATCH, RESERVED_BYTES
from lora_engine.config import FullConfig, HeadConfig, LoraConfig
from lora_engine.errors import ConfigError, TargetError

GIB = 2**30
ALL = LoraConfig(r=16)
TINY, LLAMA, LARGEST = "TinyLlama", "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-405B"


def peak(shape, method, **options):
    return calc.estimate_memory(shape, method, **options).peak_bytes


def holds(size, room, peak_at, limit):
    """`size` fits, one more does not, unless the limit or nothing is in between."""
    return (size == 0 or peak_at(size) <= room) and (size == limit or peak_at(size + 1) > room)


@settings(deadline=None, max_examples=60)
@given(
    gib=st.floats(1, 120),
    precision=st.sampled_from(["fp32", "bf16", "mixed-bf16", "nf4-dq"]),
    attention=st.sampled_from(["sdpa", "eager"]),
    checkpointing=st.booleans(),
)
def test_the_largest_fits_and_one_more_does_not(gib, precision, attention, checkpointing):
    shape, room = calc.load_shape(TINY), int(gib * GIB)
    options = {"precision": precision, "attention": attention, "checkpointing": checkpointing}
    batch = calc.max_batch(shape, ALL, room, seq_length=512, **options)
    assert holds(batch, room, lambda n: peak(shape, ALL, batch_size=n, seq_length=512, **options), MAX_BATCH)
    length = calc.max_seq_length(shape, ALL, room, batch_size=4, **options)
    context = shape.max_positions
    assert holds(length, room, lambda n: peak(shape, ALL, batch_size=4, seq_length=n, **options), context)
    rank = calc.max_rank(shape, ALL, room, batch_size=2, **options)
    assert holds(rank, room, lambda r: peak(shape, LoraConfig(r=r), batch_size=2, **options), 2048)


def test_limits_bound_the_answers():
    shape = calc.load_shape(TINY)
    assert calc.max_batch(shape, ALL, 10**15) == MAX_BATCH
    assert calc.max_batch(shape, ALL, 10**15, limit=7) == 7
    assert calc.max_seq_length(shape, ALL, 10**15) == shape.max_positions
    assert calc.max_seq_length(shape, ALL, 10**15, limit=10_000) == 10_000
    assert calc.max_rank(shape, ALL, 10**15) == 2048  # the smaller side of the widest map
    assert calc.max_rank(shape, ALL, 10**15, limit=64) == 64
    assert calc.max_batch(shape, ALL, 1) == calc.max_seq_length(shape, ALL, 1) == calc.max_rank(shape, ALL, 1) == 0


def test_a_method_without_a_rank_has_no_largest():
    with pytest.raises(ConfigError, match="method is 'full'; allowed: lora"):
        calc.max_rank(calc.load_shape(TINY), FullConfig(), 10**12)


@pytest.mark.parametrize(
    ("model", "method", "options"),
    [
        (TINY, ALL, {"precision": "bf16", "seq_length": 1024}),
        (TINY, FullConfig(), {"precision": "fp32", "batch_size": 8}),
        (LLAMA, ALL, {"precision": "nf4-dq", "batch_size": 4, "attention": "eager"}),
    ],
)
def test_cards_agree_with_one_card_at_a_time(model, method, options):
    shape = calc.load_shape(model)
    memory = calc.estimate_memory(shape, method, **options)
    fits = calc.fit_gpus(shape, method, **options)
    assert [f.name for f in fits] == [gpu.name for gpu in GPUS]
    for row in fits:
        room = row.memory_bytes - RESERVED_BYTES
        assert row.fits == (memory.peak_bytes <= room)
        assert row.max_batch == calc.max_batch(shape, method, room, **options)
        expected = "yes" if memory.high_bytes <= room else "tight" if memory.low_bytes <= room else "no"
        assert row.verdict == expected


def test_a_better_card_never_takes_less():
    fits = calc.fit_gpus(calc.load_shape(LLAMA), ALL, precision="bf16")
    by_size = sorted(fits, key=lambda row: row.memory_bytes)
    batches = [row.max_batch for row in by_size]
    assert batches == sorted(batches)
    assert batches[0] == 0 < batches[-1]


def test_every_card_of_the_largest_model_in_two_milliseconds():
    facts = calc.CATALOG[LARGEST]
    seconds = []
    for layers in (124, 125, 126):
        shape = calc.shape_from_config(facts | {"num_hidden_layers": layers}, "test")
        calc.estimate_memory(shape, ALL, precision="nf4")  # names are matched once for a model, not for a card
        began = time.perf_counter()
        calc.fit_gpus(shape, ALL, precision="nf4")
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 0.002


def test_few_estimates_answer_for_every_card(monkeypatch):
    """Peaks are nearly straight lines: the line's guess and a proof for each card, not twelve halvings."""
    asked = []

    def estimate(*args, **options):
        asked.append(options["batch_size"])
        return calc.estimate_memory(*args, **options)

    monkeypatch.setattr(fit, "estimate_memory", estimate)
    fit.fit_gpus(calc.load_shape(TINY), ALL, batch_size=4, seq_length=1024)
    assert len(asked) <= 4 * len(GPUS)


STEP = {"precision": "bf16", "batch_size": 8, "seq_length": 1024}


@pytest.mark.parametrize(
    ("method", "options"),
    [(ALL, STEP), (FullConfig(), STEP | {"precision": "fp32"}), (HeadConfig(), STEP), (ALL, {})],
)
def test_each_change_saves_what_it_says(method, options):
    shape = calc.load_shape(TINY)
    now, room = peak(shape, method, **options), 8 * GIB
    changes = calc.cheapest_changes(shape, method, room, options)
    assert changes
    assert len({change.words for change in changes}) == len(changes)
    for change in changes:
        after = peak(shape, change.method, **options | change.settings)
        assert (change.peak_bytes, change.saved_bytes) == (after, now - after)
        assert change.saved_bytes > 0
        assert change.fits == (after <= room)
        assert change.settings or change.method != method
        assert "{" not in change.words
    saved = [change.saved_bytes for change in changes]
    assert saved == sorted(saved, reverse=True)


def words(method, options, room=8 * GIB, model=TINY):
    return [change.words for change in calc.cheapest_changes(calc.load_shape(model), method, room, options)]


def test_changes_name_what_can_be_changed():
    lora = words(ALL, STEP)
    for said in (
        "Turn on gradient checkpointing",
        "Hold the frozen weights in int8",
        "Hold the frozen weights in NF4 (QLoRA)",
        "Use 8-bit AdamW",
        "Adapt attention only",
    ):
        assert said in lora
    assert any(w.startswith("Micro-batches of ") and "instead of 8" in w for w in lora)
    assert any(w.startswith("Shorten sequences to ") for w in lora)
    assert any(w.startswith("Lower the rank to ") for w in lora)
    full = words(FullConfig(), STEP | {"precision": "fp32"})
    assert "Train in bfloat16" in full
    assert "Train LoRA (r = 16) instead of every weight" in full
    assert not any("NF4" in w or "int8" in w or "rank" in w for w in full)


def test_changes_that_are_made_already_are_not_offered():
    method = LoraConfig(r=1, target_modules="attention")
    options = {
        "precision": "nf4-dq",
        "batch_size": 1,
        "seq_length": 64,
        "optimizer": "adamw8bit",
        "checkpointing": True,
    }
    assert words(method, options) == []


def test_degrees_change_as_little_as_makes_it_fit():
    shape = calc.load_shape(TINY)
    room = peak(shape, ALL, **(STEP | {"batch_size": 4, "accumulation": 2}))
    by_words = {change.words: change for change in calc.cheapest_changes(shape, ALL, room, STEP)}
    batches = by_words["Micro-batches of 4 instead of 8, accumulated to the same batch"]
    assert batches.settings == {"batch_size": 4, "accumulation": 2}
    assert batches.fits
    assert by_words["Shorten sequences to 512 tokens"].fits


def test_a_plan_ends_when_it_fits():
    shape = calc.load_shape(LLAMA)
    options = {"precision": "bf16", "batch_size": 16, "seq_length": 2048}
    plan = calc.changes_until_it_fits(shape, ALL, 20 * GIB, options)
    assert [change.fits for change in plan] == [False] * (len(plan) - 1) + [True]
    for change in plan:
        options = options | change.settings
    assert peak(shape, plan[-1].method, **options) == plan[-1].peak_bytes <= 20 * GIB
    assert plan[0].words.startswith("Micro-batches")  # time before precision, precision before what is learned
    assert calc.changes_until_it_fits(shape, ALL, 10**15, options) == []


def test_a_plan_says_when_nothing_helps():
    plan = calc.changes_until_it_fits(calc.load_shape(LARGEST), ALL, 24 * GIB, {"precision": "bf16"})
    assert plan
    assert not plan[-1].fits
    quantised = [change.words for change in plan if "precision" in change.settings]
    assert quantised == ["Quantise NF4's scales as well (double quantisation)"]  # which stands for those before it


def test_what_cannot_be_estimated_is_refused():
    shape = calc.load_shape(TINY)
    with pytest.raises(ConfigError, match="precision is 'fp8'"):
        calc.cheapest_changes(shape, ALL, GIB, {"precision": "fp8"})
    with pytest.raises(TargetError, match="matches no module"):
        calc.fit_gpus(shape, LoraConfig(target_modules=("c_attn",)))


@pytest.mark.parametrize(
    ("verdict", "says"),
    [
        ("yes", "fits 16 GiB with 95 %"),
        ("tight", "may or may not fit 16 GiB"),
        ("no", "does not fit 16 GiB with 95 %"),
    ],
)
def test_confidence_in_words(verdict, says):
    row = fit.GpuFit("card", 16 * GIB, True, 1, verdict)
    assert fit.confidence_text(row, "16 GiB", 95.0) == says
