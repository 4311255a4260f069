"""Decoders with a layout of their own: Phi, GPT-2, GPT-NeoX, GPT-J, GPT-Neo, OPT, Falcon, BLOOM."""

from lora_engine.calc.facts import MAX_LAYERS, MAX_VOCAB, Facts
from lora_engine.calc.parts import Parts, common_fields, sizes_of
from lora_engine.calc.structure import ModelShape


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
        **parts.fields(),
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
        **parts.fields(),
        layer_path="model.layers",
        output_head="lm_head",
        norm_kind="layer",
        activation=facts.text("hidden_act", default="gelu_new"),
        gated=False,
        fused_qkv=False,
        rotary=True,
        parallel=True,
        num_dropouts=2 if facts.rate("resid_pdrop", 0.0) else 0,
        embedding_dropout=facts.rate("embd_pdrop", 0.0) > 0,
    )


def gpt2(facts: Facts) -> ModelShape:
    """Conv1D everywhere; learned positions; `c_proj` stands in attention and in the MLP."""
    h, layers, heads, vocab = _gpt_sizes(facts)
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
        **common_fields(
            facts,
            "GPT2LMHeadModel",
            (h, layers, heads, vocab),
            heads,
            d,
            inner,
            1024,
            attention_dropout=("attn_pdrop", 0.1),
        ),
        tied=tied,
        **parts.fields(),
        layer_path="transformer.h",
        output_head="lm_head",
        norm_kind="layer",
        activation=facts.text("activation_function", default="gelu_new"),
        gated=False,
        fused_qkv=True,
        rotary=False,
        num_dropouts=2 if facts.rate("resid_pdrop", 0.1) else 0,
        embedding_dropout=facts.rate("embd_pdrop", 0.1) > 0,
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
        **parts.fields(),
        layer_path="gpt_neox.layers",
        output_head="lm_head",
        norm_kind="layer",
        activation=facts.text("hidden_act", default="gelu"),
        gated=False,
        fused_qkv=True,
        rotary=True,
        parallel=facts.flag("use_parallel_residual", True),
        num_dropouts=2 if facts.rate("hidden_dropout", 0.0) else 0,
        embedding_dropout=facts.rate("hidden_dropout", 0.0) > 0,
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
        **parts.fields(),
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
        **parts.fields(),
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


def gptj(facts: Facts) -> ModelShape:
    """One norm feeds attention and MLP side by side; attention without biases, the head with one."""
    h, layers, heads, vocab = sizes = _gpt_sizes(facts)
    inner, d = facts.size("n_inner", default=4 * h), facts.derived_head_dim(h, heads)
    tied = facts.flag("tie_word_embeddings", False)
    qkv = ("attn.k_proj", "attn.v_proj", "attn.q_proj")
    parts = Parts(layers, norm_bias=True)
    parts.embedding("transformer.wte", vocab, h)
    parts.norm("ln_1", h, (*qkv, "mlp.fc_in"))
    for name in (*qkv, "attn.out_proj"):
        parts.linear(name, h, h, "attention")
    parts.linear("mlp.fc_in", h, inner, "mlp", bias=True)
    parts.linear("mlp.fc_out", inner, h, "mlp", bias=True)
    parts.outer_norm("transformer.ln_f", h)
    parts.outer("lm_head", h, vocab, "head", bias=True, tied=tied)
    return ModelShape(
        **common_fields(facts, "GPTJForCausalLM", sizes, heads, d, inner, 2048, attention_dropout=("attn_pdrop", 0.0)),
        tied=tied,
        **parts.fields(),
        layer_path="transformer.h",
        output_head="lm_head",
        norm_kind="layer",
        activation=facts.text("activation_function", default="gelu_new"),
        gated=False,
        fused_qkv=False,
        rotary=True,
        parallel=True,
        num_dropouts=2 if facts.rate("resid_pdrop", 0.0) else 0,
        embedding_dropout=facts.rate("embd_pdrop", 0.0) > 0,
    )


