"""Decoders built like Llama: separate q, k, v and o, rotary positions, a gated MLP of three maps."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lora_engine.calc.facts import Facts
from lora_engine.calc.parts import Parts, common_fields, sizes_of
from lora_engine.calc.structure import ModelShape, MoeShape

QKV = tuple(f"self_attn.{x}_proj" for x in "qkv")


@dataclass(frozen=True)
class Mlp:
    """What the second half of a layer adds to the shape: `enters` names the linears that read its input."""

    enters: tuple[str, ...]
    intermediate_size: int
    gated: bool = True
    moe: MoeShape | None = None


def gated_mlp(
    parts: Parts,
    prefix: str,
    h: int,
    inner: int,
    *,
    bias: bool = False,
    layers: tuple[int, ...] | None = None,
) -> tuple[str, ...]:
    """gate, up and down; returns the names of the two that read the input, if any layer has them."""
    parts.linear(f"{prefix}.gate_proj", h, inner, "mlp", bias=bias, layers=layers)
    parts.linear(f"{prefix}.up_proj", h, inner, "mlp", bias=bias, layers=layers)
    parts.linear(f"{prefix}.down_proj", inner, h, "mlp", bias=bias, layers=layers)
    return () if layers == () else (f"{prefix}.gate_proj", f"{prefix}.up_proj")


def llama_like(
    facts: Facts,
    architecture: str,
    *,
    sizes: tuple[int, int, int, int] | None = None,
    biased: bool = False,
    qkv_bias: bool = False,
    out_bias: bool = False,
    mlp_bias: bool = False,
    head_bias: bool = False,
    default_kv: int | None = None,
    default_head_dim: int | None = None,
    tied: bool = False,
    head_norms: bool = False,
    wide_norms: bool = False,
    norms: str = "before",
    norm_kind: str = "rms",
    norm_bias: bool = False,
    affine: bool = True,
    act: str = "silu",
    default_positions: int = 2048,
    mlp: Callable[[Parts, int], Mlp] | None = None,
    extra: Callable[[Parts, tuple[int, int, int]], None] | None = None,
    **more: Any,
) -> ModelShape:
    """`norms` stand "before" attention and MLP, "after" them, "around" both (four a layer), or there is "one"
    for both, side by side. Norms on q and k: `head_norms` over each head, `wide_norms` over all heads at once.
    `biased` families let `attention_bias` decide for q, k, v and o alike.
    `mlp` adds another MLP than Llama's, `extra` whatever else a layer has, given (heads, kv heads, head size)."""
    h, layers, heads, vocab = sizes or sizes_of(facts)
    if biased:
        qkv_bias = out_bias = facts.flag("attention_bias", False)
    d = facts.size("head_dim", default=default_head_dim) if default_head_dim is not None else facts.head_dim(h, heads)
    kv_heads = facts.kv_heads("num_key_value_heads", heads, default_kv)
    tied = facts.flag("tie_word_embeddings", tied)
    parts = Parts(layers, norm_bias=norm_bias)
    parts.embedding("model.embed_tokens", vocab, h)
    parts.linear("self_attn.q_proj", h, heads * d, "attention", bias=qkv_bias)
    parts.linear("self_attn.k_proj", h, kv_heads * d, "attention", bias=qkv_bias)
    parts.linear("self_attn.v_proj", h, kv_heads * d, "attention", bias=qkv_bias)
    parts.linear("self_attn.o_proj", heads * d, h, "attention", bias=out_bias)
    if extra is not None:
        extra(parts, (heads, kv_heads, d))
    if mlp is not None:
        second = mlp(parts, h)
    else:
        inner = facts.size("intermediate_size")
        second = Mlp(gated_mlp(parts, "mlp", h, inner, bias=mlp_bias), inner)
    if head_norms:
        parts.head_norm("self_attn.q_norm", d, heads * d)
        parts.head_norm("self_attn.k_norm", d, kv_heads * d)
    if wide_norms:
        parts.norm("self_attn.q_norm", heads * d)
        parts.norm("self_attn.k_norm", kv_heads * d)
    layer_norms(parts, h, norms, QKV, second.enters, affine=affine)
    parts.outer_norm("model.norm", h, affine=affine)
    parts.outer("lm_head", h, vocab, "head", bias=head_bias, tied=tied)
    return ModelShape(
        **common_fields(
            facts,
            architecture,
            (h, layers, heads, vocab),
            kv_heads,
            d,
            second.intermediate_size,
            default_positions,
        ),
        tied=tied,
        **parts.fields(),
        layer_path="model.layers",
        output_head="lm_head",
        norm_kind=norm_kind,
        activation=facts.text("hidden_activation", "hidden_act", default=act),
        gated=second.gated,
        fused_qkv=False,
        rotary=True,
        parallel=norms == "one",
        moe=second.moe,
        experts_per_token=second.moe.experts_per_token if second.moe else 0,
        **more,
    )


