"""What a transformer is made of, as far as counting goes: names, sizes, and what feeds what."""

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class LinearShape:
    """`count` equal linear maps x (..., in_features) -> (..., out_features).

    `name` is dotted: inside a layer ("self_attn.q_proj") when `per_layer`, full otherwise ("lm_head").
    `kind` is "linear" (weight stored (out, in)) or "conv1d" (GPT-2's, stored (in, out)).
    `tied` means that the weight is the input embedding's, so it counts no parameters of its own."""

    name: str
    count: int
    in_features: int
    out_features: int
    kind: str
    has_bias: bool
    group: str  # "attention" | "mlp" | "projection" | "head"
    per_layer: bool = True
    tied: bool = False

    @property
    def num_parameters(self) -> int:
        """Of one of them."""
        weight = 0 if self.tied else self.in_features * self.out_features
        return weight + (self.out_features if self.has_bias else 0)


@dataclass(frozen=True)
class OtherShape:
    """`count` equal modules that hold parameters and are no linear map.

    `feeds` names the linears of a layer that read a norm's output; `width` is the number of values
    per token that the module reads."""

    name: str
    count: int
    num_parameters: int
    kind: str  # "embedding" | "norm"
    width: int
    per_layer: bool = False
    feeds: tuple[str, ...] = ()
    num_groups: int = 1  # a norm over heads normalises so many groups per token


@dataclass(frozen=True)
class ModelShape:
    """A model as counted. `architecture` is the transformers class whose parameters these are.

    Sizes are numbers of values; `linears` and `others` hold every parameter exactly once, in the
    model's order. The fields from `layer_path` on are what names and memory need."""

    name: str
    model_type: str
    architecture: str
    hidden_size: int
    num_layers: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_positions: int
    tied: bool
    linears: tuple[LinearShape, ...]
    others: tuple[OtherShape, ...]
    layer_path: str
    output_head: str | None
    norm_kind: str  # "rms" | "layer"
    activation: str
    gated: bool
    fused_qkv: bool
    rotary: bool
    parallel: bool = False
    num_dropouts: int = 0  # over the residual stream, in each layer
    softcap: bool = False  # scores and logits pass through a tanh, which scaled_dot_product_attention cannot do
    notes: tuple[str, ...] = ()

    @cached_property
    def total_parameters(self) -> int:
        """Every parameter once; a tied head is its embedding."""
        linears = sum(linear.count * linear.num_parameters for linear in self.linears)
        return linears + sum(part.count * part.num_parameters for part in self.others)

    @property
    def query_width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def is_decoder(self) -> bool:
        """Whether it predicts the next token (and so keeps a key-value cache when it generates)."""
        return self.model_type not in ("bert", "roberta")

    def full_names(self, part: LinearShape | OtherShape) -> list[str]:
        """The dotted names of `part` in the real model, one per module."""
        if not part.per_layer:
            return [part.name]
        return [f"{self.layer_path}.{i}.{part.name}" for i in range(self.num_layers)]

    @cached_property
    def linear_names(self) -> tuple[str, ...]:
        """Every linear's full name in the model's order: what precedes the layers, layer by layer, what follows."""
        in_layer = [linear for linear in self.linears if linear.per_layer]
        first = self.linears.index(in_layer[0])
        last = self.linears.index(in_layer[-1])
        names = [linear.name for linear in self.linears[:first]]
        for i in range(self.num_layers):
            names += [f"{self.layer_path}.{i}.{linear.name}" for linear in in_layer]
        return tuple(names + [linear.name for linear in self.linears[last + 1 :]])
