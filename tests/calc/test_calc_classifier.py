"""A base as the classifier that is trained: its parts, counts and bytes against transformers' class and real steps."""

import json

import pytest
import torch
from real_models import ALL_VARIANTS, ENCODER_VARIANTS, TITLES, assert_same, encoder_and_shape
from real_models import ENCODERS as BERTS
from real_models import OTHER_ENCODERS as OTHERS
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSES

from lora_engine import calc, export
from lora_engine.assets_path import asset_path
from lora_engine.calc.classifier import as_classifier
from lora_engine.calc.families import FAMILIES
from lora_engine.calc.predict import RowFacts, predict_run, row_facts, shape_to_train
from lora_engine.config import (
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
)
from lora_engine.data import Encoded
from lora_engine.errors import ConfigError, ModelConfigError
from lora_engine.methods import inject, trainable_parameters
from lora_engine.training.batches import make_batch
from lora_engine.training.loop import build_optimizer
from lora_engine.training.loss import labelled_loss_sum
from lora_engine.training.measure import PeakMemory

CLASSIFIED = {name: each for name, each in ALL_VARIANTS.items() if each[0] in CLASSES}


def real_classifier(config, num_classes):
    config.num_labels = num_classes
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(config)


@pytest.mark.parametrize(("model_type", "facts"), CLASSIFIED.values(), ids=CLASSIFIED)
def test_decoders_get_transformers_own_head(model_type, facts):
    shape = as_classifier(calc.shape_from_config(facts | {"model_type": model_type}, "test"), 5)
    model = real_classifier(CONFIG_MAPPING[model_type](**facts), 5)
    assert_same(shape, model)
    assert shape.architecture == type(model).__name__
    assert_head(shape, model)


def assert_head(shape, model):
    """What stands beside the pretrained part is the head, by name and number."""
    base = f"{model.base_model_prefix}."
    head = {name: p.numel() for name, p in model.named_parameters() if not name.startswith(base)}
    assert {name.rpartition(".")[0] for name in head} == set(shape.task_head)
    assert shape.task_head_parameters == sum(head.values())
    assert shape.num_classes == model.config.num_labels


KINDS = {f"{family} {kind}": (family, kind, None) for family, kind in (*BERTS.values(), *OTHERS.values())} | {
    name: (family, "ForMaskedLM", more) for name, (family, more) in ENCODER_VARIANTS.items()
}


@pytest.mark.parametrize(("family", "kind", "more"), KINDS.values(), ids=KINDS)
def test_encoders_become_classifiers_whatever_their_config_names(family, kind, more):
    named, shape = encoder_and_shape(family, kind, more)
    model = real_classifier(named.config, 4)
    shape = as_classifier(shape, 4)
    assert_same(shape, model)
    assert shape.architecture == TITLES[family] + "ForSequenceClassification"
    assert_head(shape, model)


def test_every_family_is_known_to_have_a_classifier_or_none():
    assert {family for family in FAMILIES if family not in CLASSES} == calc.classifier._NONE
    with pytest.raises(ModelConfigError, match="a GraniteForCausalLM, of which transformers has no classifier"):
        as_classifier(calc.shape_from_config(ALL_VARIANTS["granite"][1] | {"model_type": "granite"}, "test"), 2)


@pytest.mark.parametrize("num_classes", [0, 1, 2.0, True])
def test_fewer_than_two_classes_are_refused(num_classes):
    with pytest.raises(ConfigError, match="num_classes is .*; allowed: a whole number of at least 2"):
        as_classifier(calc.load_shape("embedded"), num_classes)


# The runs themselves: each method injected into the real classifier.

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 500,
    "intermediate_size": 192,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
