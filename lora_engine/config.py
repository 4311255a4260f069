"""What a run is made of: frozen dataclasses, validated once, JSON in and out.

`to_dict(config)` gives plain JSON types; `run_config_from_dict` is its exact inverse. A wrong value
raises ConfigError with the argument, the value and what is allowed. A method has one config here,
one file in `lora_engine.methods`, and one line in each of the two registries.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

from lora_engine.errors import ConfigError

PRECISIONS = ("fp32", "fp16", "bf16", "mixed-fp16", "mixed-bf16", "int8", "nf4", "nf4-dq")
TRAINABLE_PRECISIONS = ("fp32", "fp16", "bf16", "mixed-fp16", "mixed-bf16")
OPTIMIZERS = ("adamw", "adamw8bit", "sgd")
DEVICES = ("auto", "cpu", "cuda", "mps")
SCHEDULES = ("constant", "linear", "cosine")
TASKS = ("text", "prompt_completion", "instruction", "messages", "question_answer", "text_label")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """LoRA (Hu et al. 2021, section 4.1), field names as in PEFT.

    `target_modules` is "attention", "mlp", "all-linear", a regular expression (one string), or a
    tuple of module names or suffixes; matching follows PEFT (`lora_engine.calc.targets`)."""

    method: ClassVar[str] = "lora"

    r: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    use_rslora: bool = False
    use_dora: bool = False

    def __post_init__(self) -> None:
        _check_int("r", self.r, 1, 65536)
        _check_float("lora_alpha", self.lora_alpha, 0.0, 1e6)
        _check_float("lora_dropout", self.lora_dropout, 0.0, 0.95)
        if isinstance(self.target_modules, list):
            object.__setattr__(self, "target_modules", tuple(self.target_modules))
        if not self.target_modules or (
            isinstance(self.target_modules, tuple) and not all(isinstance(t, str) and t for t in self.target_modules)
        ):
            raise ConfigError("target_modules", self.target_modules, "a name, a list of names or a regular expression")

    @property
    def scaling(self) -> float:
        """alpha / r, or alpha / sqrt(r) with rsLoRA (Kalajdzievski 2023)."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


@dataclass(frozen=True, kw_only=True)
class FullConfig:
    """Full fine-tuning: every weight is trained."""

    method: ClassVar[str] = "full"


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """Transfer learning: the base is frozen and only a head is trained.

    A language model trains its output head (a tied one is given a copy of its own first); a classifier trains a new
    linear map from the pooled features to the labels."""

    method: ClassVar[str] = "head"


@dataclass(frozen=True, kw_only=True)
class BottleneckConfig:
    """Adapter layers: down-projection, nonlinearity, up-projection, residual.

    "houlsby" puts one after attention and one after the MLP (Houlsby et al. 2019, section 2.1), "pfeiffer" one after
    the MLP alone (Pfeiffer et al. 2021, section 2.2.2). The inner width is
    hidden_size // reduction_factor, at least 1."""

    method: ClassVar[str] = "bottleneck"

    reduction_factor: int = 16
    placement: str = "houlsby"
    activation: str = "gelu"

    def __post_init__(self) -> None:
        _check_int("reduction_factor", self.reduction_factor, 1, 65536)
        _check_choice("placement", self.placement, ("houlsby", "pfeiffer"))
        _check_choice("activation", self.activation, ("gelu", "relu"))


@dataclass(frozen=True, kw_only=True)
class PrefixConfig:
    """Prefix tuning (Li and Liang 2021, section 4): `prefix_length` trained key-value pairs before the first token, in
    every layer. `reparametrize` trains them through an MLP of width `encoder_hidden_size` (0: the hidden size), which
    is dropped after training (section 4.3)."""

    method: ClassVar[str] = "prefix"

    prefix_length: int = 16
    reparametrize: bool = False
    encoder_hidden_size: int = 0

    def __post_init__(self) -> None:
        _check_int("prefix_length", self.prefix_length, 0, 65536)
        _check_int("encoder_hidden_size", self.encoder_hidden_size, 0, 65536)


@dataclass(frozen=True, kw_only=True)
class IA3Config:
    """(IA)^3 (Liu et al. 2022, section 3.3): learned scales on keys, values and the inner activations of the MLP."""

    method: ClassVar[str] = "ia3"


MethodConfig = LoraConfig | FullConfig | HeadConfig | BottleneckConfig | PrefixConfig | IA3Config

METHOD_CONFIGS: dict[str, type[MethodConfig]] = {
    config.method: config for config in (LoraConfig, FullConfig, HeadConfig, BottleneckConfig, PrefixConfig, IA3Config)
}

