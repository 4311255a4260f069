"""Peak memory of a training step, traced: the real model, the real method, the real loss and the real optimizer run
once on fake tensors (torch._subclasses.fake_tensor), which have shapes and storages and no contents. Nothing is
allocated, so a model of any size can be traced on any machine.

Kernels are the CPU's. `lora_engine.calc.memory` answers at once and is held against this.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedConfig, masking_utils
from transformers.integrations import moe

from lora_engine.calc.structure import ENCODERS
from lora_engine.config import MethodConfig, TrainConfig
from lora_engine.methods import inject
from lora_engine.methods.quantized import QUANTIZED_PRECISIONS, quantize_model
from lora_engine.training.base import autocast_of, prepare_model, weight_dtype
from lora_engine.training.batches import Batch
from lora_engine.training.loop import build_optimizer
from lora_engine.training.loss import labelled_loss_sum
from lora_engine.training.measure import LiveBytes

CATEGORIES = ("weights", "adapter", "gradients", "optimizer", "activations", "logits", "overhead")


@dataclass(frozen=True)
class TracedMemory:
    """`phases`: for "forward", "loss", "backward" and "optimizer" the bytes alive by category at that phase's peak.
    "activations" are storages that the forward pass made and that still live, "logits" those that the output head
    and the loss made; "overhead" is what backward and the optimizer made and is no gradient or state."""

    phases: dict[str, dict[str, int]]

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

    Raises TargetError, ConfigError, and ModelLoadError for a config that transformers cannot build."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, torch.device(device):
        kind: Any = AutoModelForMaskedLM if config.model_type in ENCODERS else AutoModelForCausalLM
        model: Any = kind.from_config(
            config, dtype=weight_dtype(train, torch.device(device)), attn_implementation=attention
        )
        prepare_model(model, train)
        if train.precision in QUANTIZED_PRECISIONS:
            quantize_model(model, train.precision)
    inject(model, method)
    _make_fake(model, fake)
    with fake, _plain_transformers():
        return _trace(model, train, labelled_share, torch.device(device))


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


@contextlib.contextmanager
def _plain_transformers() -> Iterator[None]:
    """Where transformers or torch would ask a fake tensor what it cannot say: a batch of ours is never packed, which
    transformers finds out by reading positions; and products of grouped experts go through a stand-in."""
    with (
        mock.patch.object(masking_utils, "find_packed_sequence_indices", return_value=None),
        mock.patch.object(moe, "_grouped_mm", _grouped_mm),
        mock.patch.object(nn.functional, "softmax", _softmax),
    ):
        yield


def _trace(model: Any, train: TrainConfig, labelled_share: float, device: torch.device) -> TracedMemory:
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
                with _gradients(count, trained), _head(count, model):
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
    return TracedMemory(count.phases)


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
def _head(count: CategoryBytes, model: Any) -> Iterator[None]:
    """From the output head on, what is made are logits; the loss phase ends where backward leaves the head."""
    head = model.get_output_embeddings()

    def leave(_gradient: Tensor) -> None:
        count.phase = count.phase and "backward"

    def enter(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if count.category == "activations":
            count.category = "logits"
            count.phase = count.phase and "loss"
            if inputs[0].requires_grad:
                inputs[0].register_hook(leave)

    handle = head.register_forward_pre_hook(enter)
    yield
    handle.remove()


def _make_fake(model: nn.Module, fake: FakeTensorMode) -> None:
    """Injection takes its values from numpy; what it added becomes fake like the rest."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and not hasattr(parameter, "fake_mode"):
                made = nn.Parameter(fake.from_tensor(parameter.detach()), requires_grad=parameter.requires_grad)
                setattr(module, name, made)
