"""Peak memory of a training step, traced: the real model, the real method, the real loss and the real optimizer run
once on fake tensors (torch._subclasses.fake_tensor), which have shapes and storages and no contents. Nothing is
allocated, so a model of any size can be traced on any machine.

Kernels are the CPU's, with what CUDA's keep put in their place unless the CPU is asked for.
`lora_engine.calc.memory` answers at once and is held against this.
"""

import contextlib
import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedConfig
from transformers.integrations import moe

from lora_engine.assets_path import asset_path
from lora_engine.calc.catalog import CATALOG, find_model
from lora_engine.calc.structure import ENCODERS
from lora_engine.config import LoraConfig, MethodConfig, TrainConfig
from lora_engine.errors import InputError, ModelLoadError, NotFoundError
from lora_engine.methods import inject
from lora_engine.methods.places import transformer_layers
from lora_engine.methods.quantized import QUANTIZED_PRECISIONS, quantize_model
from lora_engine.training.base import autocast_of, prepare_model, weight_dtype
from lora_engine.training.batches import Batch
from lora_engine.training.graphs import without_device_checks
from lora_engine.training.loop import build_optimizer
from lora_engine.training.loss import labelled_loss_sum
from lora_engine.training.measure import LiveBytes

CATEGORIES = ("weights", "adapter", "gradients", "optimizer", "activations", "logits", "overhead")

# Deeper models are traced at these depths: memory is affine in the number of layers, phase by phase. Four layers
# apart, so that patterns of two and four layers (Llama 4's) come round.
SHALLOW, DEEP = 4, 8


@dataclass(frozen=True)
class TracedMemory:
    """`phases`: the bytes alive by category at the peak of each phase, "forward", "loss" (with the way back through the
    head), "backward" (the upper half of the layers), "lower backward" and "optimizer". "activations" are storages that
    the forward pass made and that still live, "logits" those that the output head and the loss made; "overhead" is
    what backward and the optimizer made and is no gradient or state. Counts are of the whole model."""

    phases: dict[str, dict[str, int]]
    total_parameters: int
    trainable_parameters: int

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def terms(self) -> dict[str, int]:
        """Bytes by category at the peak of the whole step."""
        return {name: self.phases[self.peak_phase].get(name, 0) for name in CATEGORIES}

    @property
    def peak_bytes(self) -> int:
        return sum(self.phases[self.peak_phase].values())


class CategoryBytes(LiveBytes):
    """LiveBytes that files every storage under a category and keeps the peak of each phase."""

    def __init__(self) -> None:
        super().__init__()
        self.category, self.phase = "overhead", ""
        self.live: dict[str, int] = {}
        self.phases: dict[str, dict[str, int]] = {}
        self._filed: dict[int, tuple[str, int]] = {}

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        self._filed[key] = (self.category, storage.nbytes())
        self.live[self.category] = self.live.get(self.category, 0) + storage.nbytes()
        super().add(tensor)
        best = self.phases.get(self.phase)
        if self.phase and (best is None or self.live_bytes > sum(best.values())):
            self.phases[self.phase] = dict(self.live)

    def _drop(self, key: int, size: int) -> None:
        super()._drop(key, size)
        category, size = self._filed.pop(key)
        self.live[category] -= size

    def file_under(self, category: str, tensor: Tensor) -> None:
        """A storage turns out to be something else: backward's temporary becomes a gradient."""
        key = tensor.untyped_storage()._cdata
        old, size = self._filed[key]
        self._filed[key] = (category, size)
        self.live[old] -= size
        self.live[category] = self.live.get(category, 0) + size


def load_config(model: str) -> PreTrainedConfig:
    """transformers' config of "embedded", a folder, a path to a config.json, or a name from the catalog.

    Raises ModelLoadError when transformers does not know the architecture, NotFoundError for an unknown name."""
    path = asset_path("base") if model == "embedded" else Path(model).expanduser()
    try:
        if path.is_dir():
            path = path / "config.json"
        if path.is_file():
            facts = json.loads(path.read_text(encoding="utf-8-sig"))
        else:
            hub_id = find_model(model)
            if hub_id is None:
                raise NotFoundError(
                    f"model is {model[:200]!r}; allowed: embedded, a folder with config.json, a path to a config.json, "
                    "or a name from the catalog."
                )
            facts = CATALOG[hub_id]
        facts = dict(facts)
        config: PreTrainedConfig = CONFIG_MAPPING[facts.pop("model_type")](**facts)
    except InputError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelLoadError(
            f"model is {model[:200]!r}; transformers cannot read its config: {reason[:200]}"
        ) from error
    return config


