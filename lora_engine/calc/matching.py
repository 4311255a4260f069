"""Which names a LoRA config means: PEFT's matching rules.

Source: peft/tuners/tuners_utils.py, check_target_module_exists and _maybe_include_all_linear_layers;
peft/utils/other.py, get_pattern_key.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from lora_engine.config import LoraConfig, Pattern
from lora_engine.errors import ConfigError, TargetError

ALIASES = ("attention", "mlp", "all-linear")

# One dotted part of a name says where a module sits: self_attn.q_proj, attn.c_attn, attention.self.query.
_ATTENTION = re.compile(
    r"(^|\.)(self_attn|attn|attention|self_attention|crossattention|cross_attn|SelfAttention|EncDecAttention)\."
)
_MLP = re.compile(
    r"(^|\.)(mlp|ffn|feed_forward|block_sparse_moe|experts|shared_experts?|intermediate|DenseReluDense)\."
    r"|\.layers?\.\d+\.(fc1|fc2|output\.dense)$"
)
_PLAIN = re.compile(r"[\w-]+(\.[\w-]+)*")
# No part is a number or begins like one, so it cannot tell two layers apart.
_LAYERLESS = re.compile(r"[A-Za-z_][\w-]*(\.[A-Za-z_][\w-]*)*")
_FIRST_INDEX = re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")


@dataclass(frozen=True)
class Rule:
    """`test` says whether a full dotted name is meant; `layerless` that equal names in two layers fare alike.

    Where only layers_to_transform tells them apart, `named` is the layerless rest, `index` reads the number of a
    name's layer, and `layers` are the numbers that are meant."""

    test: Callable[[str], bool]
    layerless: bool
    named: Callable[[str], bool] | None = None
    index: Callable[[str], int | None] | None = None
    layers: frozenset[int] = frozenset()


def parse_targets(text: str) -> str | tuple[str, ...]:
    """What a person typed -> `target_modules`: "q_proj,v_proj" and "q_proj" become tuples of names; an alias
    stays itself; anything else is a regular expression. Raises ConfigError when there is nothing."""
    text = text.strip()
    if text.lower() in ALIASES:
        return text.lower()
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise ConfigError("targets", text, f"{', '.join(ALIASES)}, module names with commas, or a regular expression")
    if all(_PLAIN.fullmatch(name) for name in names):
        return tuple(dict.fromkeys(names))
    return text


def select_modules(
    names: Sequence[str],
    target_modules: str | Sequence[str],
    *,
    output_head: str | None = None,
    exclude_modules: str | Sequence[str] = (),
    layers_to_transform: int | Sequence[int] | None = None,
    layers_pattern: str | Sequence[str] | None = None,
) -> list[str]:
    """The full dotted `names` that `target_modules` adapts, in their order.

    "attention" and "mlp" go by where a name sits; "all-linear" is every given name except `output_head`;
    any other string is a regular expression for the whole name; a list matches a name that is one of its
    items or ends in "." and one. The rest is as in LoraConfig. Raises TargetError when nothing matches."""
    rule = module_rule(target_modules, output_head, exclude_modules, layers_to_transform, layers_pattern)
    chosen = [name for name in names if rule.test(name)]
    if not chosen:
        raise no_match(target_modules, names, exclude_modules, layers_to_transform)
    return chosen


def select_by_config(names: Sequence[str], config: LoraConfig, *, output_head: str | None = None) -> list[str]:
    """`select_modules` with everything that `config` says of modules."""
    return select_modules(
        names,
        config.target_modules,
        output_head=output_head,
        exclude_modules=config.exclude_modules,
        layers_to_transform=config.layers_to_transform,
        layers_pattern=config.layers_pattern,
    )


