"""Decoders with experts, as transformers 5 stores them: one 3-D parameter for all experts' maps of a kind.

Counted convention: an expert's gate and up maps are one `gate_up_proj`, its down map `down_proj`; a shared
expert, which every token passes, is an ordinary MLP of linears; the router is a module of its own, a linear
in Llama 4 and Phi-3.5-MoE only.
"""

from lora_engine.calc.facts import Facts
from lora_engine.calc.families.llama import Mlp, gated_mlp, layer_norms, llama_like
from lora_engine.calc.parts import Parts, common_fields, sizes_of
from lora_engine.calc.structure import LatentAttention, ModelShape, MoeShape


def _experts(parts: Parts, prefix: str, h: int, moe: MoeShape, *, router_linear: bool = False, **more: bool) -> None:
    """The router and the two 3-D parameters, in the layers that `moe` names."""
    num, inner, layers = moe.num_experts, moe.intermediate_size, moe.layers
    if router_linear:
        parts.linear(moe.router, h, num, "mlp", layers=layers)
    else:
        bias = num if more.get("bias") else 0
        parts.inner(moe.router, h * num + bias, "router", h, layers=layers)
    parts.expert(f"{prefix}.gate_up_proj", (num, h, 2 * inner), layers=layers, **more)
    parts.expert(f"{prefix}.down_proj", (num, inner, h), layers=layers, **more)


