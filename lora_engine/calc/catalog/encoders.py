"""Encoders, and T5 with its two stacks."""

from typing import Any


def _bert(
    model_type: str, task: str, sizes: tuple[int, int, int], vocab: int, positions: int, types: int
) -> dict[str, Any]:
    """sizes: hidden, layers, heads."""
    hidden, layers, heads = sizes
    return {
        "architectures": [task],
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


def _deberta(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    """Names no class."""
    return {
        "model_type": "deberta-v2",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
        "vocab_size": 128100,
        "max_position_embeddings": 512,
        "type_vocab_size": 0,
        "relative_attention": True,
        "position_buckets": 256,
        "max_relative_positions": -1,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "pos_att_type": "p2c|c2p",
        "position_biased_input": False,
        "hidden_dropout_prob": 0.1,
    }


def _modernbert(hidden: int, layers: int, heads: int, inner: int) -> dict[str, Any]:
    return {
        "architectures": ["ModernBertForMaskedLM"],
        "model_type": "modernbert",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "vocab_size": 50368,
        "max_position_embeddings": 8192,
        "attention_bias": False,
        "classifier_bias": False,
        "decoder_bias": True,
        "mlp_bias": False,
        "norm_bias": False,
    }


def _t5(d_model: int, d_ff: int, layers: int, heads: int, d_kv: int = 64, **more: Any) -> dict[str, Any]:
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "d_model": d_model,
        "d_ff": d_ff,
        "d_kv": d_kv,
        "num_layers": layers,
        "num_heads": heads,
        "relative_attention_num_buckets": 32,
        "vocab_size": 32128,
        "n_positions": 512,
        "dropout_rate": 0.1,
        **more,
    }


def _flan(d_model: int, d_ff: int, layers: int, heads: int) -> dict[str, Any]:
    return _t5(
        d_model,
        d_ff,
        layers,
        heads,
        num_decoder_layers=layers,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )


ENCODERS_AND_T5: dict[str, dict[str, Any]] = {
    "google-bert/bert-base-uncased": _bert("bert", "BertForMaskedLM", (768, 12, 12), 30522, 512, 2),
    "google-bert/bert-large-uncased": _bert("bert", "BertForMaskedLM", (1024, 24, 16), 30522, 512, 2),
    "FacebookAI/roberta-base": _bert("roberta", "RobertaForMaskedLM", (768, 12, 12), 50265, 514, 1),
    "FacebookAI/roberta-large": _bert("roberta", "RobertaForMaskedLM", (1024, 24, 16), 50265, 514, 1),
    "FacebookAI/xlm-roberta-base": _bert("xlm-roberta", "XLMRobertaForMaskedLM", (768, 12, 12), 250002, 514, 1),
    "FacebookAI/xlm-roberta-large": _bert("xlm-roberta", "XLMRobertaForMaskedLM", (1024, 24, 16), 250002, 514, 1),
    "distilbert/distilbert-base-uncased": {
        "architectures": ["DistilBertForMaskedLM"],
        "model_type": "distilbert",
        "dim": 768,
        "n_layers": 6,
        "n_heads": 12,
        "hidden_dim": 3072,
        "vocab_size": 30522,
        "max_position_embeddings": 512,
        "dropout": 0.1,
    },
    "microsoft/deberta-v3-xsmall": _deberta(384, 12, 6),
    "microsoft/deberta-v3-small": _deberta(768, 6, 12),
    "microsoft/deberta-v3-base": _deberta(768, 12, 12),
    "microsoft/deberta-v3-large": _deberta(1024, 24, 16),
    "answerdotai/ModernBERT-base": _modernbert(768, 22, 12, 1152),
    "answerdotai/ModernBERT-large": _modernbert(1024, 28, 16, 2624),
    "google-t5/t5-small": _t5(512, 2048, 6, 8),
    "google-t5/t5-base": _t5(768, 3072, 12, 12),
    "google-t5/t5-large": _t5(1024, 4096, 24, 16),
    "google-t5/t5-3b": _t5(1024, 16384, 24, 32, 128),
    "google/flan-t5-small": _flan(512, 1024, 8, 6),
    "google/flan-t5-base": _flan(768, 2048, 12, 12),
    "google/flan-t5-large": _flan(1024, 2816, 24, 16),
    "google/flan-t5-xl": _flan(2048, 5120, 24, 32),
}
