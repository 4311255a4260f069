"""Memory: exact terms by arithmetic, derived terms against steps that really run, properties of the whole."""

import contextlib
import gc
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from lora_engine import calc
from lora_engine.assets_path import asset_path
from lora_engine.calc.memory import TERMS, UNCERTAINTY_PERCENT, WIDTHS
from lora_engine.calc.moments import moments
from lora_engine.calc.plans import make_plan
from lora_engine.calc.step import Step
from lora_engine.config import OPTIMIZERS, PRECISIONS, TRAINABLE_PRECISIONS, FullConfig, LoraConfig
from lora_engine.errors import ConfigError
from lora_engine.methods import full, lora
from lora_engine.training.batches import label_batch
from lora_engine.training.loss import labelled_loss_sum
from lora_engine.training.measure import LiveBytes

GIB = 2**30
ALL, QV = LoraConfig(r=8), LoraConfig(r=8, target_modules=("q_proj", "v_proj"))


def estimate(model="embedded", method=ALL, **settings):
    return calc.estimate_memory(calc.load_shape(model), method, **settings)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_terms_sum_up_and_the_interval_holds_the_peak(precision, optimizer, checkpointing, attention):
    for method in (ALL, QV, FullConfig()):
        if isinstance(method, FullConfig) and precision not in TRAINABLE_PRECISIONS:
            continue
        memory = estimate(
            method=method, precision=precision, optimizer=optimizer, checkpointing=checkpointing, attention=attention
        )
        assert tuple(memory.terms) == TERMS
        assert all(isinstance(value, int) and value >= 0 for value in memory.terms.values())
        assert sum(memory.terms.values()) == memory.peak_bytes
        assert 0 < memory.low_bytes <= memory.peak_bytes <= memory.high_bytes


def test_state_bytes_per_trainable_parameter():
    """16 in fp32 and for adapters on any base, 8 in pure bf16, 16 under autocast, 2.03 for 8-bit moments."""
    shape = calc.load_shape("Llama-3.1-8B")
    trained = calc.count_parameters(shape, ALL).trainable_parameters
    for precision in PRECISIONS:
        memory = estimate("Llama-3.1-8B", ALL, precision=precision)
        assert memory.terms["adapter"] + memory.gradient_bytes + memory.terms["optimizer"] == 16 * trained
    for precision, per_parameter in (("fp32", 16), ("bf16", 8), ("mixed-bf16", 16), ("mixed-fp16", 16)):
        memory = estimate("Llama-3.1-8B", FullConfig(), precision=precision)
        state = memory.terms["weights"] + memory.gradient_bytes + memory.terms["optimizer"]
        assert state == per_parameter * shape.total_parameters
        assert memory.terms["adapter"] == 0
    eight_bit = estimate("Llama-3.1-8B", FullConfig(), precision="bf16", optimizer="adamw8bit").terms["optimizer"]
    assert eight_bit / shape.total_parameters == pytest.approx(2 + 2 * 4 / 256, rel=1e-3)
    assert estimate("Llama-3.1-8B", ALL, optimizer="sgd").terms["optimizer"] == 0


def test_quantised_bytes_per_weight():
    shape = calc.load_shape("Llama-3.1-8B")
    inside = sum(x.count * x.in_features * x.out_features for x in shape.linears if x.per_layer)
    rest = 2 * (shape.total_parameters - inside)  # embeddings, norms and head stay in 16 bits

    def bits(precision):
        return 8 * (estimate("Llama-3.1-8B", precision=precision).terms["weights"] - rest) / inside

    assert bits("nf4") == 4.5
    assert bits("nf4-dq") == pytest.approx(4.127, abs=5e-4)
    assert bits("int8") == pytest.approx(8, abs=0.01)
    assert bits("bf16") == 16


