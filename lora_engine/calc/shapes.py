"""config.json -> ModelShape. Read with `json`, without transformers."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_engine.assets_path import asset_path
from lora_engine.calc.catalog import CATALOG, find_model, near_matches
from lora_engine.calc.facts import Facts
from lora_engine.calc.families import build_shape
from lora_engine.calc.structure import LinearShape, ModelShape, OtherShape
from lora_engine.errors import ModelConfigError, NotFoundError

__all__ = ["LinearShape", "ModelShape", "OtherShape", "load_shape", "shape_from_config"]

MAX_CONFIG_BYTES = 5_000_000


def load_shape(model: str) -> ModelShape:
    """The shape of "embedded", a folder with config.json, a path to a config.json, a catalog name, or a hub id
    whose config.json is already in the hub's cache on this machine; looked up in that order.

    Raises NotFoundError when there is no such thing, ModelConfigError when the file cannot be understood."""
    if model == "embedded":
        return _read_config(asset_path("base") / "config.json", "embedded")
    path = _local_config(model)
    if path is not None:
        return _read_config(path, path.parent.resolve().name if path.name == "config.json" else path.stem)
    hub_id = find_model(model)
    if hub_id is not None:
        return shape_from_config(CATALOG[hub_id], hub_id)
    cached = _cached_config(model)
    if cached is not None:
        return _read_config(cached, model)
    near = near_matches(model)
    hint = f" (near: {', '.join(near)})" if near else ""
    raise NotFoundError(
        f"model is {model[:200]!r}; allowed: embedded, a folder with config.json, a path to a config.json, "
        f"or a name from the catalog{hint}."
    )


def shape_from_config(config: Mapping[str, Any], name: str) -> ModelShape:
    """The shape that `config`, the content of a config.json, describes. Raises ModelConfigError."""
    if not isinstance(config, Mapping):
        raise ModelConfigError(f"config of {name} is a {type(config).__name__}; allowed: a JSON object.")
    return build_shape(Facts(config, name))


def _local_config(model: str) -> Path | None:
    """The config.json that the path `model` means, None when there is no such file or folder."""
    try:
        path = Path(model).expanduser()
        if path.is_file():
            return path
        if (path / "config.json").is_file():
            return path / "config.json"
        if path.is_dir() and model.strip() and find_model(model) is None:
            raise NotFoundError(f"model is {model!r}; allowed: a folder that holds config.json.")
    except (OSError, ValueError, RuntimeError):  # too long, a NUL byte, no home folder
        return None
    return None


def _read_config(path: Path, name: str) -> ModelShape:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise ModelConfigError(f"{path} cannot be read: {error.strerror or type(error).__name__}.") from error
    if len(raw) > MAX_CONFIG_BYTES:
        raise ModelConfigError(f"{path} is larger than {MAX_CONFIG_BYTES // 10**6} MB; allowed: a config.json.")
    try:
        config = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ModelConfigError(f"{path} is not text in UTF-8; allowed: a config.json.") from error
    except json.JSONDecodeError as error:
        raise ModelConfigError(
            f"{path} is not JSON (line {error.lineno}: {error.msg}); allowed: a config.json."
        ) from error
    except (RecursionError, ValueError) as error:  # nested too deep, or a number of thousands of digits
        raise ModelConfigError(f"{path} is not a config.json that can be read; allowed: a JSON object.") from error
    if not isinstance(config, dict):
        raise ModelConfigError(f"{path} holds a JSON {type(config).__name__}; allowed: a JSON object.")
    return shape_from_config(config, name)


def _cached_config(model: str) -> Path | None:
    """config.json of hub id `model` as huggingface_hub keeps it, if it was downloaded before."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model):
        return None
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub") / f"models--{model.replace('/', '--')}"
    try:
        commit = (cache / "refs" / "main").read_text().strip()
        path = cache / "snapshots" / commit / "config.json"
        return path if re.fullmatch(r"[0-9a-f]{40}", commit) and path.is_file() else None
    except (OSError, ValueError):
        return None
