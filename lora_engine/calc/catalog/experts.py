"""Models with experts."""

from typing import Any

from lora_engine.calc.catalog.spelling import rotary


def _mixtral(sizes: tuple[int, int, int, int, int, int], positions: int) -> dict[str, Any]:
    return rotary("mixtral", sizes, positions, num_local_experts=8, num_experts_per_tok=2)


def _qwen3(sizes: tuple[int, int, int, int, int, int], moe_inner: int) -> dict[str, Any]:
    return rotary(
        "qwen3_moe",
        sizes,
        40960,
        head_dim=128,
        moe_intermediate_size=moe_inner,
        num_experts=128,
        num_experts_per_tok=8,
        decoder_sparse_step=1,
        mlp_only_layers=[],
    )


def _llama4(experts: int, step: int, positions: int) -> dict[str, Any]:
    """Reads images too; the language model is in `text_config`."""
    text = rotary(
        "llama4_text",
        (5120, 48, 40, 8, 8192, 202048),
        positions,
        head_dim=128,
        intermediate_size_mlp=16384,
        num_local_experts=experts,
        num_experts_per_tok=1,
        interleave_moe_layer_step=step,
    )
    return {"model_type": "llama4", "architectures": ["Llama4ForConditionalGeneration"], "text_config": text}


def _gpt_oss(layers: int, experts: int) -> dict[str, Any]:
    return rotary(
        "gpt_oss",
        (2880, layers, 64, 8, 2880, 201088),
        131072,
        head_dim=64,
        attention_bias=True,
        num_local_experts=experts,
        num_experts_per_tok=4,
    )


def _deepseek_v2(
    sizes: tuple[int, int, int, int, int, int], moe_inner: int, experts: int, q_rank: int | None
) -> dict[str, Any]:
    return rotary(
        "deepseek_v2",
        sizes,
        163840,
        moe_intermediate_size=moe_inner,
        n_routed_experts=experts,
        n_shared_experts=2,
        num_experts_per_tok=6,
        first_k_dense_replace=1,
        q_lora_rank=q_rank,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        attention_bias=False,
    )


def _deepseek_v3() -> dict[str, Any]:
    return rotary(
        "deepseek_v3",
        (7168, 61, 128, 128, 18432, 129280),
        163840,
        moe_intermediate_size=2048,
        n_routed_experts=256,
        n_shared_experts=1,
        num_experts_per_tok=8,
        first_k_dense_replace=3,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        attention_bias=False,
    )


WITH_EXPERTS: dict[str, dict[str, Any]] = {
    "mistralai/Mixtral-8x7B-v0.1": _mixtral((4096, 32, 32, 8, 14336, 32000), 32768),
    "mistralai/Mixtral-8x22B-v0.1": _mixtral((6144, 56, 48, 8, 16384, 32000), 65536),
    "Qwen/Qwen1.5-MoE-A2.7B": rotary(
        "qwen2_moe",
        (2048, 24, 16, 16, 5632, 151936),
        8192,
        moe_intermediate_size=1408,
        shared_expert_intermediate_size=5632,
        num_experts=60,
        num_experts_per_tok=4,
        decoder_sparse_step=1,
    ),
    "Qwen/Qwen3-30B-A3B": _qwen3((2048, 48, 32, 4, 6144, 151936), 768),
    "Qwen/Qwen3-235B-A22B": _qwen3((4096, 94, 64, 4, 12288, 151936), 1536),
    "meta-llama/Llama-4-Scout-17B-16E-Instruct": _llama4(16, 1, 10485760),
    "meta-llama/Llama-4-Maverick-17B-128E-Instruct": _llama4(128, 2, 1048576),
    "openai/gpt-oss-20b": _gpt_oss(24, 32),
    "openai/gpt-oss-120b": _gpt_oss(36, 128),
    "deepseek-ai/DeepSeek-V2-Lite": _deepseek_v2((2048, 27, 16, 16, 10944, 102400), 1408, 64, None),
    "deepseek-ai/DeepSeek-V2": _deepseek_v2((5120, 60, 128, 128, 12288, 102400), 1536, 160, 1536),
    "deepseek-ai/DeepSeek-V3": _deepseek_v3(),
    "deepseek-ai/DeepSeek-R1": _deepseek_v3(),
    "allenai/OLMoE-1B-7B-0924": rotary(
        "olmoe", (2048, 16, 16, 16, 1024, 50304), 4096, num_experts=64, num_experts_per_tok=8
    ),
    "microsoft/Phi-3.5-MoE-instruct": rotary(
        "phimoe",
        (4096, 32, 32, 8, 6400, 32064),
        131072,
        attention_bias=True,
        lm_head_bias=True,
        num_local_experts=16,
        num_experts_per_tok=2,
    ),
}
