"""What autograd keeps between forward and backward, tensor by tensor.

Every term names a tensor that a backward formula of torch 2.13 reads, for the layers as transformers 5
writes them and for our LoRA layer (methods.lora), which keeps its input x and x A^T. Widths are numbers
of values per token: h hidden, q and kv the attention's, i intermediate.

Checked by hand against the published coefficients, in bytes per token and h, for a Llama in bf16 with
kappa = kv/h and iota = i/h: full 20 + 4 kappa + 8 iota; LoRA on all linears 16 + 4 kappa + 8 iota; LoRA on
q and v 14 + 4 kappa + 6 iota; checkpointed 2. PEFT's default, adapters that see float32 copies of their
inputs, keeps more: 36 + 4 kappa + 10 iota.
"""

from dataclasses import dataclass

from lora_engine.calc.structure import ModelShape, OtherShape
from lora_engine.calc.targets import Selection


@dataclass(frozen=True)
class Widths:
    """Bytes per value: `weight` as stored, `compute` inside matrix products, `stream` between layers
    (float32 under autocast, where every half-precision product starts with a copy of its input)."""

    weight: int
    compute: int
    stream: int

    @property
    def mixed(self) -> bool:
        return self.compute != self.stream


@dataclass(frozen=True)
class Adapted:
    """What is trained inside a layer: these names, `ranks` in all of them together, or everything (`full`)."""

    names: frozenset[str]
    ranks: int
    full: bool

    def trains(self, name: str) -> bool:
        return self.full or name in self.names


def saved_bytes(
    shape: ModelShape,
    selection: Selection | None,
    r: int,
    widths: Widths,
    *,
    seq_length: int,
    checkpointing: bool,
    eager: bool,
) -> tuple[int, int]:
    """(bytes per token kept until backward, bytes per token of one recomputed layer; 0 without checkpointing).

    `selection` None means full fine-tuning. Layers before the first adapted one keep nothing: no gradient
    goes there. The first adapted one keeps less: its own input needs none."""
    full = selection is None
    nothing: frozenset[str] = frozenset()
    patterns = (
        [
            (names, layers, r * plain + fixed)
            for (names, layers), (plain, fixed) in zip(selection.patterns, selection.low_ranks, strict=True)
        ]
        if selection
        else []
    )
    first = selection.first_layer if selection else 0
    flows_in = full or any(name.endswith("project_in") for name in (selection.outer if selection else ()))
    if flows_in:
        first = 0

    def layer(names: frozenset[str], ranks: int, flows: bool) -> int:
        return layer_bytes(shape, Adapted(names, ranks, full), flows, widths, seq_length=seq_length, eager=eager)

    outside = _outside_bytes(shape, selection, widths, flows=full or first < shape.num_layers)
    if checkpointing:
        # Each layer keeps its input; the one that is recomputed keeps everything for a moment.
        kept = shape.num_layers * widths.stream * shape.hidden_size
        return kept + outside, max(
            (layer(names, ranks, True) for names, _, ranks in patterns), default=layer(nothing, 0, True)
        )
    if full:
        return shape.num_layers * layer(nothing, 0, True) + outside, 0
    total, seen = 0, 0
    for names, layers, ranks in patterns:
        later = len(layers)
        if first in layers and not flows_in:
            total += layer(names, ranks, False)
            later -= 1
        total += later * layer(names, ranks, True)
        seen += len(layers)
    # Layers without an adapter of their own still carry gradients to those before them.
    untouched = shape.num_layers - first - seen
    return total + untouched * layer(nothing, 0, True) + outside, 0


