"""BERT and RoBERTa: config facts -> ModelShape, by the class that the config names."""

from lora_engine.calc.facts import Facts
from lora_engine.calc.parts import Parts, common_fields, sizes_of
from lora_engine.calc.structure import ModelShape

_ENCODER_TASKS = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


def encoder(facts: Facts) -> ModelShape:
    """BERT and RoBERTa, with the head that `architectures` names; without one, the bare model and its pooler.

    ForMaskedLM, ForTokenClassification and ForQuestionAnswering have no pooler, nor has RoBERTa's classifier."""
    sizes = h, layers, heads, vocab = sizes_of(facts)
    inner, d = facts.size("intermediate_size"), facts.derived_head_dim(h, heads)
    positions = facts.size("max_position_embeddings", default=512)
    family = facts.text("model_type", default="bert")
    title = {"bert": "Bert", "roberta": "Roberta"}[family]
    listed = facts.values.get("architectures")
    first = listed[0] if isinstance(listed, list) and listed and isinstance(listed[0], str) else ""
    task = next((t for t in _ENCODER_TASKS if first == title + t), None)
    tied = task == "ForMaskedLM" and facts.flag("tie_word_embeddings", True)
    root = f"{family}." if task else ""
    parts = Parts(layers, norm_bias=True)
    for name, rows in (
        ("word", vocab),
        ("position", positions),
        ("token_type", facts.size("type_vocab_size", default=2)),
    ):
        parts.embedding(f"{root}embeddings.{name}_embeddings", rows, h)
    parts.outer_norm(f"{root}embeddings.LayerNorm", h)
    qkv = tuple(f"attention.self.{x}" for x in ("query", "key", "value"))
    for name in qkv:
        parts.linear(name, h, h, "attention", bias=True)
    parts.linear("attention.output.dense", h, h, "attention", bias=True)
    parts.norm("attention.output.LayerNorm", h, ("intermediate.dense",))
    parts.linear("intermediate.dense", h, inner, "mlp", bias=True)
    parts.linear("output.dense", inner, h, "mlp", bias=True)
    parts.norm("output.LayerNorm", h, qkv)
    head = _encoder_head(parts, facts, family, task, (h, vocab), root, tied)
    return ModelShape(
        **common_fields(facts, title + (task or "Model"), sizes, heads, d, inner, 512),
        tied=tied,
        linears=tuple(parts.linears),
        others=tuple(parts.others),
        layer_path=f"{root}encoder.layer",
        output_head=head,
        norm_kind="layer",
        activation=facts.text("hidden_act", default="gelu"),
        gated=False,
        fused_qkv=False,
        rotary=False,
        num_dropouts=2 if facts.rate("hidden_dropout_prob", 0.1) else 0,
    )


def _encoder_head(
    parts: Parts, facts: Facts, family: str, task: str | None, sizes: tuple[int, int], root: str, tied: bool
) -> str | None:
    """Adds the task head; returns the full name of the output embeddings, if there are any."""
    h, vocab = sizes
    labels = facts.values.get("id2label")
    num_labels = facts.size("num_labels", default=len(labels) if isinstance(labels, dict) and labels else 2)
    if task is None or (task == "ForSequenceClassification" and family == "bert"):
        parts.outer(f"{root}pooler.dense", h, h, "projection", bias=True)
    if task == "ForMaskedLM":
        dense, norm, decoder = (
            ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.decoder")
            if family == "bert"
            else ("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder")
        )
        parts.outer(dense, h, h, "projection", bias=True)
        parts.outer_norm(norm, h)
        parts.outer(decoder, h, vocab, "head", bias=True, tied=tied)
        return decoder
    if task == "ForQuestionAnswering":
        parts.outer("qa_outputs", h, num_labels, "projection", bias=True)
    elif task == "ForTokenClassification" or (task and family == "bert"):
        parts.outer("classifier", h, num_labels, "projection", bias=True)
    elif task:
        parts.outer("classifier.dense", h, h, "projection", bias=True)
        parts.outer("classifier.out_proj", h, num_labels, "projection", bias=True)
    return None
