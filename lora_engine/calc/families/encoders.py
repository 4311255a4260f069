"""BERT, RoBERTa, DistilBERT, DeBERTa and ModernBERT, with the head of the class that the config names."""

from lora_engine.calc.facts import MAX_LAYERS, MAX_VOCAB, Facts
from lora_engine.calc.parts import Parts, common_fields, sizes_of
from lora_engine.calc.structure import ModelShape, OtherShape
from lora_engine.errors import ModelConfigError

_ENCODER_TASKS = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


def named_task(facts: Facts, title: str) -> str | None:
    """Which of the four tasks the first of `architectures` is for; None for anything else: the bare model."""
    listed = facts.values.get("architectures")
    first = listed[0] if isinstance(listed, list) and listed and isinstance(listed[0], str) else ""
    return next((task for task in _ENCODER_TASKS if first == title + task), None)


def num_labels(facts: Facts) -> int:
    labels = facts.values.get("id2label")
    return facts.size("num_labels", default=len(labels) if isinstance(labels, dict) and labels else 2)


# BERT's word for dropout over attention, and its rate where it is absent.
_DROPPED = ("attention_probs_dropout_prob", 0.1)

_TITLES = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta"}


def bert(facts: Facts) -> ModelShape:
    """BERT, RoBERTa and XLM-RoBERTa; without a task, the bare model and its pooler.

    ForMaskedLM, ForTokenClassification and ForQuestionAnswering have no pooler, nor has RoBERTa's classifier."""
    sizes = h, layers, heads, vocab = sizes_of(facts)
    inner, d = facts.size("intermediate_size"), facts.derived_head_dim(h, heads)
    positions = facts.size("max_position_embeddings", default=512)
    model_type = facts.text("model_type", default="bert")
    title, family = _TITLES[model_type], "bert" if model_type == "bert" else "roberta"
    task = named_task(facts, title)
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
    _bert_layers(parts, h, inner, ("query", "key", "value"))
    head = _bert_head(parts, facts, family, task, (h, vocab), root, tied)
    return ModelShape(
        **common_fields(facts, title + (task or "Model"), sizes, heads, d, inner, 512, attention_dropout=_DROPPED),
        tied=tied,
        **parts.fields(),
        layer_path=f"{root}encoder.layer",
        output_head=head,
        norm_kind="layer",
        activation=facts.text("hidden_act", default="gelu"),
        gated=False,
        fused_qkv=False,
        rotary=False,
        num_dropouts=2 if facts.rate("hidden_dropout_prob", 0.1) else 0,
        embedding_dropout=facts.rate("hidden_dropout_prob", 0.1) > 0,
        post_norm=True,
    )


def _bert_layers(parts: Parts, h: int, inner: int, names: tuple[str, str, str]) -> None:
    """Norms after attention and after the MLP: what a norm gives, the next half reads."""
    qkv = tuple(f"attention.self.{name}" for name in names)
    for name in qkv:
        parts.linear(name, h, h, "attention", bias=True)
    parts.linear("attention.output.dense", h, h, "attention", bias=True)
    parts.norm("attention.output.LayerNorm", h, ("intermediate.dense",))
    parts.linear("intermediate.dense", h, inner, "mlp", bias=True)
    parts.linear("output.dense", inner, h, "mlp", bias=True)
    parts.norm("output.LayerNorm", h, qkv)


def _bert_head(
    parts: Parts, facts: Facts, family: str, task: str | None, sizes: tuple[int, int], root: str, tied: bool
) -> str | None:
    """Adds the task head; returns the full name of the output embeddings, if there are any."""
    h, vocab = sizes
    labels = num_labels(facts)
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
        _decoder(parts, decoder, h, vocab, tied=tied)
        return decoder
    if task == "ForQuestionAnswering":
        parts.outer("qa_outputs", h, labels, "projection", bias=True)
    elif task == "ForTokenClassification" or (task and family == "bert"):
        parts.outer("classifier", h, labels, "projection", bias=True)
    elif task:
        parts.outer("classifier.dense", h, h, "projection", bias=True)
        parts.outer("classifier.out_proj", h, labels, "projection", bias=True)
    return None


def _decoder(parts: Parts, name: str, width: int, vocab: int, *, tied: bool) -> None:
    """The output embeddings; untied, the head above them has a second, unused bias."""
    parts.outer(name, width, vocab, "head", bias=True, tied=tied)
    if not tied:
        parts.others.append(OtherShape(name.replace("decoder", "bias"), 1, vocab, "bias", vocab))