BASES = {
    "llama": SMALL | {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "gpt2": {
        "n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 500, "n_positions": 128, "pad_token_id": 0,
        "bos_token_id": 0, "eos_token_id": 0, "resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0,
    },
    "bert": SMALL | QUIET,
    "roberta": SMALL | QUIET,
}  # fmt: skip
METHODS = {
    "lora": LoraConfig(r=8),
    "lora, attention": LoraConfig(r=4, target_modules="attention"),
    "lora, mlp": LoraConfig(r=8, target_modules="mlp"),
    "dora": LoraConfig(r=8, use_dora=True),
    "full": FullConfig(),
    "head": HeadConfig(),
    "bottleneck": BottleneckConfig(),
    "prefix": PrefixConfig(),
    "prefix, by an MLP": PrefixConfig(reparametrize=True),
    "ia3": IA3Config(),
}
HEADS = {"llama": "score", "gpt2": "score", "bert": "classifier", "roberta": "out_proj"}
CLASSES_OF_DATA = 3


def config_of(family):
    if family == "embedded":
        return AutoConfig.from_pretrained(asset_path("base"))
    return CONFIG_MAPPING[family](**BASES[family])


@pytest.fixture
def predicted(tmp_path):
    def predict(family, method, **train):
        folder = "embedded"
        if family != "embedded":
            folder = str(tmp_path)
            (tmp_path / "config.json").write_text(json.dumps(BASES[family] | {"model_type": family}))
        config = RunConfig(
            model=folder, data=DataConfig(path="d.csv"), method=method, train=TrainConfig(max_length=64, **train)
        )
        return predict_run(config, RowFacts(64, 1.0, CLASSES_OF_DATA))

    return predict


def test_every_method_is_tried():
    assert {method.method for method in METHODS.values()} == set(METHOD_CONFIGS)


@pytest.mark.parametrize("family", ["embedded", *BASES])
@pytest.mark.parametrize("name", METHODS)
def test_counts_are_those_of_the_injected_model(predicted, family, name):
    model = real_classifier(config_of(family), CLASSES_OF_DATA)
    total = sum(p.numel() for p in model.parameters())
    model = inject(model.to_empty(device="cpu"), METHODS[name])
    found = predicted(family, METHODS[name])
    assert found["trainable_parameters"] == sum(p.numel() for p in trainable_parameters(model))
    assert found["total_parameters"] == total


@pytest.mark.parametrize("family", BASES)
def test_a_head_that_lora_names_is_trained_as_it_is(predicted, family):
    method = LoraConfig(target_modules=(HEADS[family],))
    model = inject(real_classifier(config_of(family), CLASSES_OF_DATA).to_empty(device="cpu"), method)
    assert predicted(family, method)["trainable_parameters"] == sum(p.numel() for p in trainable_parameters(model))


@pytest.mark.parametrize("family", BASES)
@pytest.mark.parametrize("name", [name for name in METHODS if name != "full"])
def test_files_hold_the_head_too(tmp_path, predicted, family, name):
    """Beside PEFT's two files, or among what else was trained: within a few bytes for each tensor."""
    model = inject(real_classifier(config_of(family), CLASSES_OF_DATA).to_empty(device="cpu"), METHODS[name])
    size = export.save_trained(model, METHODS[name], base_model="x", base_folder=tmp_path, out=tmp_path / "out")
    tensors = len(trainable_parameters(model))
    assert predicted(family, METHODS[name])["adapter_bytes"] == pytest.approx(size, abs=30 * tensors + 100)


def measured_peak(family, method, train):
    """Tracked bytes of a step over a padded batch, the optimizer's state there already."""
    config = config_of(family)
    config.num_labels = CLASSES_OF_DATA
    torch.manual_seed(0)
    dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
    model = inject(AutoModelForSequenceClassification.from_config(config, dtype=dtype), method)
    if train.checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    trained = trainable_parameters(model)
    optimizer = build_optimizer(trained, train)
    lengths = [64, *(24 + 5 * i for i in range(train.batch_size - 1))]
    rows = [Encoded(i, [5 + i] * n, [], False, label=i % CLASSES_OF_DATA) for i, n in enumerate(lengths)]
    batch = make_batch(rows, config.pad_token_id, torch.device("cpu"))
    memory = PeakMemory(model, optimizer, torch.device("cpu"))
    for _ in range(2):
        with memory.watch():
            (labelled_loss_sum(model, batch) / batch.num_labels).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return memory.peak_bytes


STEPS = [
    *((family, name, {}) for family in BASES for name in METHODS if "," not in name and name != "dora"),
    *((family, name, {"precision": "bf16"}) for family in ("llama", "gpt2", "bert") for name in ("lora", "full")),
    *((family, "lora", {"checkpointing": True}) for family in ("llama", "gpt2")),
]


@pytest.mark.parametrize(("family", "name", "settings"), STEPS, ids=str)
def test_bytes_are_those_of_a_real_step(predicted, family, name, settings):
    train = TrainConfig(batch_size=8, max_length=64, **settings)
    measured = measured_peak(family, METHODS[name], train)
    found = predicted(family, METHODS[name], batch_size=8, **settings)
    assert found["peak_bytes"] == pytest.approx(measured, rel=0.03)
    assert sum(found["terms"].values()) == found["peak_bytes"]


def test_facts_of_the_rows_say_the_classes():
    report = {"longest_tokens": 40, "trained_tokens": 12, "examples": 12, "classes": [{"name": "a", "rows": 12}] * 3}
    assert row_facts(report) == RowFacts(40, 1.0, 3)
    assert row_facts(report | {"classes": []}).num_classes == 0


def test_text_to_write_is_predicted_as_ever():
    shape = calc.load_shape("embedded")
    assert shape_to_train(shape) is shape
    assert shape_to_train(shape, 2).task_head == ("score",)