def _split(num_layers: int, sparse: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(the layers with experts, those without)."""
    held = set(sparse)
    return sparse, tuple(i for i in range(num_layers) if i not in held)


def _everywhere(
    facts: Facts,
    parts: Parts,
    h: int,
    router: str,
    experts: tuple[int, int],
    *,
    router_linear: bool = False,
    bias: bool = False,
    transposed: bool = False,
) -> Mlp:
    """Experts in every layer and nothing else there."""
    num, chosen = experts
    inner = facts.size("intermediate_size")
    moe = MoeShape(num, chosen, inner, 0, 0, router, tuple(range(parts.num_layers)))
    _experts(parts, "mlp.experts", h, moe, router_linear=router_linear, bias=bias, transposed=transposed)
    return Mlp((router,) if router_linear else (), inner, moe=moe)


def mixtral(facts: Facts) -> ModelShape:
    """Mistral with a choice of experts for its MLP."""
    experts = facts.experts("num_local_experts", "num_experts", default=8, chosen_default=2)
    return llama_like(
        facts,
        "MixtralForCausalLM",
        default_kv=8,
        default_positions=131072,
        mlp=lambda parts, h: _everywhere(facts, parts, h, "mlp.gate", experts),
    )


def phimoe(facts: Facts) -> ModelShape:
    """Phi-3.5-MoE: layer norms, and on demand biases on attention and head."""
    experts = facts.experts("num_local_experts", default=16, chosen_default=2)
    return llama_like(
        facts,
        "PhimoeForCausalLM",
        biased=True,
        head_bias=facts.flag("lm_head_bias", False),
        default_kv=8,
        norm_kind="layer",
        norm_bias=True,
        default_positions=131072,
        mlp=lambda parts, h: _everywhere(facts, parts, h, "mlp.router", experts, router_linear=True),
    )


def olmoe(facts: Facts) -> ModelShape:
    """Norms over all of q and k."""
    experts = facts.experts("num_experts", "num_local_experts", default=64, chosen_default=8)
    return llama_like(
        facts,
        "OlmoeForCausalLM",
        biased=True,
        wide_norms=True,
        default_positions=4096,
        mlp=lambda parts, h: _everywhere(facts, parts, h, "mlp.gate", experts),
    )


def gpt_oss(facts: Facts) -> ModelShape:
    """Biases everywhere, experts stored (E, in, out), and a learned sink for each head's attention."""
    experts = facts.experts("num_local_experts", "num_experts", default=128, chosen_default=4)
    bias = facts.flag("attention_bias", True)

    def sinks(parts: Parts, heads: tuple[int, int, int]) -> None:
        parts.inner("self_attn.sinks", heads[0], "attention sink", heads[0])

    return llama_like(
        facts,
        "GptOssForCausalLM",
        qkv_bias=bias,
        out_bias=bias,
        default_kv=8,
        default_head_dim=64,
        default_positions=131072,
        extra=sinks,
        mlp=lambda parts, h: _everywhere(facts, parts, h, "mlp.router", experts, bias=True, transposed=True),
    )


def _qwen_mlp(facts: Facts, parts: Parts, h: int, experts: tuple[int, int], shared: int, sizes: tuple[int, int]) -> Mlp:
    """Experts in every `decoder_sparse_step`-th layer that `mlp_only_layers` does not name; the others dense.

    `shared`: width of the expert that every token passes, behind a gate of one value; 0: there is none."""
    num, chosen = experts
    step = facts.size("decoder_sparse_step", default=1)
    only_mlp = set(facts.layers("mlp_only_layers", parts.num_layers) or ())
    sparse, dense = _split(
        parts.num_layers, tuple(i for i in range(parts.num_layers) if i not in only_mlp and (i + 1) % step == 0)
    )
    wide, inner = (
        facts.size("intermediate_size", default=sizes[0]),
        facts.size("moe_intermediate_size", default=sizes[1]),
    )
    enters = gated_mlp(parts, "mlp", h, wide, layers=dense)
    if not sparse:
        return Mlp(enters, wide)
    moe = MoeShape(num, chosen, inner, shared, wide if dense else 0, "mlp.gate", sparse)
    _experts(parts, "mlp.experts", h, moe)
    if shared:
        enters += gated_mlp(parts, "mlp.shared_expert", h, shared, layers=sparse)
        parts.linear("mlp.shared_expert_gate", h, 1, "mlp", layers=sparse)
        enters += ("mlp.shared_expert_gate",)
    return Mlp(enters, inner, moe=moe)


def qwen2_moe(facts: Facts) -> ModelShape:
    """Qwen1.5-MoE and Qwen2-MoE: a shared expert beside the chosen ones."""
    experts = facts.experts("num_experts", default=60, chosen_default=4)
    shared = facts.size("shared_expert_intermediate_size", default=5632)
    return llama_like(
        facts,
        "Qwen2MoeForCausalLM",
        qkv_bias=facts.flag("qkv_bias", True),
        default_kv=16,
        default_positions=32768,
        mlp=lambda parts, h: _qwen_mlp(facts, parts, h, experts, shared, (5632, 1408)),
    )


def qwen3_moe(facts: Facts) -> ModelShape:
    """Norms over each head of q and k; no shared expert."""
    experts = facts.experts("num_experts", "num_local_experts", default=128, chosen_default=8)
    return llama_like(
        facts,
        "Qwen3MoeForCausalLM",
        biased=True,
        default_kv=4,
        head_norms=True,
        default_positions=32768,
        mlp=lambda parts, h: _qwen_mlp(facts, parts, h, experts, 0, (6144, 768)),
    )


def llama4(facts: Facts) -> ModelShape:
    """The language model of Llama 4: experts in every layer (Scout) or every second (Maverick), each beside a
    shared expert of the same size; experts stored (E, in, out), the router a linear."""
    num, chosen = facts.experts("num_local_experts", default=16, chosen_default=1)

    def mlp(parts: Parts, h: int) -> Mlp:
        step = facts.size("interleave_moe_layer_step", default=1)
        said = facts.layers("moe_layers", parts.num_layers)
        sparse, dense = _split(
            parts.num_layers, tuple(range(step - 1, parts.num_layers, step)) if said is None else said
        )
        inner = facts.size("intermediate_size", default=8192)
        wide = facts.size("intermediate_size_mlp", default=16384)
        enters = gated_mlp(parts, "feed_forward", h, wide, layers=dense)
        if not sparse:
            return Mlp(enters, wide)
        moe = MoeShape(num, chosen, inner, inner, wide if dense else 0, "feed_forward.router", sparse)
        _experts(parts, "feed_forward.experts", h, moe, router_linear=True, transposed=True)
        shared = gated_mlp(parts, "feed_forward.shared_expert", h, inner, layers=sparse)
        return Mlp((*enters, moe.router, *shared), inner, moe=moe)

    return llama_like(
        facts,
        "Llama4ForCausalLM",
        biased=True,
        default_kv=8,
        default_head_dim=128,
        default_positions=131072,
        mlp=mlp,
    )


def _deepseek(
    facts: Facts,
    architecture: str,
    *,
    experts: tuple[int, int],
    first_dense: int,
    shared: int,
    inner_default: int,
    default_positions: int,
    mlp_bias: bool = False,
) -> ModelShape:
    """Latent attention; dense layers first, then shared experts beside the chosen ones."""
    sizes = h, layers, heads, vocab = sizes_of(facts)
    latent = _latent(facts)
    bias = facts.flag("attention_bias", False)
    tied = facts.flag("tie_word_embeddings", False)
    parts = Parts(layers)
    parts.embedding("model.embed_tokens", vocab, h)
    enters = _latent_attention(parts, h, heads, latent, bias=bias)
    sparse, dense = _split(layers, tuple(range(min(first_dense, layers), layers)))
    num, chosen = experts
    wide, inner = facts.size("intermediate_size"), facts.size("moe_intermediate_size", default=inner_default)
    mlp = gated_mlp(parts, "mlp", h, wide, bias=mlp_bias, layers=dense)
    moe = MoeShape(num, chosen, inner, shared * inner, wide if dense else 0, "mlp.gate", sparse) if sparse else None
    if moe is not None:
        _experts(parts, "mlp.experts", h, moe)
        mlp += gated_mlp(parts, "mlp.shared_experts", h, shared * inner, bias=mlp_bias, layers=sparse)
    layer_norms(parts, h, "before", enters, mlp)
    parts.outer_norm("model.norm", h)
    parts.outer("lm_head", h, vocab, "head", tied=tied)
    width = latent.qk_nope_head_dim + latent.qk_rope_head_dim
    return ModelShape(
        **common_fields(facts, architecture, sizes, heads, width, inner if moe else wide, default_positions),
        tied=tied,
        **parts.fields(),
        layer_path="model.layers",
        output_head="lm_head",
        norm_kind="rms",
        activation=facts.text("hidden_act", default="silu"),
        gated=True,
        fused_qkv=False,
        rotary=True,
        moe=moe,
        experts_per_token=chosen if moe else 0,
        latent=latent,
    )


def _latent(facts: Facts) -> LatentAttention:
    direct = "q_lora_rank" in facts.values and facts.values["q_lora_rank"] is None
    return LatentAttention(
        q_lora_rank=0 if direct else facts.size("q_lora_rank", default=1536),
        kv_lora_rank=facts.size("kv_lora_rank", default=512),
        qk_nope_head_dim=facts.size("qk_nope_head_dim", default=128),
        qk_rope_head_dim=facts.size("qk_rope_head_dim", default=64),
        v_head_dim=facts.size("v_head_dim", default=128),
    )


def _latent_attention(parts: Parts, h: int, heads: int, latent: LatentAttention, *, bias: bool) -> tuple[str, ...]:
    """Adds the maps of multi-head latent attention; returns the names of those that read the hidden state."""
    width, rank = latent.qk_nope_head_dim + latent.qk_rope_head_dim, latent.kv_lora_rank
    if latent.q_lora_rank:
        parts.linear("self_attn.q_a_proj", h, latent.q_lora_rank, "attention", bias=bias)
        parts.norm("self_attn.q_a_layernorm", latent.q_lora_rank, ("self_attn.q_b_proj",))
        parts.linear("self_attn.q_b_proj", latent.q_lora_rank, heads * width, "attention")
    else:
        parts.linear("self_attn.q_proj", h, heads * width, "attention")
    # One rotary key serves all heads; it leaves the same map as the compressed keys and values.
    parts.linear("self_attn.kv_a_proj_with_mqa", h, rank + latent.qk_rope_head_dim, "attention", bias=bias)
    parts.norm("self_attn.kv_a_layernorm", rank, ("self_attn.kv_b_proj",))
    parts.linear("self_attn.kv_b_proj", rank, heads * (latent.qk_nope_head_dim + latent.v_head_dim), "attention")
    parts.linear("self_attn.o_proj", heads * latent.v_head_dim, h, "attention", bias=bias)
    query = "self_attn.q_a_proj" if latent.q_lora_rank else "self_attn.q_proj"
    return (query, "self_attn.kv_a_proj_with_mqa")


def deepseek_v2(facts: Facts) -> ModelShape:
    """DeepSeek-V2 and its Lite, which has no compressed queries."""
    return _deepseek(
        facts,
        "DeepseekV2ForCausalLM",
        experts=facts.experts("n_routed_experts", "num_experts", default=64, chosen_default=None),
        first_dense=facts.count("first_k_dense_replace", 0),
        shared=facts.size("n_shared_experts", default=2),
        inner_default=1407,
        default_positions=2048,
        mlp_bias=facts.flag("mlp_bias", False),
    )


def deepseek_v3(facts: Facts) -> ModelShape:
    """DeepSeek-V3 and R1, without the layer for multi-token prediction, which transformers does not build."""
    return _deepseek(
        facts,
        "DeepseekV3ForCausalLM",
        experts=facts.experts("n_routed_experts", "num_local_experts", default=256, chosen_default=8),
        first_dense=facts.count("first_k_dense_replace", 3),
        shared=facts.size("n_shared_experts", default=1),
        inner_default=2048,
        default_positions=4096,
    )
