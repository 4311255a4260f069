"""One function per model family: config facts -> ModelShape, with the module names of transformers 5.

Sources: modeling_<family>.py of transformers for names, biases and tied weights, and
configuration_<family>.py for what an absent key means.
"""

from collections.abc import Callable
from dataclasses import replace

from lora_engine.calc.experts import OLD_NAMES
from lora_engine.calc.facts import Facts
from lora_engine.calc.families import decoders, encoders, llama, moe
from lora_engine.calc.families.t5 import t5
from lora_engine.calc.structure import ModelShape
from lora_engine.errors import ModelConfigError, UnknownArchitectureError

FAMILIES: dict[str, Callable[[Facts], ModelShape]] = {
    "bert": encoders.bert,
    "bloom": decoders.bloom,
    "cohere": llama.cohere,
    "deberta-v2": encoders.deberta,
    "deepseek_v2": moe.deepseek_v2,
    "deepseek_v3": moe.deepseek_v3,
    "distilbert": encoders.distilbert,
    "falcon": decoders.falcon,
    "gemma": llama.gemma,
    "gemma2": llama.gemma2,
    "gemma3_text": llama.gemma3,
    "gpt2": decoders.gpt2,
    "gpt_neo": decoders.gpt_neo,
    "gpt_neox": decoders.gpt_neox,
    "gpt_oss": moe.gpt_oss,
    "gptj": decoders.gptj,
    "granite": llama.granite,
    "llama": llama.llama,
    "llama4_text": moe.llama4,
    "ministral3": llama.ministral3,
    "mistral": llama.mistral,
    "mixtral": moe.mixtral,
    "modernbert": encoders.modernbert,
    "olmo": llama.olmo,
    "olmo2": llama.olmo2,
    "olmo3": llama.olmo3,
    "olmoe": moe.olmoe,
    "opt": decoders.opt,
    "phi": decoders.phi,
    "phi3": decoders.phi3,
    "phimoe": moe.phimoe,
    "qwen2": llama.qwen2,
    "qwen2_moe": moe.qwen2_moe,
    "qwen3": llama.qwen3,
    "qwen3_moe": moe.qwen3_moe,
    "roberta": encoders.bert,
    "smollm3": llama.smollm3,
    "stablelm": llama.stablelm,
    "starcoder2": llama.starcoder2,
    "t5": t5,
    "xlm-roberta": encoders.bert,
}


def build_shape(facts: Facts) -> ModelShape:
    """The shape by `model_type`; of a multimodal model, that of the language model in its `text_config`.

    Raises UnknownArchitectureError, naming what is supported, and ModelConfigError for what cannot be."""
    model_type = facts.text("model_type", default="")
    if model_type in FAMILIES:
        return _with_notes(FAMILIES[model_type](facts), _named_class(facts))
    text = facts.nested("text_config")
    if text is not None:
        return _language_model(facts, text, model_type)
    if f"{model_type}_text" in FAMILIES:
        raise ModelConfigError(
            f"text_config of {facts.name} is missing; allowed: a config.json that says it, as {model_type} has "
            "its language model there."
        )
    allowed = ", ".join(FAMILIES)
    if model_type:
        raise UnknownArchitectureError(f"model_type of {facts.name} is {model_type[:40]!r}; allowed: {allowed}.")
    raise UnknownArchitectureError(f"model_type of {facts.name} is missing; allowed: one of {allowed}.")


def _named_class(facts: Facts) -> str | None:
    """The first of `architectures`."""
    listed = facts.values.get("architectures")
    return str(listed[0])[:60] if isinstance(listed, list) and listed else None


def _language_model(facts: Facts, text: Facts, model_type: str) -> ModelShape:
    """What `text_config` describes. A key that only the outer config has counts for the inner, too."""
    inner = text.text("model_type", default=f"{model_type}_text")
    values = {**text.values, "model_type": inner}
    if "tie_word_embeddings" in facts.values:
        values.setdefault("tie_word_embeddings", facts.values["tie_word_embeddings"])
    if inner not in FAMILIES:
        raise UnknownArchitectureError(f"model_type of {text.name} is {inner[:40]!r}; allowed: {', '.join(FAMILIES)}.")
    shape = replace(FAMILIES[inner](Facts(values, text.name)), name=facts.name)
    said = _named_class(facts) or (model_type or "the model")
    note = f"Counted is the language model of {said}, as {shape.architecture}; what reads images or sound is left out."
    return replace(shape, notes=(note, *shape.notes, *_moe_notes(shape)))


def _with_notes(shape: ModelShape, named: str | None) -> ModelShape:
    """Says when the config names another class than the one counted, and how experts are counted."""
    notes = (*shape.notes, *_moe_notes(shape))
    if named != shape.architecture and (named is not None or not shape.is_decoder):
        said = f"its config.json names {named}" if named else "its config.json names no class"
        notes = (f"Counted as {shape.architecture}; {said}.", *notes)
    return replace(shape, notes=notes)


def _moe_notes(shape: ModelShape) -> tuple[str, ...]:
    if shape.moe is None:
        return ()
    found, names = shape.moe, " and ".join(part.name for part in shape.experts)
    where = f"{len(found.layers)} of {shape.num_layers} layers" if found.dense_intermediate_size else "every layer"
    shared = " and the shared expert" if found.shared_intermediate_size else ""
    turned = (
        " PEFT 0.21 turns all-linear into both for this family, router included, and so does this count."
        if shape.model_type in OLD_NAMES
        else ""
    )
    return (
        f"The {found.num_experts} experts of a layer, in {where}, are the 3-D parameters {names}, no linear modules: "
        f"target_modules does not reach them, target_parameters does.{turned}",
        f"A token passes {found.experts_per_token} of {found.num_experts} experts{shared}: "
        f"{shape.active_parameters:,} of {shape.total_parameters:,} parameters are active.",
    )
