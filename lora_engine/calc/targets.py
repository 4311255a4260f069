"""What a LoRA config adapts in a shape: which maps, how many, with which rank.

A name's rule is tried once for all layers wherever it cannot tell them apart, so the work grows with the
number of different maps and not with the number of modules.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from lora_engine.calc.experts import FUSED, Reading, read_targets
from lora_engine.calc.matching import (
    ALIASES,
    Rule,
    module_rule,
    name_rule,
    no_match,
    number_rule,
    parse_targets,
    select_by_config,
    select_modules,
    shown,
    unmatched,
)
from lora_engine.calc.structure import LinearShape, ModelShape, Part
from lora_engine.config import LoraConfig, Pattern
from lora_engine.errors import ConfigError, TargetError

__all__ = [
    "ALIASES",
    "Selection",
    "Target",
    "parse_targets",
    "select_by_config",
    "select_linears",
    "select_modules",
]


@dataclass(frozen=True)
class Target:
    """`count` equal maps that get an adapter of one rank. `rank` None means the config's r, `times` over;
    `num_experts` maps share one 3-D parameter, with r ranks for each; `parameter` says that target_parameters found
    it."""

    name: str
    count: int
    in_features: int
    out_features: int
    rank: int | None = None
    times: int = 1
    num_experts: int = 1
    parameter: bool = False
    linear: LinearShape | None = None

    @property
    def values_per_rank(self) -> int:
        """What one rank adds in all of them: A (r E, in) and B (out, r E) of E experts."""
        return self.count * self.num_experts * (self.in_features + self.out_features)

    def r(self, config: LoraConfig) -> int:
        return config.r * self.times if self.rank is None else self.rank


@dataclass(frozen=True)
class Selection:
    """What a config adapts in a shape, whatever its r.

    `targets` holds every adapted map once, by rank. `linears` counts the adapted modules of each linear.
    `patterns` lists each different set of targets inside a layer with the layers that have it; layers without any are
    left out. `first_layer` is the first adapted layer, `num_layers` when none is."""

    targets: tuple[Target, ...]
    linears: tuple[tuple[LinearShape, int], ...]
    patterns: tuple[tuple[tuple[Target, ...], tuple[int, ...]], ...]
    outer: frozenset[str]
    first_layer: int
    values_per_rank: int  # sum of in + out over what has rank r: LoRA trains r times this ...
    fixed_values: int  # ... and this, where rank_pattern says the rank
    num_outputs: int  # sum of out over the adapted linears: DoRA's magnitudes
    unmatched: tuple[str, ...] = ()
    unused_patterns: tuple[str, ...] = ()


def select_linears(shape: ModelShape, method: LoraConfig) -> Selection:
    """What `method` adapts in `shape`, modules and parameters. Cached over everything but r and lora_alpha.

    Raises TargetError when nothing matches, or something that takes no adapter, ConfigError for DoRA or dropout on
    parameters: their update is added to the weight, which leaves nothing to normalise or to drop."""
    reading = Reading(method.target_modules, method.target_parameters)
    if shape.experts:
        linears = (linear.name for linear in shape.linears if linear.name != shape.output_head)
        reading = read_targets(shape.model_type, linears, method)
    selection = _select(
        shape,
        reading.target_modules,
        method.exclude_modules,
        method.layers_to_transform,
        method.layers_pattern,
        method.rank_pattern,
        method.alpha_pattern,
        reading.target_parameters,
        reading.fused,
    )
    if method.use_dora or method.lora_dropout:
        for target in selection.targets:
            if target.parameter and method.use_dora:
                raise ConfigError("use_dora", True, f"False where {target.name} is adapted, a parameter of no Linear")
            if target.parameter:
                allowed = f"0 where {target.name} is adapted, a parameter of no Linear"
                raise ConfigError("lora_dropout", method.lora_dropout, allowed)
    return selection


@lru_cache(maxsize=256)
def _select(
    shape: ModelShape,
    target_modules: str | tuple[str, ...],
    exclude_modules: str | tuple[str, ...],
    layers_to_transform: int | tuple[int, ...] | None,
    layers_pattern: str | tuple[str, ...] | None,
    rank_pattern: Pattern,
    alpha_pattern: Pattern,
    target_parameters: tuple[str, ...],
    fused: bool,
) -> Selection:
    rule = module_rule(target_modules, shape.output_head, exclude_modules, layers_to_transform, layers_pattern)
    if not (isinstance(target_modules, str) and target_modules.lower() in ALIASES):
        _refuse_unfit(shape, target_modules, rule)
    found = [(linear, hits) for linear in shape.linears if (hits := _hits(shape, linear, linear.name, rule))]
    parameters = _find_parameters(shape, target_parameters, found) if target_parameters else []
    if not found and not parameters:
        if not target_modules:
            known = ", ".join(dict.fromkeys(part.name for part in shape.experts)) or "q_proj.weight, say"
            raise TargetError(
                f"target_parameters is {shown(target_parameters)}, which matches no parameter; allowed: {known}."
            )
        raise no_match(target_modules, shape.linear_names, exclude_modules, layers_to_transform)
    if shape.task_head:  # trained as it is, whatever names it (methods.inject)
        found = [(linear, hits) for linear, hits in found if linear.name not in shape.task_head]
        parameters = [each for each in parameters if each[0].name not in shape.task_head]
    by_rank = _rank_splitter(shape, rank_pattern)
    adapted: list[tuple[Target, tuple[int, ...]]] = []
    for linear, hits in found:
        sizes = linear.in_features, linear.out_features
        for rank, layers in by_rank(linear, linear.name, hits):
            adapted.append((Target(linear.name, len(layers), *sizes, rank, linear=linear), layers))
    for part, key, (experts, in_features, out_features), hits in parameters:
        for rank, layers in by_rank(part, key, hits):
            times = 2 if fused and rank is None and key.endswith(f".{FUSED}") else 1
            adapted.append((Target(key, len(layers), in_features, out_features, rank, times, experts, True), layers))
    targets = tuple(target for target, _ in adapted)
    patterns = _layer_patterns(shape, adapted)
    names = [name for linear, hits in found for name in _names(shape, linear, linear.name, hits)]
    listed = () if isinstance(target_modules, str) else target_modules
    return Selection(
        targets=targets,
        linears=tuple((linear, len(hits)) for linear, hits in found),
        patterns=tuple(patterns),
        outer=frozenset(target.name for target, layers in adapted if layers == _OUTSIDE),
        first_layer=min((layers[0] for _, layers in patterns), default=shape.num_layers),
        values_per_rank=sum(t.times * t.values_per_rank for t in targets if t.rank is None),
        fixed_values=sum(t.rank * t.values_per_rank for t in targets if t.rank is not None),
        num_outputs=sum(len(hits) * linear.out_features for linear, hits in found),
        unmatched=unmatched(listed, _some_names(shape) if rule.layerless else shape.linear_names),
        unused_patterns=_unused(shape, (rank_pattern, alpha_pattern), names, parameters),
    )


# Stands for the layers of a part that is in none of them.
_OUTSIDE = (-1,)

# A parameter that target_parameters found: its part, its name, (experts, in, out), its layers.
Splitter = Callable[[Part, str, tuple[int, ...]], list[tuple[int | None, tuple[int, ...]]]]
Found = tuple[Part, str, tuple[int, int, int], tuple[int, ...]]


def _names(shape: ModelShape, part: Part, name: str, layers: Iterable[int]) -> list[str]:
    """Full names of module `name` of `part` in these layers ("" is the layer itself)."""
    if not part.per_layer:
        return [name]
    path, end = part.path or shape.layer_path, f".{name}" if name else ""
    return [f"{path}.{i}{end}" for i in layers]


def _hits(shape: ModelShape, part: Part, name: str, rule: Rule) -> tuple[int, ...]:
    """The layers in which `rule` means `name` of `part`; _OUTSIDE for one that stands outside the layers."""
    layers = shape.layers_of(part) if part.per_layer else _OUTSIDE
    if rule.layerless:
        return layers if layers and rule.test(_names(shape, part, name, layers[:1])[0]) else ()
    if rule.named and rule.index and layers != _OUTSIDE:
        # Two names say how the number is read: it is the layer's, or another that is the same in all layers.
        first, second = _names(shape, part, name, (1, 2))
        if not rule.named(first):
            return ()
        read = rule.index(first), rule.index(second)
        if read == (1, 2):
            return tuple(i for i in layers if i in rule.layers)
        if read[0] == read[1]:
            return layers if read[0] in rule.layers else ()
    return tuple(i for i, full in zip(layers, _names(shape, part, name, layers), strict=True) if rule.test(full))


def _rank_splitter(shape: ModelShape, rank_pattern: Pattern) -> Splitter:
    """(part, name, layers) -> the layers apart by the rank that `rank_pattern` gives; None stands for r."""
    if not rank_pattern:
        return lambda _part, _name, hits: [(None, hits)]
    rank_of, layerless = number_rule(rank_pattern)

    def split(part: Part, name: str, hits: tuple[int, ...]) -> list[tuple[int | None, tuple[int, ...]]]:
        groups: dict[float | None, list[int]] = {}
        if layerless:
            groups[rank_of(_names(shape, part, name, hits[:1])[0])] = list(hits)
        else:
            for i, full in zip(hits, _names(shape, part, name, hits), strict=True):
                groups.setdefault(rank_of(full), []).append(i)
        return [(None if rank is None else int(rank), tuple(layers)) for rank, layers in groups.items()]

    return split


def _layer_patterns(
    shape: ModelShape, adapted: list[tuple[Target, tuple[int, ...]]]
) -> list[tuple[tuple[Target, ...], tuple[int, ...]]]:
    """Each different set of targets in a layer with its layers, in the order of the layers."""
    in_layer: dict[int, list[int]] = {}
    for number, (_, layers) in enumerate(adapted):
        if layers != _OUTSIDE:
            for i in layers:
                in_layer.setdefault(i, []).append(number)
    groups: dict[tuple[int, ...], list[int]] = {}
    for i in range(shape.num_layers):
        if i in in_layer:
            groups.setdefault(tuple(in_layer[i]), []).append(i)
    return [(tuple(adapted[number][0] for number in key), tuple(layers)) for key, layers in groups.items()]


def _refuse_unfit(shape: ModelShape, target_modules: str | tuple[str, ...], rule: Rule) -> None:
    """PEFT walks over every module; one that is matched and is no linear is an error there and here."""
    known: set[str] = set()
    modules: list[tuple[Part, str, str]] = []
    for other in shape.others:
        known.add(other.name)
        modules.append((other, other.name, other.kind))
    parts: tuple[Part, ...] = (*shape.others, *shape.linears, *shape.experts)
    for part in parts:
        name = part.name
        while name := name.rpartition(".")[0]:
            if name not in known:
                known.add(name)
                modules.append((part, name, "block"))
        if part.per_layer and (part.path or shape.layer_path) not in known:
            path = part.path or shape.layer_path
            known.add(path)
            modules.append((part, "", "block"))
            outer = path
            while outer:
                if rule.test(outer):
                    raise _unfit(target_modules, outer, "block")
                outer = outer.rpartition(".")[0]
    for part, name, kind in modules:
        if hits := _hits(shape, part, name, rule):
            raise _unfit(target_modules, _names(shape, part, name, hits[:1])[0], kind)


def _unfit(target_modules: str | tuple[str, ...], name: str, kind: str) -> TargetError:
    article = "an" if kind[0] in "aeiou" else "a"
    return TargetError(
        f"target_modules is {shown(target_modules)}, which matches {name!r}, {article} {kind}; "
        "allowed: Linear and Conv1D modules."
    )


def _parameters_of(shape: ModelShape) -> list[tuple[Part, str, tuple[int, int, int] | None]]:
    """Every parameter's part, name and (experts, in, out); None where it is a vector."""
    listed: list[tuple[Part, str, tuple[int, int, int] | None]] = []
    for linear in shape.linears:
        listed.append((linear, f"{linear.name}.weight", (1, linear.in_features, linear.out_features)))
        if linear.has_bias:
            listed.append((linear, f"{linear.name}.bias", None))
    for other in shape.others:
        if not other.num_parameters:
            continue
        matrix = other.kind != "norm" and other.num_parameters > other.width
        sizes = (1, other.width, other.num_parameters // other.width) if matrix else None
        if other.is_matrix:
            sizes = (1, other.width // other.num_groups, other.num_groups)
        listed.append((other, f"{other.name}.weight", sizes))
        if other.kind == "norm" and shape.norm_kind == "layer":
            listed.append((other, f"{other.name}.bias", None))
    for stack in shape.experts:
        listed.append((stack, stack.name, (stack.num_experts, stack.in_features, stack.out_features)))
        if stack.has_bias:  # a matrix (experts, out) to PEFT
            listed.append((stack, f"{stack.name}_bias", (1, stack.out_features, stack.num_experts)))
    return listed


def _find_parameters(
    shape: ModelShape, target_parameters: tuple[str, ...], modules: list[tuple[LinearShape, tuple[int, ...]]]
) -> list[Found]:
    """What target_parameters means (peft/tuners/tuners_utils.py, _inject_parameters): neither exclude_modules nor
    layers_to_transform touch it. Raises TargetError for vectors and for weights that have an adapter already."""
    rule, taken = name_rule(target_parameters), {linear.name: set(hits) for linear, hits in modules}
    found = []
    for part, key, sizes in _parameters_of(shape):
        hits = _hits(shape, part, key, rule)
        if not hits:
            continue
        full = _names(shape, part, key, hits[:1])[0]
        if sizes is None:
            raise TargetError(
                f"target_parameters is {shown(target_parameters)}, which matches {full!r}, a vector; "
                "allowed: parameters of two or three dimensions."
            )
        if taken.get(part.name, set()) & set(hits):
            raise TargetError(
                f"target_parameters is {shown(target_parameters)}, which matches {full!r}; allowed: "
                "parameters of modules that target_modules leaves alone."
            )
        found.append((part, key, sizes, hits))
    return found


def _some_names(shape: ModelShape) -> list[str]:
    """A full name of each linear."""
    return [name for linear in shape.linears for name in _names(shape, linear, linear.name, (0,))]


def _unused(
    shape: ModelShape, patterns: tuple[Pattern, Pattern], names: list[str], parameters: list[Found]
) -> tuple[str, ...]:
    """Keys of rank_pattern and alpha_pattern that no adapted name ends in."""
    if not any(patterns):
        return ()
    full = names + [name for part, key, _, hits in parameters for name in _names(shape, part, key, hits)]
    unused = []
    for pattern in patterns:
        for key, value in pattern.items() if isinstance(pattern, Mapping) else pattern:
            value_of, _ = number_rule(((key, value),))
            if not any(value_of(name) is not None for name in full):
                unused.append(str(key))
    return tuple(dict.fromkeys(unused))