# The learning rate where none is given: good ones of a few, two to a decade, over short runs of the bundled
# customer-support set and of a classifier on the embedded model.
DEFAULT_LRS = {"full": 3e-4, "lora": 3e-3, "head": 3e-3, "bottleneck": 3e-3, "prefix": 1e-2, "ia3": 1e-2}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop's settings.

    `batch_size` sequences a micro-batch of at most `max_length` tokens; `accumulation`
    micro-batches make one optimizer step. `eval_every` 0 means ten times over the run."""

    lr: float = 3e-3
    steps: int = 60
    batch_size: int = 8
    accumulation: int = 1
    max_length: int = 128
    weight_decay: float = 0.0
    warmup_steps: int = 0
    schedule: str = "linear"
    max_grad_norm: float = 1.0
    seed: int = 0
    precision: str = "fp32"
    device: str = "auto"
    optimizer: str = "adamw"
    checkpointing: bool = False
    eval_every: int = 0
    eval_examples: int = 64
    checkpoint_every: int = 20

    def __post_init__(self) -> None:
        _check_float("lr", self.lr, 1e-9, 10.0)
        _check_int("steps", self.steps, 1, 1_000_000)
        _check_int("batch_size", self.batch_size, 1, 65536)
        _check_int("accumulation", self.accumulation, 1, 65536)
        _check_int("max_length", self.max_length, 8, 1_048_576)
        _check_float("weight_decay", self.weight_decay, 0.0, 10.0)
        _check_int("warmup_steps", self.warmup_steps, 0, 1_000_000)
        _check_float("max_grad_norm", self.max_grad_norm, 0.0, 1e6)
        _check_int("seed", self.seed, 0, 2**31 - 1)
        _check_int("eval_every", self.eval_every, 0, 1_000_000)
        _check_int("eval_examples", self.eval_examples, 1, 1_000_000)
        _check_int("checkpoint_every", self.checkpoint_every, 1, 1_000_000)
        _check_choice("schedule", self.schedule, SCHEDULES)
        _check_choice("precision", self.precision, TRAINABLE_PRECISIONS)
        _check_choice("device", self.device, DEVICES)
        _check_choice("optimizer", self.optimizer, ("adamw", "sgd"))


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which file, and how its columns are read.

    `task` and `columns` (role -> column name) None mean: recognised from the file. The split into
    train and evaluation depends on `eval_share` and `split_seed` alone, so runs stay comparable."""

    path: str
    task: str | None = None
    columns: Mapping[str, str] | None = None
    encoding: str | None = None
    eval_share: float = 0.1
    split_seed: int = 0

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("data", self.path, "the path of a dataset file")
        if self.task is not None:
            _check_choice("task", self.task, TASKS)
        _check_float("eval_share", self.eval_share, 0.01, 0.9)
        _check_int("split_seed", self.split_seed, 0, 2**31 - 1)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run: a base model, data, a method and the loop's settings.

    `model` is "embedded", a folder with config.json and safetensors, or a hub id. `prompt` is what
    the before/after sample continues (None: taken from the evaluation data)."""

    model: str = "embedded"
    data: DataConfig
    method: MethodConfig = field(default_factory=LoraConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    prompt: str | None = None

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError("model", self.model, "embedded, a folder, or a hub id")
        if isinstance(self.method, FullConfig) and self.train.precision == "fp16":
            # Float16 weights have no float32 copy for loss scaling to work on.
            raise ConfigError("precision", "fp16", "fp32, bf16, mixed-fp16 or mixed-bf16 with full fine-tuning")


def to_dict(config: RunConfig | MethodConfig | TrainConfig | DataConfig) -> dict[str, Any]:
    """Plain JSON types; a method's dict carries its name under "method"."""
    if isinstance(config, RunConfig):
        return {
            "model": config.model,
            "data": to_dict(config.data),
            "method": to_dict(config.method),
            "train": to_dict(config.train),
            "prompt": config.prompt,
        }
    values = asdict(config)
    for key, value in values.items():
        if isinstance(value, tuple):
            values[key] = list(value)
    if isinstance(config, MethodConfig):
        return {"method": config.method} | values
    return values


def method_from_dict(values: Mapping[str, Any]) -> MethodConfig:
    """Inverse of `to_dict` for a method's config. Raises ConfigError."""
    rest = dict(values)
    name = rest.pop("method", "lora")
    _check_choice("method", name, tuple(METHOD_CONFIGS))
    return _build(METHOD_CONFIGS[name], rest)


def run_config_from_dict(values: Mapping[str, Any]) -> RunConfig:
    """Inverse of `to_dict` for a RunConfig. Raises ConfigError on an unknown key or a wrong value."""
    rest = dict(values)
    return _build(
        RunConfig,
        rest
        | {
            "data": _build(DataConfig, dict(rest.get("data") or {"path": ""})),
            "method": method_from_dict(rest.get("method") or {}),
            "train": _build(TrainConfig, dict(rest.get("train") or {})),
        },
    )


def _build(cls: Any, values: dict[str, Any]) -> Any:
    known = {f.name for f in fields(cls)}
    for key in values:
        if key not in known:
            raise ConfigError(key, values[key], f"one of {', '.join(sorted(known))}")
    return cls(**values)


def _check_int(argument: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(argument, value, f"a whole number from {low} to {high}")


def _check_float(argument: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ConfigError(argument, value, f"a number from {low:g} to {high:g}")


def _check_choice(argument: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(argument, value, f"one of {', '.join(allowed)}")
