"""The models that transformers builds (on the meta device), small ones of every family, beside our shapes."""

import json

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.pytorch_utils import Conv1D

from lora_engine import calc

SMALL = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 101,
    "intermediate_size": 80,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
BARE = {key: value for key, value in SMALL.items() if key != "intermediate_size"}
GPT2 = {
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 4,
    "vocab_size": 101,
    "n_positions": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
QWEN_MOE = {"num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LLAMA4 = {"num_key_value_heads": 2, "num_local_experts": 4, "intermediate_size_mlp": 100, "head_dim": 16}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
}
T5 = {
    "d_model": 48,
    "d_kv": 10,
    "d_ff": 80,
    "num_layers": 3,
    "num_heads": 4,
    "vocab_size": 101,
    "pad_token_id": 0,
    "eos_token_id": 0,
}

# What makes each family's parameters differ; every one is compared with the real model.
VARIANTS = {
    "llama": ("llama", SMALL | {"num_key_value_heads": 2}),
    "llama tied, biases, own head size": (
        "llama",
        SMALL | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 20},
    ),
    "mistral": ("mistral", SMALL | {"num_key_value_heads": 2}),
    "mistral, no kv heads said": ("mistral", SMALL | {"num_attention_heads": 8}),
    "qwen2": ("qwen2", SMALL | {"num_key_value_heads": 2}),
    "qwen2 tied": ("qwen2", SMALL | {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", SMALL | {"num_key_value_heads": 2, "head_dim": 16}),
    "qwen3, default head size": ("qwen3", SMALL | {"num_key_value_heads": 2, "attention_bias": True}),
    "gemma": ("gemma", SMALL | {"num_key_value_heads": 1, "head_dim": 24}),
    "gemma2": ("gemma2", SMALL | {"num_key_value_heads": 2}),
    "phi3": ("phi3", SMALL | {"num_key_value_heads": 2}),
    "phi": ("phi", SMALL),
    "phi, norms on q and k": ("phi", SMALL | {"qk_layernorm": True, "num_key_value_heads": 2}),
    "gpt2": ("gpt2", GPT2),
    "gpt2, own inner size, untied": ("gpt2", GPT2 | {"n_inner": 100, "tie_word_embeddings": False}),
    "gpt_neox": ("gpt_neox", SMALL),
    "gpt_neox, no attention bias, tied": ("gpt_neox", SMALL | {"attention_bias": False, "tie_word_embeddings": True}),
    "opt": ("opt", BARE | {"ffn_dim": 80}),
    "opt 350m": ("opt", BARE | {"ffn_dim": 80, "word_embed_proj_dim": 20, "do_layer_norm_before": False}),
    "opt, no bias, plain norms": (
        "opt",
        BARE | {"ffn_dim": 80, "enable_bias": False, "layer_norm_elementwise_affine": False},
    ),
    "falcon 7b": ("falcon", BARE),
    "falcon 40b": ("falcon", BARE | {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}),
    "falcon 11b": (
        "falcon",
        BARE
        | {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1, "ffn_hidden_size": 99},
    ),
    "falcon 1b": ("falcon", BARE | {"multi_query": False, "alibi": True, "parallel_attn": False}),
    "bloom": ("bloom", {key: BARE[key] for key in BARE if not key.startswith("num_")} | {"n_layer": 3, "n_head": 4}),
    "gpt_neo": ("gpt_neo", BARE | {"num_layers": 3, "num_heads": 4, "attention_types": [[["global"], 3]]}),
    "gptj": ("gptj", GPT2 | {"rotary_dim": 8}),
    "gptj, own inner size": ("gptj", GPT2 | {"rotary_dim": 8, "n_inner": 100}),
    "cohere": ("cohere", SMALL | {"num_key_value_heads": 2}),
    "cohere, norms on q and k": ("cohere", SMALL | {"num_key_value_heads": 2, "use_qk_norm": True}),
    "gemma3": ("gemma3_text", SMALL | {"num_key_value_heads": 2, "head_dim": 16}),
    "gemma3, all defaults": (
        "gemma3_text",
        {key: SMALL[key] for key in ("hidden_size", "num_hidden_layers", "intermediate_size")},
    ),
    "granite": ("granite", SMALL | {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True}),
    "ministral3": ("ministral3", SMALL | {"num_key_value_heads": 2}),
    "olmo": ("olmo", SMALL | {"num_key_value_heads": 2}),
    "olmo2": ("olmo2", SMALL | {"num_key_value_heads": 2}),
    "olmo3": ("olmo3", SMALL | {"num_key_value_heads": 2}),
    "smollm3": ("smollm3", SMALL | {"num_key_value_heads": 2}),
    "smollm3, no kv heads said": ("smollm3", SMALL),
    "stablelm": ("stablelm", SMALL | {"num_key_value_heads": 2, "use_qkv_bias": True}),
    "stablelm 12b": (
        "stablelm",
        SMALL | {"num_key_value_heads": 2, "qk_layernorm": True, "use_parallel_residual": True},
    ),
    "starcoder2": ("starcoder2", SMALL),
    "starcoder2, no bias, untied": ("starcoder2", SMALL | {"use_bias": False, "tie_word_embeddings": False}),
    "t5": ("t5", T5),
    "t5 1.1": ("t5", T5 | {"feed_forward_proj": "gated-gelu"}),
    "t5, longer decoder": ("t5", T5 | {"num_decoder_layers": 4}),
    "t5, shorter decoder": ("t5", T5 | {"num_decoder_layers": 1}),
}
# Those with experts, of which PEFT sees the linears only.
MOE_VARIANTS = {
    "mixtral": ("mixtral", SMALL | {"num_local_experts": 4, "num_key_value_heads": 2}),
    "phimoe": (
        "phimoe",
        SMALL | {"num_local_experts": 4, "num_key_value_heads": 2, "attention_bias": True, "lm_head_bias": True},
    ),
    "olmoe": ("olmoe", SMALL | {"num_experts": 12, "num_key_value_heads": 2}),
    "gpt_oss": ("gpt_oss", SMALL | {"num_local_experts": 4, "num_key_value_heads": 2}),
    "qwen2_moe": ("qwen2_moe", SMALL | QWEN_MOE | {"shared_expert_intermediate_size": 56}),
    "qwen2_moe, some layers dense": (
        "qwen2_moe",
        SMALL | QWEN_MOE | {"shared_expert_intermediate_size": 56, "mlp_only_layers": [1], "qkv_bias": False},
    ),
    "qwen3_moe": ("qwen3_moe", SMALL | QWEN_MOE | {"head_dim": 20}),
    "qwen3_moe, every second layer": ("qwen3_moe", SMALL | QWEN_MOE | {"decoder_sparse_step": 2}),
    "qwen3_moe, all dense": ("qwen3_moe", SMALL | QWEN_MOE | {"mlp_only_layers": [0, 1, 2]}),
    "llama4": ("llama4_text", SMALL | LLAMA4),
    "llama4, every second layer": ("llama4_text", SMALL | LLAMA4 | {"interleave_moe_layer_step": 2}),
    "llama4, layers by number": ("llama4_text", SMALL | LLAMA4 | {"moe_layers": [0, 2], "attention_bias": True}),
    "deepseek_v2 lite": ("deepseek_v2", SMALL | DEEPSEEK | {"q_lora_rank": None, "n_shared_experts": 2}),
    "deepseek_v2": ("deepseek_v2", SMALL | DEEPSEEK | {"q_lora_rank": 20, "mlp_bias": True, "attention_bias": True}),
    "deepseek_v3": ("deepseek_v3", SMALL | DEEPSEEK | {"q_lora_rank": 20, "first_k_dense_replace": 2}),
    "deepseek_v3, all dense": ("deepseek_v3", SMALL | DEEPSEEK | {"first_k_dense_replace": 3}),
    "deepseek_v3, no dense": ("deepseek_v3", SMALL | DEEPSEEK | {"first_k_dense_replace": 0}),
}
ALL_VARIANTS = VARIANTS | MOE_VARIANTS
TASKS = ("Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
TITLES = {
    "bert": "Bert",
    "roberta": "Roberta",
    "xlm-roberta": "XLMRoberta",
    "distilbert": "DistilBert",
    "deberta-v2": "DebertaV2",
    "modernbert": "ModernBert",
}
ENCODERS = {f"{family} {kind}": (family, kind) for family in ("bert", "roberta", "xlm-roberta") for kind in TASKS}
# Their attention's maps have other names than BERT's.
OTHER_ENCODERS = {
    f"{family} {kind}": (family, kind)
    for family in ("distilbert", "deberta-v2", "modernbert")
    for kind in TASKS
    if (family, kind) != ("distilbert", "ForQuestionAnswering")  # takes two labels only
}
# As the two published generations of DeBERTa set them.
DEBERTA_V3 = {
    "relative_attention": True,
    "position_buckets": 16,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": "p2c|c2p",
    "position_biased_input": False,
    "max_relative_positions": -1,
    "type_vocab_size": 0,
}
ENCODER_FACTS = {
    "distilbert": {"dim": 48, "n_layers": 3, "n_heads": 4, "hidden_dim": 80},
    "deberta-v2": DEBERTA_V3,
    "modernbert": {"cls_token_id": 0, "sep_token_id": 0},
}
# Only what differs from the encoder's facts.
ENCODER_VARIANTS = {
    "deberta with maps of its own for positions": (
        "deberta-v2",
        {"share_att_key": False, "position_buckets": -1, "norm_rel_ebd": "none", "max_relative_positions": 20},
    ),
    "deberta without relative positions": (
        "deberta-v2",
        {"relative_attention": False, "position_biased_input": True, "type_vocab_size": 2, "norm_rel_ebd": "none"},
    ),
    "deberta xlarge": ("deberta-v2", {"conv_kernel_size": 3, "pos_att_type": ["p2c", "c2p"]}),
    "deberta, narrow embedding": ("deberta-v2", {"embedding_size": 20}),
    "modernbert with biases": (
        "modernbert",
        {"norm_bias": True, "attention_bias": True, "mlp_bias": True, "classifier_bias": True, "decoder_bias": False},
    ),
    **{f"{family}, untied": (family, {"tie_word_embeddings": False}) for family in TITLES},
}


def real_model(model_type, facts, auto=None):
    config = CONFIG_MAPPING[model_type](**facts)
    auto = auto or (AutoModelForSeq2SeqLM if model_type == "t5" else AutoModelForCausalLM)
    with torch.device("meta"):
        return auto.from_config(config)


def encoder_and_shape(family, kind, more=None):
    title = TITLES[family] + kind
    facts = SMALL | {"id2label": {0: "a", 1: "b", 2: "c"}} | ENCODER_FACTS.get(family, {}) | (more or {})
    if family == "distilbert":
        facts = {key: value for key, value in facts.items() if key not in BARE or not key.startswith("num_")}
        facts.pop("hidden_size")
    config = CONFIG_MAPPING[family](**facts)
    with torch.device("meta"):
        model = getattr(transformers, title)(config)
    # As a config.json says it: JSON has no whole numbers as keys.
    stored = json.loads(json.dumps(facts | {"model_type": family, "architectures": [title]}))
    return model, calc.shape_from_config(stored, title)


def assert_same(shape, model):
    """Total, every linear by name with its two sizes and bias, every 3-D parameter by name and sizes, the head."""
    assert shape.total_parameters == sum(p.numel() for p in model.parameters())
    ours = {
        name: (linear.in_features, linear.out_features, linear.has_bias, linear.kind)
        for linear in shape.linears
        for name in shape.full_names(linear)
    }
    theirs = {}
    for name, module in model.named_modules():
        if isinstance(module, Conv1D):
            rows, columns = module.weight.shape
            theirs[name] = (rows, columns, True, "conv1d")
        elif isinstance(module, torch.nn.Linear):
            theirs[name] = (module.in_features, module.out_features, module.bias is not None, "linear")
    assert ours == theirs
    assert set(shape.linear_names) == set(theirs)
    others = {name for part in shape.others for name in shape.full_names(part)}
    assert others <= {name for name, _ in (*model.named_modules(), *model.named_parameters())}
    assert_same_experts(shape, model)
    head = model.get_output_embeddings()
    assert shape.output_head == next((name for name, module in model.named_modules() if module is head), None)
    if head is not None:
        assert shape.tied == (head.weight is model.get_input_embeddings().weight)


def assert_same_experts(shape, model):
    """Every 3-D parameter by name and sizes, and the biases beside it."""
    ours = {}
    for part in shape.experts:
        inner = (part.in_features, part.out_features)
        for name in shape.full_names(part):
            ours[name] = (part.num_experts, *(inner if part.transposed else inner[::-1]))
            if part.has_bias:
                ours[f"{name}_bias"] = (part.num_experts, part.out_features)
    theirs = {name: tuple(p.shape) for name, p in model.named_parameters() if ".experts." in name}
    assert ours == theirs
    assert all(len(theirs[name]) == 3 for part in shape.experts for name in shape.full_names(part))
