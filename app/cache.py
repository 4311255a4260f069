"""The only st.cache_* wrappers: shapes, rank tables, tokenizers, data checks, the ledger."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st
from dial.table import DrawnModule, FullCost
from state import RANKS

from lora_engine import calc
from lora_engine.calc.fit import card_room, verdict
from lora_engine.config import METHOD_CONFIGS, PRECISIONS, TRAINABLE_PRECISIONS, FullConfig, LoraConfig
from lora_engine.errors import InputError

FULL_CONFIG = FullConfig()
# Full fine-tuning in a quantised precision does not exist: it is shown in this one.
FULL_FALLBACK = "bf16"


@st.cache_resource(max_entries=32, show_spinner=False)
def shape(model: str) -> calc.ModelShape:
    """The shape of a model by its name or path. Raises ModelConfigError, NotFoundError."""
    return calc.load_shape(model)


def model_names() -> list[str]:
    """The embedded model first, then one's own that were dropped in (their folders), then the catalog."""
    own = sorted(str(path.parent) for path in ledger().home.glob("models/*/config.json"))
    return ["embedded", *own, *_catalog_names()]


@st.cache_data(show_spinner=False)
def _catalog_names() -> list[str]:
    return sorted(calc.CATALOG, key=str.lower)


@st.cache_data(show_spinner=False)
def cards() -> dict[str, int]:
    """Card name -> bytes of memory, smallest first."""
    return {gpu.name: gpu.memory_bytes for gpu in sorted(calc.GPUS, key=lambda gpu: (gpu.memory_bytes, gpu.name))}


