"""One function per model family: config facts -> ModelShape, with the module names of transformers 5.

Sources: modeling_<family>.py of transformers for names, biases and tied weights, and
configuration_<family>.py for what an absent key means.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lora_engine.calc.encoders import encoder
from lora_engine.calc.facts import MAX_LAYERS, MAX_VOCAB, Facts
from lora_engine.calc.parts import Parts, common_fields, sizes_of
from lora_engine.calc.structure import ModelShape
from lora_engine.errors import ModelConfigError


def _llama_like(
    facts: Facts,
    architecture: str,
    *,
    qkv_bias: bool = False,
    out_bias: bool = False,
    mlp_bias: bool = False,
    default_kv: int | None = None,
    default_head_dim: int | None = None,
    tied: bool = False,
    head_norms: bool = False,
    post_norms: bool = False,
    act: str = "silu",
    default_positions: int = 2048,
    **more: Any,
) -> ModelShape:
    """RMS norms, rotary positions, separate q, k, v and o, a gated MLP of three maps."""
    h, layers, heads, vocab = sizes_of(facts)
    inner = facts.size("intermediate_size")
    d = facts.size("head_dim", default=default_head_dim) if default_head_dim is not None else facts.head_dim(h, heads)
    kv_heads = facts.kv_heads("num_key_value_heads", heads, default_kv)
    tied = facts.flag("tie_word_embeddings", tied)
    parts = Parts(layers)
    parts.embedding("model.embed_tokens", vocab, h)
    parts.linear("self_attn.q_proj", h, heads * d, "attention", bias=qkv_bias)
    parts.linear("self_attn.k_proj", h, kv_heads * d, "attention", bias=qkv_bias)
    parts.linear("self_attn.v_proj", h, kv_heads * d, "attention", bias=qkv_bias)
    parts.linear("self_attn.o_proj", heads * d, h, "attention", bias=out_bias)
    parts.linear("mlp.gate_proj", h, inner, "mlp", bias=mlp_bias)
    parts.linear("mlp.up_proj", h, inner, "mlp", bias=mlp_bias)
    parts.linear("mlp.down_proj", inner, h, "mlp", bias=mlp_bias)
    attention, mlp = tuple(f"self_attn.{x}_proj" for x in "qkv"), ("mlp.gate_proj", "mlp.up_proj")
    if head_norms:
        parts.head_norm("self_attn.q_norm", d, heads * d)
        parts.head_norm("self_attn.k_norm", d, kv_heads * d)
    parts.norm("input_layernorm", h, attention)
    parts.norm("post_attention_layernorm", h, () if post_norms else mlp)
    if post_norms:
        parts.norm("pre_feedforward_layernorm", h, mlp)
        parts.norm("post_feedforward_layernorm", h)
    parts.outer_norm("model.norm", h)
    parts.outer("lm_head", h, vocab, "head", tied=tied)
    return ModelShape(
        **common_fields(facts, architecture, (h, layers, heads, vocab), kv_heads, d, inner, default_positions),
        tied=tied,
        linears=tuple(parts.linears),
        others=tuple(parts.others),
        layer_path="model.layers",
        output_head="lm_head",
        norm_kind="rms",
        activation=facts.text("hidden_activation", "hidden_act", default=act),
        gated=True,
        fused_qkv=False,
        rotary=True,
        **more,
    )


def llama(facts: Facts) -> ModelShape:
    """Llama 1-3, TinyLlama, SmolLM2, and ours."""
    bias = facts.flag("attention_bias", False)
    return _llama_like(facts, "LlamaForCausalLM", qkv_bias=bias, out_bias=bias, mlp_bias=facts.flag("mlp_bias", False))


def mistral(facts: Facts) -> ModelShape:
    return _llama_like(facts, "MistralForCausalLM", default_kv=8, default_positions=131072)


def qwen2(facts: Facts) -> ModelShape:
    """Qwen2 and Qwen2.5: q, k and v have a bias, o has none."""
    return _llama_like(facts, "Qwen2ForCausalLM", qkv_bias=True, default_kv=32, default_positions=32768)


def qwen3(facts: Facts) -> ModelShape:
    """Norms over each head of q and k."""
    bias = facts.flag("attention_bias", False)
    return _llama_like(
        facts,
        "Qwen3ForCausalLM",
        qkv_bias=bias,
        out_bias=bias,
        default_kv=32,
        default_head_dim=128,
        head_norms=True,
        default_positions=32768,
    )


def gemma(facts: Facts) -> ModelShape:
    bias = facts.flag("attention_bias", False)
    return _llama_like(
        facts,
        "GemmaForCausalLM",
        qkv_bias=bias,
        out_bias=bias,
        default_kv=16,
        default_head_dim=256,
        tied=True,
        act="gelu_pytorch_tanh",
        default_positions=8192,
    )


def gemma2(facts: Facts) -> ModelShape:
    """Four norms a layer; scores and logits pass through a tanh."""
    bias = facts.flag("attention_bias", False)
    return _llama_like(
        facts,
        "Gemma2ForCausalLM",
        qkv_bias=bias,
        out_bias=bias,
        default_kv=4,
        default_head_dim=256,
        tied=True,
        post_norms=True,
        act="gelu_pytorch_tanh",
        default_positions=8192,
        softcap=True,
    )


def phi3(facts: Facts) -> ModelShape:
    """q, k and v are one map, and so are gate and up."""
    sizes = h, layers, heads, vocab = sizes_of(facts)
    inner = facts.size("intermediate_size")
    d, kv_heads = facts.head_dim(h, heads), facts.kv_heads("num_key_value_heads", heads)
    tied = facts.flag("tie_word_embeddings", False)
    parts = Parts(layers)
    parts.embedding("model.embed_tokens", vocab, h)
    parts.linear("self_attn.o_proj", heads * d, h, "attention")
    parts.linear("self_attn.qkv_proj", h, (heads + 2 * kv_heads) * d, "attention")
    parts.linear("mlp.gate_up_proj", h, 2 * inner, "mlp")
    parts.linear("mlp.down_proj", inner, h, "mlp")
    parts.norm("input_layernorm", h, ("self_attn.qkv_proj",))
    parts.norm("post_attention_layernorm", h, ("mlp.gate_up_proj",))
    parts.outer_norm("model.norm", h)
    parts.outer("lm_head", h, vocab, "head", tied=tied)
    return ModelShape(
        **common_fields(facts, "Phi3ForCausalLM", sizes, kv_heads, d, inner, 4096),
        tied=tied,
        linears=tuple(parts.linears),
        others=tuple(parts.others),
        layer_path="model.layers",
        output_head="lm_head",
        norm_kind="rms",
        activation=facts.text("hidden_act", default="silu"),
        gated=True,
        fused_qkv=True,
        rotary=True,
        num_dropouts=2 if facts.rate("resid_pdrop", 0.0) else 0,
    )


def phi(facts: Facts) -> ModelShape:
    """Phi-1, 1.5 and 2: one norm feeds attention and MLP side by side; everything has a bias, the head too."""
    sizes = h, layers, heads, vocab = sizes_of(facts)
    inner = facts.size("intermediate_size")
    d, kv_heads = facts.head_dim(h, heads), facts.kv_heads("num_key_value_heads", heads)
    tied = facts.flag("tie_word_embeddings", False)
    parts = Parts(layers, norm_bias=True)
    parts.embedding("model.embed_tokens", vocab, h)
    parts.linear("self_attn.q_proj", h, heads * d, "attention", bias=True)
    parts.linear("self_attn.k_proj", h, kv_heads * d, "attention", bias=True)
    parts.linear("self_attn.v_proj", h, kv_heads * d, "attention", bias=True)
    parts.linear("self_attn.dense", heads * d, h, "attention", bias=True)
    parts.linear("mlp.fc1", h, inner, "mlp", bias=True)
    parts.linear("mlp.fc2", inner, h, "mlp", bias=True)
    if facts.flag("qk_layernorm", False):
        parts.head_norm("self_attn.q_layernorm", d, heads * d)
        parts.head_norm("self_attn.k_layernorm", d, kv_heads * d)
    parts.norm("input_layernorm", h, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1"))
    parts.outer_norm("model.final_layernorm", h)
    parts.outer("lm_head", h, vocab, "head", bias=True, tied=tied)
    return ModelShape(
        **common_fields(facts, "PhiForCausalLM", sizes, kv_heads, d, inner, 2048),
        tied=tied,
        linears=tuple(parts.linears),
        others=tuple(parts.others),
        layer_path="model.layers",
        output_head="lm_head",
        norm_kind="layer",
        activation=facts.text("hidden_act", default="gelu_new"),
        gated=False,
        fused_qkv=False,
        rotary=True,
        parallel=True,
        num_dropouts=2 if facts.rate("resid_pdrop", 0.0) else 0,
    )


def gpt2(facts: Facts) -> ModelShape:
    """Conv1D everywhere; learned positions; `c_proj` stands in attention and in the MLP."""
    h = facts.size("hidden_size", "n_embd")
    layers = facts.size("num_hidden_layers", "n_layer", high=MAX_LAYERS)
    heads = facts.size("num_attention_heads", "n_head")
    vocab = facts.size("vocab_size", high=MAX_VOCAB)
    positions = facts.size("max_position_embeddings", "n_positions", default=1024)
    inner = facts.size("n_inner", default=4 * h)
    d, tied = facts.derived_head_dim(h, heads), facts.flag("tie_word_embeddings", True)
    parts = Parts(layers, norm_bias=True, kind="conv1d")
    parts.embedding("transformer.wte", vocab, h)
    parts.embedding("transformer.wpe", positions, h)
    parts.norm("ln_1", h, ("attn.c_attn",))
    parts.linear("attn.c_attn", h, 3 * h, "attention", bias=True)
    parts.linear("attn.c_proj", h, h, "attention", bias=True)
    parts.norm("ln_2", h, ("mlp.c_fc",))
    parts.linear("mlp.c_fc", h, inner, "mlp", bias=True)
    parts.linear("mlp.c_proj", inner, h, "mlp", bias=True)
    parts.outer_norm("transformer.ln_f", h)
    parts.outer("lm_head", h, vocab, "head", tied=tied)
    return ModelShape(
        **common_fields(facts, "GPT2LMHeadModel", (h, layers, heads, vocab), heads, d, inner, 1024),
        tied=tied,
        linears=tuple(parts.linears),
        others=tuple(parts.others),
        layer_path="transformer.h",
        output_head="lm_head",
        norm_kind="layer",
        activation=facts.text("activation_function", default="gelu_new"),
        gated=False,
        fused_qkv=True,
        rotary=False,
        num_dropouts=2 if facts.rate("resid_pdrop", 0.1) else 0,
    )


def gpt_neox(facts: Facts) -> ModelShape:
    """Pythia and GPT-NeoX: fused query_key_value, attention and MLP side by side."""
    sizes = h, layers, heads, vocab = sizes_of(facts)
    inner, d = facts.size("intermediate_size"), facts.derived_head_dim(h, heads)
    bias, tied = facts.flag("attention_bias", True), facts.flag("tie_word_embeddings", False)
    parts = Parts(layers, norm_bias=True)
    parts.embedding("gpt_neox.embed_in", vocab, h)
    parts.norm("input_layernorm", h, ("attention.query_key_value",))
    parts.norm("post_attention_layernorm", h, ("mlp.dense_h_to_4h",))
    parts.linear("attention.query_key_value", h, 3 * h, "attention", bias=bias)
    parts.linear("attention.dense", h, h, "attention", bias=bias)
    parts.linear("mlp.dense_h_to_4h", h, inner, "mlp", bias=True)
    parts.linear("mlp.dense_4h_to_h", inner, h, "mlp", bias=True)
    parts.outer_norm("gpt_neox.final_layer_norm", h)
    parts.outer("lm_head", h, vocab, "head", tied=tied)
    return ModelShape(
        **common_fields(facts, "GPTNeoXForCausalLM", sizes, heads, d, inner, 2048),
        tied=tied,
        linears=tuple(parts.linears),
        others=tuple(parts.others),
        layer_path="gpt_neox.layers",
        output_head="lm_head",
        norm_kind="layer",
        activation=facts.text("hidden_act", default="gelu"),
        gated=False,
        fused_qkv=True,
        rotary=True,
        parallel=facts.flag("use_parallel_residual", True),
        num_dropouts=2 if facts.rate("hidden_dropout", 0.0) else 0,
    )


def opt(facts: Facts) -> ModelShape:
    """Learned positions with an offset of 2; the 350m projects its narrower embeddings in and out."""
    sizes = h, layers, heads, vocab = sizes_of(facts)
    inner, d = facts.size("ffn_dim"), facts.derived_head_dim(h, heads)
    positions = facts.size("max_position_embeddings", default=2048)
    width = facts.size("word_embed_proj_dim", default=h)
    bias, affine = facts.flag("enable_bias", True), facts.flag("layer_norm_elementwise_affine", True)
    tied = facts.flag("tie_word_embeddings", True)
    norm_first = facts.flag("do_layer_norm_before", True)
    qkv = ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj")
    parts = Parts(layers, norm_bias=True)
    parts.embedding("model.decoder.embed_tokens", vocab, width)
    parts.embedding("model.decoder.embed_positions", positions + 2, h)
    if width != h:
        parts.outer("model.decoder.project_out", h, width, "projection")
        parts.outer("model.decoder.project_in", width, h, "projection")
    if affine and norm_first and not facts.flag("_remove_final_layer_norm", False):
        parts.outer_norm("model.decoder.final_layer_norm", h)
    for name in qkv:
        parts.linear(name, h, h, "attention", bias=bias)
    parts.linear("self_attn.out_proj", h, h, "attention", bias=bias)
    parts.linear("fc1", h, inner, "mlp", bias=bias)
    parts.linear("fc2", inner, h, "mlp", bias=bias)
    # With the norm after the block, a norm's output is what the next block reads.
    parts.norm("self_attn_layer_norm", h, qkv if norm_first else ("fc1",), affine=affine)
    parts.norm("final_layer_norm", h, ("fc1",) if norm_first else qkv, affine=affine)
    parts.outer("lm_head", width, vocab, "head", tied=tied)
    return ModelShape(
        **common_fields(facts, "OPTForCausalLM", sizes, heads, d, inner, 2048),
        tied=tied,
        linears=tuple(parts.linears),
        others=tuple(parts.others),
        layer_path="model.decoder.layers",
        output_head="lm_head",
        norm_kind="layer",
        activation=facts.text("activation_function", default="relu"),
        gated=False,
        fused_qkv=False,
        rotary=False,
        num_dropouts=2 if facts.rate("dropout", 0.1) else 0,
    )


def falcon(facts: Facts) -> ModelShape:
    """Fused query_key_value: one kv head (7B), grouped (40B and later), or one per head (1B)."""
    h = facts.size("hidden_size", "n_embed")
    layers = facts.size("num_hidden_layers", high=MAX_LAYERS)
    heads = facts.size("num_attention_heads")
    vocab = facts.size("vocab_size", high=MAX_VOCAB)
    inner, d = facts.size("ffn_hidden_size", default=4 * h), facts.derived_head_dim(h, heads)
    new, one_kv = facts.flag("new_decoder_architecture", False), facts.flag("multi_query", True)
    parallel, bias = facts.flag("parallel_attn", True), facts.flag("bias", False)
    tied = facts.flag("tie_word_embeddings", True)
    kv_heads = facts.kv_heads("num_kv_heads", heads) if new else (1 if one_kv else heads)
    num_norms = facts.size("num_ln_in_parallel_attn", default=2 if new else 1)
    parts = Parts(layers, norm_bias=True)
    parts.embedding("transformer.word_embeddings", vocab, h)
    parts.linear("self_attention.query_key_value", h, (heads + 2 * kv_heads) * d, "attention", bias=bias)
    parts.linear("self_attention.dense", h, h, "attention", bias=bias)
    parts.linear("mlp.dense_h_to_4h", h, inner, "mlp", bias=bias)
    parts.linear("mlp.dense_4h_to_h", inner, h, "mlp", bias=bias)
    attention, mlp = ("self_attention.query_key_value",), ("mlp.dense_h_to_4h",)
    if not parallel:
        parts.norm("post_attention_layernorm", h, mlp)
        parts.norm("input_layernorm", h, attention)
    elif num_norms == 2:
        parts.norm("ln_attn", h, attention)
        parts.norm("ln_mlp", h, mlp)
    else:
        parts.norm("input_layernorm", h, attention + mlp)
    parts.outer_norm("transformer.ln_f", h)
    parts.outer("lm_head", h, vocab, "head", tied=tied)
    return ModelShape(
        **common_fields(facts, "FalconForCausalLM", (h, layers, heads, vocab), kv_heads, d, inner, 2048),
        tied=tied,
        linears=tuple(parts.linears),
        others=tuple(parts.others),
        layer_path="transformer.h",
        output_head="lm_head",
        norm_kind="layer",
        activation=facts.text("activation", default="gelu"),
        gated=False,
        fused_qkv=True,
        rotary=not facts.flag("alibi", False),
        parallel=parallel,
        num_dropouts=2 if facts.rate("hidden_dropout", 0.0) else 0,
    )


FAMILIES: dict[str, Callable[[Facts], ModelShape]] = {
    "bert": encoder,
    "falcon": falcon,
    "gemma": gemma,
    "gemma2": gemma2,
    "gpt2": gpt2,
    "gpt_neox": gpt_neox,
    "llama": llama,
    "mistral": mistral,
    "opt": opt,
    "phi": phi,
    "phi3": phi3,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "roberta": encoder,
}


def build_shape(facts: Facts) -> ModelShape:
    """The shape by `model_type`. Raises ModelConfigError, naming what is supported."""
    model_type = facts.text("model_type", default="")
    if model_type not in FAMILIES:
        raise ModelConfigError(
            f"model_type of {facts.name} is {model_type[:40]!r}; allowed: {', '.join(FAMILIES)}."
            if model_type
            else f"model_type of {facts.name} is missing; allowed: one of {', '.join(FAMILIES)}."
        )
    shape = FAMILIES[model_type](facts)
    listed = facts.values.get("architectures")
    named = listed[0] if isinstance(listed, list) and listed else None
    if named == shape.architecture or (named is None and shape.is_decoder):
        return shape
    said = f"its config.json names {str(named)[:60]}" if named else "its config.json names no class"
    return replace(shape, notes=(f"Counted as {shape.architecture}; {said}.",))
