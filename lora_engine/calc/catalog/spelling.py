"""The keys that most config.json files share."""

from typing import Any


def rotary(
    model_type: str, sizes: tuple[int, int, int, int, int, int], positions: int, tied: bool = False, **more: Any
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
