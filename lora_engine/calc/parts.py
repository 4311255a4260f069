"""What the families share: collecting the parts of a model, and the sizes that all of them have."""

from typing import Any

from lora_engine.calc.facts import MAX_LAYERS, MAX_VOCAB, Facts
from lora_engine.calc.structure import ExpertShape, LinearShape, OtherShape

Layers = tuple[int, ...] | None


class Parts:
    """Collects the parts of one model in its order.

    `layers` says which layers have a part (None: all of them); a part that no layer has is left out."""

    def __init__(self, num_layers: int, *, norm_bias: bool = False, kind: str = "linear") -> None:
        self.num_layers, self.norm_bias, self.kind = num_layers, norm_bias, kind
        self.linears: list[LinearShape] = []
        self.others: list[OtherShape] = []
        self.experts: list[ExpertShape] = []
        self._path, self._count = "", num_layers
        self._every: Layers = None

    def enter(self, path: str, num_layers: int) -> None:
        """The parts that follow sit in the module list `path`, which has `num_layers` layers."""
        self._path, self._count = path, num_layers
        self._every = None if num_layers == self.num_layers else tuple(range(num_layers))

    def fields(self) -> dict[str, Any]:
        """What a ModelShape takes."""
        return {"linears": tuple(self.linears), "others": tuple(self.others), "experts": tuple(self.experts)}

    def linear(
        self, name: str, in_features: int, out_features: int, group: str, *, bias: bool = False, layers: Layers = None
    ) -> None:
        count, layers = self._held_by(layers)
        if count:
            sizes = (in_features, out_features)
            self.linears.append(
                LinearShape(name, count, *sizes, self.kind, bias, group, layers=layers, path=self._path)
            )

    def outer(
        self, name: str, in_features: int, out_features: int, group: str, *, bias: bool = False, tied: bool = False
    ) -> None:
        """A linear that stands outside the layers."""
        self.linears.append(LinearShape(name, 1, in_features, out_features, "linear", bias, group, False, tied))

    def expert(
        self, name: str, sizes: tuple[int, int, int], *, bias: bool = False, transposed: bool = False, layers: Layers
    ) -> None:
        """A 3-D parameter; `sizes`: number of experts, in_features, out_features."""
        count, layers = self._held_by(layers)
        if count:
            num_experts, rows, columns = sizes
            self.experts.append(
                ExpertShape(name, count, num_experts, rows, columns, bias, transposed, layers, self._path)
            )

    def embedding(self, name: str, rows: int, width: int) -> None:
        self.others.append(OtherShape(name, 1, rows * width, "embedding", width))

    def norm(
        self, name: str, width: int, feeds: tuple[str, ...] = (), *, affine: bool = True, layers: Layers = None
    ) -> None:
        """A norm in each layer."""
        self.inner(name, self._size(width) if affine else 0, "norm", width, feeds=feeds, layers=layers)

    def head_norm(self, name: str, head_dim: int, width: int) -> None:
        """A norm over each head, in each layer: `head_dim` weights read `width` values per token."""
        self.inner(name, self._size(head_dim), "norm", width, num_groups=width // head_dim)

    def inner(self, name: str, size: int, kind: str, width: int, *, layers: Layers = None, **more: Any) -> None:
        """Anything else in each layer, with `size` parameters."""
        count, layers = self._held_by(layers)
        if count:
            self.others.append(
                OtherShape(name, count, size, kind, width, per_layer=True, layers=layers, path=self._path, **more)
            )

    def outer_norm(self, name: str, width: int, *, affine: bool = True) -> None:
        self.others.append(OtherShape(name, 1, self._size(width) if affine else 0, "norm", width))

    def _held_by(self, layers: Layers) -> tuple[int, Layers]:
        """How many layers hold a part, and which."""
        if layers is None or len(layers) == self._count:
            return self._count, self._every
        return len(layers), layers

    def _size(self, width: int) -> int:
        return 2 * width if self.norm_bias else width


def sizes_of(facts: Facts, *, heads: int | None = None, vocab: int | None = None) -> tuple[int, int, int, int]:
    """hidden size, layers, heads, vocabulary; `heads` and `vocab` stand for absent keys."""
    return (
        facts.size("hidden_size"),
        facts.size("num_hidden_layers", high=MAX_LAYERS),
        facts.size("num_attention_heads", default=heads),
        facts.size("vocab_size", default=vocab, high=MAX_VOCAB),
    )


def common_fields(
    facts: Facts,
    architecture: str,
    sizes: tuple[int, int, int, int],
    kv_heads: int,
    head_dim: int,
    inner: int,
    positions: int,
    *,
    attention_dropout: tuple[str, float] = ("attention_dropout", 0.0),
) -> dict[str, Any]:
    """What every shape says; `attention_dropout`: the config's word for it, and the rate where it is absent."""
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
        "max_positions": facts.size("max_position_embeddings", "n_positions", default=positions, high=MAX_VOCAB),
        "attention_dropout": facts.rate(*attention_dropout) > 0,
    }
