"""Every method as a run: trained, written, loaded again, on text to write and on text to label."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from lora_engine import methods
from lora_engine.config import (
    DEFAULT_LRS,
    METHOD_CONFIGS,
    BottleneckConfig,
    DataConfig,
    FullConfig,
    HeadConfig,
    IA3Config,
    LoraConfig,
    PrefixConfig,
    RunConfig,
    TrainConfig,
    method_from_dict,
    to_dict,
)
from lora_engine.data import class_names, encode_classes, encode_text, load_tokenizer, read_dataset
from lora_engine.errors import ConfigError, DataError, ModelLoadError, NotFoundError, TargetError
from lora_engine.export import METHOD_CONFIG, TRAINED_WEIGHTS, load_trained
from lora_engine.jobs import execute_run, generate_from_run
from lora_engine.training.base import load_base
from lora_engine.training.batches import make_batch
from lora_engine.training.loop import Callbacks
from lora_engine.training.loss import accuracy, labelled_loss_sum, macro_f1

CONFIGS = {
    "lora": LoraConfig(r=4),
    "full": FullConfig(),
    "head": HeadConfig(),
    "bottleneck": BottleneckConfig(reduction_factor=4),
    "prefix": PrefixConfig(prefix_length=4),
    "prefix-mlp": PrefixConfig(prefix_length=4, reparametrize=True),
    "ia3": IA3Config(),
}
WORDS = [
    "the", "film", "is", "a", "good", "bad", "fine", "poor", "great", "awful", "plot", "and", "story", "with",
    "actors", "music", "in", "of", "to", "very",
]  # fmt: skip
CPU = torch.device("cpu")
SHORT = TrainConfig(max_length=32)


def write_tokenizer(folder, *, bert):
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"] if bert else ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS, "positive", "negative"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=special[3]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(special)
    if bert:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"pad_token": special[0], "unk_token": special[3]} | ({} if bert else {"eos_token": special[2]})
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return len(vocabulary)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoder")
    vocab = write_tokenizer(folder, bert=False)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, initializer_range=0.2,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """As encoders are shared: no head, safetensors, a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("encoder")
    vocab = write_tokenizer(folder, bert=True)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=vocab, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


def sentences(num=64):
    generator = torch.Generator().manual_seed(0)
    for _ in range(num):
        good = bool(torch.randint(2, (1,), generator=generator))
        picked = [WORDS[i] for i in torch.randint(10, len(WORDS), (8,), generator=generator)]
        picked[int(torch.randint(8, (1,), generator=generator))] = "great" if good else "awful"
        yield " ".join(picked), "positive" if good else "negative"


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in sentences()))
    return path


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "replies.csv"
    path.write_text("prompt,completion\n" + "".join(f"{text},{label} film\n" for text, label in sentences()))
    return path