def module_rule(
    target_modules: str | Sequence[str],
    output_head: str | None = None,
    exclude_modules: str | Sequence[str] = (),
    layers_to_transform: int | Sequence[int] | None = None,
    layers_pattern: str | Sequence[str] | None = None,
) -> Rule:
    """The rule of `select_modules`. Raises TargetError for what is no regular expression."""
    exact: frozenset[str] = frozenset()
    if isinstance(target_modules, str):
        rule = _text_rule(target_modules, output_head)
    else:
        rule, exact = name_rule(target_modules), frozenset(target_modules)
    if exclude_modules:
        if isinstance(exclude_modules, str):
            pattern = re.compile(exclude_modules)
            excluded = Rule(lambda name: pattern.fullmatch(name) is not None, False)
        else:
            excluded = name_rule(exclude_modules)
        kept, away = rule.test, excluded.test
        rule = Rule(lambda name: kept(name) and not away(name), rule.layerless and excluded.layerless)
    listed = (layers_to_transform,) if isinstance(layers_to_transform, int) else layers_to_transform
    if not listed:
        return rule
    chosen, index, named = frozenset(listed), _layer_index(layers_pattern), rule.test
    plain = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern or []
    readable = rule.layerless and all(_LAYERLESS.fullmatch(name) for name in plain)
    return Rule(
        # PEFT: a name given in full is meant whatever its layer.
        lambda name: named(name) and (name in exact or index(name) in chosen),
        False,
        named if readable else None,
        index,
        chosen,
    )


def name_rule(targets: Iterable[str]) -> Rule:
    """Names that are one of `targets`, or end in "." and one."""
    wanted = frozenset(targets)

    def test(name: str) -> bool:
        while name not in wanted:
            _, dot, name = name.partition(".")
            if not dot:
                return False
        return True

    return Rule(test, all(_LAYERLESS.fullmatch(target) for target in wanted))


def unmatched(targets: Sequence[str], names: Iterable[str]) -> tuple[str, ...]:
    """Those of `targets` that mean none of `names`."""
    missing = dict.fromkeys(targets)
    for name in names:
        while name:
            missing.pop(name, None)
            name = name.partition(".")[2]
    return tuple(missing)


def number_rule(pattern: Pattern) -> tuple[Callable[[str], float | None], bool]:
    """(a name -> the value of the first key that it ends in, whether that is the same in every layer)."""
    pairs = pattern if isinstance(pattern, tuple) else tuple(pattern.items())
    compiled = [(re.compile(rf"(.*\.)?({key})$"), value) for key, value in pairs]

    def value_of(name: str) -> float | None:
        return next((value for key, value in compiled if key.match(name)), None)

    return value_of, all(_LAYERLESS.fullmatch(key) for key, _ in pairs)


def no_match(
    target_modules: str | Sequence[str],
    names: Sequence[str],
    exclude_modules: str | Sequence[str] = (),
    layers_to_transform: int | Sequence[int] | None = None,
) -> TargetError:
    known = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    listed = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
    within = "" if layers_to_transform is None else f" in layers_to_transform {layers_to_transform!r}"
    within += f" outside exclude_modules {shown(exclude_modules)}" if exclude_modules else ""
    return TargetError(
        f"target_modules is {shown(target_modules)}, which matches no module{within}; allowed: {', '.join(ALIASES)}, "
        f"a regular expression for whole names, or some of {listed or '(this model has no linear modules)'}."
    )


def shown(target: str | Sequence[str]) -> str:
    text = repr(target) if isinstance(target, str) else repr(",".join(target))
    return text if len(text) <= 120 else text[:117] + "..."


def _text_rule(target: str, output_head: str | None) -> Rule:
    alias = target.lower()
    if alias == "all-linear":
        return Rule(lambda name: name != output_head, True)
    if alias == "attention":
        return Rule(lambda name: _ATTENTION.search(name) is not None, True)
    if alias == "mlp":
        return Rule(lambda name: _MLP.search(name) is not None and not _ATTENTION.search(name), True)
    try:
        pattern = re.compile(target)
    except re.error as error:
        raise TargetError(
            f"target_modules is {shown(target)}, no regular expression ({error}); allowed: {', '.join(ALIASES)}, "
            "a list of names, or a regular expression."
        ) from error
    return Rule(lambda name: pattern.fullmatch(name) is not None, False)


def _layer_index(layers_pattern: str | Sequence[str] | None) -> Callable[[str], int | None]:
    """A name -> the first number after the name of a list of layers (any name without `layers_pattern`)."""
    if not layers_pattern:
        patterns = [_FIRST_INDEX]
    else:
        listed = (layers_pattern,) if isinstance(layers_pattern, str) else layers_pattern
        patterns = [re.compile(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.") for pattern in listed]

    def index(name: str) -> int | None:
        match = next((found for pattern in patterns if (found := pattern.match(name))), None)
        return int(match["idx"]) if match else None

    return index