def distilbert(facts: Facts) -> ModelShape:
    """BERT without token types and pooler, under names of its own."""
    h = facts.size("dim", "hidden_size")
    layers = facts.size("n_layers", "num_hidden_layers", high=MAX_LAYERS)
    heads, vocab = facts.size("n_heads", "num_attention_heads"), facts.size("vocab_size", high=MAX_VOCAB)
    inner, d = facts.size("hidden_dim", default=4 * 768), facts.derived_head_dim(h, heads)
    positions = facts.size("max_position_embeddings", default=512)
    task = named_task(facts, "DistilBert")
    tied = task == "ForMaskedLM" and facts.flag("tie_word_embeddings", True)
    root = "distilbert." if task else ""
    qkv = tuple(f"attention.{x}_lin" for x in "qkv")
    parts = Parts(layers, norm_bias=True)
    parts.embedding(f"{root}embeddings.word_embeddings", vocab, h)
    parts.embedding(f"{root}embeddings.position_embeddings", positions, h)
    parts.outer_norm(f"{root}embeddings.LayerNorm", h)
    for name in (*qkv, "attention.out_lin"):
        parts.linear(name, h, h, "attention", bias=True)
    parts.norm("sa_layer_norm", h, ("ffn.lin1",))
    parts.linear("ffn.lin1", h, inner, "mlp", bias=True)
    parts.linear("ffn.lin2", inner, h, "mlp", bias=True)
    parts.norm("output_layer_norm", h, qkv)
    if task == "ForMaskedLM":
        parts.outer("vocab_transform", h, h, "projection", bias=True)
        parts.outer_norm("vocab_layer_norm", h)
        parts.outer("vocab_projector", h, vocab, "head", bias=True, tied=tied)
    elif task == "ForQuestionAnswering":
        parts.outer("qa_outputs", h, num_labels(facts), "projection", bias=True)
    elif task:
        if task == "ForSequenceClassification":
            parts.outer("pre_classifier", h, h, "projection", bias=True)
        parts.outer("classifier", h, num_labels(facts), "projection", bias=True)
    return ModelShape(
        **common_fields(
            facts,
            "DistilBert" + (task or "Model"),
            (h, layers, heads, vocab),
            heads,
            d,
            inner,
            512,
            attention_dropout=("attention_dropout", 0.1),
        ),
        tied=tied,
        **parts.fields(),
        layer_path=f"{root}transformer.layer",
        output_head="vocab_projector" if task == "ForMaskedLM" else None,
        norm_kind="layer",
        activation=facts.text("activation", default="gelu"),
        gated=False,
        fused_qkv=False,
        rotary=False,
        num_dropouts=1 if facts.rate("dropout", 0.1) else 0,
        embedding_dropout=facts.rate("dropout", 0.1) > 0,
        post_norm=True,
    )


def deberta(facts: Facts) -> ModelShape:
    """DeBERTa v2 and v3: one table of relative positions for all layers, projected by the layers' own query and
    key maps, or by maps of their own unless `share_att_key`."""
    sizes = h, layers, heads, vocab = sizes_of(facts)
    inner, d = facts.size("intermediate_size"), facts.derived_head_dim(h, heads)
    positions = facts.size("max_position_embeddings", default=512)
    width = facts.size("embedding_size", default=h)
    task = named_task(facts, "DebertaV2")
    tied = task == "ForMaskedLM" and facts.flag("tie_word_embeddings", True)
    root = "deberta." if task else ""
    parts = Parts(layers, norm_bias=True)
    parts.embedding(f"{root}embeddings.word_embeddings", vocab, width)
    if facts.flag("position_biased_input", True):
        parts.embedding(f"{root}embeddings.position_embeddings", positions, width)
    if types := facts.count("type_vocab_size", 0):
        parts.embedding(f"{root}embeddings.token_type_embeddings", types, width)
    if width != h:
        parts.outer(f"{root}embeddings.embed_proj", width, h, "projection")
    parts.outer_norm(f"{root}embeddings.LayerNorm", h)
    _bert_layers(parts, h, inner, ("query_proj", "key_proj", "value_proj"))
    _relative_positions(parts, facts, root, h, positions)
    if task == "ForMaskedLM":
        parts.outer("cls.predictions.transform.dense", h, width, "projection", bias=True)
        parts.outer_norm("cls.predictions.transform.LayerNorm", width)
        _decoder(parts, "cls.predictions.decoder", width, vocab, tied=tied)
    elif task == "ForQuestionAnswering":
        parts.outer("qa_outputs", h, num_labels(facts), "projection", bias=True)
    elif task:
        if task == "ForSequenceClassification":
            parts.outer("pooler.dense", h, h, "projection", bias=True)
        parts.outer("classifier", h, num_labels(facts), "projection", bias=True)
    return ModelShape(
        **common_fields(
            facts, "DebertaV2" + (task or "Model"), sizes, heads, d, inner, 512, attention_dropout=_DROPPED
        ),
        tied=tied,
        **parts.fields(),
        layer_path=f"{root}encoder.layer",
        output_head="cls.predictions.decoder" if task == "ForMaskedLM" else None,
        norm_kind="layer",
        activation=facts.text("hidden_act", default="gelu"),
        gated=False,
        fused_qkv=False,
        rotary=False,
        num_dropouts=2 if facts.rate("hidden_dropout_prob", 0.1) else 0,
        embedding_dropout=facts.rate("hidden_dropout_prob", 0.1) > 0,
        post_norm=True,
    )


