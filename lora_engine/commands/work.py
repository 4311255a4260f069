"""train, sweep, generate, pretrain: what takes a while."""

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from tqdm import tqdm

from lora_engine.assets_path import absolute_model
from lora_engine.calc import parse_targets
from lora_engine.calc.predict import predict_run
from lora_engine.commands.history import loss_text, run_payload
from lora_engine.commands.requests import Output, data_of, loop_of, method_of
from lora_engine.config import LoraConfig, RunConfig, default_lr, to_dict
from lora_engine.errors import ConfigError, InputError, RunFailedError
from lora_engine.executors import LocalExecutor
from lora_engine.runs import Ledger, RunRecord, default_home, runs_frame
from lora_engine.sweeps import (
    EarlyExitBill,
    SweepSpec,
    advise,
    early_exit_bill,
    estimate_packed_sweep_seconds,
    estimate_sweep_seconds,
    evaluated_at_quarters,
    start_sweep,
)
from lora_engine.text import bytes_text, count_text, table_text


def train(arguments: argparse.Namespace) -> Output:
    ledger = Ledger(default_home())
    method = method_of(arguments)
    dataset, rows = data_of(ledger, arguments)
    lr = arguments.lr if arguments.lr is not None else default_lr(method.method, rows.num_classes)
    train = loop_of(arguments, rows, lr=lr, seed=arguments.seed)
    config = RunConfig(
        model=absolute_model(arguments.model),
        data=dataset,
        method=method,
        train=train,
    )
    prediction = predict_run(config, rows)
    run_id = ledger.create_run(to_dict(config), prediction=prediction, num_steps=config.train.steps)
    executor = LocalExecutor(ledger.home)
    executor.submit([run_id])
    record = _follow(ledger, [run_id], quiet=arguments.json, cancel=executor.cancel)[0]
    payload = run_payload(record)
    if record.status in ("failed", "queued", "interrupted", "cancelled"):
        why = record.error or f"it did not reach its end; see {ledger.home / 'worker.log'}"
        raise RunFailedError(f"run {run_id} is {record.status}: {why}")
    sample = (record.result or {}).get("sample", {})
    lines = [
        f"Run {run_id} {record.status}. Evaluation loss fell from {payload['eval_loss_before']:.3f} to "
        f"{payload['eval_loss_after']:.3f} in {payload['seconds']:.0f} s of training."
        if payload["eval_loss_after"] is not None and payload["eval_loss_after"] <= payload["eval_loss_before"]
        else f"Run {run_id} {record.status}. Evaluation loss: {payload['eval_loss_before']} before, "
        f"{payload['eval_loss_after']} after.",
        *(
            [f"Accuracy {100 * payload['eval_accuracy']:.1f} %, macro-F1 {payload['eval_macro_f1']:.3f}."]
            if payload["eval_accuracy"] is not None
            else []
        ),
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
    dataset, rows = data_of(ledger, arguments)
    lr = default_lr(method.method, rows.num_classes)
    train = evaluated_at_quarters(loop_of(arguments, rows, lr=lr, seed=0))
    base = RunConfig(model=absolute_model(arguments.model), data=dataset, method=method, train=train)
    spec = SweepSpec(
        base=base,
        rs=arguments.r,
        lora_alphas=arguments.alpha,
        lrs=arguments.lr,
        seeds=arguments.seeds,
        packed=arguments.packed,
        early_exit=arguments.early_exit,
    )
    earlier = runs_frame(ledger)
    packed_estimate = estimate_packed_sweep_seconds(spec, earlier)
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
            "pack": (record.result or {}).get("pack"),
            "early_exit": (record.result or {}).get("early_exit"),
        }
        for record in records
    ]
    seconds = time.monotonic() - began
    bill = early_exit_bill(frame) if spec.early_exit else None
    payload = {
        "sweep_id": sweep_id,
        "status": status,
        "seconds": seconds,
        "runs": cells,
        "recommended": {"r": advice.r, "alpha": advice.lora_alpha, "lr": advice.lr, "reason": advice.reason}
        if advice
        else None,
        "packed": spec.packed,
        "estimated_seconds": {
            "sequential": estimate_sweep_seconds(spec, earlier),
            "packed": packed_estimate.seconds if packed_estimate else None,
        },
        "early_exit": bill.to_dict() if bill else None,
    }
    if advice is None:
        failed = next((r.error for r in records if r.error), "no run finished")
        raise RunFailedError(f"sweep {sweep_id}: {failed}")
    lines = [
        [run["run_id"], run["r"], f"{run['alpha']:g}", f"{run['lr']:g}", run["seed"], run["status"], loss_text(run)]
        for run in cells
    ]
    text = table_text(["run", "r", "alpha", "lr", "seed", "status", "evaluation loss"], lines)
    ending = [advice.reason, *([_bill_text(bill, sweep_id)] if bill else [])]
    return payload, "\n\n".join([text, *ending])


