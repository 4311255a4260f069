"""Pretraining on a page of text: the folder it writes is a model that transformers loads."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_engine.errors import ConfigError, DataError
from lora_engine.training.corpus import split_corpus, train_tokenizer
from lora_engine.training.pretrain import PretrainConfig, batch_at, pretrain

SETTINGS = PretrainConfig(
    vocab_size=320, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2, num_kv_heads=1,
    context=32, tokens=64 * 30, tokens_per_step=64, held_out_share=0.2,
)  # fmt: skip


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name in "abc":
        lines = [
            f"Once upon a time number {i} a {name} walked to the river and sang {i * i} songs.\n" for i in range(400)
        ]
        (folder / f"{name}.txt").write_text("".join(lines))
    return folder


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_pretrained_folder_loads_and_beats_chance(corpus, tmp_path, optimizer):
    import dataclasses

    config = dataclasses.replace(SETTINGS, optimizer=optimizer)
    result = pretrain(corpus, tmp_path / "out", config, half=False, checkpoint_every=10)
    curve = [point["eval_bits_per_byte"] for point in result["curve"]]
    assert curve[-1] < curve[0]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert sum(p.numel() for p in model.parameters()) == result["parameters"]
    assert model.dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "A river, 1906: x = [3, 14]"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.pad_token == "<|pad|>"
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|user|>Hi<|assistant|>"


def test_interrupted_pretraining_resumes_exactly(corpus, tmp_path):
    pretrain(corpus, tmp_path / "whole", SETTINGS, half=False, checkpoint_every=10)

    class StopError(Exception):
        pass

    def stop(step, *_):
        if step == 17:
            raise StopError

    with pytest.raises(StopError):
        pretrain(corpus, tmp_path / "parts", SETTINGS, half=False, checkpoint_every=10, on_step=stop)
    pretrain(corpus, tmp_path / "parts", SETTINGS, half=False, checkpoint_every=10)
    folders = [tmp_path / part for part in ("whole", "parts")]
    assert folders[0].joinpath("tokenizer.json").read_bytes() == folders[1].joinpath("tokenizer.json").read_bytes()
    whole, parts = (load_file(folder / "model.safetensors") for folder in folders)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    figures = [
        json.loads((tmp_path / part / "pretrain.json").read_text())["eval_bits_per_byte"] for part in ("whole", "parts")
    ]
    assert figures[0] == figures[1]


def test_a_checkpoint_goes_on_under_its_own_plan_only(corpus, tmp_path):
    import dataclasses

    pretrain(corpus, tmp_path / "out", SETTINGS, half=False, checkpoint_every=10)
    longer = dataclasses.replace(SETTINGS, tokens=SETTINGS.tokens + 64 * 10)
    assert len(pretrain(corpus, tmp_path / "out", longer, half=False, checkpoint_every=10)["curve"]) == 4
    with pytest.raises(ConfigError, match="seed is 1; allowed: 0, as in the checkpoint"):
        pretrain(corpus, tmp_path / "out", dataclasses.replace(SETTINGS, seed=1), half=False)
    (corpus / "d.txt").write_text("another book")
    with pytest.raises(ConfigError, match="corpus is"):
        pretrain(corpus, tmp_path / "out", SETTINGS, half=False)


def test_held_out_blocks_are_never_trained_on():
    documents = [("a", "".join(f"line {i}\n" for i in range(20000)))]
    train, held_out = split_corpus(documents, 0.1, seed=0)
    lines = {line for text in train for line in text.splitlines()}
    assert held_out
    assert not any(line in lines for text in held_out for line in text.splitlines())
    assert sum(map(len, train)) + sum(map(len, held_out)) == len(documents[0][1])


def test_batches_depend_on_seed_and_step_alone_and_cover_the_stream():
    stream = np.arange(64 * 12 + 1, dtype=np.uint16)
    config = SETTINGS
    assert torch.equal(batch_at(stream, config, 3), batch_at(stream, config, 3))
    firsts = [int(row[0]) for step in range(10) for row in batch_at(stream, config, step)]
    assert len(set(firsts)) == len(firsts)


def test_digits_are_single_tokens():
    tokenizer = train_tokenizer(["1906 1906 1906 and so on"] * 50, 300)
    assert [tokenizer.decode([i]) for i in tokenizer.encode("1906").ids] == ["1", "9", "0", "6"]


def test_wrong_requests_are_refused(tmp_path):
    with pytest.raises(DataError, match="at least one .txt"):
        pretrain(tmp_path, tmp_path / "out", SETTINGS)
    with pytest.raises(ConfigError, match="optimizer is 'sgd'; allowed: muon or adamw"):
        PretrainConfig(optimizer="sgd")
    with pytest.raises(ConfigError, match="tokens_per_step"):
        PretrainConfig(tokens_per_step=100)