def layer_bytes(
    shape: ModelShape, adapted: Adapted, flows: bool, widths: Widths, *, seq_length: int, eager: bool
) -> int:
    """Bytes per token that one layer keeps; `flows` says whether its input needs a gradient."""
    fed = {name for part in shape.others if part.per_layer for name in part.feeds}
    inside = [linear for linear in shape.linears if linear.per_layer]
    enters_attention = [x.name for x in inside if x.group == "attention" and x.name in fed]
    leaves_attention = [x.name for x in inside if x.group == "attention" and x.name not in fed]
    enters_mlp = [x.name for x in inside if x.group == "mlp" and x.name in fed]
    leaves_mlp = [x.name for x in inside if x.group == "mlp" and x.name not in fed]
    after_qkv = flows or any(map(adapted.trains, enters_attention))
    before_mlp = flows if shape.parallel else after_qkv or any(map(adapted.trains, leaves_attention))
    inside_mlp = before_mlp or any(map(adapted.trains, enters_mlp))

    total, inputs_kept = 0, 0
    for part in shape.others:
        if part.kind != "norm" or not part.per_layer:
            continue
        if part.num_groups > 1:  # over the heads of q or k
            needs = after_qkv
        else:
            needs = flows if set(part.feeds) & set(enters_attention) else before_mlp
            if shape.parallel and inputs_kept:
                needs = False  # both norms read the same tensor
            inputs_kept += needs
        total += _norm_bytes(shape, part, adapted, needs, widths)
    if after_qkv:
        total += _attention_bytes(shape, widths, seq_length, eager)
    if (eager or not after_qkv or shape.model_type in _COPIED_OUTPUT) and any(map(adapted.trains, leaves_attention)):
        # The output projection's input; otherwise sdpa has kept it as its own output.
        total += widths.compute * shape.query_width
    total += _mlp_bytes(shape, inside_mlp, any(map(adapted.trains, leaves_mlp)), widths)
    if flows:
        # Dropout keeps a mask of one byte a value (CUDA; the CPU keeps it in the values' own type).
        total += shape.num_dropouts * shape.hidden_size
    if not adapted.full:
        total += widths.compute * adapted.ranks  # x A^T
    return total


def _norm_bytes(shape: ModelShape, norm: OtherShape, adapted: Adapted, needs: bool, widths: Widths) -> int:
    total = 0
    if needs and shape.norm_kind == "rms":
        # x.float(), read by pow and by the product with rsqrt: a float32 copy, or x itself when it is float32.
        total += 4 * norm.width + 4 * norm.num_groups
        if adapted.full:
            # weight * normalised: a trained weight needs the normalised x.
            total += (4 if shape.model_type in ("gemma", "gemma2") else widths.stream) * norm.width
    elif needs:
        total += widths.stream * norm.width + 8 * norm.num_groups  # its input, mean and 1 / deviation
    readers = sum(adapted.trains(name) for name in norm.feeds)
    if readers:
        # The input of the trained maps that follow: one tensor for all, under autocast one copy for each.
        total += widths.compute * norm.width * (readers if widths.mixed else 1)
    return total


def _attention_bytes(shape: ModelShape, widths: Widths, seq_length: int, eager: bool) -> int:
    q, kv = shape.query_width, shape.kv_width
    if shape.model_type == "falcon" and 1 < shape.num_kv_heads < shape.num_heads:
        kv = q  # Falcon's grouped heads are broadcast to full width before attention
    c = widths.compute
    # Rotated q and k are new tensors; v stays a view, so a fused map's whole output stays with it.
    fused = (q + kv) if shape.fused_qkv and shape.rotary else 0
    if eager:
        # k and v repeated to every head; softmax keeps its float32 result, the product its half copy.
        scores = shape.num_heads * seq_length * ((4 if c == 4 else 4 + c) + (c if shape.softcap else 0))
        return c * (3 * q + fused) + scores
    # scaled_dot_product_attention keeps q, k, v, its output and a float32 logsumexp per head.
    return c * (q + 2 * kv + fused + q) + 4 * shape.num_heads


# Partial rotary positions put q together anew, head by head; sdpa answers in that layout, and the output
# projection reads a copy in its own.
_COPIED_OUTPUT = ("phi", "phi3", "gpt_neox")

# What an activation function's own operations keep, in multiples of its width.
_ACTIVATION_SAVES = {
    "relu": 1,  # its result
    "gelu_new": 4,  # x, tanh(...), 1 + tanh(...), x / 2: written out in Python
    "gelu_fast": 6,
    "quick_gelu": 2,  # x and the sigmoid
}


def _mlp_bytes(shape: ModelShape, inside: bool, trains_down: bool, widths: Widths) -> int:
    i, c = shape.intermediate_size, widths.compute
    keeps = 0
    if inside and shape.gated:
        keeps += 3 * i  # gate (the activation's input), act(gate) and up (the product's factors)
    elif inside:
        keeps += _ACTIVATION_SAVES.get(shape.activation, 1) * i
    if trains_down and not (inside and shape.activation == "relu" and not shape.gated):
        keeps += i  # the input of the map that leaves the MLP
    return c * keeps


def _outside_bytes(shape: ModelShape, selection: Selection | None, widths: Widths, *, flows: bool) -> int:
    """Final (and embedding) norms, and the inputs of maps outside the layers."""
    full = selection is None
    total = 0
    for part in shape.others:
        if part.kind == "norm" and not part.per_layer and flows:
            total += _norm_bytes(shape, part, Adapted(frozenset(), 0, full), True, widths)
    for linear in shape.linears:
        if not linear.per_layer and (selection is None or linear.name in selection.outer):
            total += widths.compute * linear.in_features
    return total
