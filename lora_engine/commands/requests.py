"""Parsed arguments to configs, files and folders that are there."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_engine.assets_path import asset_path
from lora_engine.calc import parse_targets
from lora_engine.calc.devices import default_precision
from lora_engine.calc.predict import RowFacts, row_facts
from lora_engine.config import (
    BATCH,
    STEPS,
    BottleneckConfig,
    DataConfig,
    FullConfig,
    HeadConfig,
    IA3Config,
    LoraConfig,
    MethodConfig,
    PrefixConfig,
    TrainConfig,
)
from lora_engine.data import check_dataset, load_tokenizer
from lora_engine.errors import InputError
from lora_engine.runs import Ledger, store_upload

# What a command gives back: the JSON object (None: nothing to print) and the same for people.
Output = tuple[dict[str, Any] | None, str]


def method_of(arguments: argparse.Namespace) -> MethodConfig:
    """The config of --method, from the flags that belong to it."""
    only_parameters = bool(arguments.target_parameters) and not arguments.targets.strip()
    builders: dict[str, Callable[[], MethodConfig]] = {
        "lora": lambda: LoraConfig(
            r=arguments.r,
            lora_alpha=arguments.alpha if arguments.alpha is not None else 2.0 * arguments.r,
            target_modules=() if only_parameters else parse_targets(arguments.targets),
            use_rslora=arguments.rslora,
            use_dora=arguments.dora,
            layers_to_transform=arguments.layers,
            exclude_modules=parse_targets(arguments.exclude) if arguments.exclude else (),
            rank_pattern=tuple(arguments.rank_pattern or ()),
            alpha_pattern=tuple(arguments.alpha_pattern or ()),
            target_parameters=parse_names(arguments.target_parameters),
        ),
        "full": FullConfig,
        "head": HeadConfig,
        "bottleneck": lambda: BottleneckConfig(
            reduction_factor=arguments.reduction_factor,
            placement=arguments.placement,
            activation=arguments.activation,
        ),
        "prefix": lambda: PrefixConfig(
            prefix_length=arguments.prefix_length,
            reparametrize=arguments.reparametrize,
            encoder_hidden_size=arguments.encoder_hidden,
        ),
        "ia3": IA3Config,
    }
    return builders[arguments.method]()


def parse_names(text: str | None) -> tuple[str, ...]:
    """ "a,b" -> ("a", "b"); nothing for None."""
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())


def loop_of(arguments: argparse.Namespace, rows: RowFacts, *, lr: float, seed: int) -> TrainConfig:
    steps, batch_size = STEPS[rows.num_classes > 0], BATCH[rows.num_classes > 0]
    return TrainConfig(
        lr=lr,
        steps=steps if arguments.steps is None else arguments.steps,
        batch_size=batch_size if arguments.batch is None else arguments.batch,
        max_length=arguments.seq,
        seed=seed,
        precision=precision_of(arguments),
        device=arguments.device,
    )


def precision_of(arguments: argparse.Namespace) -> str:
    """As asked, else as fits the device; float32 where every weight is trained, or methods are compared: the small
    steps of full fine-tuning are lost in bfloat16 weights."""
    if arguments.precision:
        return str(arguments.precision)
    trains_all = "methods" in arguments or getattr(arguments, "method", "") == "full"
    return "fp32" if trains_all else default_precision(arguments.device)


def file_of(path: str) -> Path:
    found = Path(os.path.expanduser(path))  # noqa: PTH111 (leaves ~nobody as it is instead of raising)
    if not found.is_file():
        raise InputError(f"data is {path!r}; allowed: the path of a file that exists.")
    return found


def data_of(ledger: Ledger, arguments: argparse.Namespace) -> tuple[DataConfig, RowFacts]:
    """Check the dataset before anything starts, then keep a copy with the ledger; also the facts of its rows."""
    loop_of(arguments, RowFacts(0, 0.0), lr=1.0, seed=0)  # a wrong flag is said before a file is read, let alone kept
    path = file_of(arguments.data)
    report = check_dataset(path, load_tokenizer(model_folder(arguments.model)), max_length=arguments.seq).to_dict()
    stored = store_upload(ledger.home, path.name, path.read_bytes())
    return DataConfig(path=str(stored)), row_facts(report)


def model_folder(model: str) -> Path:
    if model == "embedded":
        return asset_path("base")
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    from lora_engine.training.base import resolve_model

    return resolve_model(model)
