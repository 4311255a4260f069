"""Well-known models by their hub id: what their config.json says. Facts only; counts follow from them.

Source: the config.json of each repository on the Hugging Face hub. Keys as spelled there.
"""

import difflib
from typing import Any

from lora_engine.errors import NotFoundError


def _gpt2(n_embd: int, n_layer: int, n_head: int) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "n_embd": n_embd,
        "n_layer": n_layer,
        "n_head": n_head,
        "n_positions": 1024,
        "vocab_size": 50257,
        "activation_function": "gelu_new",
        "resid_pdrop": 0.1,
    }


def _rotary(
    model_type: str,
    sizes: tuple[int, int, int, int, int, int],
    positions: int,
    tied: bool,
    **more: Any,
) -> dict[str, Any]:
    """sizes: hidden, layers, heads, key-value heads, intermediate, vocabulary."""
    hidden, layers, heads, kv_heads, inner, vocab = sizes
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": inner,
        "vocab_size": vocab,
        "max_position_embeddings": positions,
        "tie_word_embeddings": tied,
        **more,
    }


def _pythia(hidden: int, layers: int, heads: int, vocab: int = 50304) -> dict[str, Any]:
    return {
        "model_type": "gpt_neox",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
        "vocab_size": vocab,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    }


def _opt(hidden: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "opt",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "ffn_dim": 4 * hidden,
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
        "word_embed_proj_dim": hidden,
        "do_layer_norm_before": True,
        "dropout": 0.1,
        **more,
    }


def _bert(model_type: str, sizes: tuple[int, int, int], vocab: int, positions: int, types: int) -> dict[str, Any]:
    hidden, layers, heads = sizes
    return {
        "architectures": ["BertForMaskedLM" if model_type == "bert" else "RobertaForMaskedLM"],
        "model_type": model_type,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
        "vocab_size": vocab,
        "max_position_embeddings": positions,
        "type_vocab_size": types,
        "hidden_dropout_prob": 0.1,
    }


_LLAMA_31 = 131072

CATALOG: dict[str, dict[str, Any]] = {
    "openai-community/gpt2": _gpt2(768, 12, 12),
    "openai-community/gpt2-medium": _gpt2(1024, 24, 16),
    "openai-community/gpt2-large": _gpt2(1280, 36, 20),
    "openai-community/gpt2-xl": _gpt2(1600, 48, 25),
    "HuggingFaceTB/SmolLM2-135M": _rotary("llama", (576, 30, 9, 3, 1536, 49152), 8192, True),
    "HuggingFaceTB/SmolLM2-360M": _rotary("llama", (960, 32, 15, 5, 2560, 49152), 8192, True),
    "HuggingFaceTB/SmolLM2-1.7B": _rotary("llama", (2048, 24, 32, 32, 8192, 49152), 8192, True),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": _rotary("llama", (2048, 22, 32, 4, 5632, 32000), 2048, False),
    "meta-llama/Llama-2-7b-hf": _rotary("llama", (4096, 32, 32, 32, 11008, 32000), 4096, False),
    "meta-llama/Llama-2-13b-hf": _rotary("llama", (5120, 40, 40, 40, 13824, 32000), 4096, False),
    "meta-llama/Llama-3.1-8B": _rotary("llama", (4096, 32, 32, 8, 14336, 128256), _LLAMA_31, False),
    "meta-llama/Llama-3.1-70B": _rotary("llama", (8192, 80, 64, 8, 28672, 128256), _LLAMA_31, False),
    "meta-llama/Llama-3.1-405B": _rotary("llama", (16384, 126, 128, 8, 53248, 128256), _LLAMA_31, False),
    "meta-llama/Llama-3.2-1B": _rotary("llama", (2048, 16, 32, 8, 8192, 128256), _LLAMA_31, True, head_dim=64),
    "meta-llama/Llama-3.2-3B": _rotary("llama", (3072, 28, 24, 8, 8192, 128256), _LLAMA_31, True, head_dim=128),
    "mistralai/Mistral-7B-v0.1": _rotary("mistral", (4096, 32, 32, 8, 14336, 32000), 32768, False),
    "Qwen/Qwen2.5-0.5B": _rotary("qwen2", (896, 24, 14, 2, 4864, 151936), 32768, True),
    "Qwen/Qwen2.5-1.5B": _rotary("qwen2", (1536, 28, 12, 2, 8960, 151936), 131072, True),
    "Qwen/Qwen2.5-7B": _rotary("qwen2", (3584, 28, 28, 4, 18944, 152064), 131072, False),
    "Qwen/Qwen3-0.6B": _rotary("qwen3", (1024, 28, 16, 8, 3072, 151936), 40960, True, head_dim=128),
    "Qwen/Qwen3-8B": _rotary("qwen3", (4096, 36, 32, 8, 12288, 151936), 40960, False, head_dim=128),
    "microsoft/Phi-3-mini-4k-instruct": _rotary("phi3", (3072, 32, 32, 32, 8192, 32064), 4096, False),
    "microsoft/phi-2": _rotary("phi", (2560, 32, 32, 32, 10240, 51200), 2048, False, resid_pdrop=0.1),
    "google/gemma-2b": _rotary("gemma", (2048, 18, 8, 1, 16384, 256000), 8192, True, head_dim=256),
    "google/gemma-2-2b": _rotary("gemma2", (2304, 26, 8, 4, 9216, 256000), 8192, True, head_dim=256),
    "EleutherAI/pythia-70m": _pythia(512, 6, 8),
    "EleutherAI/pythia-410m": _pythia(1024, 24, 16),
    "facebook/opt-125m": _opt(768, 12, 12),
    "facebook/opt-350m": _opt(1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False),
    "tiiuae/falcon-7b": {
        "model_type": "falcon",
        "hidden_size": 4544,
        "num_hidden_layers": 32,
        "num_attention_heads": 71,
        "vocab_size": 65024,
        "multi_query": True,
        "parallel_attn": True,
        "new_decoder_architecture": False,
        "bias": False,
        "alibi": False,
    },
    "google-bert/bert-base-uncased": _bert("bert", (768, 12, 12), 30522, 512, 2),
    "FacebookAI/roberta-base": _bert("roberta", (768, 12, 12), 50265, 514, 1),
}


def find_model(name: str) -> str | None:
    """The hub id that `name` means, in any case: the id itself, its last part, or a beginning of that up to
    a "-" which only one model has ("TinyLlama", "Phi-3"). None when nothing begins so.

    Raises NotFoundError when several models begin so."""
    wanted = name.strip().lower()
    short = {hub_id: hub_id.lower().rpartition("/")[2] for hub_id in CATALOG}
    for hub_id, last in short.items():
        if wanted in (hub_id.lower(), last):
            return hub_id
    if "/" in wanted or not wanted:
        return None
    begins = [hub_id for hub_id, last in short.items() if last.startswith(wanted + "-")]
    if len(begins) > 1:
        raise NotFoundError(f"model is {name!r}, which could be several; allowed: {', '.join(begins)}.")
    return begins[0] if begins else None


def near_matches(name: str) -> list[str]:
    """Up to five hub ids that look like `name`, most alike first."""
    wanted = name.strip().lower().rpartition("/")[2]
    last_to_id = {hub_id.lower().rpartition("/")[2]: hub_id for hub_id in CATALOG}
    holding = [hub_id for last, hub_id in last_to_id.items() if len(wanted) >= 3 and wanted in last]
    alike = [last_to_id[last] for last in difflib.get_close_matches(wanted, last_to_id, n=5, cutoff=0.5)]
    return list(dict.fromkeys(holding + alike))[:5]
