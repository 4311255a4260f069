"""Floating-point operations of a training step: a multiply and an add are two."""

from dataclasses import dataclass

from lora_engine.calc.params import trained_lora_parameters
from lora_engine.calc.structure import ExpertShape, LinearShape, ModelShape
from lora_engine.calc.targets import Selection, select_linears
from lora_engine.config import BottleneckConfig, FullConfig, HeadConfig, LoraConfig, MethodConfig, PrefixConfig
from lora_engine.errors import ConfigError

# Where a map stands in a layer, in the order of the forward pass. In a parallel block (GPT-NeoX, Phi, Falcon) the MLP
# reads what attention reads, so what is trained in attention is not before it.
QKV, SCORES, ATTENTION_OUT, MLP_IN, MLP_OUT = range(5)
BELOW = frozenset({-1})  # the layer's input needs a gradient


@dataclass(frozen=True)
class StepFlops:
    """One optimizer step over `tokens` tokens (all micro-batches). `recomputed`: what checkpointing does again."""

    forward: int
    backward: int
    recomputed: int
    tokens: int

    @property
    def total(self) -> int:
        return self.forward + self.backward + self.recomputed

    @property
    def per_token(self) -> float:
        return self.total / self.tokens


def estimate_step_flops(
    shape: ModelShape,
    method: MethodConfig,
    batch_size: int,
    seq_length: int,
    *,
    accumulation: int = 1,
    checkpointing: bool = False,
) -> int:
    """`count_step_flops(...).total`."""
    return count_step_flops(
        shape, method, batch_size, seq_length, accumulation=accumulation, checkpointing=checkpointing
    ).total