def _bill_text(bill: EarlyExitBill, sweep_id: str) -> str:
    saved = "" if bill.seconds_saved is None else f", about {bill.seconds_saved:.0f} s of steps"
    share = 100 * bill.steps_saved / bill.steps_planned
    return (
        f"Early exit dropped {bill.num_dropped} of {bill.num_runs} runs and saved {share:.0f} % of the steps{saved}. "
        f"What it gave up is known once the full grid is trained: lora-explorer runs resume {sweep_id}."
    )


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


def pretrain(arguments: argparse.Namespace) -> Output:
    if not arguments.corpus.is_dir():
        raise InputError(f"corpus is {str(arguments.corpus)!r}; allowed: a folder of .txt files.")
    if arguments.tokens < 4096:
        raise ConfigError("tokens", arguments.tokens, "a whole number of at least 4096")
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
    bars: list[tqdm[Any]] = []

    def on_step(step: int, num_steps: int, loss: float, rate: float) -> None:
        if not bars:  # with the first step: what is refused before it is one line and no bar
            bars.append(tqdm(total=num_steps, initial=step - 1, unit="step", disable=arguments.json))
        bars[0].set_postfix(loss=f"{loss:.3f}", tokens_per_second=f"{rate:.0f}", refresh=False)
        bars[0].update()

    try:
        result = run_pretraining(
            arguments.corpus,
            arguments.out,
            config,
            device=str(resolve_device(arguments.device)),
            half=not arguments.fp32,
            compile_model=arguments.compile,
            on_step=on_step,
        )
    finally:
        for bar in bars:
            bar.close()
    payload = {key: result[key] for key in ("parameters", "tokens", "eval_bits_per_byte", "seconds")}
    return payload, (
        f"{result['parameters']:,} parameters, {result['tokens']:,} tokens, "
        f"{result['eval_bits_per_byte']:.3f} bits per byte on held-out text; written to {arguments.out}."
    )


def _look_again(ledger: Ledger, records: list[RunRecord], ended: Sequence[str]) -> list[RunRecord]:
    """The runs as they stand, in order; what has ended stays as it was. Raises NotFoundError for a deleted one."""
    ledger.reconcile()
    found = {r.id: r for r in ledger.find_runs([r.id for r in records if r.status not in ended])}
    return [r if r.status in ended else found.get(r.id) or ledger.get_run(r.id) for r in records]


def _follow(ledger: Ledger, run_ids: list[str], *, quiet: bool, cancel: Callable[[str], None]) -> list[RunRecord]:
    """Wait for the runs, with a progress bar on standard error; Ctrl-C cancels them."""
    ended = ("done", "failed", "cancelled", "interrupted")
    records = [ledger.get_run(run_id) for run_id in run_ids]
    try:
        with tqdm(total=sum(r.num_steps for r in records), unit="step", disable=quiet) as bar:
            while True:
                records = _look_again(ledger, records, ended)
                # A run that early exit dropped takes no more steps.
                bar.n = sum(r.num_steps if r.dropped else r.last_step or 0 for r in records)
                running = [r for r in records if r.status == "running"]
                if running:
                    losses = [r.last_train_loss for r in running if r.last_train_loss is not None]
                    loss = f", loss {min(losses):.3f}" if losses else ""
                    bar.set_description(f"{running[0].progress or 'running'}{loss}", refresh=False)
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
