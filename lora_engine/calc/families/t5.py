"""T5: an encoder and a decoder, config facts -> ModelShape."""

from lora_engine.calc.facts import MAX_LAYERS, MAX_VOCAB, Facts
from lora_engine.calc.parts import Parts, common_fields
from lora_engine.calc.structure import ModelShape


def t5(facts: Facts) -> ModelShape:
    """T5 and Flan-T5, as T5ForConditionalGeneration or, when the config names it, the bare T5Model.

    transformers 5 ties the head whatever the config says; the 1.1 checkpoints (Flan-T5) store one of their own
    beside the embedding."""
    h, vocab = facts.size("d_model", "hidden_size"), facts.size("vocab_size", high=MAX_VOCAB)
    layers = facts.size("num_layers", "num_hidden_layers", high=MAX_LAYERS)
    decoder_layers = facts.size("num_decoder_layers", default=layers, high=MAX_LAYERS)
    heads, d = facts.size("num_heads", "num_attention_heads"), facts.size("d_kv", "head_dim", default=64)
    inner, kind = facts.size("d_ff"), facts.text("feed_forward_proj", default="relu")
    gated, act = kind.startswith("gated-"), kind.removeprefix("gated-")
    bare = facts.values.get("architectures") == ["T5Model"]
    parts = Parts(layers)
    parts.embedding("shared", vocab, h)
    parts.enter("encoder.block", layers)
    _attention(parts, facts, "layer.0", h, heads, d)
    _mlp(parts, "layer.1", h, inner, gated=gated)
    parts.outer_norm("encoder.final_layer_norm", h)
    parts.enter("decoder.block", decoder_layers)
    _attention(parts, facts, "layer.0", h, heads, d)
    _attention(parts, facts, "layer.1", h, heads, d, name="EncDecAttention")
    _mlp(parts, "layer.2", h, inner, gated=gated)
    parts.outer_norm("decoder.final_layer_norm", h)
    if not bare:
        parts.outer("lm_head", h, vocab, "head", tied=True)
    architecture = "T5Model" if bare else "T5ForConditionalGeneration"
    untied = facts.values.get("tie_word_embeddings") is False and not bare
    notes = (
        "The checkpoint may hold a head of its own; transformers 5 ties it to the embedding, and so it is counted.",
    )
    return ModelShape(
        **common_fields(
            facts,
            architecture,
            (h, layers, heads, vocab),
            heads,
            d,
            inner,
            512,
            attention_dropout=("dropout_rate", 0.1),
        ),
        tied=not bare,
        **parts.fields(),
        layer_path="encoder.block",
        output_head=None if bare else "lm_head",
        norm_kind="rms",
        activation="gelu_new" if kind == "gated-gelu" else act,
        gated=gated,
        fused_qkv=False,
        rotary=False,
        num_dropouts=2 if facts.rate("dropout_rate", 0.1) else 0,
        embedding_dropout=facts.rate("dropout_rate", 0.1) > 0,
        notes=notes if untied else (),
    )


def _attention(parts: Parts, facts: Facts, place: str, h: int, heads: int, d: int, name: str = "SelfAttention") -> None:
    """Four maps and the norm before them; across the stacks, k and v read what the encoder gave."""
    for x in "qkv":
        parts.linear(f"{place}.{name}.{x}", h, heads * d, "attention")
    parts.linear(f"{place}.{name}.o", heads * d, h, "attention")
    reads = "qkv" if name == "SelfAttention" else "q"
    if name == "SelfAttention":
        # The first layer of a stack holds the biases of relative positions for all of them.
        buckets = facts.size("relative_attention_num_buckets", default=32)
        parts.inner(f"{place}.{name}.relative_attention_bias", buckets * heads, "embedding", heads, layers=(0,))
    parts.norm(f"{place}.layer_norm", h, tuple(f"{place}.{name}.{x}" for x in reads))


def _mlp(parts: Parts, place: str, h: int, inner: int, *, gated: bool) -> None:
    enters = tuple(f"{place}.DenseReluDense.{x}" for x in (("wi_0", "wi_1") if gated else ("wi",)))
    for name in enters:
        parts.linear(name, h, inner, "mlp")
    parts.linear(f"{place}.DenseReluDense.wo", inner, h, "mlp")
    parts.norm(f"{place}.layer_norm", h, enters)