def run_config(model, data, method, **changes):
    settings = {"steps": 25, "batch_size": 8, "max_length": 32, "device": "cpu", "eval_every": 100}
    lr = changes.pop("lr", DEFAULT_LRS[method.method])
    return RunConfig(
        model=str(model), data=DataConfig(path=str(data)), method=method, train=TrainConfig(lr=lr, **settings | changes)
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_a_language_model_run_and_its_text_again(tmp_path, decoder, written, name):
    config = run_config(decoder, written, CONFIGS[name])
    state, result = execute_run(config, tmp_path)
    assert result["eval_loss_after"] < result["eval_loss_before"]
    assert result["method"] == CONFIGS[name].method
    assert result["adapter_bytes"] == sum(p.stat().st_size for p in (tmp_path / "adapter").glob("*.safetensors"))
    assert "eval_accuracy" not in result
    once = generate_from_run(to_dict(config), tmp_path, prompt="the film is", with_eval=True)
    assert once["eval_loss"] == pytest.approx(state.eval_loss_after, abs=1e-5)
    base = generate_from_run(to_dict(config), tmp_path, prompt="the film is", scale=0.0, with_eval=True)
    if not name.startswith("prefix"):  # a prefix is there from the start
        assert base["eval_loss"] == pytest.approx(state.eval_loss_before, abs=1e-6)
    if name not in ("lora", "full"):
        folder = tmp_path / "adapter"
        facts = json.loads((folder / METHOD_CONFIG).read_text())
        assert method_from_dict(facts["config"]) == CONFIGS[name]
        assert facts["base_model_name_or_path"] == str(decoder)
        assert {p.name for p in folder.iterdir()} == {METHOD_CONFIG, TRAINED_WEIGHTS}
        with pytest.raises(ConfigError, match=r"scale is 0\.5; allowed: 0 or 1"):
            generate_from_run(to_dict(config), tmp_path, prompt="x", scale=0.5)


@pytest.mark.parametrize("base", ["encoder", "decoder"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_classifier_run_and_its_labels_again(tmp_path, request, labelled, name, base):
    folder = request.getfixturevalue(base)
    config = run_config(folder, labelled, CONFIGS[name], lr=1e-2, steps=30)
    state, result = execute_run(config, tmp_path)
    assert result["eval_loss_after"] < result["eval_loss_before"]
    assert result["classes"] == ["negative", "positive"]
    assert 0 <= result["eval_accuracy"] <= 1
    assert 0 <= result["eval_macro_f1"] <= 1
    assert sum(map(sum, result["confusion_matrix"])) == 6  # a tenth of 64 rows
    assert result["sample"]["after"] in result["classes"]
    again = generate_from_run(to_dict(config), tmp_path, prompt="very great music", with_eval=True)
    assert again["text"] in result["classes"]
    assert again["eval_loss"] == pytest.approx(state.eval_loss_after, abs=1e-5)
    assert again["eval_accuracy"] == result["eval_accuracy"]


@pytest.mark.parametrize("precision", ["bf16", "fp16", "mixed-bf16", "mixed-fp16"])
@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ("lora", "full")])
def test_every_precision_trains(tmp_path, decoder, encoder, written, labelled, name, precision):
    for base, data in ((decoder, written), (encoder, labelled)):
        config = run_config(base, data, CONFIGS[name], lr=1e-2, precision=precision, steps=10)
        state, _ = execute_run(config, tmp_path / base.name)
        assert state.eval_loss_after < state.eval_loss_before
        again = generate_from_run(to_dict(config), tmp_path / base.name, prompt="the film", with_eval=True)
        assert again["eval_loss"] == pytest.approx(state.eval_loss_after, abs=1e-2)


@pytest.mark.parametrize("base", ["encoder", "decoder"])
def test_a_classifier_learns_what_it_has_not_seen(tmp_path, request, labelled, base):
    config = run_config(request.getfixturevalue(base), labelled, LoraConfig(r=4), lr=1e-2, steps=60)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, eval_share=0.25))
    _, result = execute_run(config, tmp_path)
    assert result["eval_accuracy"] >= 0.8  # chance is a half
    assert result["eval_macro_f1"] >= 0.8


def test_a_stopped_classifier_resumes_bit_identically(tmp_path, encoder, labelled):
    config = run_config(encoder, labelled, BottleneckConfig(), steps=8)
    whole, _ = execute_run(config, tmp_path / "whole")
    seen = []
    callbacks = Callbacks(on_step=seen.append, should_stop=lambda: len(seen) >= 3)
    stopped, _ = execute_run(config, tmp_path / "run", callbacks=callbacks)
    assert stopped.stopped
    resumed, _ = execute_run(config, tmp_path / "run")
    assert resumed.eval_loss_after == whole.eval_loss_after