def kept(shape, method, *, seq_length=512, checkpointing=False, attention="sdpa"):
    """Activation bytes in bf16 while the loss is computed: all that the forward pass keeps."""
    plan = make_plan(shape, method, weight_width=2, adapter_width=4)
    step = Step(WIDTHS["bf16"], seq_length, seq_length, attention == "eager")
    found = moments(shape, plan, step, labelled_share=1.0, checkpointing=checkpointing, accumulation=1)
    return next(moment.activations for moment in found if moment.name == "loss")


def coefficients(method, **settings):
    """Activation bytes per layer, token and h of a Llama, by the difference of two depths."""
    facts = calc.CATALOG["meta-llama/Llama-3.1-8B"]
    four, five = (
        kept(calc.shape_from_config(facts | {"num_hidden_layers": depth}, "test"), method, **settings)
        for depth in (4, 5)
    )
    # What grows with the adapters and not with tokens: their half-precision copies.
    adapted = {ALL: 2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336), QV: 2 * 4096 + 4096 + 1024}
    copies = 0 if settings.get("checkpointing") else 2 * 8 * adapted.get(method, 0)
    return (five - four - copies) / (512 * facts["hidden_size"])


def test_published_activation_coefficients():
    kappa, iota = 1024 / 4096, 14336 / 4096
    assert coefficients(FullConfig()) == pytest.approx(20 + 4 * kappa + 8 * iota, rel=0.005)
    assert coefficients(QV) == pytest.approx(14 + 4 * kappa + 6 * iota, rel=0.005)
    assert coefficients(ALL) == pytest.approx(16 + 4 * kappa + 8 * iota, rel=0.005)
    assert coefficients(ALL, checkpointing=True) == 2


def test_eager_attention_keeps_the_scores():
    shape = calc.load_shape("Llama-3.1-8B")

    def activations(seq_length):
        return kept(shape, ALL, seq_length=seq_length, attention="eager")

    quadratic = activations(3072) - 2 * activations(2048) + activations(1024)  # what is constant or linear cancels
    assert quadratic == shape.num_layers * shape.num_heads * (4 + 2) * 2 * 1024**2


# What a step really takes: the same loss, layers and optimizer as the loop, every live storage counted.

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "mixed-bf16": torch.float32}
SMALL = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 1000,
    "intermediate_size": 384,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
NO_DROPOUT = {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "dropout": 0.0}
FAMILIES = {
    "embedded": None,
    "qwen2": SMALL,
    "qwen3": SMALL,
    "gemma": SMALL,
    "gemma2": SMALL,
    "phi3": SMALL,
    "phi": {key: value for key, value in SMALL.items() if key not in ("head_dim", "num_key_value_heads")},
    "gpt_neox": {key: value for key, value in SMALL.items() if key not in ("head_dim", "num_key_value_heads")},
    "gpt2": {"n_embd": 128, "n_layer": 3, "n_head": 4, "vocab_size": 1000, "bos_token_id": 0, "eos_token_id": 0}
    | NO_DROPOUT,
    "opt": {key: SMALL[key] for key in SMALL if key not in ("head_dim", "num_key_value_heads", "intermediate_size")}
    | {"ffn_dim": 384}
    | NO_DROPOUT,
}


def config_of(family):
    if family == "embedded":
        return AutoConfig.from_pretrained(asset_path("base"))
    return CONFIG_MAPPING[family](**FAMILIES[family])


def measured_peak(config, method, *, precision, batch_size, seq_length, checkpointing, attention, labelled=1.0):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[precision], attn_implementation=attention)
    (lora if isinstance(method, LoraConfig) else full).inject(model, method)
    if checkpointing:
        model.activation_checkpointing_enable()
        model.enable_input_require_grads()
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    ids = torch.randint(0, config.vocab_size, (batch_size, seq_length))
    labels = ids.clone()
    labels[:, : round(seq_length * (1 - labelled))] = -100
    batch = label_batch(ids, labels, torch.device("cpu"))
    autocast = torch.autocast("cpu", torch.bfloat16) if precision == "mixed-bf16" else contextlib.nullcontext()

    def step():
        with autocast:
            loss = labelled_loss_sum(model, batch) / batch.num_labels
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()  # the optimizer's state exists from here on
    gc.collect()
    live = LiveBytes()
    states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    for tensor in (*model.parameters(), *model.buffers(), *states):
        live.add(tensor)
    with live:
        step()
    return live.peak_bytes


