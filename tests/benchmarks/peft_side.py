"""The other side: PEFT with a plain loop, and PEFT with transformers' Trainer, one configuration after another.

Both start from our initial values of A and read our batches in our order, so their losses must be ours."""

import tempfile
import warnings
from collections.abc import Sequence
from typing import Any

import peft
import torch
from benchmarks.workload import Workload
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.utils import logging as transformers_logging

from lora_engine import core
from lora_engine.config import LoraConfig, RunConfig
from lora_engine.data import Encoded
from lora_engine.training.batches import rows_of_step
from lora_engine.training.loop import lr_at

Losses = list[list[float]]
"""[configuration][step], nats per labelled token."""


def adapted(base: Any, config: RunConfig) -> Any:
    """PEFT's model on `base`, its A filled with our initial values."""
    assert isinstance(config.method, LoraConfig)
    wanted = peft.LoraConfig(
        r=config.method.r,
        lora_alpha=config.method.lora_alpha,
        target_modules=config.method.target_modules,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fan_in_fan_out of Conv1D, which PEFT sets right itself
        model = peft.get_peft_model(base, wanted)
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            A = module.lora_A["default"].weight
            A.data.copy_(torch.from_numpy(core.init_A(config.method.r, A.shape[1], seed=config.train.seed, name=name)))
    return model


def batch_tensors(rows: Sequence[Encoded], config: RunConfig, step: int) -> tuple[Tensor, Tensor]:
    """(input_ids, labels) of `step`; the rows are equally long."""
    chosen = [rows[i] for i in rows_of_step(len(rows), config.train.batch_size, step, config.train.seed)]
    device = config.train.device
    ids = torch.tensor([row.input_ids for row in chosen], device=device)
    return ids, torch.tensor([row.labels for row in chosen], device=device)


class PlainLoop:
    """The loop of PEFT's documentation: a forward, a backward, clipping, AdamW, a linear schedule."""

    def __init__(self, base: Any, config: RunConfig, rows: Sequence[Encoded], *, fused: bool) -> None:
        self.config, self.rows = config, rows
        self.model = adapted(base, config)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        train = config.train
        # None, as in the documentation: torch chooses, on the CPU a loop over the parameters.
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=train.lr, weight_decay=train.weight_decay, fused=fused or None
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda k: lr_at(train, k) / train.lr)
        self.model.train()

    def step(self, k: int) -> Tensor:
        """One optimizer step; its loss, still on the device."""
        ids, labels = batch_tensors(self.rows, self.config, k)
        loss: Tensor = self.model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.train.max_grad_norm)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return loss.detach()


def train_in_loop(base: Any, work: Workload, *, fused: bool = True) -> Losses:
    """Every configuration after the other on one loaded base, in this process."""
    losses = []
    for config in work.configs:
        loop = PlainLoop(base, config, work.rows, fused=fused)
        losses.append(torch.stack([loop.step(k) for k in range(config.train.steps)]).tolist())
        loop.model.unload()
    return losses


class _Recorded(Trainer):  # type: ignore[misc]
    """Keeps each step's loss where it is, as the plain loop does: logging it would wait for the device."""

    losses: list[Tensor]

    def training_step(self, *arguments: Any, **more: Any) -> Tensor:
        loss: Tensor = super().training_step(*arguments, **more)
        self.losses.append(loss.detach())
        return loss


def train_with_trainer(base: Any, work: Workload) -> Losses:
    """As `train_in_loop`, by transformers' Trainer with its own optimizer (fused AdamW), its logging off."""
    transformers_logging.set_verbosity_error()
    losses = []
    for config in work.configs:
        train = config.train
        order = [i for k in range(train.steps) for i in rows_of_step(len(work.rows), train.batch_size, k, train.seed)]
        model = adapted(base, config)
        with tempfile.TemporaryDirectory() as folder:
            trainer = _Recorded(
                model,
                TrainingArguments(
                    folder,
                    per_device_train_batch_size=train.batch_size,
                    max_steps=train.steps,
                    learning_rate=train.lr,
                    weight_decay=train.weight_decay,
                    max_grad_norm=train.max_grad_norm,
                    lr_scheduler_type="linear",
                    train_sampling_strategy="sequential",
                    seed=train.seed,
                    use_cpu=train.device == "cpu",
                    logging_strategy="no",
                    save_strategy="no",
                    report_to="none",
                    disable_tqdm=True,
                ),
                train_dataset=[{"input_ids": work.rows[i].input_ids, "labels": work.rows[i].labels} for i in order],
            )
            trainer.remove_callback(PrinterCallback)
            trainer.losses = []
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                trainer.train()
            losses.append(torch.stack(trainer.losses).tolist())
        model.unload()
    return losses
