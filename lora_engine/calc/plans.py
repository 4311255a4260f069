"""What each method trains, as memory sees it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from lora_engine.calc.blocks import Trained
from lora_engine.calc.params import count_parameters, trained_lora_parameters
from lora_engine.calc.structure import ModelShape
from lora_engine.calc.targets import select_linears
from lora_engine.config import BottleneckConfig, FullConfig, LoraConfig, MethodConfig, PrefixConfig


@dataclass(frozen=True)
class Plan:
    """`layers` says what is trained inside which layers, `elsewhere` what inside the others; `outer` names the maps
    outside the layers that are adapted, each with its rank; `trained` counts the trained parameters, `width` is bytes
    of each and of its gradient. `full`: they are the model's own weights. `head`: they are the output head, a copy of
    its own where it was tied, or the task head. `task_head` of them are a classifier's new head, always in float32."""

    elsewhere: Trained
    layers: tuple[tuple[tuple[int, ...], Trained], ...]
    trained: int
    width: int
    outer: dict[str, int]
    full: bool = False
    head: bool = False
    task_head: int = 0

    def layer(self, i: int) -> Trained:
        """What is trained inside layer i."""
        return next((trained for layers, trained in self.layers if _holds(layers, i)), self.elsewhere)

    @property
    def gradient_bytes(self) -> int:
        return (self.trained - self.task_head) * self.width + 4 * self.task_head

    @property
    def adapter_bytes(self) -> int:
        """Beside the base model's weights."""
        return 0 if self.full else self.gradient_bytes


def edges(layers: tuple[int, ...]) -> tuple[int, ...]:
    """Where runs of neighbouring layers begin and end."""
    if not layers:
        return ()
    if layers[-1] - layers[0] + 1 == len(layers):
        return layers[0], layers[-1] + 1
    return (*layers, *(i + 1 for i in layers))


def _holds(layers: tuple[int, ...], i: int) -> bool:
    return layers[0] <= i <= layers[-1] and (layers[-1] - layers[0] + 1 == len(layers) or i in layers)


def make_plan(shape: ModelShape, method: MethodConfig, *, weight_width: int, adapter_width: int) -> Plan:
    """The plan of `method`. Raises TargetError."""
    return replace(
        PLANNERS[method.method](shape, method, weight_width, adapter_width), task_head=shape.task_head_parameters
    )


def optimizer_bytes(shape: ModelShape, method: MethodConfig, plan: Plan, optimizer: str) -> int:
    """AdamW: two moments in the parameter's type. 8-bit (Dettmers et al. 2021): a byte each and a float32 per
    block of 256, tensors under 4096 values in float32. SGD without momentum: nothing."""
    if optimizer == "sgd":
        return 0
    if optimizer == "adamw":
        return 2 * plan.gradient_bytes
    return sum(
        count * (8 * size if size < 4096 else 2 * (size + 4 * -(-size // 256)))
        for count, size in _trained_tensors(shape, method)
    )


def _trained_tensors(shape: ModelShape, method: MethodConfig) -> list[tuple[int, int]]:
    """(count, number of values) of every trained tensor."""
    tensors: list[tuple[int, int]] = []
    if isinstance(method, LoraConfig):
        for target in select_linears(shape, method).targets:
            r = target.r(method) * target.num_experts
            tensors += [(target.count, r * target.in_features), (target.count, r * target.out_features)]
            if method.use_dora:
                tensors.append((target.count, target.out_features))
        return tensors + [(1, part.num_parameters) for part in shape.task_head_parts]
    if not isinstance(method, FullConfig):
        # One tensor a module: its bias would be apart, and small.
        modules = count_parameters(shape, method).modules
        return [(module.count, module.trainable_parameters // module.count) for module in modules]
    for linear in shape.linears:
        if not linear.tied:
            tensors.append((linear.count, linear.in_features * linear.out_features))
        if linear.has_bias:
            tensors.append((linear.count, linear.out_features))
    for stack in shape.experts:
        tensors.append((stack.count, stack.num_experts * stack.in_features * stack.out_features))
        if stack.has_bias:
            tensors.append((stack.count, stack.num_experts * stack.out_features))
    for part in shape.others:
        vectors = 1 if part.kind == "embedding" or shape.norm_kind == "rms" else 2
        tensors.append((part.count * vectors, part.num_parameters // vectors))
    return tensors


def _full(shape: ModelShape, method: Any, weight_width: int, adapter_width: int) -> Plan:  # noqa: ARG001
    everything = Trained({}, full=True)
    return Plan(everything, (), shape.total_parameters, weight_width, {}, full=True)


def _lora(shape: ModelShape, method: LoraConfig, weight_width: int, adapter_width: int) -> Plan:  # noqa: ARG001
    selection = select_linears(shape, method)
    nothing = Trained({}, adapter_width=adapter_width)
    layers = tuple(
        (
            found,
            replace(nothing, ranks={target.name: target.r(method) for target in targets}, magnitudes=method.use_dora),
        )
        for targets, found in selection.patterns
    )
    outer = {target.name: target.r(method) for target in selection.targets if target.name in selection.outer}
    trained = trained_lora_parameters(selection, method) + shape.task_head_parameters
    return Plan(nothing, layers, trained, adapter_width, outer)


def _same_everywhere(trained: Callable[[ModelShape, Any], Trained]) -> Callable[..., Plan]:
    """A method that does the same in every layer; what it adds is float32."""

    def plan(shape: ModelShape, method: Any, weight_width: int, adapter_width: int) -> Plan:  # noqa: ARG001
        everywhere = trained(shape, method)
        return Plan(everywhere, (), count_parameters(shape, method).trainable_parameters, 4, {})

    return plan


def _bottleneck(shape: ModelShape, method: BottleneckConfig) -> Trained:
    width = max(1, shape.hidden_size // method.reduction_factor)
    return Trained({}, bottleneck=width, houlsby=method.placement == "houlsby")


def _prefix(shape: ModelShape, method: PrefixConfig) -> Trained:  # noqa: ARG001
    return Trained({}, prefix=method.prefix_length)


def _head(shape: ModelShape, method: Any, weight_width: int, adapter_width: int) -> Plan:  # noqa: ARG001
    nothing = Trained({})
    return Plan(nothing, (), count_parameters(shape, method).trainable_parameters, 4, {}, head=True)


# Each method's planner. A method more is a line more.
PLANNERS: dict[str, Callable[..., Plan]] = {
    "lora": _lora,
    "full": _full,
    "head": _head,
    "bottleneck": _same_everywhere(_bottleneck),
    "prefix": _same_everywhere(_prefix),
    "ia3": _same_everywhere(lambda shape, method: Trained({}, scales=True)),  # noqa: ARG005
}