def rank_rows(model: str, method: LoraConfig, precision: str, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The engine's rank table; neither rank nor alpha of `method` matters."""
    return _rank_rows(model, replace(method, r=1, lora_alpha=1.0), precision, dict(options))


@st.cache_data(max_entries=64, show_spinner=False)
def _rank_rows(model: str, method: LoraConfig, precision: str, options: dict[str, Any]) -> list[dict[str, Any]]:
    return calc.rank_table(shape(model), method, RANKS, precision=precision, **options)


@st.cache_data(max_entries=64, show_spinner=False)
def full_cost(model: str, precision: str, options: dict[str, Any]) -> FullCost:
    """Full fine-tuning of the same model, to compare with."""
    used = precision if precision in TRAINABLE_PRECISIONS else FULL_FALLBACK
    memory = calc.estimate_memory(shape(model), FULL_CONFIG, precision=used, **options)
    total = shape(model).total_parameters
    return FullCost(
        total_parameters=total,
        peak_bytes=memory.peak_bytes,
        terms=dict(memory.terms),
        precision=used,
        checkpoint_bytes=total * 2 if used in ("fp16", "bf16") else total * 4,
    )


@st.cache_data(max_entries=64, show_spinner=False)
def module_table(model: str, method: LoraConfig) -> pd.DataFrame:
    """name, count, in_features, out_features, trainable_parameters, formula a row; notes in `.attrs`."""
    counted = calc.count_parameters(shape(model), method)
    columns = ["name", "count", "in_features", "out_features", "trainable_parameters", "formula"]
    frame = pd.DataFrame([asdict(module) for module in counted.modules], columns=columns)
    frame.attrs["notes"] = list(counted.notes)
    return frame


def drawn_module(model: str, method: LoraConfig) -> DrawnModule:
    """The first adapted weight of the model."""
    first = module_table(model, replace(method, r=1, lora_alpha=1.0)).iloc[0]
    return DrawnModule(str(first["name"]), int(first["count"]), int(first["in_features"]), int(first["out_features"]))


def memory_table(model: str, method: LoraConfig, options: Mapping[str, Any]) -> pd.DataFrame:
    """precision, method ("full" | "lora"), term, bytes for every precision; full only where it can train."""
    return _memory_table(model, replace(method, lora_alpha=1.0), dict(options))


@st.cache_data(max_entries=128, show_spinner=False)
def _memory_table(model: str, method: LoraConfig, options: dict[str, Any]) -> pd.DataFrame:
    rows = []
    for precision in PRECISIONS:
        configs = {"full": FULL_CONFIG} if precision in TRAINABLE_PRECISIONS else {}
        for name, config in (configs | {"lora": method}).items():
            terms = calc.estimate_memory(shape(model), config, precision=precision, **options).terms
            rows += [(precision, name, term, value) for term, value in terms.items()]
    return pd.DataFrame(rows, columns=["precision", "method", "term", "bytes"])


@st.cache_data(max_entries=64, show_spinner=False)
def methods_table(model: str, method: LoraConfig) -> pd.DataFrame:
    """method, trainable_parameters, trainable_percent, formula for LoRA as set and every other method as it comes;
    a method that the model cannot have is left out."""
    rows = []
    for name, config in METHOD_CONFIGS.items():
        try:
            counted = calc.count_parameters(shape(model), method if name == "lora" else config())
        except (InputError, KeyError):
            continue
        terms = [module.formula.partition(" = ")[0] for module in counted.modules]
        formula = f"{' + '.join(terms)} = {counted.trainable_parameters:,}"
        rows.append((name, counted.trainable_parameters, counted.trainable_percent, formula))
    return pd.DataFrame(rows, columns=["method", "trainable_parameters", "trainable_percent", "formula"])


def memory(model: str, method: LoraConfig, precision: str, options: Mapping[str, Any]) -> calc.MemoryEstimate:
    """The estimate, with this machine's interval where there is one."""
    estimate = _memory(model, replace(method, lora_alpha=1.0), precision, dict(options))
    return calc.with_interval(estimate, interval())


@st.cache_data(max_entries=128, show_spinner=False)
def _memory(model: str, method: LoraConfig, precision: str, options: dict[str, Any]) -> calc.MemoryEstimate:
    return calc.estimate_memory(shape(model), method, precision=precision, **options)


def fits(model: str, method: LoraConfig, precision: str, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row a card: name, memory_bytes, fits, max_batch, verdict ("yes" | "tight" | "no") by `memory`'s interval."""
    estimate = memory(model, method, precision, options)
    rows = _fits(model, replace(method, lora_alpha=1.0), precision, dict(options))
    return [row | {"verdict": verdict(estimate, card_room(row["memory_bytes"]))} for row in rows]


@st.cache_data(max_entries=128, show_spinner=False)
def _fits(model: str, method: LoraConfig, precision: str, options: dict[str, Any]) -> list[dict[str, Any]]:
    return [asdict(fit) for fit in calc.fit_gpus(shape(model), method, precision=precision, **options)]


def limits(model: str, method: LoraConfig, precision: str, options: Mapping[str, Any], room: int) -> dict[str, int]:
    """The largest "batch", "seq" and "r" whose estimate is at most `room` bytes; 0 where even 1 is too much."""
    return _limits(model, replace(method, lora_alpha=1.0), {"precision": precision, **options}, room)


@st.cache_data(max_entries=128, show_spinner=False)
def _limits(model: str, method: LoraConfig, settings: dict[str, Any], room: int) -> dict[str, int]:
    return {
        "batch": calc.max_batch(shape(model), method, room, **settings),
        "seq": calc.max_seq_length(shape(model), method, room, **settings),
        "r": calc.max_rank(shape(model), method, room, **settings),
    }


def changes(
    model: str, method: LoraConfig, precision: str, options: Mapping[str, Any], room: int
) -> tuple[list[calc.Change], list[calc.Change]]:
    """(changes one after the other until the step fits `room` bytes, single changes by what each saves)."""
    return _changes(model, method, {"precision": precision, **options}, room)


@st.cache_data(max_entries=64, show_spinner=False)
def _changes(
    model: str, method: LoraConfig, settings: dict[str, Any], room: int
) -> tuple[list[calc.Change], list[calc.Change]]:
    return (
        calc.changes_until_it_fits(shape(model), method, room, settings),
        calc.cheapest_changes(shape(model), method, room, settings),
    )


@st.cache_data(ttl=10, max_entries=8, show_spinner=False)
def _accuracy(home: str) -> pd.DataFrame:
    from lora_engine.runs import accuracy_frame

    return accuracy_frame(_ledger(home))


def accuracy() -> pd.DataFrame:
    """Every finished run's prediction beside its measurement (`accuracy_frame`); at most ten seconds old."""
    return _accuracy(str(ledger().home))


@st.cache_data(ttl=10, max_entries=8, show_spinner=False)
def _prediction_errors(home: str) -> dict[str, list[float]]:
    from lora_engine.runs import prediction_errors

    return prediction_errors(_ledger(home))


def interval() -> calc.Interval | None:
    """What this machine's runs say about predictions: those on its card where there are enough, else those on its
    CPU; None with too few of either."""
    errors = _prediction_errors(str(ledger().home))
    for kind in ("allocated", "tracked"):
        found = calc.calibrate(errors.get(kind, []))
        if found is not None:
            return found
    return None


@st.cache_resource(max_entries=8, show_spinner=False)
def _tokenizer(folder: str) -> Any:
    from lora_engine import data

    return data.load_tokenizer(Path(folder))


def tokenizer(model: str) -> tuple[Any, str | None]:
    """(tokenizer, note): the model's own, or the embedded one with a sentence that says so."""
    from lora_engine.assets_path import absolute_model, asset_path

    base = str(asset_path("base"))
    folder = base if model == "embedded" else absolute_model(model)
    if (Path(folder) / "tokenizer.json").is_file():
        return _tokenizer(folder), None
    return _tokenizer(base), f"{model} has no tokenizer on this machine; tokens are counted with the embedded model's."


def check_data(
    path: Path,
    model: str,
    max_length: int,
    *,
    task: str | None,
    columns: Mapping[str, str] | None,
    encoding: str | None,
) -> dict[str, Any]:
    """The report of the data check as a dict, or {"error": one sentence}."""
    try:
        stamp = path.stat().st_mtime_ns
    except OSError:
        return {"error": f"{path.name} is no longer there; choose it again."}
    return _check_data(str(path), stamp, model, max_length, task, dict(columns) if columns else None, encoding)


@st.cache_data(max_entries=32, show_spinner="Checking the data")
def _check_data(
    path: str,
    stamp: int,  # noqa: ARG001 - part of the key: a changed file is read again
    model: str,
    max_length: int,
    task: str | None,
    columns: dict[str, str] | None,
    encoding: str | None,
) -> dict[str, Any]:
    from lora_engine import data

    try:
        report = data.check_dataset(
            Path(path), tokenizer(model)[0], max_length=max_length, task=task, columns=columns, encoding=encoding
        )
    except InputError as error:
        return {"error": str(error)}
    return dict(report.to_dict())


def ledger() -> Any:
    """The ledger at home; a changed LORA_EXPLORER_HOME gives another one."""
    from lora_engine.runs import default_home

    return _ledger(str(default_home()))


@st.cache_resource(max_entries=4, show_spinner=False)
def _ledger(home: str) -> Any:
    from lora_engine.runs import Ledger

    return Ledger(Path(home))


def dialer() -> Any:
    """The warm process that turns the dial of runs at home; started with its first question."""
    from lora_engine.runs import default_home

    return _dialer(str(default_home()))


@st.cache_resource(max_entries=2, show_spinner=False, on_release=lambda warm: warm.close())
def _dialer(home: str) -> Any:
    from lora_engine.executors.warm import WarmProcess

    return WarmProcess(Path(home))
