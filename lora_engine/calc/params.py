"""How many parameters a method trains: closed formulas over a shape, no model is built."""

from dataclasses import dataclass

from lora_engine.calc.structure import ModelShape
from lora_engine.calc.targets import Selection, select_linears
from lora_engine.config import LoraConfig, MethodConfig

# PEFT's keys: base_model.model.<module>.lora_A.weight (export.peft_format).
_KEY_EXTRA = len("base_model.model.") + len(".lora_A.weight")


@dataclass(frozen=True)
class ModuleCount:
    """`count` equal modules and what is trained in all of them. An embedding reads a row out of
    `in_features`; a norm has as many outputs as inputs."""

    name: str
    count: int
    in_features: int
    out_features: int
    trainable_parameters: int


@dataclass(frozen=True)
class ParameterCount:
    """`total_parameters` is the base model's own, every parameter once, without what LoRA adds
    (PEFT's "all params" is the sum of both). `modules` sums up to `trainable_parameters`."""

    total_parameters: int
    trainable_parameters: int
    trainable_percent: float
    modules: tuple[ModuleCount, ...]
    notes: tuple[str, ...]


def count_parameters(shape: ModelShape, method: MethodConfig) -> ParameterCount:
    """What `method` trains in a model of `shape`, by module. Raises TargetError.

    LoRA: r * (in + out) per adapted module (Hu et al. 2021, section 4.1); DoRA: out more, one magnitude per
    output (Liu et al. 2024, section 4). Full: everything."""
    if isinstance(method, LoraConfig):
        selection = select_linears(shape, method.target_modules)
        modules = tuple(
            ModuleCount(
                linear.name,
                count,
                linear.in_features,
                linear.out_features,
                count * lora_parameters(linear.in_features, linear.out_features, method),
            )
            for linear, count in selection.linears
        )
        notes = shape.notes + _lora_notes(method, selection)
    else:
        modules = _all_modules(shape)
        notes = shape.notes
    trainable = sum(module.trainable_parameters for module in modules)
    return ParameterCount(
        total_parameters=shape.total_parameters,
        trainable_parameters=trainable,
        trainable_percent=100.0 * trainable / shape.total_parameters,
        modules=modules,
        notes=notes,
    )


def lora_parameters(in_features: int, out_features: int, config: LoraConfig) -> int:
    """A (r, in) and B (out, r), and DoRA's magnitude (out)."""
    return config.r * (in_features + out_features) + (out_features if config.use_dora else 0)


def trained_lora_parameters(selection: Selection, config: LoraConfig) -> int:
    """The sum over a selection, in closed form."""
    magnitudes = sum(count * linear.out_features for linear, count in selection.linears) if config.use_dora else 0
    return config.r * selection.values_per_rank + magnitudes


def adapter_file_bytes(shape: ModelShape, method: MethodConfig) -> int:
    """Size of what is saved, as float32 safetensors: the adapter in PEFT's format, or the whole model.

    The tensors' bytes are exact; the file's header (a JSON entry per tensor) is within a few bytes each."""
    if not isinstance(method, LoraConfig):
        tensors = sum(linear.count * (1 + linear.has_bias) for linear in shape.linears) + 2 * len(shape.others)
        return 4 * shape.total_parameters + 110 * tensors
    selection = select_linears(shape, method.target_modules)
    return lora_file_bytes(shape, selection, method)


def lora_file_bytes(shape: ModelShape, selection: Selection, config: LoraConfig) -> int:
    data = 4 * trained_lora_parameters(selection, config)
    offset = len(str(data))  # most offsets have as many digits as the last
    header = 8 + len('{"__metadata__":{"format":"pt"}}')
    for linear, count in selection.linears:
        name = len(linear.name) + (len(shape.layer_path) + 1 + len(str(shape.num_layers)) if linear.per_layer else 0)
        entry = len(',"":{"dtype":"F32","shape":[,],"data_offsets":[,]}') + name + _KEY_EXTRA + 2 * offset
        shapes = 2 * len(str(config.r)) + len(str(linear.in_features)) + len(str(linear.out_features))
        header += count * (2 * entry + shapes + (entry if config.use_dora else 0))
    return data + header


def _all_modules(shape: ModelShape) -> tuple[ModuleCount, ...]:
    others = tuple(
        ModuleCount(
            part.name,
            part.count,
            part.num_parameters // part.width if part.kind == "embedding" else part.width,
            part.width,
            part.count * part.num_parameters,
        )
        for part in shape.others
    )
    linears = tuple(
        ModuleCount(
            linear.name, linear.count, linear.in_features, linear.out_features, linear.count * linear.num_parameters
        )
        for linear in shape.linears
    )
    return others + linears


def _lora_notes(config: LoraConfig, selection: Selection) -> tuple[str, ...]:
    notes = []
    beyond = [linear for linear, _ in selection.linears if config.r > min(linear.in_features, linear.out_features)]
    if beyond:
        smallest = min(beyond, key=lambda linear: min(linear.in_features, linear.out_features))
        side = min(smallest.in_features, smallest.out_features)
        names = ", ".join(linear.name for linear in beyond)
        notes.append(
            f"Rank {config.r} is larger than the smaller side of {names} (down to {side}): "
            "the update cannot have a higher rank than that side, so the rest adds parameters only."
        )
    for linear, _ in selection.linears:
        if linear.tied:
            notes.append(f"{linear.name} shares its weight with the input embedding; only the output side is adapted.")
    if selection.unmatched:
        notes.append(f"No module is called {', '.join(selection.unmatched)}.")
    return tuple(notes)