def trace_memory(
    config: PreTrainedConfig,
    method: MethodConfig,
    train: TrainConfig,
    **options: Any,
) -> TracedMemory:
    """`trace_step`; of a model with more than DEEP layers from two shallow traces, each phase and category continued
    to the full depth. A method that names single layers is traced as it is."""
    text = config.get_text_config()
    depth = getattr(text, "num_hidden_layers", 0)
    if depth <= DEEP or (isinstance(method, LoraConfig) and method.layers_to_transform is not None):
        return trace_step(config, method, train, **options)
    low, high = (trace_step(_with_depth(config, layers), method, train, **options) for layers in (SHALLOW, DEEP))

    def at_depth(one: int, other: int) -> int:
        return other + (other - one) * (depth - DEEP) // (DEEP - SHALLOW)

    return TracedMemory(
        {
            phase: {
                name: at_depth(low.phases[phase].get(name, 0), high.phases[phase].get(name, 0)) for name in CATEGORIES
            }
            for phase in high.phases
        },
        at_depth(low.total_parameters, high.total_parameters),
        at_depth(low.trainable_parameters, high.trainable_parameters),
    )


def _with_depth(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """A copy of `config` with so many layers; lists with an entry for each layer are cut."""
    shallow = copy.deepcopy(config)
    text = shallow.get_text_config()
    depth = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == depth:
            setattr(text, name, value[:layers])
    text.num_hidden_layers = layers
    return shallow


def trace_step(
    config: PreTrainedConfig,
    method: MethodConfig,
    train: TrainConfig,
    *,
    attention: str = "sdpa",
    labelled_share: float = 1.0,
    device: str = "cpu",
) -> TracedMemory:
    """The second step of training `config`'s model with `method`: `train.batch_size` sequences of `train.max_length`
    tokens, of which `labelled_share` carry labels. Weights are never read, so `config` may describe any size.
    `train.device` "cpu" is traced as the CPU does it, anything else with the tensors that CUDA's kernels keep.

    Raises TargetError, ConfigError, and ModelLoadError for a config that transformers cannot build."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, torch.device(device):
        kind: Any = AutoModelForMaskedLM if config.model_type in ENCODERS else AutoModelForCausalLM
        model: Any = kind.from_config(
            config, dtype=weight_dtype(train, torch.device(device)), attn_implementation=attention
        )
        prepare_model(model, train)
        total = sum(p.numel() for p in model.parameters())
        if train.precision in QUANTIZED_PRECISIONS:
            quantize_model(model, train.precision)
    inject(model, method)
    _make_fake(model, fake)
    with fake, _plain_transformers(), contextlib.nullcontext() if train.device == "cpu" else _cuda_kernels():
        phases = _trace(model, train, labelled_share, torch.device(device))
    return TracedMemory(phases, total, sum(p.numel() for p in model.parameters() if p.requires_grad))


class _GroupedProduct(torch.autograd.Function):
    """Each group of rows times its own matrix, as torch.nn.functional.grouped_mm saves and makes its tensors; torch's
    own fake one knows bfloat16 alone. rows (n, in), weight (groups, in, out) -> (n, out)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, weight)
        return rows.new_empty(rows.shape[0], weight.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, Tensor | None]:
        _, weight = ctx.saved_tensors
        grad_rows = grads[0].new_empty(grads[0].shape[0], weight.shape[1]) if ctx.needs_input_grad[0] else None
        return grad_rows, torch.empty_like(weight) if ctx.needs_input_grad[1] else None


def _grouped_mm(rows: Tensor, weight: Tensor, offs: Tensor) -> Tensor:  # noqa: ARG001
    product: Tensor = _GroupedProduct.apply(rows.to(weight.dtype), weight)
    return product


