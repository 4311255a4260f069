"""Adapters on disk: what PEFT reads back, and what is refused."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lora_engine import calc
from lora_engine.config import LoraConfig
from lora_engine.errors import NotFoundError, TargetError
from lora_engine.export import ADAPTER_CONFIG, ADAPTER_WEIGHTS, load_adapter, save_adapter
from lora_engine.methods import inject, lora


def llama(layers=2):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=24, intermediate_size=40, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=97, n_embd=24, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval()


def trained(make, config):
    model = inject(make(), config)
    generator = torch.Generator().manual_seed(1)
    for layer in lora.lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B.weight, std=0.1, generator=generator)
        if layer.lora_magnitude_vector is not None:
            with torch.no_grad():
                layer.lora_magnitude_vector.weight.mul_(1.3)
    return model


CASES = [
    (llama, LoraConfig(r=2, lora_alpha=3)),
    (llama, LoraConfig(r=8, lora_alpha=12, use_rslora=True, target_modules=("q_proj", "v_proj"))),
    (llama, LoraConfig(r=2, lora_alpha=3, target_modules=r".*layers\.1\.mlp\..*_proj")),
    (gpt2, LoraConfig(r=2, lora_alpha=3)),
    (gpt2, LoraConfig(r=2, lora_alpha=3, target_modules="attention")),
    (llama, LoraConfig(r=2, lora_alpha=3, use_dora=True)),
    (gpt2, LoraConfig(r=2, lora_alpha=3, use_dora=True, rank_pattern={"mlp.c_proj": 5})),
    (llama, LoraConfig(target_modules=("q_proj", "up_proj"), layers_to_transform=(1,), layers_pattern="layers")),
    (llama, LoraConfig(target_modules=("q_proj", "up_proj"), layers_to_transform=1, layers_pattern=("h", "layers"))),
    (llama, LoraConfig(target_modules=("q_proj", "lm_head"), exclude_modules=r".*\.0\..*")),
    (llama, LoraConfig(exclude_modules=("mlp.up_proj", "1.self_attn.q_proj"))),
    (llama, LoraConfig(target_modules="attention", layers_to_transform=(0,))),
    (
        llama,
        LoraConfig(
            r=5,
            lora_alpha=7,
            use_rslora=True,
            rank_pattern={"q_proj": 3, r"layers\.1\..*v_proj": 11},
            alpha_pattern={"self_attn.o_proj": 13, "1.self_attn.q_proj": 2.5},
        ),
    ),
]


@pytest.mark.parametrize(("make", "config"), CASES)
def test_peft_and_we_load_what_was_saved(tmp_path, make, config):
    model = trained(make, config)
    save_adapter(model, config, base_model="base", out=tmp_path)
    ids = torch.arange(5, 25)[None]
    expected = model(ids).logits
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
    assert torch.allclose(theirs(ids).logits, expected, atol=1e-5)
    ours = make()
    loaded = load_adapter(ours, tmp_path)
    assert torch.equal(ours(ids).logits, expected)
    assert (loaded.r, loaded.lora_alpha, loaded.scaling) == (config.r, config.lora_alpha, config.scaling)
    assert (loaded.rank_pattern, loaded.alpha_pattern) == (config.rank_pattern, config.alpha_pattern)


@pytest.mark.parametrize(("make", "config"), CASES)
def test_we_write_the_names_that_peft_writes(tmp_path, make, config):
    """And load what PEFT saved."""
    ours = trained(make, config)
    save_adapter(ours, config, base_model="base", out=tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    written, reference = (load_file(tmp_path / who / ADAPTER_WEIGHTS) for who in ("ours", "theirs"))
    assert written.keys() == reference.keys()
    assert all(torch.equal(value, reference[name]) for name, value in written.items())
    again = make()
    load_adapter(again, tmp_path / "theirs")
    ids = torch.arange(5, 25)[None]
    assert torch.equal(again(ids).logits, ours(ids).logits)


def test_patterns_are_written_as_peft_spells_them(tmp_path):
    config = LoraConfig(
        target_modules=("q_proj", "k_proj"), layers_to_transform=(1,), layers_pattern="layers",
        exclude_modules=("1.self_attn.k_proj",), rank_pattern={"q_proj": 3}, alpha_pattern={"q_proj": 5.0},
    )  # fmt: skip
    save_adapter(trained(llama, config), config, base_model="base", out=tmp_path)
    written = json.loads((tmp_path / ADAPTER_CONFIG).read_text())
    expected = {
        "target_modules": ["q_proj", "k_proj"], "layers_to_transform": [1], "layers_pattern": "layers",
        "exclude_modules": ["1.self_attn.k_proj"], "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"q_proj": 5.0},
    }  # fmt: skip
    assert {key: written[key] for key in expected} == expected


def test_more_than_loras_factors_is_refused(tmp_path):
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    model.save_pretrained(tmp_path)
    with pytest.raises(TargetError, match="holds more than LoRA's factors .*lm_head"):
        load_adapter(llama(), tmp_path)


@pytest.mark.parametrize(("make", "config"), CASES)
def test_file_is_as_large_as_counted(tmp_path, make, config):
    model = trained(make, config)
    save_adapter(model, config, base_model="base", out=tmp_path)
    shape = calc.shape_from_config(model.config.to_dict(), "test")
    assert calc.adapter_file_bytes(shape, config) == pytest.approx(
        (tmp_path / ADAPTER_WEIGHTS).stat().st_size, rel=0.02
    )


def test_targets_are_written_short_where_that_says_it_exactly(tmp_path):
    for config, names in ((CASES[1][1], ["q_proj", "v_proj"]), (CASES[2][1], None)):
        save_adapter(trained(llama, config), config, base_model="base", out=tmp_path)
        written = json.loads((tmp_path / ADAPTER_CONFIG).read_text())["target_modules"]
        if names:
            assert written == names
        else:
            assert all(name.startswith("model.layers.1.mlp.") for name in written)


def test_what_is_no_adapter_is_refused(tmp_path):
    with pytest.raises(NotFoundError, match="allowed: a folder that holds adapter_config.json"):
        load_adapter(llama(), tmp_path)
    config = LoraConfig(r=2)
    save_adapter(trained(llama, config), config, base_model="base", out=tmp_path)
    with pytest.raises(TargetError, match="another base model"):
        load_adapter(llama(layers=3), tmp_path)
