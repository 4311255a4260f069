"""A layer as backward meets it: stretches that keep tensors until their turn, and hold more while it lasts.

Every term names a tensor that a backward formula of torch 2.13 reads or makes, for the layers as transformers 5
writes them and for our LoRA layer (methods.lora), which keeps its input x and x A^T. Widths are numbers of values
per token: h hidden, q and kv the attention's, i intermediate. `training.trace` shows the same tensors on any model.

Checked by hand against the published coefficients of what is kept, in bytes per token and h, for a Llama in bf16
with kappa = kv/h and iota = i/h: full 20 + 4 kappa + 8 iota; LoRA on all linears 16 + 4 kappa + 8 iota; LoRA on q
and v 14 + 4 kappa + 6 iota; checkpointed 2. PEFT's default, adapters that see float32 copies of their inputs,
keeps more: 36 + 4 kappa + 10 iota.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from lora_engine.calc.attention import attention_saved, scores_of
from lora_engine.calc.step import Step, Widths
from lora_engine.calc.structure import LinearShape, ModelShape, OtherShape, Part


@dataclass(frozen=True)
class Trained:
    """What is trained inside a layer: `ranks` gives each adapted linear its rank; or everything (`full`).

    `bottleneck` is the inner width of adapter layers (0: none), which sit behind the attention's and the MLP's last
    map (`houlsby`) or the MLP's alone; `prefix` the number of trained key-value pairs; `scales`: (IA)^3's, on keys,
    values and the MLP's inner activations."""

    ranks: Mapping[str, int]
    full: bool = False
    adapter_width: int = 4
    magnitudes: bool = False
    bottleneck: int = 0
    houlsby: bool = False
    prefix: int = 0
    scales: bool = False

    @property
    def anything(self) -> bool:
        return self.full or self.scales or bool(self.ranks or self.bottleneck or self.prefix)

    @property
    def in_attention(self) -> bool:
        """Whether it changes keys and values themselves, beside the maps."""
        return self.scales or self.prefix > 0

    def trains(self, linear: LinearShape) -> bool:
        return self.full or linear.name in self.ranks


@dataclass(frozen=True)
class Block:
    """A stretch of a layer, in bytes: `saved` until its backward; `passing`, what its backward holds at most beside
    what is saved up to here (less than nothing when it lets go of more first); `gradients` it leaves behind."""

    saved: int
    passing: int
    gradients: int


def layer_blocks(shape: ModelShape, index: int, trained: Trained, flows: bool, step: Step) -> list[Block]:
    """The blocks of layer `index` in the order of the forward pass; `flows`: its input needs a gradient.

    Where norms come last, the first block is what the layer's maps keep of its input."""
    return _Layer(shape, index, trained, flows, step).blocks()


