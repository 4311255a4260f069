"""Shapes against the models that transformers builds (on the meta device), and every way a config.json is bad."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from real_models import (
    ALL_VARIANTS,
    ENCODER_VARIANTS,
    ENCODERS,
    OTHER_ENCODERS,
    SMALL,
    VARIANTS,
    assert_same,
    encoder_and_shape,
    real_model,
)
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from lora_engine import calc
from lora_engine.assets_path import asset_path
from lora_engine.errors import ModelConfigError, NotFoundError

ALL_ENCODERS = ENCODERS | OTHER_ENCODERS


@pytest.mark.parametrize(("model_type", "facts"), ALL_VARIANTS.values(), ids=ALL_VARIANTS)
def test_shape_is_that_of_the_real_model(model_type, facts):
    assert_same(calc.shape_from_config(facts | {"model_type": model_type}, "test"), real_model(model_type, facts))


@pytest.mark.parametrize(("family", "more"), ENCODER_VARIANTS.values(), ids=ENCODER_VARIANTS)
@pytest.mark.parametrize("kind", ["Model", "ForMaskedLM"])
def test_encoder_variants_are_those_of_the_real_model(family, kind, more):
    model, shape = encoder_and_shape(family, kind, more)
    assert_same(shape, model)


@pytest.mark.parametrize(("family", "kind"), ALL_ENCODERS.values(), ids=ALL_ENCODERS)
def test_encoder_is_counted_as_the_class_its_config_names(family, kind):
    model, shape = encoder_and_shape(family, kind)
    assert_same(shape, model)
    assert shape.architecture == type(model).__name__
    assert shape.notes == ()


def test_encoder_without_a_named_class_is_the_bare_model_and_says_so():
    shape = calc.shape_from_config(SMALL | {"model_type": "bert"}, "test")
    assert_same(shape, real_model("bert", SMALL, AutoModel))
    assert shape.notes == ("Counted as BertModel; its config.json names no class.",)


def test_decoder_for_another_task_is_counted_as_a_language_model_and_says_so():
    facts = VARIANTS["llama"][1] | {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}
    shape = calc.shape_from_config(facts, "test")
    assert shape.notes == ("Counted as LlamaForCausalLM; its config.json names LlamaForSequenceClassification.",)


def test_embedded_model_is_the_shipped_one():
    shape = calc.load_shape("embedded")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(asset_path("base")))
    assert_same(shape, model)
    assert shape.name == "embedded"


def write_config(folder, content):
    folder.mkdir(exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "config.json").write_text(text)
    return folder


def test_folder_and_path(tmp_path):
    folder = write_config(tmp_path / "mine", VARIANTS["llama"][1] | {"model_type": "llama"})
    assert calc.load_shape(str(folder)).name == "mine"
    assert calc.load_shape(str(folder / "config.json")) == calc.load_shape(str(folder))
    with pytest.raises(NotFoundError, match="holds config.json"):
        calc.load_shape(str(tmp_path))


def test_config_in_the_hubs_cache_is_found(tmp_path, monkeypatch):
    cache, commit = tmp_path / "models--somebody--something", "0" * 40
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text(commit)
    (cache / "snapshots").mkdir()
    write_config(cache / "snapshots" / commit, VARIANTS["llama"][1] | {"model_type": "llama"})
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert calc.load_shape("somebody/something").name == "somebody/something"


GOOD = VARIANTS["llama"][1] | {"model_type": "llama"}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({k: v for k, v in GOOD.items() if k != "hidden_size"}, "hidden_size of bad is missing"),
        (GOOD | {"hidden_size": None}, "hidden_size of bad is missing"),
        (GOOD | {"num_hidden_layers": -2}, "num_hidden_layers of bad is -2; allowed: a whole number from 1 to 10000."),
        (GOOD | {"num_hidden_layers": 10**9}, "num_hidden_layers of bad is 1000000000"),
        (GOOD | {"hidden_size": "48"}, "hidden_size of bad is '48'"),
        (GOOD | {"hidden_size": True}, "hidden_size of bad is True"),
        (GOOD | {"hidden_size": 48.0}, "hidden_size of bad is 48.0"),
        (
            GOOD | {"num_attention_heads": 5},
            "num_attention_heads of bad is 5; allowed: a divisor of the hidden size, 48.",
        ),
        (
            GOOD | {"num_key_value_heads": 3},
            "num_key_value_heads of bad is 3; allowed: a divisor of the 4 attention heads.",
        ),
        (GOOD | {"tie_word_embeddings": "yes"}, "tie_word_embeddings of bad is 'yes'; allowed: true or false."),
        (GOOD | {"hidden_act": 3}, "hidden_act of bad is 3"),
        (GOOD | {"model_type": 7}, "model_type of bad is 7"),
        (GOOD | {"model_type": "rwkv"}, "model_type of bad is 'rwkv'; allowed: bert, bloom, cohere, deberta-v2,"),
        ({}, "model_type of bad is missing; allowed: one of bert,"),
        ("{", "is not JSON (line 1:"),
        ("", "is not JSON (line 1:"),
        ("[1, 2]", "holds a JSON list; allowed: a JSON object."),
        ("[" * 200_000, "that can be read"),
        ('{"hidden_size": ' + "9" * 5000 + "}", "that can be read"),
        (" " * 5_000_001, "larger than 5 MB"),
    ],
)
def test_bad_config_is_one_sentence(tmp_path, content, says):
    folder = write_config(tmp_path / "bad", content)
    with pytest.raises(ModelConfigError) as caught:
        calc.load_shape(str(folder))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "allowed: " in str(caught.value)


def test_config_that_is_not_text(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(ModelConfigError, match="not text in UTF-8"):
        calc.load_shape(str(tmp_path))


def test_config_with_a_byte_order_mark(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    assert calc.load_shape(str(tmp_path)).hidden_size == 48


def test_importing_calc_imports_no_torch_and_no_numpy():
    code = "import sys, lora_engine.calc; print(*[m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    root = Path(calc.__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=dict(os.environ), capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""
