"""What the families share: collecting the parts of a model, and the sizes that all of them have."""

from typing import Any

from lora_engine.calc.facts import MAX_LAYERS, MAX_VOCAB, Facts
from lora_engine.calc.structure import LinearShape, OtherShape


class Parts:
    """Collects the parts of one model in its order."""

    def __init__(self, num_layers: int, *, norm_bias: bool = False, kind: str = "linear") -> None:
        self.num_layers, self.norm_bias, self.kind = num_layers, norm_bias, kind
        self.linears: list[LinearShape] = []
        self.others: list[OtherShape] = []

    def linear(self, name: str, in_features: int, out_features: int, group: str, *, bias: bool = False) -> None:
        self.linears.append(LinearShape(name, self.num_layers, in_features, out_features, self.kind, bias, group))

    def outer(
        self, name: str, in_features: int, out_features: int, group: str, *, bias: bool = False, tied: bool = False
    ) -> None:
        """A linear that stands outside the layers."""
        self.linears.append(LinearShape(name, 1, in_features, out_features, "linear", bias, group, False, tied))

    def embedding(self, name: str, rows: int, width: int) -> None:
        self.others.append(OtherShape(name, 1, rows * width, "embedding", width))

    def norm(self, name: str, width: int, feeds: tuple[str, ...] = (), *, affine: bool = True) -> None:
        """A norm in each layer."""
        size = self._size(width) if affine else 0
        self.others.append(OtherShape(name, self.num_layers, size, "norm", width, True, feeds))

    def head_norm(self, name: str, head_dim: int, width: int) -> None:
        """A norm over each head, in each layer: `head_dim` weights read `width` values per token."""
        size, groups = self._size(head_dim), width // head_dim
        self.others.append(OtherShape(name, self.num_layers, size, "norm", width, True, num_groups=groups))

    def outer_norm(self, name: str, width: int) -> None:
        self.others.append(OtherShape(name, 1, self._size(width), "norm", width))

    def _size(self, width: int) -> int:
        return 2 * width if self.norm_bias else width


def sizes_of(facts: Facts) -> tuple[int, int, int, int]:
    """hidden size, layers, heads, vocabulary."""
    return (
        facts.size("hidden_size"),
        facts.size("num_hidden_layers", high=MAX_LAYERS),
        facts.size("num_attention_heads"),
        facts.size("vocab_size", high=MAX_VOCAB),
    )


def common_fields(
    facts: Facts,
    architecture: str,
    sizes: tuple[int, int, int, int],
    kv_heads: int,
    head_dim: int,
    inner: int,
    positions: int,
) -> dict[str, Any]:
    h, layers, heads, vocab = sizes
    return {
        "name": facts.name,
        "model_type": facts.text("model_type", default=""),
        "architecture": architecture,
        "hidden_size": h,
        "num_layers": layers,
        "vocab_size": vocab,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": inner,
        "max_positions": facts.size("max_position_embeddings", "n_positions", default=positions),
    }
