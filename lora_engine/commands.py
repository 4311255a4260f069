"""One function a command: parsed arguments -> (JSON payload, text for people). No torch until a command needs it."""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from lora_engine.calc import (
    count_parameters,
    estimate_memory,
    fit_gpus,
    load_shape,
    parse_targets,
)
from lora_engine.calc.predict import RowFacts, predict_run, row_facts
from lora_engine.config import DataConfig, FullConfig, LoraConfig, MethodConfig, RunConfig, TrainConfig, to_dict
from lora_engine.errors import ConfigError, InputError, RunFailedError
from lora_engine.executors import LocalExecutor
from lora_engine.runs import Ledger, RunRecord, default_home, runs_frame
from lora_engine.runs.uploads import store_upload
from lora_engine.sweeps import SweepSpec, advise, start_sweep
from lora_engine.text import bytes_text, count_text, table_text

Output = tuple[dict[str, Any] | None, str]

FULL_LR = 3e-4
LORA_LR = 3e-3


def app(arguments: argparse.Namespace) -> Output:
    """Serve the dashboard until interrupted; loopback only."""
    from lora_engine.assets_path import app_path

    if not 1 <= arguments.port <= 65535:
        raise ConfigError("port", arguments.port, "a whole number from 1 to 65535")
    script = app_path()
    command = [sys.executable, "-m", "streamlit", "run", str(script), "--server.port", str(arguments.port)]
    command += ["--server.headless", "true" if arguments.no_browser else "false"]
    # Streamlit reads .streamlit/config.toml of the working folder: the one beside main.py holds everywhere.
    # One BLAS thread keeps the small matrices of a page from fighting over the cores of a running fine-tune.
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    try:
        code = subprocess.run(command, cwd=script.parent, env=environment, check=False).returncode
    except KeyboardInterrupt:
        code = 0
    if code not in (0, -2, 130):
        raise RunFailedError(f"The dashboard stopped with exit code {code}; is port {arguments.port} in use?")
    return None, ""


def count(arguments: argparse.Namespace) -> Output:
    shape = load_shape(arguments.model)
    counted = count_parameters(shape, _method(arguments))
    payload = {
        "model": shape.name,
        "total_parameters": counted.total_parameters,
        "trainable_parameters": counted.trainable_parameters,
        "trainable_percent": counted.trainable_percent,
        "modules": [asdict(module) for module in counted.modules],
        "notes": list(counted.notes),
    }
    rows = [[m.name, m.count, m.in_features, m.out_features, f"{m.trainable_parameters:,}"] for m in counted.modules]
    lines = [
        f"{shape.name}: {counted.trainable_parameters:,} of {counted.total_parameters:,} parameters are trained "
        f"({counted.trainable_percent:.3g} %).",
        table_text(["module", "count", "in", "out", "trainable"], rows),
        *counted.notes,
    ]
    return payload, "\n".join(lines)


def memory(arguments: argparse.Namespace) -> Output:
    shape, method = load_shape(arguments.model), _method(arguments)
    settings: dict[str, Any] = {
        "precision": arguments.precision,
        "batch_size": arguments.batch,
        "seq_length": arguments.seq,
        "optimizer": arguments.optimizer,
        "checkpointing": arguments.checkpointing,
        "attention": arguments.attention,
    }
    estimate = estimate_memory(shape, method, **settings)
    gpus = fit_gpus(shape, method, **settings)
    payload = {
        "model": shape.name,
        "terms": dict(estimate.terms),
        "peak_bytes": estimate.peak_bytes,
        "low_bytes": estimate.low_bytes,
        "high_bytes": estimate.high_bytes,
        "inference_bytes": estimate.inference_bytes,
        "gpus": [asdict(gpu) for gpu in gpus],
    }
    lines = [
        f"{shape.name}: {bytes_text(estimate.peak_bytes)} to train (predicted; "
        f"{bytes_text(estimate.low_bytes)} to {bytes_text(estimate.high_bytes)}), "
        f"{bytes_text(estimate.inference_bytes)} to run.",
        table_text(["term", "memory"], [[name, bytes_text(value)] for name, value in estimate.terms.items()]),
        table_text(
            ["card", "memory", "fits", "largest batch"],
            [[g.name, bytes_text(g.memory_bytes), "yes" if g.fits else "no", g.max_batch] for g in gpus],
        ),
    ]
    return payload, "\n\n".join(lines)


