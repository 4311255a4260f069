"""How many parameters a method trains: closed formulas over a shape, no model is built."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lora_engine.calc.structure import ExpertShape, LinearShape, ModelShape, OtherShape
from lora_engine.calc.targets import Selection, select_linears
from lora_engine.config import BottleneckConfig, FullConfig, HeadConfig, LoraConfig, MethodConfig, PrefixConfig
from lora_engine.errors import TargetError

# PEFT's keys: base_model.model.<module>.lora_A.weight (export.peft_format).
_KEY_EXTRA = len("base_model.model.") + len(".lora_A.weight")

_FILE_START = 8 + len('{"__metadata__":{"format":"pt"}}')  # of a safetensors file, before the tensors' entries
TASK_HEADS = ("classifier", "score", "qa_outputs")  # first part of the names of a classifier's head
_TENSOR_ENTRY = 110  # a tensor's entry in the header, roughly
_HEAD_ENTRY = 75  # that of a task head's tensor, whose name is short


@dataclass(frozen=True)
class ModuleCount:
    """`count` equal modules and what is trained in all of them. An embedding reads a row out of
    `in_features`; a norm has as many outputs as inputs. `formula` is the arithmetic behind `trainable_parameters`."""

    name: str
    count: int
    in_features: int
    out_features: int
    trainable_parameters: int
    formula: str = ""


@dataclass(frozen=True)
class ParameterCount:
    """`total_parameters` is the base model's own, every parameter once, without what LoRA adds
    (PEFT's "all params" is the sum of both). `modules` sums up to `trainable_parameters`."""

    total_parameters: int
    trainable_parameters: int
    trainable_percent: float
    modules: tuple[ModuleCount, ...]
    notes: tuple[str, ...]


Counted = tuple[list[ModuleCount], list[str]]


def count_parameters(shape: ModelShape, method: MethodConfig) -> ParameterCount:
    """What `method` trains in a model of `shape`, by module. Raises TargetError, ConfigError.

    LoRA: r * (in + out) per adapted module (Hu et al. 2021, section 4.1); DoRA: out more, one magnitude per
    output (Liu et al. 2024, section 4). Full: everything. The others: see COUNTERS. Of a classifier its
    new head too."""
    modules, notes = COUNTERS[method.method](shape, method)
    if method.method not in ("full", "head"):  # where it is counted already
        modules += _task_head(shape)
    trainable = sum(module.trainable_parameters for module in modules)
    return ParameterCount(
        total_parameters=shape.total_parameters,
        trainable_parameters=trainable,
        trainable_percent=100.0 * trainable / shape.total_parameters,
        modules=tuple(modules),
        notes=shape.notes + tuple(notes),
    )


def _task_head(shape: ModelShape) -> list[ModuleCount]:
    """The new head of a classifier; nothing for other models."""
    modules = []
    for part in shape.task_head_parts:
        if isinstance(part, LinearShape):
            modules.append(_whole_map(part))
        else:
            text = f"1 x {part.num_parameters}"
            modules.append(_module(part.name, 1, (part.width, part.width), part.num_parameters, [text]))
    return modules


def lora_parameters(in_features: int, out_features: int, config: LoraConfig) -> int:
    """A (r, in) and B (out, r), and DoRA's magnitude (out)."""
    return config.r * (in_features + out_features) + (out_features if config.use_dora else 0)


def trained_lora_parameters(selection: Selection, config: LoraConfig) -> int:
    """The sum over a selection, in closed form: affine in r."""
    magnitudes = selection.num_outputs if config.use_dora else 0
    return config.r * selection.values_per_rank + selection.fixed_values + magnitudes


def adapter_file_bytes(shape: ModelShape, method: MethodConfig) -> int:
    """Size of what is saved, as float32 safetensors: LoRA in PEFT's format, the whole model, or what was trained.
    A reparametrised prefix is saved as the plain prefix.

    The tensors' bytes are exact; the file's header (a JSON entry per tensor) is within a few bytes each."""
    if isinstance(method, LoraConfig):
        return lora_file_bytes(shape, select_linears(shape, method), method)
    if isinstance(method, PrefixConfig):
        return _FILE_START + 4 * _prefix_values(shape, method) + _TENSOR_ENTRY + _task_head_bytes(shape)
    counted = count_parameters(shape, method)
    if isinstance(method, FullConfig):
        tensors = sum(linear.count * (1 + linear.has_bias) for linear in shape.linears) + 2 * len(shape.others)
        tensors += sum(stack.count * (1 + stack.has_bias) for stack in shape.experts)
        return _FILE_START + 4 * counted.trainable_parameters + _TENSOR_ENTRY * tensors
    each = 4 if isinstance(method, BottleneckConfig) else 1  # two maps, each with its bias
    tensors = sum(each * module.count for module in counted.modules if module.name not in shape.task_head)
    own = counted.trainable_parameters - shape.task_head_parameters
    return _FILE_START + 4 * own + _TENSOR_ENTRY * tensors + _task_head_bytes(shape)


def lora_file_bytes(shape: ModelShape, selection: Selection, config: LoraConfig) -> int:
    data = 4 * trained_lora_parameters(selection, config)
    offset = len(str(data))  # most offsets have as many digits as the last
    header = _FILE_START
    for target in selection.targets:
        name, rank = len(target.name), target.r(config) * target.num_experts
        if target.linear is None or target.linear.per_layer:
            name += len(shape.layer_path) + 1 + len(str(shape.num_layers))
        entry = len(',"":{"dtype":"F32","shape":[,],"data_offsets":[,]}') + name + _KEY_EXTRA + 2 * offset
        shapes = 2 * len(str(rank)) + len(str(target.in_features)) + len(str(target.out_features))
        magnitude = entry + len("magnitude_vector") - len("A.weight") if config.use_dora else 0
        header += target.count * (2 * entry + shapes + magnitude)
    # A task head lies in a file of its own beside PEFT's.
    return data + header + (_FILE_START + _task_head_bytes(shape) if shape.task_head else 0)


def _task_head_bytes(shape: ModelShape) -> int:
    tensors = sum(2 if isinstance(part, OtherShape) or part.has_bias else 1 for part in shape.task_head_parts)
    return 4 * shape.task_head_parameters + _HEAD_ENTRY * tensors


def _lora(shape: ModelShape, config: LoraConfig) -> Counted:
    selection = select_linears(shape, config)
    rows: dict[str, list[tuple[str, int, int, int, int]]] = {}
    for target in selection.targets:
        r, inner, out = target.r(config), target.in_features, target.out_features
        times = f"{target.count} x " + (f"{target.num_experts} experts x " if target.num_experts > 1 else "")
        number = r * target.values_per_rank
        if config.use_dora and not target.parameter:
            number += target.count * out
            text = f"{times}({r} x ({inner} + {out}) + {out})"
        else:
            text = f"{times}{r} x ({inner} + {out})"
        rows.setdefault(target.name, []).append((text, target.count, inner, out, number))
    modules = [
        _module(name, sum(g[1] for g in groups), groups[0][2:4], sum(g[4] for g in groups), [g[0] for g in groups])
        for name, groups in rows.items()
    ]
    return modules, _lora_notes(config, selection)


def _full(shape: ModelShape, config: FullConfig) -> Counted:  # noqa: ARG001
    modules = []
    for other in shape.others:
        rows, width = other.width, other.width
        if other.kind == "embedding":
            rows = other.num_parameters // width
            text = f"{other.count} x {rows} x {width}"
        else:
            text = f"{other.count} x {other.num_parameters}"
        modules.append(_module(other.name, other.count, (rows, width), other.count * other.num_parameters, [text]))
    modules += [_whole_map(linear) for linear in shape.linears]
    modules += [_whole_map(stack) for stack in shape.experts]
    notes = [
        f"{linear.name} is the input embedding's weight, which is counted there."
        for linear in shape.linears
        if linear.tied
    ]
    return modules, notes


def _whole_map(part: LinearShape | ExpertShape) -> ModuleCount:
    inner, out, times = part.in_features, part.out_features, f"{part.count} x "
    weight, bias = f"{inner} x {out}", str(out) if part.has_bias else ""
    if isinstance(part, ExpertShape):
        times += f"{part.num_experts} experts x "
    elif part.tied:
        weight = ""
    text = " + ".join(filter(None, (weight, bias))) or "0"
    text = times + (f"({text})" if "+" in text else text)
    return _module(part.name, part.count, (inner, out), part.count * part.num_parameters, [text])


def _head(shape: ModelShape, config: HeadConfig) -> Counted:  # noqa: ARG001
    """The output head, or the maps of a classifier's head."""
    if shape.task_head:
        return _task_head(shape), []
    outer = [linear for linear in shape.linears if not linear.per_layer]
    heads = [linear for linear in outer if linear.name == shape.output_head]
    heads = heads or [linear for linear in outer if linear.name.partition(".")[0] in TASK_HEADS]
    if not heads:
        raise TargetError(
            f"model is a {shape.architecture}, which has no output head; allowed: a language model or a classifier."
        )
    modules, notes = [], []
    for head in heads:
        inner, out = head.in_features, head.out_features
        text = f"{out} x {inner}" + (f" + {out}" if head.has_bias else "")
        modules.append(_module(head.name, 1, (inner, out), inner * out + (out if head.has_bias else 0), [text]))
        if head.tied:
            notes.append(
                f"{head.name} shares its weight with the input embedding and gets a copy of its own to train: the "
                f"model grows from {shape.total_parameters:,} to {shape.total_parameters + inner * out:,} parameters."
            )
    return modules, notes


def _bottleneck(shape: ModelShape, config: BottleneckConfig) -> Counted:
    """Down (m, h) and up (h, m) with their biases, in each place (Houlsby et al. 2019, section 2.1)."""
    h, layers = shape.hidden_size, shape.num_layers
    m = max(1, h // config.reduction_factor)
    places = ("after attention", "after MLP") if config.placement == "houlsby" else ("after MLP",)
    text = f"{layers} x (2 x {h} x {m} + {m} + {h})"
    number = layers * (2 * h * m + m + h)
    return [_module(f"adapter {place}", layers, (h, h), number, [text]) for place in places], []


def _prefix(shape: ModelShape, config: PrefixConfig) -> Counted:
    """A key and a value per layer and position; reparametrised (peft/tuners/prefix_tuning/model.py): an embedding of
    the positions and an MLP to all of them."""
    length, layers, kv = config.prefix_length, shape.num_layers, shape.kv_width
    if not config.reparametrize:
        text = f"{length} x 2 x {layers} x {kv}"
        return [_module("prefix", layers, (length, 2 * kv), _prefix_values(shape, config), [text])], []
    inner, out = config.encoder_hidden_size or shape.hidden_size, 2 * layers * kv
    modules = [
        _module("prefix embedding", 1, (length, kv), length * kv, [f"{length} x {kv}"]),
        _module("prefix MLP, first map", 1, (kv, inner), kv * inner + inner, [f"{kv} x {inner} + {inner}"]),
        _module("prefix MLP, second map", 1, (inner, out), inner * out + out, [f"{inner} x {out} + {out}"]),
    ]
    note = f"After training the MLP is dropped: {_prefix_values(shape, config):,} values are kept."
    return modules, [note]


def _prefix_values(shape: ModelShape, config: PrefixConfig) -> int:
    return config.prefix_length * 2 * shape.num_layers * shape.kv_width


# Where keys and values come from, within a layer; the first that fits.
_KEYS_AND_VALUES = (
    ("self_attn.k_proj", "self_attn.v_proj"), ("attention.self.key", "attention.self.value"),
    ("attention.k_lin", "attention.v_lin"), ("attn.k_proj", "attn.v_proj"), ("attn.c_attn",),
    ("attention.query_key_value",), ("self_attention.query_key_value",), ("self_attn.qkv_proj",), ("attn.Wqkv",),
)  # fmt: skip


def _ia3(shape: ModelShape, config: Any) -> Counted:  # noqa: ARG001
    """A scale per output of keys and values and per input of the MLP's last map (Liu et al. 2022, section 3.3)."""
    inside = {linear.name: linear for linear in shape.linears if linear.per_layer}
    fed = {name for other in shape.others for name in other.feeds}
    places = next((names for names in _KEYS_AND_VALUES if set(names) <= inside.keys()), ())
    scaled = [(inside[name], inside[name].out_features) for name in places]
    scaled += [(x, x.in_features) for x in inside.values() if x.group == "mlp" and x.name not in fed]
    modules = [
        _module(x.name, x.count, (x.in_features, x.out_features), x.count * width, [f"{x.count} x {width}"])
        for x, width in scaled
    ]
    return modules, []


# Each method's counter. A method more is a line more.
COUNTERS: dict[str, Callable[[ModelShape, Any], Counted]] = {
    "lora": _lora,
    "full": _full,
    "head": _head,
    "bottleneck": _bottleneck,
    "prefix": _prefix,
    "ia3": _ia3,
}


def _module(name: str, count: int, sizes: tuple[int, ...], number: int, terms: list[str]) -> ModuleCount:
    return ModuleCount(name, count, sizes[0], sizes[1], number, f"{' + '.join(terms)} = {number:,}")


def _lora_notes(config: LoraConfig, selection: Selection) -> list[str]:
    notes = []
    sides = [(min(t.in_features, t.out_features), t.r(config), t.name) for t in selection.targets]
    beyond = [(side, r, name) for side, r, name in sides if r > side]
    if beyond:
        names = ", ".join(dict.fromkeys(name for _, _, name in beyond))
        smallest, _, _ = min(beyond)
        largest = max(r for _, r, _ in beyond)
        notes.append(
            f"Rank {largest} is larger than the smaller side of {names} (down to {smallest}): "
            "the update cannot have a higher rank than that side, so the rest adds parameters only."
        )
    for linear, _ in selection.linears:
        if linear.tied:
            notes.append(f"{linear.name} shares its weight with the input embedding; only the output side is adapted.")
    if selection.unmatched:
        notes.append(f"No module is called {', '.join(selection.unmatched)}.")
    if selection.unused_patterns:
        notes.append(f"No adapted module is called {', '.join(selection.unused_patterns)}: that pattern does nothing.")
    for target in selection.targets:
        if target.num_experts > 1:
            notes.append(
                f"{target.name} stacks {target.num_experts} experts in one parameter; each gets "
                f"{target.r(config)} ranks of its own, {target.num_experts * target.r(config)} in all."
            )
    return notes
