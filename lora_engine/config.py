"""What a run is made of: frozen dataclasses, validated once, JSON in and out.

`to_dict(config)` gives plain JSON types; `run_config_from_dict` is its exact inverse. A wrong value
raises ConfigError with the argument, the value and what is allowed. A method has one config here,
one file in `lora_engine.methods`, and one line in each of the two registries.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, ClassVar

from lora_engine.errors import ConfigError

PRECISIONS = ("fp32", "fp16", "bf16", "mixed-fp16", "mixed-bf16", "int8", "nf4", "nf4-dq")
TRAINABLE_PRECISIONS = (
    "fp32",
    "fp16",
    "bf16",
    "mixed-fp16",
    "mixed-bf16",
)  # of weights; the others are for frozen ones
# Float16 weights have no float32 copy for loss scaling to work on.
FULL_PRECISIONS = tuple(precision for precision in TRAINABLE_PRECISIONS if precision != "fp16")
OPTIMIZERS = ("adamw", "adamw8bit", "sgd")
DEVICES = ("auto", "cpu", "cuda", "mps")
SCHEDULES = ("constant", "linear", "cosine")
MAX_RANK = 65536
GROUPS = ("attention", "mlp")  # of target_modules: short for lists of names
TASKS = ("text", "prompt_completion", "instruction", "messages", "question_answer", "text_label")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """LoRA (Hu et al. 2021, section 4.1), field names as in PEFT.

    `target_modules` is "attention", "mlp", "all-linear", a regular expression (one string), or a tuple of module
    names or suffixes; `exclude_modules` takes away, `layers_to_transform` (with `layers_pattern`, the name of the
    module list) keeps some layers. `target_parameters` names parameters that no Linear holds, such as stacked experts.
    `rank_pattern` and `alpha_pattern` give r and lora_alpha to modules whose name ends in a key, itself a regular
    expression; the first key that fits counts. A mapping is stored as pairs, so that a config can be hashed.
    Matching follows PEFT (`lora_engine.calc.matching`)."""

    method: ClassVar[str] = "lora"

    r: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    use_rslora: bool = False
    use_dora: bool = False
    layers_to_transform: int | tuple[int, ...] | None = None
    layers_pattern: str | tuple[str, ...] | None = None
    exclude_modules: str | tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] | tuple[tuple[str, int], ...] = ()
    alpha_pattern: Mapping[str, float] | tuple[tuple[str, float], ...] = ()
    target_parameters: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_int("r", self.r, 1, MAX_RANK)
        _check_float("lora_alpha", self.lora_alpha, 0.0, 1e6)
        _check_float("lora_dropout", self.lora_dropout, 0.0, 0.95)
        for name in ("target_modules", "layers_to_transform", "layers_pattern", "exclude_modules", "target_parameters"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        self._check_targets()
        self._check_layers()
        ranks, alphas = _pairs("rank_pattern", self.rank_pattern), _pairs("alpha_pattern", self.alpha_pattern)
        for key, rank in ranks:
            _check_int(f"rank_pattern[{key!r}]", rank, 1, MAX_RANK)
        for key, alpha in alphas:
            _check_float(f"alpha_pattern[{key!r}]", alpha, 0.0, 1e6)
        object.__setattr__(self, "rank_pattern", ranks)
        object.__setattr__(self, "alpha_pattern", alphas)

    def _check_targets(self) -> None:
        if not _is_names(self.target_parameters):
            raise ConfigError("target_parameters", self.target_parameters, "a list of parameter names")
        named = isinstance(self.target_modules, str) or _is_names(self.target_modules)
        if not named or not (self.target_modules or self.target_parameters):
            raise ConfigError("target_modules", self.target_modules, "a name, a list of names or a regular expression")
        if self.exclude_modules is None:
            object.__setattr__(self, "exclude_modules", ())
        if isinstance(self.exclude_modules, str):
            _check_pattern("exclude_modules", self.exclude_modules, self.exclude_modules)
        elif not _is_names(self.exclude_modules):
            raise ConfigError("exclude_modules", self.exclude_modules, "a list of names or a regular expression")

    def _check_layers(self) -> None:
        layers, pattern = self.layers_to_transform, self.layers_pattern
        listed = (layers,) if isinstance(layers, int) and not isinstance(layers, bool) else layers
        if listed is not None and not (
            isinstance(listed, tuple) and all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in listed)
        ):
            raise ConfigError("layers_to_transform", layers, "a layer's index from 0, or a list of them")
        if pattern is not None and not isinstance(pattern, str) and not _is_names(pattern):
            raise ConfigError("layers_pattern", pattern, "the name of the list of layers, or a list of names")
        for text in (pattern,) if isinstance(pattern, str) else pattern or ():
            _check_pattern("layers_pattern", pattern, text)
        for argument, value in (("layers_to_transform", layers), ("layers_pattern", pattern)):
            if value is None or not isinstance(self.target_modules, str) or self.target_modules.lower() in GROUPS:
                continue
            # PEFT: a regular expression can say itself which layers it means.
            raise ConfigError(
                argument, value, f"None with target_modules {self.target_modules!r}; name the modules in a list"
            )
        if pattern and layers is None:
            raise ConfigError("layers_pattern", pattern, "None without layers_to_transform")

    @property
    def scaling(self) -> float:
        """alpha / r, or alpha / sqrt(r) with rsLoRA (Kalajdzievski 2023)."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def at(self, name: str) -> "LoraConfig":
        """This config with the r and lora_alpha of the module called `name` (PEFT's get_pattern_key)."""
        if not self.rank_pattern and not self.alpha_pattern:
            return self
        rank, alpha = pattern_value(self.rank_pattern, name), pattern_value(self.alpha_pattern, name)
        return replace(
            self,
            r=self.r if rank is None else int(rank),
            lora_alpha=self.lora_alpha if alpha is None else alpha,
            rank_pattern=(),
            alpha_pattern=(),
        )