def test_padding_does_not_change_a_classifiers_loss(encoder, decoder, labelled):
    for folder in (encoder, decoder):
        tokenizer = load_tokenizer(folder)
        dataset = read_dataset(labelled)
        rows = encode_classes(dataset.examples[:3], class_names(dataset), tokenizer, 32)
        rows[0] = type(rows[0])(0, rows[0].input_ids[:4], [], False, label=rows[0].label)
        model = load_base(folder, SHORT, CPU, classes=class_names(dataset), pad_id=tokenizer.pad_id).eval()
        together = labelled_loss_sum(model, make_batch(rows, tokenizer.pad_id, CPU))
        alone = sum(labelled_loss_sum(model, make_batch([row], tokenizer.pad_id, CPU)) for row in rows)
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_texts_are_encoded_between_the_tokenizers_own_tokens(encoder, decoder):
    bert, llama = load_tokenizer(encoder), load_tokenizer(decoder)
    film = [bert.backend.token_to_id(word) for word in ("the", "film")]
    assert encode_text("the film", bert, 8) == ([1, *film, 2], False)
    assert encode_text("the film the film", bert, 4) == ([1, *film, 2], True)
    assert encode_text("the film", llama, 8) == (film, False)
    assert 2 not in encode_text("the [SEP] film", bert, 16)[0][1:-1]  # spelled in the text: plain text


def test_the_new_head_is_the_same_for_the_same_seed(encoder):
    heads = [
        load_base(encoder, TrainConfig(seed=seed, max_length=32), CPU, classes=("a", "b"), pad_id=0).classifier.weight
        for seed in (0, 0, 1)
    ]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_accuracy_and_macro_f1():
    # 3 classes; precision and recall by hand: F1 = 2/3, 4/5, 0 (guessed once, never true).
    matrix = [[1, 0, 1], [0, 2, 0], [0, 0, 0]]
    assert accuracy(matrix) == 3 / 4
    assert macro_f1(matrix) == pytest.approx((2 / 3 + 1.0 + 0.0) / 3)
    assert macro_f1([[2, 0], [0, 0]]) == 1.0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("text,label\na,x\nb,x\n", "'x' in every row; a classifier needs at least 2 labels"),
        (
            "text,label\n" + "".join(f"t{i},l{i}\n" for i in range(1001)),
            "1,001 different labels; allowed: at most 1,000",
        ),
    ],
)
def test_labels_that_are_none(tmp_path, text, words):
    path = tmp_path / "labels.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=words):
        class_names(read_dataset(path))


def test_an_encoder_writes_no_text(tmp_path, encoder, written):
    with pytest.raises(
        ModelLoadError, match="an encoder, which writes no text; allowed with it: data of texts and labels"
    ):
        execute_run(run_config(encoder, written, HeadConfig()), tmp_path)


def test_a_method_that_trains_nothing_is_refused(tmp_path, decoder, written):
    with pytest.raises(ConfigError, match="allowed: a method with at least one parameter to train"):
        execute_run(run_config(decoder, written, PrefixConfig(prefix_length=0)), tmp_path)


def test_a_prefix_and_its_text_must_fit_into_the_context(tmp_path, decoder, written):
    with pytest.raises(ConfigError, match="max_length is 64; allowed: at most 54"):
        execute_run(run_config(decoder, written, PrefixConfig(prefix_length=10), max_length=64), tmp_path)


def test_what_was_trained_for_another_model_is_refused(tmp_path, decoder, written):
    config = run_config(decoder, written, IA3Config(), steps=1)
    execute_run(config, tmp_path)
    folder = tmp_path / "adapter"
    other = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=31,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=2,
        )
    )
    with pytest.raises(TargetError, match="made for another base model"):
        load_trained(other, IA3Config(), folder)
    assert len(load_file(folder / TRAINED_WEIGHTS)) == 2 * 3
    (folder / TRAINED_WEIGHTS).unlink()
    with pytest.raises(NotFoundError, match=r"allowed: a folder that holds trained\.safetensors"):
        load_trained(load_base(decoder, SHORT, CPU), IA3Config(), folder)


def test_every_method_has_a_default_learning_rate():
    assert set(DEFAULT_LRS) == set(METHOD_CONFIGS) == set(methods.METHODS)
