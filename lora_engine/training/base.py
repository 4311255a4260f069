"""Base models: found, checked, loaded. Safetensors only, never remote code."""

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils import logging as transformers_logging

from lora_engine.assets_path import asset_path
from lora_engine.config import TrainConfig
from lora_engine.errors import ConfigError, ModelLoadError
from lora_engine.methods.places import task_head_parameters
from lora_engine.methods.quantized import QUANTIZED_PRECISIONS, quantize_model

_ENCODERS = {
    "albert", "bert", "camembert", "deberta", "deberta-v2", "distilbert", "electra", "modernbert", "mpnet", "roberta",
    "xlm-roberta",
}  # fmt: skip
_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]


@dataclass(frozen=True)
class Precision:
    """How a precision setting is carried out: `weights` as stored, `compute` under autocast (None: as
    stored), `scaled` for float16's loss scaling (Micikevicius et al. 2018, section 3.2). Quantised: `weights` is the
    type of what is not packed, and of products."""

    weights: torch.dtype
    compute: torch.dtype | None
    scaled: bool


PRECISION_PLANS = {
    "fp32": Precision(torch.float32, None, False),
    "bf16": Precision(torch.bfloat16, None, False),
    "fp16": Precision(torch.float16, None, True),
    "mixed-bf16": Precision(torch.float32, torch.bfloat16, False),
    "mixed-fp16": Precision(torch.float32, torch.float16, True),
    **dict.fromkeys(QUANTIZED_PRECISIONS, Precision(torch.bfloat16, None, False)),
}


def autocast_of(config: TrainConfig, device: torch.device) -> Any:
    """The context that products run in: autocast for mixed precision, else nothing."""
    compute = PRECISION_PLANS[config.precision].compute
    return contextlib.nullcontext() if compute is None else torch.autocast(device.type, compute)


def resolve_model(model: str) -> Path:
    """Folder of "embedded", of a local folder, or of a hub id (downloaded once, when there is a network).

    Raises ModelLoadError."""
    if model == "embedded":
        return asset_path("base")
    folder = Path(model).expanduser()
    if folder.is_dir():
        return _checked(folder.resolve())
    if folder.exists():
        raise ModelLoadError(f"model is {model!r}, a file; allowed: embedded, a folder, or a hub id.")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import snapshot_download

    try:
        return _checked(Path(snapshot_download(model, allow_patterns=_FILES)))
    except ModelLoadError:
        raise
    except Exception as error:
        why = type(error).__name__
        raise ModelLoadError(
            f"model is {model!r}; it is no folder here and could not be downloaded ({why}); "
            "allowed: embedded, a folder with config.json and safetensors, or a hub id while there is a network."
        ) from error


