"""The moments of a training step at which memory can be highest, each with what is alive then.

Backward undoes the forward pass from the last layer to the first: activations go, gradients come. Layers that are
alike give sums that grow or shrink evenly from one to the next, so the first and the last of a run are enough.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from lora_engine.calc.attention import scores_of
from lora_engine.calc.blocks import Block, layer_blocks, norm_passing, norm_saved
from lora_engine.calc.plans import Plan, edges
from lora_engine.calc.step import Step
from lora_engine.calc.structure import ModelShape, Part

# Tensors of the MLP's width that its activation has at once on the way up.
FORWARD_PASSES = {"gelu_new": 4, "gelu_fast": 4}


@dataclass(frozen=True)
class Moment:
    """Bytes alive beside weights, adapters and optimizer state. `name`: "forward", "loss", "head",
    "backward", "embedding" or "optimizer"."""

    name: str
    gradients: int
    activations: int
    logits: int
    overhead: int

    @property
    def total(self) -> int:
        return self.gradients + self.activations + self.logits + self.overhead


@dataclass(frozen=True)
class _Run:
    """`count` layers that are alike, from below to above."""

    blocks: tuple[Block, ...]
    count: int
    keeps_inner: bool  # whether the map that leaves the MLP is trained, and so keeps its input

    @property
    def saved(self) -> int:
        return sum(block.saved for block in self.blocks)

    @property
    def gradients(self) -> int:
        return sum(block.gradients for block in self.blocks)


def moments(
    shape: ModelShape,
    plan: Plan,
    step: Step,
    *,
    labelled_share: float,
    checkpointing: bool,
    accumulation: int,
    loss_in_place: bool = False,
) -> Iterator[Moment]:
    """Every moment that can be the peak of a step, in order. `loss_in_place`: the loss goes back in the place of its
    log-probabilities (a pack's), so that nothing stands beside them."""
    widths, tokens = step.widths, step.tokens
    batch = tokens // step.seq_length
    rows = round(batch * (step.seq_length - 1) * labelled_share) if shape.output_head else 0
    # Token ids, positions and targets; rotary tables.
    always = 24 * tokens + (2 * widths.stream * step.seq_length * shape.head_dim if shape.rotary else 0)
    mask = tokens * step.seq_length if step.padded else 0  # bytes of a boolean for each pair of tokens
    held = plan.gradient_bytes if accumulation > 1 else 0
    runs = layer_runs(shape, plan, step, checkpointing)
    if checkpointing and not (plan.full or shape.rotary):
        always += tokens * widths.stream * shape.hidden_size  # the embedding's output, before positions are added
    if checkpointing and step.eager and shape.is_decoder:
        always += (
            widths.weight * batch * step.seq_length**2 * (2 if shape.softcap else 1)
        )  # masks, which every layer is given
    inputs = tokens * widths.stream * shape.hidden_size if checkpointing else 0
    # A layer's first norm keeps the layer's input, which checkpointing has kept already, unless it is a float32 copy.
    shared = inputs if shape.is_decoder and (shape.norm_kind == "layer" or widths.stream == 4) else 0
    under = _under_layers(shape, step) if plan.full or checkpointing else 0
    kept = under + sum(run.count * (inputs or run.saved) for run in runs)
    flows = any(run.saved or run.gradients for run in runs) or plan.full
    outside, tail_passing, outer_gradients = _outside(shape, plan, step, rows, flows)

    def moment(name: str, gradients: int, activations: int, logits: int, overhead: int) -> Moment:
        return Moment(name, held or gradients, activations, logits, always + overhead)

    # Where layers keep nothing of their inside, one layer's inside is on top; else the last norm's temporaries.
    weight = step.unpacked(max(x.in_features * x.out_features for x in shape.linears if x.per_layer))
    last = tokens * shape.hidden_size * (4 + 3 * widths.stream)
    inside = _forward_passing(shape, step) if checkpointing or not flows else 0
    if inside and shape.is_decoder and not (checkpointing or shape.rotary):
        inside += tokens * widths.stream * shape.hidden_size  # the embedding's output, before positions are added
    if shape.num_classes and not (shape.is_decoder or shape.rotary or checkpointing):
        last = _last_sum(shape, plan, step)
    yield moment("forward", 0, kept, 0, max(last, inside) + weight + mask)
    always += mask if checkpointing else 0
    # Cross-entropy in float32 keeps log-softmax (4); backward holds the gradients at its output and at its input
    # beside it (4 + 4). The half-precision logits are gone by then, unless a tanh reads them again.
    c, vocab = widths.compute, shape.vocab_size
    scores = c * shape.num_classes * (tokens if shape.is_decoder else batch)  # of a classifier
    every = c * vocab * tokens
    capped = every if shape.softcap else 0
    # A float32 head has a copy in half precision, kept for the gradient of the hidden state where one is asked for.
    copied = shape.output_head is not None and (widths.mixed or (plan.head and c == 2))
    copy = c * vocab * shape.hidden_size if copied else 0
    yield moment("loss", 0, kept + outside, (8 if c == 4 or loss_in_place else 8 + c) * vocab * rows + capped, copy)
    back = 4 if loss_in_place else 12
    yield moment("loss", 0, kept + outside, back * vocab * rows + capped, copy if flows else 0)
    if shape.output_head and not shape.plain_head:
        # Logits of every token were made and the labelled ones picked: their gradient goes back into the room of all.
        picked = c * vocab * rows + capped + 2 * every
        yield moment("loss", 0, kept + outside, picked, copy if flows else 0)
    if shape.num_classes:
        yield moment("loss", 0, kept + outside, 12 * shape.num_classes * batch + scores, 0)
    head_gradient = plan.width * _head_parameters(shape) if plan.full or plan.head else 4 * plan.task_head
    # A tied head's gradient waits for the embedding's, also where gradients of earlier micro-batches are held.
    waiting = head_gradient if plan.full and shape.tied else 0
    always += waiting if held else 0
    done = outer_gradients
    if head_gradient:
        logits = scores or c * vocab * rows + capped
        into = tokens if shape.num_classes and shape.is_decoder else rows
        passing = into * widths.compute * shape.hidden_size + (held and head_gradient) - (held and waiting)
        if copied:  # a float32 gradient is made in half precision first; logits and the weight's copy are gone then
            yield moment("head", head_gradient, kept + outside, 0, copy + passing)
        else:
            yield moment("head", head_gradient, kept + outside, logits, passing)
        done += head_gradient
    yield moment("backward", done, kept + outside, 0, tail_passing)
    for run in reversed(runs):
        kept -= run.count * (inputs or run.saved)
        for place in {run.count - 1, 0}:
            before = done + run.gradients * (run.count - 1 - place)
            if shape.post_norm and not widths.mixed:  # its maps read the input itself
                shared = inputs and run.blocks[0].saved
            below = kept + place * (inputs or run.saved) + inputs - shared
            if checkpointing:  # the layer's inside is made once more: its last sums stand beside all that it keeps
                last_sums = (2 + widths.mixed + shape.post_norm) * widths.stream * shape.hidden_size
                if not (shape.post_norm and run.keeps_inner):
                    last_sums += c * (shape.hidden_size + shape.intermediate_size)
                yield moment("backward", before, below + run.saved, 0, tokens * last_sums)
            yield from _backward(run, moment, before, below)
        done += run.gradients * run.count
    if plan.full:
        tables = [widths.weight * part.num_parameters for part in shape.others if part.kind == "embedding"]
        table = sum(tables)
        passing = tokens * widths.stream * shape.hidden_size + (max(tables) if held else 0)
        if shape.tied:
            passing += waiting  # the head's gradient, the embedding's, and their sum
        yield moment("embedding", done + table, 0, 0, passing)
    yield Moment("optimizer", plan.gradient_bytes, 0, 0, always)


def _forward_passing(shape: ModelShape, step: Step) -> int:
    """What one layer holds on the way up when nothing is kept, in bytes."""
    c, s, h = step.widths.compute, step.widths.stream, shape.hidden_size
    inner = c * shape.intermediate_size * (3 if shape.gated else FORWARD_PASSES.get(shape.activation, 2))
    # The layer's input, the residual and, until the model returns, the embedding's output; before a norm one more.
    mlp = h * ((3 if shape.is_decoder else 2) * s + c) + inner
    scores = scores_of(shape, step)
    if scores is None:
        return step.tokens * mlp
    # q, and k and v for every head; inside sdpa q scaled, and all three in float32.
    products = 3 * c + (0 if step.eager else 4 if c == 4 else 12)
    # The embedding's output, the residual, and the norm's output where the norm comes first.
    held = 2 * s if shape.post_norm else 2 * s + c
    # The scores, and the mask.
    masked = step.eager or step.padded  # sdpa turns a mask of booleans into numbers
    made = shape.num_heads * step.seq_length * scores.forward + (s * step.seq_length if masked else 0)
    return step.tokens * max(mlp, made + h * held + products * shape.query_width)


def _last_sum(shape: ModelShape, plan: Plan, step: Step) -> int:
    """What BERT's last norm, the end of its forward pass, has beside what the layers keep, in bytes: its input and
    output, the result of the last map, and whatever the layer's maps have read and not kept."""
    c, s, h = step.widths.compute, step.widths.stream, shape.hidden_size
    fed = {name for part in shape.others if part.per_layer for name in part.feeds}
    trained = plan.layer(shape.num_layers - 1)
    kept = {(x.group, x.name in fed) for x in shape.linears if x.per_layer and trained.trains(x)}
    held = h * (2 * s + c)
    if ("attention", True) not in kept:
        held += 2 * s * h  # the layer's input, and the first one's, which the model holds until it returns
    if ("mlp", True) not in kept:
        held += s * h
    if ("mlp", False) not in kept and not trained.scales:
        # DistilBERT's MLP has let go of it by its norm; it is highest just before.
        held += c * shape.intermediate_size - (s * h if shape.model_type == "distilbert" else 0)
    return step.tokens * held


def _backward(run: _Run, moment: Callable[..., Moment], done: int, below: int) -> Iterator[Moment]:
    here = run.saved
    for block in reversed(run.blocks):
        yield moment("backward", done, below + here, 0, block.passing)
        here -= block.saved
        done += block.gradients


def layer_runs(shape: ModelShape, plan: Plan, step: Step, checkpointing: bool) -> list[_Run]:
    """The layers from below to above, those that are alike and adjoin taken together."""
    # Checkpointing asks for gradients at the embedding's output, so that they reach every layer.
    flows = plan.full or checkpointing or any(name.endswith("project_in") for name in plan.outer)
    parts: tuple[Part, ...] = (*shape.linears, *shape.others, *shape.experts)
    partial = [part.layers for part in parts if part.layers is not None]
    cuts = {0, shape.num_layers, *(i for layers in partial for i in edges(layers))}
    cuts.update(i for layers, _ in plan.layers for i in edges(layers))
    if not flows:
        # The first trained layer has an input that needs no gradient, the next one has.
        first = (
            0 if plan.elsewhere.anything else min((layers[0] for layers, _ in plan.layers), default=shape.num_layers)
        )
        cuts.update((first, min(first + 1, shape.num_layers)))
    runs: list[_Run] = []
    for start, stop in pairwise(sorted(cuts)):
        trained = plan.layer(start)
        keeps_inner = any(trained.trains(x) for x in shape.linears if x.per_layer and x.group == "mlp")
        runs.append(_Run(tuple(layer_blocks(shape, start, trained, flows, step)), stop - start, keeps_inner))
        flows = flows or trained.anything
    return runs


def _head_parameters(shape: ModelShape) -> int:
    return next((x.in_features * x.out_features for x in shape.linears if x.name == shape.output_head), 0)


def _is_under_layers(part: Part) -> bool:
    return "embeddings" in part.name or part.name.endswith("embeddings_layernorm")


def _under_layers(shape: ModelShape, step: Step) -> int:
    """Bytes kept below the first layer, where the embedding's output needs a gradient: a norm's and dropout's."""
    widths = step.widths
    norms = [part for part in shape.others if part.kind == "norm" and not part.per_layer and _is_under_layers(part)]
    saved = sum(norm_saved(shape, norm, False, True, widths) for norm in norms)
    return step.tokens * (saved + shape.embedding_dropout * step.dropout_mask(widths.stream) * shape.hidden_size)


def _outside(shape: ModelShape, plan: Plan, step: Step, rows: int, flows: bool) -> tuple[int, int, int]:
    """(saved, passing at the last norm, gradients) of what stands outside the layers, in bytes."""
    widths, saved, passing, gradients = step.widths, 0, 0, 0
    for part in shape.others:
        if part.kind != "norm" or part.per_layer:
            continue
        if _is_under_layers(part):
            gradients += widths.weight * part.num_parameters if plan.full else 0
            continue
        saved += step.tokens * norm_saved(shape, part, plan.full, flows, widths)
        passing = max(passing, step.tokens * norm_passing(shape, part, plan.full, widths))
        gradients += widths.weight * part.num_parameters if plan.full else 0
    if shape.num_classes:
        more, grown = _outside_classifier(shape, plan, step)
        into_all = step.widths.stream * shape.hidden_size * step.tokens
        return saved + more, max(passing, into_all) if flows else 0, gradients + grown
    for linear in shape.linears:
        if linear.per_layer or linear.group == "attention":
            continue
        at = rows if linear.name == shape.output_head else step.tokens
        if flows and linear.group == "projection" and shape.output_head and not shape.is_decoder:
            saved += step.tokens * widths.compute * linear.out_features  # its activation's input
        if plan.full or (plan.head and linear.name == shape.output_head):
            saved += at * widths.compute * linear.in_features
        elif linear.name in plan.outer:
            r = plan.outer[linear.name]
            saved += at * widths.compute * (linear.in_features + r)
            gradients += plan.width * r * (linear.in_features + linear.out_features)
    # On the way out of the head: its rows' gradient, and twice the room of every token to put it into.
    into_rows = step.widths.stream * shape.hidden_size * (rows + 2 * step.tokens)
    return saved, max(passing, into_rows) if flows else 0, gradients


def _outside_classifier(shape: ModelShape, plan: Plan, step: Step) -> tuple[int, int]:
    """(saved, gradients but for the task head's) of a classifier's maps behind the layers, in bytes."""
    widths, saved, gradients = step.widths, 0, 0
    behind = [x for x in shape.linears if not x.per_layer and not x.name.endswith(("project_in", "embed_proj"))]
    for linear in behind:
        at = step.tokens if shape.is_decoder else step.tokens // step.seq_length
        new, rank = linear.name in shape.task_head, plan.outer.get(linear.name, 0)
        if new or plan.full or rank:
            saved += at * widths.compute * (linear.in_features + rank)
        if plan.full and not new:
            gradients += widths.weight * linear.num_parameters
        gradients += plan.width * rank * (linear.in_features + linear.out_features)
    # The first token's hidden state is a view: where a trained map reads it as it is, all tokens' are kept.
    first = behind[0]
    copied = widths.mixed or (shape.num_dropouts > 0 and shape.model_type in _DROPPED_FIRST)
    if not shape.is_decoder and not copied and (first.name in shape.task_head or plan.full or first.name in plan.outer):
        saved += step.tokens * widths.stream * shape.hidden_size
    return saved, gradients


# Dropout stands between the first token's hidden state and the classifier's first map.
_DROPPED_FIRST = ("deberta-v2", "roberta", "xlm-roberta")