@pytest.mark.parametrize(
    ("family", "method", "settings"),
    [
        *[("embedded", method, {"precision": p}) for method in (ALL, QV, FullConfig()) for p in DTYPES],
        ("embedded", ALL, {"checkpointing": True}),
        ("embedded", FullConfig(), {"checkpointing": True}),
        ("embedded", ALL, {"attention": "eager"}),
        ("embedded", LoraConfig(r=64, target_modules="attention"), {}),
        ("embedded", LoraConfig(target_modules="mlp"), {}),
        ("embedded", LoraConfig(target_modules=r".*layers\.(3|5)\..*proj"), {}),
        ("embedded", LoraConfig(target_modules=("lm_head",)), {}),
        ("embedded", ALL, {"labelled": 0.25}),
        *[
            (family, method, {"attention": "eager"} if family == "gemma2" else {})
            for family in FAMILIES
            if family != "embedded"
            for method in (ALL, FullConfig())
        ],
    ],
    ids=lambda value: value if isinstance(value, str) else repr(value)[:60],
)
def test_prediction_holds_on_a_real_step(family, method, settings):
    config = config_of(family)
    chosen = {"precision": "fp32", "checkpointing": False, "attention": "sdpa"} | settings
    sizes = {"batch_size": 8, "seq_length": 128}
    measured = measured_peak(config, method, **sizes, **chosen)
    labelled = chosen.pop("labelled", 1.0)
    shape = calc.shape_from_config(config.to_dict(), family)
    memory = calc.estimate_memory(shape, method, **sizes, **chosen, labelled_share=labelled)
    assert memory.low_bytes <= measured <= memory.high_bytes
    assert memory.peak_bytes == pytest.approx(measured, rel=0.02)


def test_step_flops_are_what_torch_counts():
    config, shape = config_of("embedded"), calc.load_shape("embedded")
    ids = torch.randint(0, config.vocab_size, (2, 64))
    # The counter knows no product in place; eager attention shows it the products of attention.
    in_place = {torch.ops.aten.addmm_: lambda _out, a, b, **_more: 2 * a[0] * a[1] * b[1]}
    for method, module in ((ALL, lora), (FullConfig(), full)):
        model = module.inject(AutoModelForCausalLM.from_config(config, attn_implementation="eager"), method)
        with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        predicted = calc.estimate_step_flops(shape, method, 2, 64)
        assert predicted == pytest.approx(counter.get_total_flops(), rel=0.015)
    with pytest.raises(ConfigError, match="batch_size is 0"):
        calc.estimate_step_flops(shape, ALL, 0, 64)


def test_rank_table_is_the_estimate_at_each_rank():
    shape = calc.load_shape("TinyLlama")
    settings = {"precision": "bf16", "batch_size": 2, "seq_length": 256}
    rows = calc.rank_table(shape, QV, **settings)
    assert [row["r"] for row in rows] == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    for row in rows:
        method = LoraConfig(r=row["r"], target_modules=QV.target_modules)
        memory, count = calc.estimate_memory(shape, method, **settings), calc.count_parameters(shape, method)
        assert row["trainable_parameters"] == count.trainable_parameters
        assert row["trainable_percent"] == count.trainable_percent
        assert (row["peak_bytes"], row["terms"]) == (memory.peak_bytes, memory.terms)
        assert row["adapter_bytes"] == calc.adapter_file_bytes(shape, method)