def data(arguments: argparse.Namespace) -> Output:
    from lora_engine.data import check_dataset, load_tokenizer

    report = check_dataset(
        _file(arguments.file), load_tokenizer(_model_folder(arguments.model)), max_length=arguments.seq
    )
    payload = report.to_dict()
    lines = [
        f"{arguments.file}: {payload['format']}, {payload['rows']} rows, task {payload['task']}.",
        f"{payload['examples']} examples, {payload['tokens']:,} tokens, {len(payload['dropped'])} rows dropped.",
        *(f"  row {drop['row']}: {drop['reason']}" for drop in payload["dropped"][:10]),
        *payload["warnings"],
    ]
    return payload, "\n".join(lines)


def train(arguments: argparse.Namespace) -> Output:
    ledger = Ledger(default_home())
    method = _method(arguments)
    lr = arguments.lr if arguments.lr is not None else (FULL_LR if arguments.method == "full" else LORA_LR)
    train = _loop(arguments, lr=lr, seed=arguments.seed)
    dataset, rows = _data(ledger, arguments)
    config = RunConfig(
        model=_model_name(arguments.model),
        data=dataset,
        method=method,
        train=train,
    )
    prediction = predict_run(config, rows)
    run_id = ledger.create_run(to_dict(config), prediction=prediction, num_steps=config.train.steps)
    executor = LocalExecutor(ledger.home)
    executor.submit([run_id])
    record = _follow(ledger, [run_id], quiet=arguments.json, cancel=executor.cancel)[0]
    payload = _run_payload(record)
    if record.status in ("failed", "queued", "interrupted"):
        why = record.error or f"its worker ended early; see {ledger.home / 'worker.log'}"
        raise RunFailedError(f"run {run_id} is {record.status}: {why}")
    sample = (record.result or {}).get("sample", {})
    lines = [
        f"Run {run_id} {record.status}. Evaluation loss fell from {payload['eval_loss_before']:.3f} to "
        f"{payload['eval_loss_after']:.3f} in {payload['seconds']:.0f} s of training."
        if payload["eval_loss_after"] is not None and payload["eval_loss_after"] <= payload["eval_loss_before"]
        else f"Run {run_id} {record.status}. Evaluation loss: {payload['eval_loss_before']} before, "
        f"{payload['eval_loss_after']} after.",
        f"Trained {count_text(payload['trainable_parameters'])} of "
        f"{count_text(payload['total_parameters'])} parameters; "
        f"peak memory {bytes_text(payload['peak_bytes'])} measured, "
        f"{bytes_text(payload['predicted_peak_bytes'])} predicted.",
        f"Prompt: {sample.get('prompt', '')!r}",
        f"Before: {sample.get('before', '')!r}",
        f"After:  {sample.get('after', '')!r}",
        f"Adapter: {ledger.run_folder(run_id) / 'adapter'}",
    ]
    return payload, "\n".join(lines)


def sweep(arguments: argparse.Namespace) -> Output:
    ledger = Ledger(default_home())
    method = LoraConfig(target_modules=parse_targets(arguments.targets), use_rslora=arguments.rslora)
    train = _loop(arguments, lr=LORA_LR, seed=0)
    dataset, rows = _data(ledger, arguments)
    base = RunConfig(model=_model_name(arguments.model), data=dataset, method=method, train=train)
    spec = SweepSpec(base=base, rs=arguments.r, lora_alphas=arguments.alpha, lrs=arguments.lr, seeds=arguments.seeds)
    executor = LocalExecutor(ledger.home)
    began = time.monotonic()
    sweep_id = start_sweep(ledger, spec, executor, partial(predict_run, rows=rows))
    sweep_run_ids = list(ledger.get_sweep(sweep_id).run_ids)
    records = _follow(ledger, sweep_run_ids, quiet=arguments.json, cancel=executor.cancel)
    frame = runs_frame(ledger, sweep_id)
    try:
        advice = advise(frame)
    except InputError:  # no run finished, or every one diverged
        advice = None
    status = ledger.get_sweep(sweep_id).status
    cells: list[dict[str, Any]] = [
        {
            "run_id": record.id,
            "r": record.config["method"]["r"],
            "alpha": record.config["method"]["lora_alpha"],
            "lr": record.config["train"]["lr"],
            "seed": record.config["train"]["seed"],
            "status": record.status,
            "trainable_parameters": (record.result or {}).get("trainable_parameters"),
            "eval_loss_after": (record.result or {}).get("eval_loss_after"),
            "seconds": (record.result or {}).get("seconds"),
        }
        for record in records
    ]
    payload = {
        "sweep_id": sweep_id,
        "status": status,
        "seconds": time.monotonic() - began,
        "runs": cells,
        "recommended": {"r": advice.r, "alpha": advice.lora_alpha, "lr": advice.lr, "reason": advice.reason}
        if advice
        else None,
    }
    if advice is None:
        failed = next((r.error for r in records if r.error), "no run finished")
        raise RunFailedError(f"sweep {sweep_id}: {failed}")
    lines = [
        [run["run_id"], run["r"], f"{run['alpha']:g}", f"{run['lr']:g}", run["seed"], run["status"], _loss(run)]
        for run in cells
    ]
    text = table_text(["run", "r", "alpha", "lr", "seed", "status", "evaluation loss"], lines)
    return payload, f"{text}\n\n{advice.reason}"


