"""The catalog against transformers, layer by layer, and against the totals that others have published."""

import pytest
import torch
import transformers
from published_totals import EXTRA, NO_TOTAL_FOUND, PUBLISHED_ACTIVE, PUBLISHED_TOTALS, VISION
from real_models import assert_same
from transformers import CONFIG_MAPPING

from lora_engine import calc
from lora_engine.errors import InputError, NotFoundError

# Enough for every kind of layer that a catalog model has (DeepSeek-V3's first three are dense).
FEW_LAYERS = 4
LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers")
TOKENS = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0)


def few_layers(facts):
    """The same model with fewer layers, as only their number makes the real one slow to build."""
    short = facts | {key: min(facts[key], FEW_LAYERS) for key in LAYER_KEYS if key in facts}
    if "attention_types" in short:
        short["attention_types"] = [[facts["attention_types"][0][0], FEW_LAYERS // 2]]
    if "text_config" in short:
        short["text_config"] = few_layers(facts["text_config"])
    return short


def language_facts(facts):
    return facts.get("text_config", facts)


@pytest.mark.parametrize("hub_id", calc.CATALOG)
def test_catalog_model_counts_what_transformers_builds(hub_id):
    short = few_layers(calc.CATALOG[hub_id])
    shape = calc.shape_from_config(short, hub_id)
    facts = {key: value for key, value in language_facts(short).items() if key not in ("model_type", "architectures")}
    config = CONFIG_MAPPING[language_facts(short)["model_type"]](**facts | TOKENS)
    with torch.device("meta"):
        model = getattr(transformers, shape.architecture)(config)
    assert_same(shape, model)
    assert shape.name == hub_id


@pytest.mark.parametrize("hub_id", calc.CATALOG)
def test_layers_left_out_are_like_those_that_were_compared(hub_id):
    """Each pattern of parts that a layer of the whole model has, a layer of the short one has, too."""

    def patterns(shape):
        parts = (*shape.linears, *shape.others, *shape.experts)
        depth = max(shape.layers_of(part)[-1] for part in parts if part.per_layer) + 1
        return {
            frozenset((p.path, p.name, p.num_parameters) for p in parts if i in set(shape.layers_of(p)))
            for i in range(depth)
        }

    whole = calc.load_shape(hub_id)
    assert patterns(whole) == patterns(calc.shape_from_config(few_layers(calc.CATALOG[hub_id]), hub_id))


def vision_parameters(facts):
    """Of the part that reads images, and of what leads from it to the language model."""
    name = facts["architectures"][0]
    text = few_layers(language_facts(facts)) | TOKENS
    config = CONFIG_MAPPING[facts["model_type"]](text_config=text, vision_config=VISION[name])
    with torch.device("meta"):
        model = getattr(transformers, name)(config)
    return sum(p.numel() for n, p in model.named_parameters() if "language_model" not in n and "lm_head" not in n)


def rounded_like(total, text):
    """`total` with as many digits as `text` ("41.87B") has."""
    unit = {"B": 10**9, "M": 10**6}[text[-1]]
    digits = len(text[:-1].partition(".")[2])
    return f"{total / unit:.{digits}f}{text[-1]}"


@pytest.mark.parametrize(("hub_id", "value"), [(hub_id, value) for hub_id, (value, _) in PUBLISHED_TOTALS.items()])
def test_total_is_the_published_one(hub_id, value):
    shape, facts = calc.load_shape(hub_id), calc.CATALOG[hub_id]
    total = shape.total_parameters
    if hub_id in EXTRA:
        total += EXTRA[hub_id][0](shape)
    if "text_config" in facts:
        total += vision_parameters(facts)
    assert (rounded_like(total, value) if isinstance(value, str) else total) == value


@pytest.mark.parametrize(("hub_id", "value", "embedding"), [(k, *v) for k, v in PUBLISHED_ACTIVE.items()])
def test_active_parameters_are_the_published_ones(hub_id, value, embedding):
    shape = calc.load_shape(hub_id)
    active = shape.active_parameters - (0 if embedding else shape.vocab_size * shape.hidden_size)
    assert rounded_like(active, value) == value


def test_every_catalog_model_has_a_published_total_or_is_said_to_have_none():
    assert set(PUBLISHED_TOTALS) | NO_TOTAL_FOUND == set(calc.CATALOG)
    assert not set(PUBLISHED_TOTALS) & NO_TOTAL_FOUND
    assert set(EXTRA) <= set(PUBLISHED_TOTALS)
    assert set(PUBLISHED_ACTIVE) < {hub_id for hub_id in calc.CATALOG if calc.load_shape(hub_id).moe}
    assert len(calc.CATALOG) >= 60


def test_distilled_models_are_those_they_were_made_from():
    for distilled, origin in (
        ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "meta-llama/Llama-3.1-8B"),
        ("deepseek-ai/DeepSeek-R1-Distill-Llama-70B", "meta-llama/Llama-3.3-70B-Instruct"),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-14B", "Qwen/Qwen2.5-14B"),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-32B", "Qwen/Qwen2.5-32B"),
    ):
        assert calc.load_shape(distilled).total_parameters == calc.load_shape(origin).total_parameters


@pytest.mark.parametrize(
    ("name", "hub_id"),
    [
        ("gpt2", "openai-community/gpt2"),
        ("GPT2", "openai-community/gpt2"),
        ("TinyLlama", "TinyLlama/TinyLlama-1.1B-Chat-v1.0"),
        ("phi-3-mini", "microsoft/Phi-3-mini-4k-instruct"),
        ("Phi-3", "microsoft/Phi-3-mini-4k-instruct"),
        ("Mistral-7B", "mistralai/Mistral-7B-v0.1"),
        ("Mistral-7B-v0.1", "mistralai/Mistral-7B-v0.1"),
        ("Mixtral-8x7B", "mistralai/Mixtral-8x7B-v0.1"),
        ("Llama-4-Scout", "meta-llama/Llama-4-Scout-17B-16E-Instruct"),
        ("Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"),
        ("llama-3.1-8b", "meta-llama/Llama-3.1-8B"),
        ("META-LLAMA/llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("bert-base-uncased", "google-bert/bert-base-uncased"),
        ("DeepSeek-V2", "deepseek-ai/DeepSeek-V2"),
    ],
)
def test_catalog_names_in_any_case_and_short(name, hub_id):
    assert calc.load_shape(name).name == hub_id


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        (
            "SmolLM2",
            "HuggingFaceTB/SmolLM2-135M, HuggingFaceTB/SmolLM2-360M, HuggingFaceTB/SmolLM2-1.7B",
        ),
    ],
)
def test_ambiguous_short_name_lists_what_it_could_be(name, allowed):
    with pytest.raises(NotFoundError) as caught:
        calc.load_shape(name)
    assert str(caught.value) == f"model is {name!r}, which could be several; allowed: {allowed}."


def test_unknown_name_offers_near_ones():
    with pytest.raises(NotFoundError, match=r"near: .*meta-llama/Llama-3\.1-8B"):
        calc.load_shape("meta-llama/Llama-3.1-8")
    with pytest.raises(NotFoundError, match=r"a name from the catalog\.$"):
        calc.load_shape("zzzz/zzzz")


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 10_000, "~nobody-here/model", "/dev/null/x", "../../etc"])
def test_odd_names_are_input_errors(name):
    with pytest.raises(InputError):
        calc.load_shape(name)