class _Layer:
    """Collects the blocks of one layer; what needs a gradient is known from front to back."""

    def __init__(self, shape: ModelShape, index: int, trained: Trained, flows: bool, step: Step) -> None:
        self.shape, self.trained, self.flows, self.step = shape, trained, flows, step
        self.linears = [x for x in shape.linears if x.per_layer and _is_in(x, index)]
        self.norms = [x for x in shape.others if x.kind == "norm" and x.per_layer and _is_in(x, index)]
        self.experts = [x for x in shape.experts if _is_in(x, index)]
        fed = {name for part in self.norms for name in part.feeds}
        self.into_attention = [x for x in self.linears if x.group == "attention" and x.name in fed]
        self.out_of_attention = [x for x in self.linears if x.group == "attention" and x.name not in fed]
        self.into_mlp = [x for x in self.linears if x.group == "mlp" and x.name in fed]
        self.out_of_mlp = [x for x in self.linears if x.group == "mlp" and x.name not in fed]
        self.inner = sum(x.in_features for x in self.out_of_mlp)
        self.after_qkv = flows or any(map(trained.trains, self.into_attention)) or trained.in_attention
        self.scores = scores_of(shape, step)
        houlsby = trained.bottleneck > 0 and trained.houlsby
        self.after_attention = self.after_qkv or any(map(trained.trains, self.out_of_attention)) or houlsby
        self.before_mlp = flows if shape.parallel else self.after_attention
        self.inside_mlp = self.before_mlp or any(map(trained.trains, self.into_mlp))

        # ReLU keeps its result, which is what the map that leaves the MLP reads.
        self.shares_result = self.inside_mlp and shape.activation == "relu" and not shape.gated

    def blocks(self) -> list[Block]:
        shape, step = self.shape, self.step
        c, s, h = step.widths.compute, step.widths.stream, shape.hidden_size
        blocks: list[Block] = []
        kept_input = False  # parallel norms read the same tensor
        attention_names = {x.name for x in self.into_attention}
        before = [x for x in self.norms if x.num_groups == 1 and set(x.feeds) & attention_names]
        heads = [x for x in self.norms if x.num_groups > 1]
        after = [x for x in self.norms if x.num_groups == 1 and x not in before]
        if shape.post_norm:
            blocks.append(Block(step.tokens * sum(map(self._read, before)), 0, 0))
        for norm in before if not shape.post_norm else ():
            blocks.append(self.norm(norm, self.flows, self._read(norm)))
            kept_input = self.flows
        blocks.append(self.attention(heads))
        blocks.append(self.leave(self.out_of_attention, self._attention_output(), h + shape.query_width))
        for norm in after:
            needs = self.before_mlp and not (shape.parallel and kept_input)
            # A norm behind the MLP (Gemma 2's) has its turn before it, which makes no difference to the peak.
            blocks.append(self.norm(norm, needs, self._read(norm)))
        blocks += self.routed()
        blocks.append(self.mlp())
        beside = s * h // c + self.inner * (3 if self.trained.scales else 1) if self.inside_mlp else 0
        blocks.append(self.leave(self.out_of_mlp, self._down_input(), beside))
        if shape.post_norm:  # what this norm gives, the next layer reads
            needs = self.after_attention or self.inside_mlp or any(map(self.trained.trains, self.out_of_mlp))
            blocks += [self.norm(norm, needs, 0) for norm in before]
            return blocks
        return [block for block in blocks if block.saved or block.passing or block.gradients]

    def _read(self, norm: OtherShape) -> int:
        """Bytes per token that the trained maps behind `norm` keep of its output: one tensor for all, under autocast
        one copy for each."""
        readers = sum(x.name in norm.feeds and self.trained.trains(x) for x in self.linears)
        return self.step.widths.compute * norm.width * (readers if self.step.widths.mixed else min(readers, 1))

    def norm(self, norm: OtherShape, needs: bool, read: int) -> Block:
        """Reads `norm.width` values; what follows keeps `read` bytes per token of its output."""
        shape, step, trained = self.shape, self.step, self.trained
        saved = norm_saved(shape, norm, trained.full, needs, step.widths) + read
        passing = norm_passing(shape, norm, trained.full, step.widths) if needs else 0
        if needs and not step.widths.mixed and step.widths.compute == 2:
            passing += step.widths.stream * norm.width  # the residual's gradient waits in its own type
        gradients = step.widths.weight * norm.num_parameters if trained.full else 0
        return Block(step.tokens * saved, step.tokens * passing, gradients)

    def attention(self, heads: list[OtherShape]) -> Block:
        """q, k, v, their head norms and rotary positions, and the products."""
        shape, step = self.shape, self.step
        c, s, n = step.widths.compute, step.widths.stream, step.tokens
        q, kv, h = shape.query_width, shape.kv_width, shape.hidden_size
        saved, passing = 0, 0
        for norm in heads:
            saved += norm_saved(shape, norm, self.trained.full, self.after_qkv, step.widths)
        if self.after_qkv:
            saved += attention_saved(shape, step)
            passing = s * h + c * (2 * q + 2 * kv)
            if self.scores is not None:
                passing = s * h + self.scores.passing(q, shape.num_heads * step.seq_length)
        if self.trained.scales:
            # What the scales multiply: keys and values, or all that a fused map returns.
            saved += c * (2 * kv if len(self.into_attention) > 1 else q + 2 * kv)
        more = (self._prefix_saved() if self.trained.prefix else self._mask_saved()) if self.after_qkv else 0
        beside = n * (s * h + c * (q + 2 * kv + h))
        block = self._with_maps(self.into_attention, n * saved + more, n * passing, beside, flows=self.flows)
        gradients = block.gradients + 4 * self.trained.prefix * 2 * kv + (4 * 2 * kv if self.trained.scales else 0)
        if self.trained.full:
            gradients += step.widths.weight * sum(norm.num_parameters for norm in heads)
        return Block(block.saved, block.passing, gradients)

    def _mask_saved(self) -> int:
        """What a mask of the padding adds, in bytes: itself in the type of the scores, anew in each layer, and keys
        and values repeated to every head, which sdpa does without where there is no mask."""
        shape, step = self.shape, self.step
        if not step.padded or self.scores is not None:
            return 0
        c, q, kv = step.widths.compute, shape.query_width, shape.kv_width
        copies = 0
        if kv < q:
            copies = 2 * (q - kv) - (q + kv if shape.fused_qkv and shape.rotary else 0)
        return c * step.tokens * (step.seq_length + copies)

    def _prefix_saved(self) -> int:
        """Keys and values behind the prefix, repeated to every head, and the mask that the prefix needs, in bytes."""
        shape, step, length = self.shape, self.step, self.trained.prefix
        c, batch = step.widths.compute, step.tokens // step.seq_length
        if self.scores is not None:
            per_score = shape.num_heads * step.seq_length * self.scores.saved
            return batch * length * (self.scores.width * 2 * shape.query_width + per_score)
        # They are copies; where a map gives q, k and v at once, q is a view that keeps all of it.
        views = 0 if shape.fused_qkv and not shape.rotary else shape.kv_width
        repeated = c * 2 * (shape.query_width - views) * step.tokens
        fused = c * (shape.query_width + shape.kv_width) * step.tokens if shape.fused_qkv and shape.rotary else 0
        mask = c * batch * step.seq_length * (step.seq_length + length) if shape.is_decoder or step.padded else 0
        return repeated - fused + c * 2 * shape.query_width * batch * length + mask

    def mlp(self) -> Block:
        """What comes before the map that leaves the MLP: gate and up, the activation, the product."""
        shape, step, i = self.shape, self.step, self.inner
        c, s, h, n = step.widths.compute, step.widths.stream, shape.hidden_size, step.tokens
        saved = passing = 0
        if self.inside_mlp and i:
            saved = c * i * (3 if shape.gated else _ACTIVATION_SAVES.get(shape.activation, 1))
            passing = s * h + c * i * (3 if shape.gated else _ACTIVATION_PASSES.get(shape.activation, 2))
        # By the turn of these maps, what the activation kept is gone.
        beside = n * (s * h + c * (i * (2 if shape.gated else 1) + h) - saved)
        return self._with_maps(self.into_mlp, n * saved, n * passing, beside, flows=self.before_mlp)

    def routed(self) -> list[Block]:
        """The experts of a layer that has them (transformers' grouped products): every token's rows are gathered, once
        for each of its experts, and summed with the router's weights in float32."""
        shape, step, trained = self.shape, self.step, self.trained
        moe = shape.moe
        if not self.experts or moe is None:
            return []
        # Autocast leaves grouped products alone: they run in the weights' own type.
        c, s, k = step.widths.weight, step.widths.stream, moe.experts_per_token
        h, n = shape.hidden_size, step.tokens
        i, adapted = moe.intermediate_size, [x for x in self.experts if trained.full or x.name in trained.ranks]
        saved = passing = out = 0
        if self.before_mlp:
            indices = 40 * k + 4 * moe.num_experts + 12
            saved, out = 3 * c * k * i + indices, c * k * h
            passing = s * h + 3 * c * k * i
        if adapted:
            saved += c * k * (h + i)
        gradients = merged = 0
        beside = [0]
        for x in adapted:
            size = x.num_experts * x.in_features * x.out_features
            if trained.full:
                gradients += step.widths.weight * x.num_parameters
            else:
                values = trained.ranks[x.name] * x.num_experts * (x.in_features + x.out_features)
                merged += c * size  # W + s B A, formed anew in every pass and kept for the way back
                merged += step.widths.compute * values if step.widths.mixed else 0  # autocast's copies of the factors
                gradients += trained.adapter_width * values
            dense = c * size + (4 * size if c < 4 and not trained.full else 0)
            # By the turn of gate and up, what the activation kept is gone.
            rows = s * h + c * k * (h + i) if x.in_features == i else s * h - c * k * i
            beside.append(n * rows + dense)
        inside = Block(n * saved + merged, max(n * passing, *beside), gradients)
        # Each row times its router weight, and the sum: in float32 where the router's weights are, else in their type.
        wide = 3 * c if shape.model_type in _NARROW_ROUTING else 12 + (c if c == 2 else 0)
        return [inside, Block(n * out, n * (s * h + wide * k * h) if out else 0, 0)]

    def leave(self, linears: list[LinearShape], input_bytes: int, passing: int) -> Block:
        """The last map of attention or MLP: its input per token, then residual (and dropout, and adapter layer)."""
        step, h = self.step, self.shape.hidden_size
        saved = input_bytes
        behind = self.trained.houlsby or linears is self.out_of_mlp
        below = self.inside_mlp if linears is self.out_of_mlp else self.after_qkv
        m = self.trained.bottleneck if behind else 0
        if linears and (below or m or any(map(self.trained.trains, linears))):
            saved += step.dropout_mask(step.widths.compute) * self.shape.num_dropouts * h // 2
        gradients = 0
        if m:
            saved += step.widths.compute * (h + 2 * m)
            gradients = 4 * (2 * h * m + m + h)
        elif self.trained.scales and linears is self.out_of_mlp:
            saved += 0 if self.shares_result else step.widths.compute * self.inner
            gradients = 4 * self.inner
        passing *= step.tokens * step.widths.compute
        block = self._with_maps(linears, step.tokens * saved, passing, passing, flows=below)
        copies = 2 * 2 * h * m if step.widths.compute == 2 else 0
        return Block(block.saved + copies, block.passing, block.gradients + gradients)

    def _attention_output(self) -> int:
        """The output projection's input; otherwise sdpa has kept it as its own output."""
        copied = self.scores is not None or not self.after_qkv or self.shape.model_type in _COPIED_OUTPUT
        if copied and any(map(self.trained.trains, self.out_of_attention)):
            return self.step.widths.compute * self.shape.query_width
        return 0

    def _down_input(self) -> int:
        if any(map(self.trained.trains, self.out_of_mlp)) and not self.shares_result:
            return self.step.widths.compute * self.inner
        return 0

    def _with_maps(self, linears: list[LinearShape], saved: int, passing: int, beside: int, *, flows: bool) -> Block:
        """Adds what the maps themselves keep: x A^T, half-precision copies of adapters and of float32 weights.

        A gradient or a copy the size of a weight comes and goes `beside` what the maps' own backward holds. `flows`:
        the maps' input needs a gradient."""
        widths, trained = self.step.widths, self.trained
        gradients, dense = 0, 0
        for x in linears:
            n = x.in_features * x.out_features
            if trained.full:
                gradients += widths.weight * x.num_parameters
            elif x.name in trained.ranks:
                r = trained.ranks[x.name]
                size = r * (x.in_features + x.out_features)
                saved += self.step.tokens * widths.compute * r
                if widths.compute < trained.adapter_width:
                    saved += widths.compute * size
                if trained.magnitudes:
                    saved += self.step.tokens * widths.compute * x.out_features
                    size += x.out_features
                    dense = max(dense, 4 * n if widths.weight < 4 else 0)  # W in float32, for the norm of each output
                gradients += trained.adapter_width * size
            if widths.mixed and (flows or trained.trains(x)):
                saved += widths.compute * n  # autocast's copy, kept for the gradient of the input
            dense = max(dense, self.step.unpacked(n))
            if trained.full:
                dense = max(dense, widths.weight * n)
        return Block(saved, max(passing, beside + dense if dense else 0), gradients)


