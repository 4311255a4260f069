"""Which modules a LoRA config adapts: PEFT's matching rules, over names.

Source: peft/tuners/tuners_utils.py, check_target_module_exists and _maybe_include_all_linear_layers.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from lora_engine.calc.structure import LinearShape, ModelShape
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
    names: Sequence[str], target_modules: str | Sequence[str], *, output_head: str | None = None
) -> list[str]:
    """The full dotted `names` that `target_modules` adapts, in their order.

    "attention" and "mlp" go by where a name sits; "all-linear" is every given name except `output_head`;
    any other string is a regular expression for the whole name; a list matches a name that is one of its
    items or ends in "." and one. Raises TargetError when nothing matches."""
    if isinstance(target_modules, str):
        chosen = _select_by_text(names, target_modules, output_head)
    else:
        exact, suffixes = set(target_modules), tuple(f".{target}" for target in target_modules)
        chosen = [name for name in names if name in exact or name.endswith(suffixes)]
    if not chosen:
        known = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
        listed = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
        raise TargetError(
            f"target_modules is {_shown(target_modules)}, which matches no module; allowed: {', '.join(ALIASES)}, "
            f"a regular expression for whole names, or some of {listed or '(this model has no linear modules)'}."
        )
    return chosen


def _select_by_text(names: Sequence[str], target: str, output_head: str | None) -> list[str]:
    alias = target.lower()
    if alias == "all-linear":
        return [name for name in names if name != output_head]
    if alias == "attention":
        return [name for name in names if _ATTENTION.search(name)]
    if alias == "mlp":
        return [name for name in names if _MLP.search(name) and not _ATTENTION.search(name)]
    try:
        pattern = re.compile(target)
    except re.error as error:
        raise TargetError(
            f"target_modules is {_shown(target)}, no regular expression ({error}); allowed: {', '.join(ALIASES)}, "
            "a list of names, or a regular expression."
        ) from error
    return [name for name in names if pattern.fullmatch(name)]


def _shown(target: str | Sequence[str]) -> str:
    text = repr(target) if isinstance(target, str) else repr(",".join(target))
    return text if len(text) <= 120 else text[:117] + "..."


@dataclass(frozen=True)
class Selection:
    """What a config adapts in a shape: per linear the number of adapted modules, and per layer which linears.

    `patterns` lists each different set of adapted names inside a layer with the layers that have it; layers
    without any are left out. `first_layer` is the first adapted layer, `num_layers` when none is."""

    linears: tuple[tuple[LinearShape, int], ...]
    patterns: tuple[tuple[frozenset[str], tuple[int, ...]], ...]
    outer: frozenset[str]
    first_layer: int
    unmatched: tuple[str, ...]

    @property
    def values_per_rank(self) -> int:
        """Sum of in + out over the adapted modules: LoRA trains r times this."""
        return sum(count * (linear.in_features + linear.out_features) for linear, count in self.linears)


@lru_cache(maxsize=256)
def select_linears(shape: ModelShape, target_modules: str | tuple[str, ...]) -> Selection:
    """`select_modules` over a shape. Raises TargetError when nothing matches, or something that is no linear."""
    aliased = isinstance(target_modules, str) and target_modules.lower() in ALIASES
    if not aliased:
        _refuse_unfit(shape, target_modules)
    chosen = set(select_modules(shape.linear_names, target_modules, output_head=shape.output_head))
    layers: dict[int, set[str]] = {}
    linears, outer = [], set()
    for linear in shape.linears:
        hits = [i for i, name in enumerate(shape.full_names(linear)) if name in chosen]
        if not hits:
            continue
        linears.append((linear, len(hits)))
        if linear.per_layer:
            for i in hits:
                layers.setdefault(i, set()).add(linear.name)
        else:
            outer.add(linear.name)
    patterns: dict[frozenset[str], list[int]] = {}
    for i in sorted(layers):
        patterns.setdefault(frozenset(layers[i]), []).append(i)
    targets = () if isinstance(target_modules, str) else target_modules
    unmatched = tuple(t for t in targets if not any(n == t or n.endswith(f".{t}") for n in chosen))
    return Selection(
        linears=tuple(linears),
        patterns=tuple((names, tuple(found)) for names, found in patterns.items()),
        outer=frozenset(outer),
        first_layer=min(layers, default=shape.num_layers),
        unmatched=unmatched,
    )


def _refuse_unfit(shape: ModelShape, target_modules: str | tuple[str, ...]) -> None:
    """PEFT walks over every module; one that is matched and is no linear is an error there and here."""
    kinds = {name: part.kind for part in shape.others for name in shape.full_names(part)}
    linear_names = shape.linear_names
    for name in (*linear_names, *kinds):
        while (name := name.rpartition(".")[0]) and name not in kinds:
            kinds[name] = "block"
    try:
        unfit = select_modules(list(kinds), target_modules)[0]
    except TargetError:
        return
    article = "an" if kinds[unfit] == "embedding" else "a"
    raise TargetError(
        f"target_modules is {_shown(target_modules)}, which matches {unfit!r}, {article} {kinds[unfit]}; "
        "allowed: Linear and Conv1D modules."
    )