def generate(arguments: argparse.Namespace) -> Output:
    if not 0 <= arguments.temperature <= 10:
        raise ConfigError("temperature", arguments.temperature, "a number from 0 to 10")
    if not 1 <= arguments.max_tokens <= 4096:
        raise ConfigError("max_tokens", arguments.max_tokens, "a whole number from 1 to 4096")
    ledger = Ledger(default_home())
    record = ledger.get_run(arguments.run)
    if record.status != "done":
        raise InputError(f"run is {arguments.run!r}, which is {record.status}; allowed: a run that is done.")
    from lora_engine.jobs import generate_from_run

    payload = generate_from_run(
        record.config,
        ledger.run_folder(record.id),
        prompt=arguments.prompt,
        scale=arguments.scale,
        max_new_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        seed=arguments.seed,
        with_eval=arguments.eval,
    )
    text = payload["text"]
    if arguments.eval:
        text += f"\n\nEvaluation loss at scale {arguments.scale:g}: {payload['eval_loss']:.4f}"
    return payload, text


def runs(arguments: argparse.Namespace) -> Output:
    ledger = Ledger(default_home())
    if arguments.action == "list":
        records = ledger.list_runs()
        rows = [
            [r.id, r.status, r.config["model"], r.config["method"]["method"], r.config["method"].get("r", ""),
             f"{r.last_step or 0}/{r.num_steps}", _loss(r.result or {})]
            for r in records
        ]  # fmt: skip
        text = table_text(["run", "status", "model", "method", "r", "steps", "evaluation loss"], rows)
        return {"runs": [_run_payload(r) for r in records]}, text if records else "No runs yet."
    if not arguments.run:
        raise InputError(f"run is missing; allowed: lora-explorer runs {arguments.action} ID.")
    record = ledger.get_run(arguments.run)
    if arguments.action == "cancel":
        ledger.request_cancel(record.id)
    elif arguments.action == "resume":
        ledger.requeue(record.id)
        LocalExecutor(ledger.home).submit([record.id])
    elif arguments.action == "delete":
        ledger.delete_run(record.id)
        return {"run_id": record.id, "status": "deleted"}, f"Deleted {record.id}."
    record = ledger.get_run(record.id)
    payload = _run_payload(record) | {"config": record.config, "prediction": record.prediction, "error": record.error}
    shown = {key: value for key, value in payload.items() if key not in ("config", "prediction")}
    return payload, table_text(["", ""], [[key, value] for key, value in shown.items()])


def pretrain(arguments: argparse.Namespace) -> Output:
    if not arguments.corpus.is_dir():
        raise InputError(f"corpus is {str(arguments.corpus)!r}; allowed: a folder of .txt files.")
    if arguments.tokens < 4096:
        raise ConfigError("tokens", arguments.tokens, "a whole number of at least 4096")
    from tqdm import tqdm

    from lora_engine.training.base import resolve_device
    from lora_engine.training.pretrain import PretrainConfig
    from lora_engine.training.pretrain import pretrain as run_pretraining

    config = PretrainConfig(
        tokens=arguments.tokens,
        hidden_size=arguments.hidden,
        num_layers=arguments.layers,
        optimizer=arguments.optimizer,
        seed=arguments.seed,
    )
    with tqdm(total=config.num_steps, unit="step", disable=arguments.json) as bar:

        def on_step(step: int, _num_steps: int, loss: float, rate: float) -> None:
            bar.initial = bar.initial or step - 1
            bar.n = step
            bar.set_postfix(loss=f"{loss:.3f}", tokens_per_second=f"{rate:.0f}", refresh=False)
            bar.refresh()

        result = run_pretraining(
            arguments.corpus,
            arguments.out,
            config,
            device=str(resolve_device(arguments.device)),
            half=not arguments.fp32,
            compile_model=arguments.compile,
            on_step=on_step,
        )
    payload = {key: result[key] for key in ("parameters", "tokens", "eval_bits_per_byte", "seconds")}
    return payload, (
        f"{result['parameters']:,} parameters, {result['tokens']:,} tokens, "
        f"{result['eval_bits_per_byte']:.3f} bits per byte on held-out text; written to {arguments.out}."
    )