def gpt_neo(facts: Facts) -> ModelShape:
    """GPT-2's layout with linears, q, k and v apart and without biases."""
    h = facts.size("hidden_size")
    layers = facts.size("num_hidden_layers", "num_layers", high=MAX_LAYERS)
    heads, vocab = facts.size("num_attention_heads", "num_heads"), facts.size("vocab_size", high=MAX_VOCAB)
    inner, d = facts.size("intermediate_size", default=4 * h), facts.derived_head_dim(h, heads)
    positions = facts.size("max_position_embeddings", default=2048)
    tied = facts.flag("tie_word_embeddings", True)
    qkv = ("attn.attention.k_proj", "attn.attention.v_proj", "attn.attention.q_proj")
    parts = Parts(layers, norm_bias=True)
    parts.embedding("transformer.wte", vocab, h)
    parts.embedding("transformer.wpe", positions, h)
    parts.norm("ln_1", h, qkv)
    for name in qkv:
        parts.linear(name, h, h, "attention")
    parts.linear("attn.attention.out_proj", h, h, "attention", bias=True)
    parts.norm("ln_2", h, ("mlp.c_fc",))
    parts.linear("mlp.c_fc", h, inner, "mlp", bias=True)
    parts.linear("mlp.c_proj", inner, h, "mlp", bias=True)
    parts.outer_norm("transformer.ln_f", h)
    parts.outer("lm_head", h, vocab, "head", tied=tied)
    return ModelShape(
        **common_fields(facts, "GPTNeoForCausalLM", (h, layers, heads, vocab), heads, d, inner, 2048),
        tied=tied,
        **parts.fields(),
        layer_path="transformer.h",
        output_head="lm_head",
        norm_kind="layer",
        activation=facts.text("activation_function", default="gelu_new"),
        gated=False,
        fused_qkv=False,
        rotary=False,
        num_dropouts=2 if facts.rate("resid_dropout", 0.0) else 0,
        embedding_dropout=facts.rate("embed_dropout", 0.0) > 0,
    )


def bloom(facts: Facts) -> ModelShape:
    """Fused query_key_value, a norm after the embedding, ALiBi in place of positions."""
    h = facts.size("hidden_size", "n_embed")
    layers = facts.size("num_hidden_layers", "n_layer", high=MAX_LAYERS)
    heads, vocab = facts.size("num_attention_heads", "n_head"), facts.size("vocab_size", high=MAX_VOCAB)
    d, tied = facts.derived_head_dim(h, heads), facts.flag("tie_word_embeddings", True)
    parts = Parts(layers, norm_bias=True)
    parts.embedding("transformer.word_embeddings", vocab, h)
    parts.outer_norm("transformer.word_embeddings_layernorm", h)
    parts.norm("input_layernorm", h, ("self_attention.query_key_value",))
    parts.linear("self_attention.query_key_value", h, 3 * h, "attention", bias=True)
    parts.linear("self_attention.dense", h, h, "attention", bias=True)
    parts.norm("post_attention_layernorm", h, ("mlp.dense_h_to_4h",))
    parts.linear("mlp.dense_h_to_4h", h, 4 * h, "mlp", bias=True)
    parts.linear("mlp.dense_4h_to_h", 4 * h, h, "mlp", bias=True)
    parts.outer_norm("transformer.ln_f", h)
    parts.outer("lm_head", h, vocab, "head", tied=tied)
    return ModelShape(
        **common_fields(facts, "BloomForCausalLM", (h, layers, heads, vocab), heads, d, 4 * h, 2048),
        tied=tied,
        **parts.fields(),
        layer_path="transformer.h",
        output_head="lm_head",
        norm_kind="layer",
        activation="gelu_new",  # BloomGelu: the tanh form, written out in Python
        gated=False,
        fused_qkv=True,
        rotary=False,
        num_dropouts=2 if facts.rate("hidden_dropout", 0.0) else 0,
    )


def _gpt_sizes(facts: Facts) -> tuple[int, int, int, int]:
    """hidden size, layers, heads, vocabulary under GPT-2's names for them."""
    return (
        facts.size("hidden_size", "n_embd"),
        facts.size("num_hidden_layers", "n_layer", high=MAX_LAYERS),
        facts.size("num_attention_heads", "n_head"),
        facts.size("vocab_size", high=MAX_VOCAB),
    )