def count_step_flops(
    shape: ModelShape,
    method: MethodConfig,
    batch_size: int,
    seq_length: int,
    *,
    accumulation: int = 1,
    checkpointing: bool = False,
) -> StepFlops:
    """Matrix products of forward and backward over `accumulation` x `batch_size` x `seq_length` tokens.

    A map of N weights costs 2N a token forward, 2N for its input's gradient and, when it is trained, 2N for its own:
    6N for full fine-tuning, 4N on a frozen base (Kaplan et al. 2020, section 2.1). Nothing goes back to where nothing
    is trained: not below the first adapted map, not into the base at all when only the head is. Of experts a token
    meets `experts_per_token`. Checkpointing runs the layers forward once more. Attention counts whole score matrices,
    although a causal kernel skips half, and not what a flash kernel recomputes; every token passes the head, although
    our loop skips unlabelled ones. Norms, activations and softmax are left out: under 1 % of a model of any size.

    Raises ConfigError, TargetError."""
    for argument, size in (("batch_size", batch_size), ("seq_length", seq_length), ("accumulation", accumulation)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ConfigError(argument, size, "a whole number of at least 1")
    selection = select_linears(shape, method) if isinstance(method, LoraConfig) else None
    first, trained = _first_trained(shape, method, selection)
    here = _adapted_in(selection, first)
    reached = first < shape.num_layers
    if checkpointing and reached:
        # Checkpointed layers need an input with a gradient, so it goes back through all of them.
        first, trained = 0, BELOW
    full = isinstance(method, FullConfig)
    stages, after_layers = _stages(shape), _after_layers(shape)
    forward = backward = in_layers = 0
    maps: tuple[LinearShape | ExpertShape, ...] = (*shape.linears, *shape.experts)
    for part in maps:
        cost = 2 * part.in_features * part.out_features
        cost *= shape.experts_per_token if isinstance(part, ExpertShape) else 1
        forward += part.count * cost
        if part.per_layer:
            in_layers += part.count * cost
            layers = shape.layers_of(part)
            passing = sum(layer > first for layer in layers)
            passing += first in layers and _goes_back(shape, stages[part.name], trained)
            backward += passing * cost
        elif full or (reached and part.name in after_layers):
            backward += part.count * cost
        if full:
            backward += part.count * cost  # its own gradient
    # q k^T and weights v, 2 * keys * width each; backward does each product twice.
    keys = seq_length + (method.prefix_length if isinstance(method, PrefixConfig) else 0)
    scores = 4 * keys * shape.query_width
    forward += shape.num_layers * scores
    in_layers += shape.num_layers * scores
    backward += 2 * scores * max(0, shape.num_layers - first - 1)
    if reached:
        backward += _score_products(method, trained, here) * scores // 2
    own = _own_flops(shape, method, selection, first, trained)
    forward, backward = forward + own.forward, backward + own.backward
    tokens = accumulation * batch_size * seq_length
    return StepFlops(
        forward=tokens * forward + accumulation * own.forward_once,
        backward=tokens * backward + accumulation * own.backward_once,
        recomputed=tokens * (in_layers + own.forward) if checkpointing and reached else 0,
        tokens=tokens,
    )


def _stages(shape: ModelShape) -> dict[str, int]:
    """Where each map of a layer stands: what a norm feeds enters attention or the MLP, the rest leaves it."""
    fed = {name for part in shape.others if part.per_layer for name in part.feeds}
    stages = {}
    for linear in shape.linears:
        if linear.per_layer and linear.group == "attention":
            stages[linear.name] = QKV if linear.name in fed else ATTENTION_OUT
        elif linear.per_layer:
            stages[linear.name] = MLP_IN if linear.name in fed else MLP_OUT
    for expert in shape.experts:
        stages[expert.name] = MLP_OUT if expert.out_features == shape.hidden_size else MLP_IN
    return stages


def _after_layers(shape: ModelShape) -> set[str]:
    """The maps that stand behind the layers (the head, OPT's project_out), not before them (project_in)."""
    return {x.name for x in shape.linears if not x.per_layer and not x.name.endswith("project_in")}


def _goes_back(shape: ModelShape, at: int, trained: frozenset[int]) -> bool:
    """Whether what stands `at` this stage of the first trained layer passes a gradient on to its input: something is
    trained before it."""
    if shape.parallel and at >= MLP_IN:
        return trained == BELOW or (at == MLP_OUT and MLP_IN in trained)
    return any(stage < at for stage in trained)


def _first_trained(shape: ModelShape, method: MethodConfig, selection: Selection | None) -> tuple[int, frozenset[int]]:
    """(first layer that a gradient reaches, `num_layers` when it reaches none; the stages trained in it)."""
    none = shape.num_layers, frozenset[int]()
    if isinstance(method, FullConfig):
        return 0, BELOW
    if isinstance(method, PrefixConfig):
        return (0, frozenset({SCORES})) if method.prefix_length else none
    if isinstance(method, BottleneckConfig):
        return 0, frozenset({ATTENTION_OUT, MLP_OUT} if method.placement == "houlsby" else {MLP_OUT})
    if isinstance(method, HeadConfig):
        return none
    if selection is None:
        return 0, frozenset({QKV})  # what else there is trains something in every layer
    if selection.outer - _after_layers(shape):
        return 0, BELOW
    if selection.first_layer >= shape.num_layers:
        return none
    stages = _stages(shape)
    return selection.first_layer, frozenset(
        stages.get(name, QKV) for name in _adapted_in(selection, selection.first_layer)
    )


def _adapted_in(selection: Selection | None, layer: int) -> frozenset[str]:
    patterns = selection.patterns if selection else ()
    return next(
        (frozenset(t.name for t in targets) for targets, layers in patterns if layer in layers), frozenset[str]()
    )


def _score_products(method: MethodConfig, trained: frozenset[int], here: frozenset[str]) -> int:
    """How many of attention's four backward products the first trained layer needs: gradients of the weights (when q
    or k has one), v, q and k. `here` names what LoRA adapts in it."""
    if trained == BELOW:
        return 4
    if isinstance(method, PrefixConfig):
        return 3  # its keys and values are trained, its queries stand before everything trained
    if QKV not in trained:
        return 0
    last = {name.rpartition(".")[2] for name in here}
    q, k, v = (bool(last & {f"{x}_proj", x, word}) for x, word in (("q", "query"), ("k", "key"), ("v", "value")))
    separate = q or k or v
    return (q or k) + v + q + k if separate else 4  # a fused map trains all three


@dataclass(frozen=True)
class _Own:
    """What a method adds: a token, and once a micro-batch."""

    forward: int = 0
    backward: int = 0
    forward_once: int = 0
    backward_once: int = 0


def _own_flops(
    shape: ModelShape, method: MethodConfig, selection: Selection | None, first: int, trained: frozenset[int]
) -> _Own:
    if isinstance(method, LoraConfig) and selection is not None:
        return _lora_flops(shape, method, selection, first, trained)
    if isinstance(method, BottleneckConfig):
        inner = max(1, shape.hidden_size // method.reduction_factor)
        one = 2 * shape.hidden_size * inner
        weights = shape.num_layers * (2 if method.placement == "houlsby" else 1) * one
        # The first down-projection has nothing below it to pass a gradient to.
        return _Own(2 * weights, 4 * weights - (0 if trained == BELOW else one))
    if isinstance(method, PrefixConfig) and method.reparametrize and method.prefix_length:
        # In each layer (prefix, kv) times (kv, encoder) times (encoder, 2 * kv): Li and Liang 2021, section 4.3.
        encoder = method.encoder_hidden_size or shape.hidden_size
        weights = shape.num_layers * encoder * 3 * shape.kv_width
        return _Own(forward_once=2 * method.prefix_length * weights, backward_once=4 * method.prefix_length * weights)
    if isinstance(method, HeadConfig):
        heads = {shape.output_head, *shape.task_head}
        return _Own(backward=sum(2 * x.in_features * x.out_features for x in shape.linears if x.name in heads))
    return _Own()


def _lora_flops(
    shape: ModelShape, method: LoraConfig, selection: Selection, first: int, trained: frozenset[int]
) -> _Own:
    """2 a weight forward and 4 backward, but A passes nothing on where its input needs no gradient."""
    weights, once = trained_lora_parameters(selection, method), 0
    if method.use_dora:
        # Magnitudes are no product; the norm of W0 + B A needs B A, without a gradient (Liu et al. 2024, section 4.3).
        weights -= sum(count * x.out_features for x, count in selection.linears)
        once = sum(2 * method.r * count * x.in_features * x.out_features for x, count in selection.linears)
    stages, after = _stages(shape), _after_layers(shape)
    here, idle = _adapted_in(selection, first), 0
    for linear, _ in selection.linears:
        if linear.per_layer:
            passes = linear.name not in here or _goes_back(shape, stages[linear.name], trained)
        else:
            passes = linear.name in after and first < shape.num_layers
        idle += 0 if passes else 2 * method.r * linear.in_features
    return _Own(2 * weights, 4 * weights - idle, forward_once=once)