# ------------------------------------------------------------------------------------------- helpers


def _method(arguments: argparse.Namespace) -> MethodConfig:
    if arguments.method == "full":
        return FullConfig()
    return LoraConfig(
        r=arguments.r,
        lora_alpha=arguments.alpha if arguments.alpha is not None else 2.0 * arguments.r,
        target_modules=parse_targets(arguments.targets),
        use_rslora=arguments.rslora,
        use_dora=getattr(arguments, "dora", False),
    )


def _loop(arguments: argparse.Namespace, *, lr: float, seed: int) -> TrainConfig:
    return TrainConfig(
        lr=lr,
        steps=arguments.steps,
        batch_size=arguments.batch,
        max_length=arguments.seq,
        seed=seed,
        precision=arguments.precision,
        device=arguments.device,
    )


def _file(path: str) -> Path:
    found = Path(path).expanduser()
    if not found.is_file():
        raise InputError(f"data is {path!r}; allowed: the path of a file that exists.")
    return found


def _data(ledger: Ledger, arguments: argparse.Namespace) -> tuple[DataConfig, RowFacts]:
    """Check the dataset before anything starts, then keep a copy with the ledger; also the facts of its rows."""
    from lora_engine.data import check_dataset, load_tokenizer

    path = _file(arguments.data)
    report = check_dataset(path, load_tokenizer(_model_folder(arguments.model)), max_length=arguments.seq).to_dict()
    stored = store_upload(ledger.home, path.name, path.read_bytes())
    return DataConfig(path=str(stored)), row_facts(report)


def _model_name(model: str) -> str:
    """Folders as full paths, since the worker may run elsewhere."""
    folder = Path(model).expanduser()
    return str(folder.resolve()) if model != "embedded" and folder.is_dir() else model


def _model_folder(model: str) -> Path:
    from lora_engine.assets_path import asset_path

    if model == "embedded":
        return asset_path("base")
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    from lora_engine.training.base import resolve_model

    return resolve_model(model)


def _follow(ledger: Ledger, run_ids: list[str], *, quiet: bool, cancel: Callable[[str], None]) -> list[RunRecord]:
    """Wait for the runs, with a progress bar on standard error; Ctrl-C cancels them."""
    from tqdm import tqdm

    ended = ("done", "failed", "cancelled", "interrupted")
    records = [ledger.get_run(run_id) for run_id in run_ids]
    try:
        with tqdm(total=sum(r.num_steps for r in records), unit="step", disable=quiet) as bar:
            while True:
                records = [r if r.status in ended else ledger.get_run(r.id) for r in records]
                bar.n = sum(r.last_step or 0 for r in records)
                active = next((r for r in records if r.status == "running"), None)
                if active:
                    loss = "" if active.last_train_loss is None else f", loss {active.last_train_loss:.3f}"
                    bar.set_description(f"{active.progress or 'running'}{loss}", refresh=False)
                bar.refresh()
                # A queued run that no living worker will come to ends the wait too.
                if all(r.status in ended or (r.status == "queued" and not r.waits_for_worker) for r in records):
                    return records
                time.sleep(0.2)
    except KeyboardInterrupt:
        for record in records:
            if record.status not in ended:
                cancel(record.id)
        raise


def _run_payload(record: RunRecord) -> dict[str, Any]:
    result = record.result or {}
    keys = (
        "trainable_parameters", "total_parameters", "eval_loss_before", "eval_loss_after", "seconds",
        "tokens_per_second", "peak_bytes", "peak_kind", "adapter_bytes", "device",
    )  # fmt: skip
    return {
        "run_id": record.id,
        "sweep_id": record.sweep_id,
        "status": record.status,
        "method": record.config["method"]["method"],
        "steps": record.last_step or 0,
        "predicted_peak_bytes": (record.prediction or {}).get("peak_bytes"),
        **{key: result.get(key) for key in keys},
    }


def _loss(values: dict[str, Any]) -> str:
    loss = values.get("eval_loss_after")
    return "" if loss is None else f"{loss:.4f}"