Pattern = Mapping[str, float] | tuple[tuple[str, float], ...]


def pattern_value(pattern: Pattern, name: str) -> float | None:
    """The value of the first key of `pattern` in which `name` ends, None when there is none."""
    for key, value in pattern.items() if isinstance(pattern, Mapping) else pattern:
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return None


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
# customer-support set; and, for texts with labels, of movie reviews. A classifier's new head wants a higher rate than
# an output head that is pretrained, and beside it a prefix a lower one.
DEFAULT_LRS = {"full": 3e-4, "lora": 3e-3, "head": 3e-3, "bottleneck": 3e-3, "prefix": 1e-2, "ia3": 1e-2}
CLASSIFIER_LRS = DEFAULT_LRS | {"head": 1e-2, "prefix": 3e-3}


# Steps, and sequences a step, of a command that says nothing of them: for texts, and for texts with labels, of which a
# row teaches one thing where a text teaches one a token.
STEPS, BATCH = (60, 150), (8, 32)


def default_lr(method: str, num_classes: int = 0) -> float:
    """The learning rate of `method` where none is given; `num_classes` 0 for texts to write."""
    return (CLASSIFIER_LRS if num_classes else DEFAULT_LRS)[method]


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
        _check_choice("precision", self.precision, PRECISIONS)
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
        if isinstance(self.method, FullConfig) and self.train.precision not in FULL_PRECISIONS:
            allowed = f"{', '.join(FULL_PRECISIONS)} with full fine-tuning"
            if self.train.precision not in TRAINABLE_PRECISIONS:
                allowed += "; quantised weights cannot be trained"
            raise ConfigError("precision", self.train.precision, allowed)


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
        if key in ("rank_pattern", "alpha_pattern"):
            values[key] = dict(value)
        elif isinstance(value, tuple):
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


def _is_names(value: object) -> bool:
    return isinstance(value, tuple) and all(isinstance(name, str) and name for name in value)


def _check_pattern(argument: str, value: object, text: str) -> None:
    try:
        re.compile(text)
    except re.error as error:
        raise ConfigError(argument, value, f"a regular expression ({error})") from error


def _pairs(argument: str, value: Any) -> tuple[tuple[str, Any], ...]:
    """A mapping, or pairs, from names to numbers -> pairs. Raises ConfigError."""
    pairs = tuple(value.items()) if isinstance(value, Mapping) else value
    if pairs is None:
        return ()
    if not isinstance(pairs, tuple | list) or not all(isinstance(x, tuple | list) and len(x) == 2 for x in pairs):
        raise ConfigError(argument, value, "a mapping from the end of a module's name to a number")
    for key, _ in pairs:
        if not isinstance(key, str) or not key:
            raise ConfigError(argument, value, "a mapping whose keys are module names or regular expressions")
        _check_pattern(argument, key, f"({key})")
    return tuple(dict(pairs).items())


def _check_choice(argument: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(argument, value, f"one of {', '.join(allowed)}")
