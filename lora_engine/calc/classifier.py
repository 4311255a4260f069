"""A base model as the classifier that is trained on texts and labels: transformers' ...ForSequenceClassification."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import TypeVar

from lora_engine.calc.structure import LinearShape, ModelShape, OtherShape
from lora_engine.errors import ConfigError, ModelConfigError

P = TypeVar("P", LinearShape, OtherShape)

# Where the pretrained part of an encoder sits inside the classes for a task.
_ROOTS = {
    "bert": "bert", "deberta-v2": "deberta", "distilbert": "distilbert", "modernbert": "model", "roberta": "roberta",
    "t5": "transformer", "xlm-roberta": "roberta",
}  # fmt: skip
# Families that transformers 5.23 has no classifier for.
_NONE = frozenset({"cohere", "granite", "llama4_text", "olmoe"})


@lru_cache(maxsize=64)
def as_classifier(shape: ModelShape, num_classes: int) -> ModelShape:
    """`shape` with transformers' own head for `num_classes` classes where the head of its config was.

    Decoders: `score`, without a bias, reads every token's hidden state, and the last token's scores are the text's.
    Encoders: the first token's hidden state passes one or two maps (modeling_<family>.py). What is new is trained by
    every method, and named in `task_head`.

    Raises ConfigError for fewer than two classes, ModelConfigError for a family without a classifier."""
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 2:
        raise ConfigError("num_classes", num_classes, "a whole number of at least 2")
    if shape.model_type in _NONE:
        raise ModelConfigError(
            f"model is a {shape.architecture}, of which transformers has no classifier; "
            "allowed with texts and labels: another family."
        )
    root = _ROOTS.get(shape.model_type)
    linears, others, layer_path = _pretrained(shape, root)
    h, norms = shape.hidden_size, list[OtherShape]()
    if root is None:
        # OPT-350m's hidden states leave the layers narrower, so the output head says how wide they are.
        width = next((x.in_features for x in shape.linears if x.name == shape.output_head), h)
        head = [_map("score", width, num_classes, bias=False)]
    elif shape.model_type == "bert":
        linears.append(_map("bert.pooler.dense", h, h, group="projection"))
        head = [_map("classifier", h, num_classes)]
    elif root == "roberta":
        head = [_map("classifier.dense", h, h), _map("classifier.out_proj", h, num_classes)]
    elif root == "distilbert":
        head = [_map("pre_classifier", h, h), _map("classifier", h, num_classes)]
    elif root == "deberta":
        head = [_map("pooler.dense", h, h), _map("classifier", h, num_classes)]
    elif root == "transformer":
        head = [_map("classification_head.dense", h, h), _map("classification_head.out_proj", h, num_classes)]
    else:
        # Of a bare model nothing says that `classifier_bias` is on, which no published one has.
        dense = next((x for x in shape.linears if x.name == "head.dense"), None)
        norm = next(x for x in shape.others if x.name.endswith("final_norm"))
        head = [_map("head.dense", h, h, bias=dense is not None and dense.has_bias), _map("classifier", h, num_classes)]
        norms = [OtherShape("head.norm", 1, norm.num_parameters, "norm", h)]
    return replace(
        shape,
        architecture=_title(shape) + "ForSequenceClassification",
        tied=False,
        linears=(*linears, *head),
        others=(*others, *norms),
        layer_path=layer_path,
        output_head=None,
        num_classes=num_classes,
        task_head=(*(x.name for x in head), *(x.name for x in norms)),
    )


def _map(name: str, in_features: int, out_features: int, *, bias: bool = True, group: str = "head") -> LinearShape:
    return LinearShape(name, 1, in_features, out_features, "linear", bias, group, per_layer=False)


def _pretrained(shape: ModelShape, root: str | None) -> tuple[list[LinearShape], list[OtherShape], str]:
    """Linears, others and layer path of the pretrained part, under the names it has in a class for a task."""
    if root is None:
        outside = {shape.output_head, *shape.task_head}
        return [x for x in shape.linears if x.name not in outside], list(shape.others), shape.layer_path
    start = f"{root}."
    bare = not shape.layer_path.startswith(start)

    def name(inner: str) -> str:
        return start + inner if bare and inner else inner

    def held(part: LinearShape | OtherShape) -> bool:
        # Task heads have no pooler of the base; BERT's is put back as a new one.
        pretrained = part.name.startswith(start) or (bare and part.name != shape.output_head)
        return part.per_layer or (pretrained and not part.name.endswith("pooler.dense"))

    linears = [_under(x, name) for x in shape.linears if held(x)]
    others = [_under(x, name) for x in shape.others if held(x)]
    return linears, others, name(shape.layer_path)


def _under(part: P, name: Callable[[str], str]) -> P:
    return replace(part, path=name(part.path)) if part.per_layer else replace(part, name=name(part.name))


def _title(shape: ModelShape) -> str:
    """What the names of the family's classes begin with."""
    architecture = shape.architecture
    if shape.model_type == "gemma3_text":
        return "Gemma3Text"  # Gemma3 is the multimodal one
    for end in ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "Model"):
        if architecture.endswith(end):
            return architecture.removesuffix(end)
    return architecture.partition("For")[0]