def _softmax(scores: Tensor, dim: int, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    """As CUDA's autocast has it, in float32; the CPU's leaves softmax in half precision."""
    return torch.softmax(scores, dim, torch.float32 if torch.is_autocast_enabled("cpu") else dtype)


class _Dropout(torch.autograd.Function):
    """Dropout as CUDA has it, which keeps a mask of one byte a value; the CPU keeps it in the values' own type."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(torch.empty_like(x, dtype=torch.bool))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:  # noqa: ARG004
        return torch.empty_like(grads[0])


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:  # noqa: ARG001
    dropped: Tensor = _Dropout.apply(x) if p and training else x
    return dropped


_attention = nn.functional.scaled_dot_product_attention


def _attention_without_dropout(*args: Any, **kwargs: Any) -> Tensor:
    """CUDA's kernels drop as they go and keep a seed; the CPU would fall back to whole score matrices."""
    return _attention(*args, **kwargs | {"dropout_p": 0.0})


@contextlib.contextmanager
def _plain_transformers() -> Iterator[None]:
    """Where transformers or torch would ask a fake tensor what it cannot say: products of grouped experts go through
    a stand-in."""
    with without_device_checks(), mock.patch.object(moe, "_grouped_mm", _grouped_mm):
        yield


@contextlib.contextmanager
def _cuda_kernels() -> Iterator[None]:
    """Where the CPU's kernels keep other tensors than CUDA's."""
    with (
        mock.patch.object(nn.functional, "dropout", _dropout),
        mock.patch.object(nn.functional, "scaled_dot_product_attention", _attention_without_dropout),
        mock.patch.object(nn.functional, "softmax", _softmax),
    ):
        yield


def _trace(model: Any, train: TrainConfig, labelled_share: float, device: torch.device) -> dict[str, dict[str, int]]:
    trained = [p for p in model.parameters() if p.requires_grad]
    count = CategoryBytes()
    for category, tensors in (
        ("weights", [*(p for p in model.parameters() if not p.requires_grad), *model.buffers()]),
        # A model that is trained whole has no adapter beside its weights.
        ("adapter" if len(trained) < len(list(model.parameters())) else "weights", trained),
    ):
        count.category = category
        for tensor in tensors:
            count.add(tensor)
    optimizer = build_optimizer(trained, train)
    model.train()
    with count:
        for step in range(2):  # the optimizer's state exists from the second step on
            for _ in range(train.accumulation):
                count.category = "overhead"
                batch = _batch(train, labelled_share, device)
                with _gradients(count, trained), _phases(count, model):
                    count.phase, count.category = ("forward" if step else ""), "activations"
                    with autocast_of(train, device):
                        loss = labelled_loss_sum(model, batch) / batch.num_labels
                    count.category = "overhead"
                    loss.backward()
                del loss, batch
            count.phase = "optimizer" if step else ""
            nn.utils.clip_grad_norm_(trained, train.max_grad_norm or float("inf"))
            count.category = "overhead" if step else "optimizer"
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return count.phases


def _batch(train: TrainConfig, labelled_share: float, device: torch.device) -> Batch:
    tokens = train.batch_size * train.max_length
    rows = round(train.batch_size * (train.max_length - 1) * labelled_share)
    index = torch.zeros(rows, dtype=torch.long, device=device)
    ids = torch.zeros(train.batch_size, train.max_length, dtype=torch.long, device=device)
    return Batch(ids, index, index.clone(), tokens)


@contextlib.contextmanager
def _gradients(count: CategoryBytes, trained: list[nn.Parameter]) -> Iterator[None]:
    def file(parameter: Tensor) -> None:
        if parameter.grad is not None:
            count.file_under("gradients", parameter.grad)

    handles = [parameter.register_post_accumulate_grad_hook(file) for parameter in trained]
    yield
    for handle in handles:
        handle.remove()


@contextlib.contextmanager
def _phases(count: CategoryBytes, model: Any) -> Iterator[None]:
    """From the output head on, what is made are logits; the loss phase ends where backward leaves the head, and the
    layers' way back is told apart in halves, whose peaks grow with depth each in its own way."""
    head = model.get_output_embeddings()

    def leave(_gradient: Tensor) -> None:
        count.phase = count.phase and "backward"

    def halfway(_gradient: Tensor) -> None:
        count.phase = count.phase and "lower backward"

    def middle(_module: nn.Module, _inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad and count.category == "activations":
            hidden.register_hook(halfway)

    def enter(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if count.category == "activations":
            count.category = "logits"
            count.phase = count.phase and "loss"
            if inputs[0].requires_grad:
                inputs[0].register_hook(leave)

    layers = transformer_layers(model)
    handles = [
        head.register_forward_pre_hook(enter),
        layers[(len(layers) - 1) // 2][1].register_forward_hook(middle),
    ]
    yield
    for handle in handles:
        handle.remove()


def _make_fake(model: nn.Module, fake: FakeTensorMode) -> None:
    """Injection takes its values from numpy; what it added becomes fake like the rest."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and not hasattr(parameter, "fake_mode"):
                made = nn.Parameter(fake.from_tensor(parameter.detach()), requires_grad=parameter.requires_grad)
                setattr(module, name, made)