def _is_set(facts: Facts, key: str) -> bool:
    return facts.values.get(key) is not None and facts.values[key] != -1


def _relative_positions(parts: Parts, facts: Facts, root: str, h: int, positions: int) -> None:
    """DeBERTa's table of relative positions, what maps it, and the convolution beside the first layer."""
    if facts.flag("relative_attention", False):
        # -1 in either key stands for "not used", as an absent key does.
        reach = facts.size("max_relative_positions") if _is_set(facts, "max_relative_positions") else positions
        if _is_set(facts, "position_buckets"):
            reach = facts.size("position_buckets")
        parts.embedding(f"{root}encoder.rel_embeddings", 2 * reach, h)
        listed = facts.values.get("pos_att_type") or ()
        kinds = [kind.strip() for kind in listed.lower().split("|")] if isinstance(listed, str) else listed
        if not isinstance(kinds, list | tuple):
            raise ModelConfigError(f"pos_att_type of {facts.name} is {kinds!r:.40}; allowed: c2p, p2c, or both.")
        if not facts.flag("share_att_key", False):
            for kind, name in (("c2p", "pos_key_proj"), ("p2c", "pos_query_proj")):
                if kind in kinds:
                    parts.linear(f"attention.self.{name}", h, h, "attention", bias=True)
    if "layer_norm" in facts.text("norm_rel_ebd", default="none").lower():
        parts.outer_norm(f"{root}encoder.LayerNorm", h)
    if kernel := facts.count("conv_kernel_size", 0):
        size = h * (h // facts.size("conv_groups", default=1)) * kernel + h
        parts.others.append(OtherShape(f"{root}encoder.conv.conv", 1, size, "convolution", h))
        parts.outer_norm(f"{root}encoder.conv.LayerNorm", h)


def modernbert(facts: Facts) -> ModelShape:
    """Rotary positions, fused q, k and v, gate and up in one map, no norm before the first attention."""
    sizes = h, layers, heads, vocab = sizes_of(facts)
    inner, d = facts.size("intermediate_size"), facts.derived_head_dim(h, heads)
    task = named_task(facts, "ModernBert")
    tied = task == "ForMaskedLM" and facts.flag("tie_word_embeddings", True)
    root = "model." if task else ""
    bias, mlp_bias = facts.flag("attention_bias", False), facts.flag("mlp_bias", False)
    parts = Parts(layers, norm_bias=facts.flag("norm_bias", False))
    parts.embedding(f"{root}embeddings.tok_embeddings", vocab, h)
    parts.outer_norm(f"{root}embeddings.norm", h)
    parts.norm("attn_norm", h, ("attn.Wqkv",), layers=tuple(range(1, layers)))
    parts.linear("attn.Wqkv", h, 3 * h, "attention", bias=bias)
    parts.linear("attn.Wo", h, h, "attention", bias=bias)
    parts.norm("mlp_norm", h, ("mlp.Wi",))
    parts.linear("mlp.Wi", h, 2 * inner, "mlp", bias=mlp_bias)
    parts.linear("mlp.Wo", inner, h, "mlp", bias=mlp_bias)
    parts.outer_norm(f"{root}final_norm", h)
    if task:
        parts.outer("head.dense", h, h, "projection", bias=facts.flag("classifier_bias", False))
        parts.outer_norm("head.norm", h)
    if task == "ForMaskedLM":
        parts.outer("decoder", h, vocab, "head", bias=facts.flag("decoder_bias", True), tied=tied)
    elif task:
        parts.outer("classifier", h, num_labels(facts), "projection", bias=True)
    return ModelShape(
        **common_fields(facts, "ModernBert" + (task or "Model"), sizes, heads, d, inner, 8192),
        tied=tied,
        **parts.fields(),
        layer_path=f"{root}layers",
        output_head="decoder" if task == "ForMaskedLM" else None,
        norm_kind="layer",
        activation=facts.text("hidden_activation", default="gelu"),
        gated=True,
        fused_qkv=True,
        rotary=True,
        embedding_dropout=facts.rate("embedding_dropout", 0.0) > 0,
    )