def test_rank_table_of_the_largest_model_takes_a_few_milliseconds():
    seconds = []
    for layers in (124, 125, 126):
        shape = calc.shape_from_config(
            calc.CATALOG["meta-llama/Llama-3.1-405B"] | {"num_hidden_layers": layers}, "test"
        )
        began = time.perf_counter()
        calc.rank_table(shape, ALL)
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 0.010


@given(
    precision=st.sampled_from(PRECISIONS),
    batch=st.integers(1, 64),
    seq=st.integers(1, 2048),
    r=st.sampled_from([1, 3, 8, 200]),
    checkpointing=st.booleans(),
)
def test_more_never_takes_less(precision, batch, seq, r, checkpointing):
    def peak(batch_size, seq_length, rank):
        return estimate(
            "TinyLlama",
            LoraConfig(r=rank),
            precision=precision,
            batch_size=batch_size,
            seq_length=seq_length,
            checkpointing=checkpointing,
        ).peak_bytes

    here = peak(batch, seq, r)
    assert here <= peak(batch + 1, seq, r)
    assert here <= peak(batch, seq + 1, r)
    assert here < peak(batch, seq, r + 1)


def test_gpus_say_the_largest_batch_that_fits():
    shape = calc.load_shape("TinyLlama")
    fits = calc.fit_gpus(shape, ALL, precision="bf16", seq_length=1024)
    assert [fit.name for fit in fits] == [gpu.name for gpu in calc.GPUS]
    for fit in fits:
        room = fit.memory_bytes - calc.gpus.RESERVED_BYTES
        assert fit.fits == (fit.max_batch >= 1)
        for batch, within in ((fit.max_batch, True), (fit.max_batch + 1, False)):
            if batch and batch <= calc.gpus.MAX_BATCH:
                peak = calc.estimate_memory(shape, ALL, precision="bf16", batch_size=batch, seq_length=1024).peak_bytes
                assert (peak <= room) == within
    assert {"yes", "no"} == {f.verdict for f in calc.fit_gpus(calc.load_shape("Llama-3.1-8B"), ALL, precision="bf16")}
    assert not any(f.fits for f in calc.fit_gpus(calc.load_shape("meta-llama/Llama-3.1-405B"), ALL, precision="nf4"))


def test_interval_is_the_stated_one():
    memory = estimate(precision="fp32", batch_size=8, seq_length=128)
    derived = sum(memory.terms[term] for term in ("activations", "logits", "overhead"))
    assert memory.high_bytes - memory.peak_bytes == derived * UNCERTAINTY_PERCENT // 100


def test_inference_needs_weights_and_a_cache():
    memory = estimate("Llama-3.1-8B", precision="bf16", seq_length=4096)
    cache = 2 * 32 * 1024 * 2 * 4096
    assert memory.inference_bytes > memory.terms["weights"] + cache
    assert memory.inference_bytes < 1.05 * memory.terms["weights"] + cache


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"precision": "fp8"}, "precision is 'fp8'; allowed: one of fp32, fp16"),
        ({"optimizer": "lion"}, "optimizer is 'lion'"),
        ({"attention": "flash"}, "attention is 'flash'; allowed: one of sdpa, eager."),
        ({"batch_size": 0}, "batch_size is 0; allowed: a whole number from 1"),
        ({"seq_length": -4}, "seq_length is -4"),
        ({"seq_length": 12.5}, "seq_length is 12.5"),
        ({"labelled_share": 2.0}, "labelled_share is 2.0"),
    ],
)
def test_settings_out_of_range(settings, says):
    with pytest.raises(ConfigError) as caught:
        estimate(**settings)
    assert says in str(caught.value)


def test_quantised_weights_cannot_be_fully_trained():
    with pytest.raises(ConfigError, match="precision is 'nf4'; allowed: .* quantised weights cannot be trained"):
        estimate(method=FullConfig(), precision="nf4")


def test_notes():
    assert estimate(seq_length=128).notes == ()
    assert estimate(seq_length=512).notes == ("512 tokens are more than the model's context of 256.",)
    assert "eager" in estimate("google/gemma-2-2b").notes[0]
