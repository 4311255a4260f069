"""The optimizer steps of a pack: its rows, their buffers and one step of all of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lora_engine.config import LoraConfig, RunConfig
from lora_engine.data import Encoded
from lora_engine.errors import ConfigError
from lora_engine.methods.packed import Pack, inject_pack
from lora_engine.training.base import autocast_of
from lora_engine.training.loop import LoopState, build_optimizer
from lora_engine.training.measure import PeakMemory
from lora_engine.training.pack_batches import PackBatches, sum_dtype
from lora_engine.training.pack_loss import pack_losses


@dataclass
class PackRow:
    """One run among others. `tensors`: its `parameter.*` and `optimizer.*` as its own checkpoint.safetensors would hold
    them, on the host (None: it has not begun). `head`: the first values of its task head. Rows of the same `pack`
    number share a pass; after an out-of-memory error there are more packs than before."""

    name: str
    config: RunConfig
    state: LoopState = field(default_factory=LoopState)
    tensors: dict[str, Tensor] | None = None
    head: Mapping[str, Tensor] | None = None
    pack: int = 0

    @property
    def method(self) -> LoraConfig:
        method = self.config.method
        if not isinstance(method, LoraConfig):
            raise ConfigError("method", method.method, "lora in a pack")
        return method

    def is_done(self, until_step: int | None) -> bool:
        last = self.config.train.steps if until_step is None else min(until_step, self.config.train.steps)
        return self.state.stopped or self.state.step >= last


class PackedSteps:
    """`rows` as one pack inside `model`, which has to be ejected when they leave."""

    def __init__(self, model: Any, rows: Sequence[PackRow], train_rows: Sequence[Encoded], pad_id: int) -> None:
        self.rows, self.model = rows, model
        train = rows[0].config.train
        heads = [row.head for row in rows]
        self.pack: Pack = inject_pack(
            model,
            [row.method for row in rows],
            seeds=[row.config.train.seed for row in rows],
            heads=None if any(head is None for head in heads) else [head for head in heads if head is not None],
            states=[_parameters(row) for row in rows],
        )
        self.device = self.pack.parameters.device
        self.optimizer = pack_optimizer(self.pack, rows)
        self.autocast = autocast_of(train, self.device)
        self.batches = PackBatches(rows, train_rows, pad_id, self.device)
        limits = [row.config.train.max_grad_norm or float("inf") for row in rows]
        self.limits = torch.tensor(limits, device=self.device, dtype=self.pack.parameters.dtype)

    def memory(self) -> PeakMemory:
        return PeakMemory(self.model, self.optimizer, self.device)

    def step(self, steps: Sequence[int], lrs: Sequence[float]) -> tuple[list[float], list[float], list[int]]:
        """Optimizer step steps[i] of row i at rate lrs[i]: losses, gradient norms before clipping, tokens read."""
        for group, lr in zip(self.optimizer.param_groups, lrs, strict=True):
            group["lr"] = lr
        batches = self.batches.step(steps)
        self.pack.zero_grad()
        losses = torch.zeros(len(self.rows), device=self.device, dtype=sum_dtype(self.device))
        for batch in batches:
            with self.autocast:
                total, each = pack_losses(self.model, batch)
            total.backward()
            losses += each
        norms = clip_rows(self.pack.gradients, self.limits)
        self.optimizer.step()
        read = torch.stack((losses, norms.to(losses.dtype))).tolist()  # one transfer for all rows
        num_tokens = [sum(batch.num_tokens[i] for batch in batches) for i in range(len(self.rows))]
        return read[0], read[1], num_tokens

    @torch.no_grad()
    def leave(self) -> None:
        """Every row's values into its `tensors`, on the host."""
        parameters = self.pack.parameters.cpu()
        for i, (row, p) in enumerate(zip(self.rows, self.pack.rows, strict=True)):
            named = self.pack.unpadded(parameters[i], i)
            tensors = {f"parameter.{name}": _copy(value) for name, value in named.items()}
            for key, value in self.optimizer.state[p].items():
                if value is None:
                    continue
                host = value.cpu()
                parts = self.pack.unpadded(host, i).values() if host.dim() else [host] * len(named)
                tensors |= {f"optimizer.{k}.{key}": _copy(part) for k, part in enumerate(parts)}
            row.tensors = tensors


def _parameters(row: PackRow) -> dict[str, Tensor] | None:
    if row.tensors is None:
        return None
    prefix = "parameter."
    return {name[len(prefix) :]: value for name, value in row.tensors.items() if name.startswith(prefix)}


@torch.no_grad()
def pack_optimizer(pack: Pack, rows: Sequence[PackRow]) -> torch.optim.Optimizer:
    """The optimizer of separate runs over the rows of `pack`, each a group with its own lr and weight decay.

    AdamW's state is made here and not at the first step, which then takes no memory that could be lacking halfway."""
    groups = [
        {"params": [p], "lr": row.config.train.lr, "weight_decay": row.config.train.weight_decay}
        for p, row in zip(pack.rows, rows, strict=True)
    ]
    optimizer = build_optimizer(groups, rows[0].config.train)
    if rows[0].config.train.optimizer == "sgd":
        return optimizer
    moments = {key: torch.zeros_like(pack.parameters) for key in ("exp_avg", "exp_avg_sq")}
    for i, (p, row) in enumerate(zip(pack.rows, rows, strict=True)):
        state: dict[str, Tensor] = {key: value[i] for key, value in moments.items()}
        step = torch.zeros((), dtype=torch.float32, device=p.device)
        for key, value in state.items():
            for k, part in enumerate(pack.unpadded(value, i).values()):
                if row.tensors and f"optimizer.{k}.{key}" in row.tensors:
                    part.copy_(row.tensors[f"optimizer.{k}.{key}"])
        if row.tensors and "optimizer.0.step" in row.tensors:
            step.copy_(row.tensors["optimizer.0.step"])
        optimizer.state[p] = {"step": step, **state}
    return optimizer


@torch.no_grad()
def clip_rows(gradients: Tensor, limits: Tensor) -> Tensor:
    """`clip_grad_norm_` of each row of gradients (N, P) by its own limit (N,); the norms before, (N,)."""
    norms = torch.linalg.vector_norm(gradients, dim=1)
    gradients.mul_((limits / (norms + 1e-6)).clamp_(max=1.0).unsqueeze(1))
    return norms


def _copy(view: Tensor) -> Tensor:
    return view.clone(memory_format=torch.contiguous_format)