def _checked(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise ModelLoadError(f"model is {str(folder)!r}; allowed: a folder that holds config.json.")
    if not list(folder.glob("*.safetensors")):
        raise ModelLoadError(
            f"model is {str(folder)!r}; allowed: a folder with *.safetensors (pickled weights are refused)."
        )
    return folder


def resolve_device(device: str) -> torch.device:
    """ "auto" takes CUDA, then MPS, then the CPU. Raises ConfigError for a device that is not here."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        return torch.device(next(name for name in ("cuda", "mps", "cpu") if available[name]))
    if not available[device]:
        here = ", ".join(name for name, ok in available.items() if ok)
        raise ConfigError("device", device, f"auto, {here} on this machine")
    return torch.device(device)


def load_base(
    folder: Path, train: TrainConfig, device: torch.device, *, classes: Sequence[str] = (), pad_id: int | None = None
) -> Any:
    """The causal language model in `folder`, on `device`, in the dtype of `train.precision`; with `classes`, a
    classifier on it: any encoder or decoder with a new head, the same for the same `train.seed`.

    Quantised: read in bfloat16 and packed layer by layer on the device, which never holds the unpacked model.

    Raises ModelLoadError when transformers cannot load it, ConfigError when its context is too short."""
    transformers_logging.disable_progress_bar()
    kind: Any = AutoModelForCausalLM
    more: dict[str, Any] = {}
    if classes:
        kind = AutoModelForSequenceClassification
        # A decoder's head reads the last token that is no padding, so the model has to know it.
        more = {
            "num_labels": len(classes),
            "id2label": dict(enumerate(classes)),
            "label2id": {name: i for i, name in enumerate(classes)},
            "pad_token_id": pad_id,
            "ignore_mismatched_sizes": True,  # a head for other classes makes way
        }
    elif _model_type(folder) in _ENCODERS:
        raise ModelLoadError(
            f"model is {folder.name!r}, an encoder, which writes no text; allowed with it: data of texts and labels."
        )
    torch.manual_seed(train.seed)  # the new head's
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # what is missing is judged below, in one line
    try:
        model, info = kind.from_pretrained(
            folder,
            dtype=weight_dtype(train, device),
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            **more,
        )
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelLoadError(f"model is {folder.name!r}; transformers could not load it: {reason}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    _check_weights(folder, model, info)
    check_context(model, train)
    prepare_model(model, train)
    if train.precision in QUANTIZED_PRECISIONS:
        quantize_model(model, train.precision, device)
    return model.to(device)


def task_heads(
    folder: Path, train: TrainConfig, seeds: Sequence[int], *, classes: Sequence[str], pad_id: int
) -> dict[int, dict[str, Tensor]]:
    """The task head that `load_base` begins with, for each seed: float32, on the CPU, by full parameter name."""
    cpu = torch.device("cpu")
    if train.precision in QUANTIZED_PRECISIONS:  # the head is not packed, so nothing needs packing here
        train = replace(train, precision="bf16" if weight_dtype(train, cpu) == torch.bfloat16 else "fp32")
    heads = {}
    for seed in dict.fromkeys(seeds):
        model = load_base(folder, replace(train, seed=seed), cpu, classes=classes, pad_id=pad_id)
        heads[seed] = {name: p.detach().float() for name, p in task_head_parameters(model)}
    return heads


def weight_dtype(train: TrainConfig, device: torch.device) -> torch.dtype:
    """How `train.precision` stores weights on `device`; quantised ones are read and computed in float32 where there
    is no bfloat16. (Float16 would overflow without loss scaling.)"""
    if train.precision in QUANTIZED_PRECISIONS and not _has_bfloat16(device):
        return torch.float32
    return PRECISION_PLANS[train.precision].weights


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":  # emulated on cards before Ampere
        return torch.cuda.is_bf16_supported()
    return device.type != "mps" or torch.backends.mps.is_macos_or_newer(14, 0)


def prepare_model(model: Any, train: TrainConfig) -> None:
    """What the loop's settings ask of the model itself: gradient checkpointing."""
    if train.checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        # A frozen embedding gives checkpointed layers no input that needs a gradient.
        model.enable_input_require_grads()


def check_context(model: Any, train: TrainConfig) -> None:
    """Raises ConfigError when sequences of `train` do not fit into the model's context, as it is now."""
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and train.max_length > context:
        raise ConfigError("max_length", train.max_length, f"at most {context}, the context of this model")


def _model_type(folder: Path) -> str:
    try:
        return str(json.loads((folder / "config.json").read_text()).get("model_type", ""))
    except (OSError, ValueError, AttributeError):  # transformers will say what is wrong with it
        return ""


def _check_weights(folder: Path, model: Any, info: Mapping[str, Any]) -> None:
    """Raises ModelLoadError when pretrained weights are missing; a classifier's head and an encoder's pooler may be."""
    base = getattr(model, "base_model_prefix", "") + "."
    is_classifier = type(model).__name__.endswith("ForSequenceClassification")
    wanted = [name for name in info["missing_keys"] if not is_classifier or name.startswith(base)]
    wanted = sorted(name for name in wanted if ".pooler." not in name)
    if wanted:
        raise ModelLoadError(
            f"model is {folder.name!r}, whose safetensors lack {len(wanted)} weights of a {type(model).__name__} "
            f"({wanted[0]}); allowed: a folder with all of them."
        )
