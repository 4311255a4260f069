"""What a config more in a pack costs, predicted and measured, and the size that is chosen from it."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lora_engine.calc import load_shape, shape_from_config
from lora_engine.calc.memory import Settings
from lora_engine.calc.pack import bytes_per_config, estimate_pack
from lora_engine.config import DataConfig, LoraConfig, RunConfig, TrainConfig
from lora_engine.data import Encoded
from lora_engine.errors import ConfigError
from lora_engine.training import pack_size
from lora_engine.training.base import load_base, resolve_model
from lora_engine.training.pack import PackRow
from lora_engine.training.pack_size import Probe, choose_pack_size, probe_pack

sys.path.insert(0, str(Path(__file__).parent.parent / "methods"))
import tiny

CPU = torch.device("cpu")
TRAIN = TrainConfig(steps=50, batch_size=2, max_length=16, device="cpu")


def full_rows(length, num=20, vocab=90):
    """Every token is there and trained, as the calculator takes them."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, vocab, (num, length), generator=generator).tolist()
    return [Encoded(row=i, input_ids=x, labels=x, truncated=False) for i, x in enumerate(ids)]


def pack_rows(ranks, train=TRAIN):
    return [
        PackRow(
            name=str(i),
            config=RunConfig(
                data=DataConfig(path="x"), method=LoraConfig(r=r), train=dataclasses.replace(train, seed=i)
            ),
        )
        for i, r in enumerate(ranks)
    ]


def small_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_bytes_of_a_config_more_are_predicted_within_five_percent(precision, checkpointing):
    model = small_llama().to(torch.bfloat16 if precision == "bf16" else torch.float32)
    if checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    shape = shape_from_config(model.config.to_dict(), "small")
    for length, r in ((16, 4), (48, 16)):
        train = dataclasses.replace(TRAIN, max_length=length, precision=precision)
        settings = Settings(precision=precision, batch_size=2, seq_length=length, checkpointing=checkpointing)
        probes = [probe_pack(model, pack_rows([r] * n, train), full_rows(length), pad_id=0, timed=0) for n in (1, 2, 4)]
        peaks = [probe.peak_bytes for probe in probes]
        predicted = bytes_per_config(shape, LoraConfig(r=r), settings)
        assert predicted == pytest.approx(peaks[1] - peaks[0], rel=0.05)
        assert predicted == pytest.approx((peaks[2] - peaks[1]) / 2, rel=0.05)
        for n, peak in zip((1, 2, 4), peaks, strict=True):
            assert estimate_pack(shape, LoraConfig(r=r), n, settings).peak_bytes == pytest.approx(peak, rel=0.05)


def test_bytes_of_a_config_more_on_the_embedded_model():
    train = dataclasses.replace(TRAIN, batch_size=1, max_length=32)
    base = load_base(resolve_model("embedded"), train, CPU)
    rows = full_rows(32, vocab=4000)
    one, two = (probe_pack(base, pack_rows([8] * n, train), rows, pad_id=1, timed=0) for n in (1, 2))
    predicted = bytes_per_config(load_shape("embedded"), LoraConfig(r=8), Settings("fp32", 1, 32))
    assert predicted == pytest.approx(two.peak_bytes - one.peak_bytes, rel=0.01)


def test_the_terms_of_a_pack_sum_up():
    shape = load_shape("embedded")
    settings = Settings("bf16", 2, 64)
    alone, packed = (estimate_pack(shape, LoraConfig(r=8), n, settings) for n in (1, 5))
    for name in ("adapter", "gradients", "optimizer"):
        assert packed.terms[name] == 5 * alone.terms[name]
    assert packed.terms["weights"] == alone.terms["weights"]
    assert sum(packed.terms.values()) == packed.peak_bytes
    assert packed.low_bytes <= packed.peak_bytes <= packed.high_bytes
    with pytest.raises(ConfigError, match="size is 0; allowed: a whole number of at least 1"):
        estimate_pack(shape, LoraConfig(), 0, settings)


def fake_probe(monkeypatch, seconds, added):
    """Probes that cost what is said, by size."""
    asked = []

    def probe(_model, rows, _train_rows, *, pad_id):  # noqa: ARG001
        asked.append([row.method.r for row in rows])
        size = len(rows)
        if added(size) is None:
            return None
        return Probe(seconds(size), 1000 + added(size), added(size))

    monkeypatch.setattr(pack_size, "probe_pack", probe)
    return asked


