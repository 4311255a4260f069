"""What a transformer is made of, as far as counting goes: names, sizes, and what feeds what."""

from dataclasses import dataclass, fields
from functools import cached_property

# Others scale or cap their logits (Gemma 2, Cohere, Granite) or project before the head.
PLAIN_HEADS = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "phi3", "phi", "gpt2", "gpt_neox", "gemma", "opt", "smollm3", "olmo2"}
)


@dataclass(frozen=True)
class LinearShape:
    """`count` equal linear maps x (..., in_features) -> (..., out_features).

    `name` is dotted: inside a layer ("self_attn.q_proj") when `per_layer`, full otherwise ("lm_head").
    `layers` lists the indices of the layers that have it (None: every layer); `path` is the module list it sits
    in where a model has several (T5's "encoder.block"; "": the model's `layer_path`).
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
    layers: tuple[int, ...] | None = None
    path: str = ""

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
    kind: str  # "embedding" | "norm" | "router" | "convolution" | "attention sink" | "bias"
    width: int
    per_layer: bool = False
    feeds: tuple[str, ...] = ()
    num_groups: int = 1  # a norm over heads normalises so many groups per token
    is_matrix: bool = False  # Cohere's norms over heads have weights (heads, head_dim)
    layers: tuple[int, ...] | None = None
    path: str = ""


@dataclass(frozen=True)
class ExpertShape:
    """`count` equal 3-D parameters that hold one map x (..., in_features) -> (..., out_features) for each of
    `num_experts` experts: Mixtral's `mlp.experts.gate_up_proj` (E, out, in), gpt-oss's (E, in, out) when
    `transposed`. No nn.Linear, so `target_modules` never sees them; PEFT's `target_parameters` does."""

    name: str
    count: int
    num_experts: int
    in_features: int
    out_features: int
    has_bias: bool = False
    transposed: bool = False
    layers: tuple[int, ...] | None = None
    path: str = ""
    per_layer: bool = True

    @property
    def num_parameters(self) -> int:
        """Of one of them, all experts together."""
        return self.num_experts * (self.in_features * self.out_features + (self.out_features if self.has_bias else 0))


@dataclass(frozen=True)
class MoeShape:
    """What the layers with experts have in common.

    `router` is the name inside a layer of the map h -> `num_experts` that scores them. Each token passes
    `experts_per_token` experts of `intermediate_size` and, where there is one, a shared expert of
    `shared_intermediate_size` (0: none). The layers not in `layers` have an MLP of `dense_intermediate_size`
    (0: there are none)."""

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    shared_intermediate_size: int
    dense_intermediate_size: int
    router: str
    layers: tuple[int, ...]


@dataclass(frozen=True)
class LatentAttention:
    """DeepSeek's multi-head latent attention (DeepSeek-V2, 2024, section 2.1): keys and values of a token come
    from `kv_lora_rank` values, queries from `q_lora_rank` (0: straight from the hidden state). A head's query
    and key have `qk_nope_head_dim` + `qk_rope_head_dim` values, its value `v_head_dim`."""

    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int


Part = LinearShape | OtherShape | ExpertShape

# Model types that read in both directions and predict no next token.
ENCODERS = frozenset({"bert", "deberta-v2", "distilbert", "modernbert", "roberta", "xlm-roberta"})


@dataclass(frozen=True)
class ModelShape:
    """A model as counted. `architecture` is the transformers class whose parameters these are.

    Sizes are numbers of values; `linears`, `others` and `experts` hold every parameter exactly once, in the
    model's order. The fields from `layer_path` on are what names and memory need. `intermediate_size` is that of
    the MLP most layers have: with experts, one expert's. `head_dim` is that of queries and keys. An
    encoder-decoder has `num_layers` in its encoder."""

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
    post_norm: bool = False  # norms follow the residual sums, so a layer's output is its last norm's
    num_dropouts: int = 0  # over the residual stream, in each layer
    attention_dropout: bool = False  # over the softmax of the scores
    embedding_dropout: bool = False
    softcap: bool = False  # scores and logits pass through a tanh, which scaled_dot_product_attention cannot do
    experts: tuple[ExpertShape, ...] = ()
    experts_per_token: int = 0
    moe: MoeShape | None = None
    latent: LatentAttention | None = None
    notes: tuple[str, ...] = ()
    num_classes: int = 0  # of a classifier (calc.classifier), whose new head every method trains
    task_head: tuple[str, ...] = ()  # the names of that head's linears and norms

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, field.name) for field in fields(self)))

    def __hash__(self) -> int:
        # Shapes are the keys of caches that a slider asks hundreds of times.
        return self._hash

    @cached_property
    def total_parameters(self) -> int:
        """Every parameter once; a tied head is its embedding."""
        parts: tuple[Part, ...] = (*self.linears, *self.others, *self.experts)
        return sum(part.count * part.num_parameters for part in parts)

    @cached_property
    def active_parameters(self) -> int:
        """What one token meets: of the experts only those that it is sent to."""
        idle = sum(
            part.count * part.num_parameters * (part.num_experts - self.experts_per_token) // part.num_experts
            for part in self.experts
        )
        return self.total_parameters - idle

    @property
    def plain_head(self) -> bool:
        """Whether the logits are the output head's map of the last hidden state and nothing more, so that a loss
        can pick its rows before the head."""
        return self.model_type in PLAIN_HEADS and not self.softcap

    @cached_property
    def task_head_parts(self) -> tuple[LinearShape | OtherShape, ...]:
        """The linears and norms of `task_head`."""
        parts: tuple[LinearShape | OtherShape, ...] = (*self.linears, *self.others)
        return tuple(part for part in parts if not part.per_layer and part.name in self.task_head)

    @cached_property
    def task_head_parameters(self) -> int:
        return sum(part.num_parameters for part in self.task_head_parts)

    @property
    def query_width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def is_decoder(self) -> bool:
        """Whether it predicts the next token (and so keeps a key-value cache when it generates)."""
        return self.model_type not in ENCODERS

    def layers_of(self, part: Part) -> tuple[int, ...]:
        """Indices of the layers that have `part`; none for one that stands outside."""
        if not part.per_layer:
            return ()
        return tuple(range(self.num_layers)) if part.layers is None else part.layers

    def full_names(self, part: Part) -> list[str]:
        """The dotted names of `part` in the real model, one per module, in the order of `layers_of`."""
        if not part.per_layer:
            return [part.name]
        return [f"{part.path or self.layer_path}.{i}.{part.name}" for i in self.layers_of(part)]

    @cached_property
    def linear_names(self) -> tuple[str, ...]:
        """Every linear's full name in the model's order: what precedes the layers, layer by layer, what follows."""
        in_layer = [linear for linear in self.linears if linear.per_layer]
        first = self.linears.index(in_layer[0])
        last = self.linears.index(in_layer[-1])
        names = [linear.name for linear in self.linears[:first]]
        for path in dict.fromkeys(linear.path or self.layer_path for linear in in_layer):
            here = [linear for linear in in_layer if (linear.path or self.layer_path) == path]
            holders = [(linear, set(self.layers_of(linear))) for linear in here]
            for i in range(1 + max(self.layers_of(linear)[-1] for linear in here)):
                names += [f"{path}.{i}.{linear.name}" for linear, layers in holders if i in layers]
        return tuple(names + [linear.name for linear in self.linears[last + 1 :]])