def layer_norms(
    parts: Parts, h: int, norms: str, attention: tuple[str, ...], mlp: tuple[str, ...], *, affine: bool = True
) -> None:
    """The norms over the residual stream in each layer; see `llama_like`."""
    if norms == "one":
        parts.norm("input_layernorm", h, attention + mlp, affine=affine)
    elif norms == "after":
        parts.norm("post_attention_layernorm", h, affine=affine)
        parts.norm("post_feedforward_layernorm", h, affine=affine)
    elif norms == "around":
        parts.norm("input_layernorm", h, attention)
        parts.norm("post_attention_layernorm", h)
        parts.norm("pre_feedforward_layernorm", h, mlp)
        parts.norm("post_feedforward_layernorm", h)
    else:
        parts.norm("input_layernorm", h, attention, affine=affine)
        parts.norm("post_attention_layernorm", h, mlp, affine=affine)


def llama(facts: Facts) -> ModelShape:
    """Llama 1-3, TinyLlama, SmolLM2, Falcon3, and ours."""
    return llama_like(facts, "LlamaForCausalLM", biased=True, mlp_bias=facts.flag("mlp_bias", False))


def smollm3(facts: Facts) -> ModelShape:
    """Llama with no rotary positions in every fourth layer, which no parameter shows."""
    bias = facts.flag("mlp_bias", False)
    return llama_like(
        facts,
        "SmolLM3ForCausalLM",
        biased=True,
        mlp_bias=bias,
        default_kv=4,
        tied=True,
        default_positions=32768,
    )


def granite(facts: Facts) -> ModelShape:
    return llama_like(facts, "GraniteForCausalLM", biased=True, mlp_bias=facts.flag("mlp_bias", False))


def mistral(facts: Facts) -> ModelShape:
    return llama_like(facts, "MistralForCausalLM", default_kv=8, default_positions=131072)


def ministral3(facts: Facts) -> ModelShape:
    return llama_like(facts, "Ministral3ForCausalLM", default_kv=8, default_head_dim=128, default_positions=262144)


def qwen2(facts: Facts) -> ModelShape:
    """Qwen2 and Qwen2.5: q, k and v have a bias, o has none."""
    return llama_like(facts, "Qwen2ForCausalLM", qkv_bias=True, default_kv=32, default_positions=32768)


def qwen3(facts: Facts) -> ModelShape:
    """Norms over each head of q and k."""
    return llama_like(
        facts,
        "Qwen3ForCausalLM",
        biased=True,
        default_kv=32,
        default_head_dim=128,
        head_norms=True,
        default_positions=32768,
    )


def gemma(facts: Facts) -> ModelShape:
    return llama_like(
        facts,
        "GemmaForCausalLM",
        biased=True,
        default_kv=16,
        default_head_dim=256,
        tied=True,
        act="gelu_pytorch_tanh",
        default_positions=8192,
    )