def _is_in(part: Part, index: int) -> bool:
    return part.layers is None or index in part.layers


def norm_saved(shape: ModelShape, norm: OtherShape, full: bool, needs: bool, widths: Widths) -> int:
    """Bytes per token that a norm's backward reads."""
    if not needs:
        return 0
    if shape.norm_kind == "rms":
        # x.float(), read by pow and by the product with rsqrt: a float32 copy, or x itself when it is float32.
        total = 4 * norm.width + 4 * norm.num_groups
        # weight * normalised: a trained weight needs the normalised x.
        return total + (_normalised(shape, widths) * norm.width if full else 0)
    return widths.stream * norm.width + 8 * norm.num_groups  # its input, mean and 1 / deviation


def norm_passing(shape: ModelShape, norm: OtherShape, full: bool, widths: Widths) -> int:
    """Bytes per token that a norm's backward holds: written out in Python, an RMS norm has five float32 tensors."""
    if shape.norm_kind == "rms":
        return 20 * norm.width - (_normalised(shape, widths) * norm.width if full else 0)
    return 2 * widths.stream * norm.width


def _normalised(shape: ModelShape, widths: Widths) -> int:
    return 4 if shape.model_type.startswith("gemma") else widths.stream


# The router's weights in the type of the model; the others keep them in float32.
_NARROW_ROUTING = ("qwen2_moe", "qwen3_moe")

# Partial rotary positions put q together anew, head by head; sdpa answers in that layout, and the output
# projection reads a copy in its own.
_COPIED_OUTPUT = ("phi", "phi3", "gpt_neox")

# What an activation function's own operations keep, and hold while they go back, in multiples of its width.
_ACTIVATION_SAVES = {
    "relu": 1,  # its result
    "gelu_new": 4,  # x, tanh(...), 1 + tanh(...), x / 2: written out in Python
    "gelu_fast": 6,
    "quick_gelu": 2,  # x and the sigmoid
}
_ACTIVATION_PASSES = {"gelu_new": 3, "gelu_fast": 3, "quick_gelu": 3}