def choose(rows, free_bytes=10**9):
    return choose_pack_size(tiny.llama(), rows, full_rows(8), pad_id=0, free_bytes=free_bytes)


def test_the_size_grows_while_configs_a_second_rise(monkeypatch):
    asked = fake_probe(monkeypatch, lambda n: 1.0 + 0.1 * n if n <= 4 else 0.35 * n, lambda n: 100 * n)
    plan = choose(pack_rows([4] * 20 + [9]))
    assert [len(ranks) for ranks in asked] == [1, 2, 4, 8]
    assert all(ranks[0] == 9 for ranks in asked)  # the dearest
    assert plan.seconds_by_size == {1: 1.1, 2: 1.2, 4: 1.4, 8: 0.35 * 8}
    assert plan.bytes_by_size == {1: 1100, 2: 1200, 4: 1400, 8: 1800}
    assert plan.size == 5  # larger ones would take no less: four packs of 4 and one of 5
    assert "5 together are 3.1 times as fast" in plan.reason
    assert plan.times_faster == pytest.approx(21 * 1.1 / (4 * 1.4 + 1.75))


def test_rows_are_cut_into_the_packs_that_take_least(monkeypatch):
    # A row more than 8 costs more than it should, two packs would cost more still.
    fake_probe(monkeypatch, lambda n: 1.0 + 0.1 * n + 0.2 * (n > 8), lambda n: n)
    assert choose(pack_rows([4] * 9)).size == 9
    # 12 rows in one pack overflow a cache: 6 and 6.
    fake_probe(monkeypatch, lambda n: 1.0 + 0.1 * n if n <= 8 else n, lambda n: n)
    assert choose(pack_rows([4] * 12)).size == 6


def test_packs_are_made_even(monkeypatch):
    fake_probe(monkeypatch, lambda n: 1.0, lambda n: n)  # noqa: ARG005
    assert choose(pack_rows([4] * 18)).size == 18
    fake_probe(monkeypatch, lambda n: 1.0 if n <= 16 else n, lambda n: n)
    assert choose(pack_rows([4] * 18)).size == 9


def test_one_after_another_where_packing_does_not_pay(monkeypatch):
    asked = fake_probe(monkeypatch, lambda n: 1.0 * n, lambda n: n)
    plan = choose(pack_rows([4] * 8))
    assert (plan.size, len(asked)) == (1, 2)
    assert "one run fills the machine" in plan.reason
    assert plan.times_faster == 1
    assert choose(pack_rows([4])).size == 1


def test_memory_limits_the_size(monkeypatch):
    asked = fake_probe(monkeypatch, lambda n: 1.0, lambda n: 50 + 100 * n)  # noqa: ARG005
    plan = choose(pack_rows([4] * 12), free_bytes=800)  # nine tenths of it: 50 + 100 n <= 720
    assert [len(ranks) for ranks in asked] == [1, 2, 4, 6]
    assert plan.size == 6
    assert "more would not fit into memory" in plan.reason
    fake_probe(monkeypatch, lambda n: 1.0, lambda n: n if n < 4 else None)  # noqa: ARG005
    plan = choose(pack_rows([4] * 12))
    assert plan.size == 2
    assert "memory ran out" in plan.reason


def test_a_probe_leaves_the_base_as_it_was():
    base = tiny.llama()
    bits = {name: value.clone() for name, value in base.state_dict().items()}
    rows = pack_rows([2, 5])
    plan = choose_pack_size(base, rows, full_rows(8), pad_id=0)
    assert set(plan.seconds_by_size) == {1, 2}
    assert all(row.tensors is None and row.state.step == 0 for row in rows)
    assert list(base.state_dict()) == list(bits)
    assert all(torch.equal(value, bits[name]) for name, value in base.state_dict().items())


def test_a_probe_tells_when_memory_ran_out(monkeypatch):
    def step(self, steps, lrs):  # noqa: ARG001
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(pack_size.PackedSteps, "step", step)
    assert probe_pack(tiny.llama(), pack_rows([2, 5]), full_rows(8), pad_id=0) is None