def gemma2(facts: Facts) -> ModelShape:
    """Four norms a layer; scores and logits pass through a tanh."""
    return llama_like(
        facts,
        "Gemma2ForCausalLM",
        biased=True,
        default_kv=4,
        default_head_dim=256,
        tied=True,
        norms="around",
        act="gelu_pytorch_tanh",
        default_positions=8192,
        softcap=True,
    )


def gemma3(facts: Facts) -> ModelShape:
    """Four norms a layer and norms over each head, which took the tanh's place. The hub's multimodal configs
    leave out whatever is the default, the vocabulary included."""
    return llama_like(
        facts,
        "Gemma3ForCausalLM",
        sizes=sizes_of(facts, heads=8, vocab=262_208),
        biased=True,
        default_kv=4,
        default_head_dim=256,
        tied=True,
        head_norms=True,
        norms="around",
        act="gelu_pytorch_tanh",
        default_positions=131072,
        softcap=facts.values.get("attn_logit_softcapping") is not None,
    )


def olmo(facts: Facts) -> ModelShape:
    """Norms without parameters."""
    return llama_like(facts, "OlmoForCausalLM", biased=True, norm_kind="layer", affine=False)


def olmo2(facts: Facts) -> ModelShape:
    """Norms after attention and MLP, and over all of q and k."""
    return llama_like(facts, "Olmo2ForCausalLM", biased=True, norms="after", wide_norms=True)


def olmo3(facts: Facts) -> ModelShape:
    """OLMo 2 with sliding windows, which no parameter shows."""
    return llama_like(facts, "Olmo3ForCausalLM", biased=True, norms="after", wide_norms=True)


def stablelm(facts: Facts) -> ModelShape:
    """Layer norms; on demand one of its own for each head of q and k, or attention and MLP side by side."""

    def per_head(parts: Parts, heads: tuple[int, int, int]) -> None:
        num_heads, kv_heads, d = heads
        if facts.flag("qk_layernorm", False):
            for name, count in (("q", num_heads), ("k", kv_heads)):
                width = count * d
                parts.inner(f"self_attn.{name}_layernorm", width, "norm", width, num_groups=count)

    return llama_like(
        facts,
        "StableLmForCausalLM",
        qkv_bias=facts.flag("use_qkv_bias", False),
        default_kv=32,
        norms="one" if facts.flag("use_parallel_residual", False) else "before",
        norm_kind="layer",
        norm_bias=True,
        extra=per_head,
        default_positions=4096,
        num_dropouts=1 if facts.rate("hidden_dropout", 0.0) else 0,
    )


def starcoder2(facts: Facts) -> ModelShape:
    """Layer norms, biases, and an MLP of two maps."""
    bias = facts.flag("use_bias", True)

    def two_maps(parts: Parts, h: int) -> Mlp:
        inner = facts.size("intermediate_size")
        parts.linear("mlp.c_fc", h, inner, "mlp", bias=bias)
        parts.linear("mlp.c_proj", inner, h, "mlp", bias=bias)
        return Mlp(("mlp.c_fc",), inner, gated=False)

    return llama_like(
        facts,
        "Starcoder2ForCausalLM",
        qkv_bias=bias,
        out_bias=bias,
        default_kv=2,
        tied=True,
        norm_kind="layer",
        norm_bias=True,
        act="gelu_pytorch_tanh",
        default_positions=4096,
        mlp=two_maps,
        num_dropouts=2 if facts.rate("residual_dropout", 0.0) else 0,
    )


def cohere(facts: Facts) -> ModelShape:
    """Command R: one norm without bias feeds attention and MLP side by side."""

    def per_head(parts: Parts, heads: tuple[int, int, int]) -> None:
        num_heads, kv_heads, d = heads
        if facts.flag("use_qk_norm", False):
            for name, count in (("q", num_heads), ("k", kv_heads)):
                parts.inner(f"self_attn.{name}_norm", count * d, "norm", count * d, num_groups=count, is_matrix=True)

    return llama_like(
        facts,
        "CohereForCausalLM",
        biased=True,
        tied=True,
        norms="one",
        norm_kind="layer",
        extra=per_head,
        default_positions=8192,
    )
