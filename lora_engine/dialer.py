"""python -m lora_engine.dialer --home HOME: turn the dial of LoRA runs, question by question.

Reads one JSON object a line: `run_id`, `scale`, and either `prompt` with `max_new_tokens, temperature, seed` for
`text`, or `eval` true for `eval_loss` on the run's evaluation rows. The last run's model stays loaded. Ends with its
input, or after a while without a question."""

import argparse
import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from lora_engine.config import LoraConfig, RunConfig, run_config_from_dict
from lora_engine.errors import ConfigError, InputError, LoraExplorerError
from lora_engine.runs import Ledger

IDLE_SECONDS = 900.0
CURVE_FILE = "dial.json"
MAX_SCALE, MAX_TOKENS = 2.0, 512


def main(argv: list[str] | None = None) -> int:
    """Answer until the input ends."""
    parser = argparse.ArgumentParser(prog="lora_engine.dialer")
    parser.add_argument("--home", type=Path, required=True)
    ledger = Ledger(parser.parse_args(argv).home)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is for the server; the input's end is for us
    # Answers alone go where the answers go: whatever a library prints is log.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    dial = Dial(ledger)
    while True:
        idle = threading.Timer(IDLE_SECONDS, os._exit, (0,))
        idle.daemon = True
        idle.start()
        line = sys.stdin.readline()
        idle.cancel()
        if not line:
            return 0
        print(json.dumps(dial.answer(json.loads(line))), file=answers, flush=True)


class Dial:
    """Holds the model of the run that was asked about last."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._run_id = ""
        self._held: Any = None

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """`scale, seconds` and `text` or `eval_loss`; or `error`, one sentence."""
        began = time.perf_counter()
        try:
            scale = question.get("scale", 1.0)
            if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 <= scale <= MAX_SCALE:
                raise ConfigError("scale", scale, f"a number from 0 to {MAX_SCALE:g}")
            held = self._load(question["run_id"])
            if question.get("eval"):
                loss = held.eval_loss(scale)
                remember_loss(self._ledger, question["run_id"], scale, loss)
                answer: dict[str, Any] = {"eval_loss": loss}
            else:
                answer = {"text": held.text(scale, question)}
        except LoraExplorerError as error:
            return {"error": str(error)}
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            return {"error": f"{type(error).__name__}: {error}"}
        return answer | {"scale": scale, "seconds": time.perf_counter() - began}

    def _load(self, run_id: str) -> "HeldRun":
        if run_id != self._run_id:
            record = self._ledger.get_run(run_id)
            config = run_config_from_dict(record.config)
            if record.status != "done" or not isinstance(config.method, LoraConfig):
                raise InputError(
                    f"run is {run_id!r}, {config.method.method} and {record.status}; allowed: a LoRA run that is done."
                )
            self._run_id, self._held = "", None  # the old model goes before the new one comes
            self._held, self._run_id = HeldRun(config, self._ledger.run_folder(run_id)), run_id
        held: HeldRun = self._held
        return held


class HeldRun:
    """A LoRA run's model with its tokenizer and evaluation rows."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        from lora_engine.data import class_names, load_tokenizer
        from lora_engine.inference import load_run_model
        from lora_engine.jobs import load_rows
        from lora_engine.training.base import resolve_model
        from lora_engine.training.batches import evaluation_batches

        self._config = config
        self._tokenizer = load_tokenizer(resolve_model(config.model))
        self._dataset, _, rows = load_rows(config.data, self._tokenizer, config.train.max_length)
        self._classes = class_names(self._dataset)
        self._model = load_run_model(config, folder, self._tokenizer, self._classes)
        device = next(self._model.parameters()).device
        self._batches = evaluation_batches(rows, config.train, self._tokenizer.pad_id, device)

    def text(self, scale: float, question: dict[str, Any]) -> str:
        """What the model says after the prompt, or its label."""
        from lora_engine.data import encode_prompt, encode_text
        from lora_engine.jobs import classify
        from lora_engine.methods import lora
        from lora_engine.training.generate import generate_text

        prompt = str(question.get("prompt", ""))
        lora.set_scale(self._model, scale)
        if self._classes:
            ids = encode_text(prompt, self._tokenizer, self._config.train.max_length)[0]
            return classify(self._model, ids, self._classes)
        return generate_text(
            self._model,
            self._tokenizer,
            encode_prompt(prompt, self._tokenizer, self._dataset.task),
            max_new_tokens=min(MAX_TOKENS, int(question.get("max_new_tokens", 48))),
            temperature=float(question.get("temperature", 0.0)),
            seed=int(question.get("seed", 0)),
        )

    def eval_loss(self, scale: float) -> float:
        """Evaluation loss with the update at `scale`."""
        from lora_engine.methods import lora
        from lora_engine.training.base import autocast_of
        from lora_engine.training.loss import evaluate

        lora.set_scale(self._model, scale)
        with autocast_of(self._config.train, next(self._model.parameters()).device):
            return evaluate(self._model, self._batches)


def read_losses(ledger: Ledger, run_id: str) -> dict[float, float]:
    """scale -> evaluation loss, as far as it was measured; ascending. Torch-free, like all above the classes."""
    try:
        values = json.loads((ledger.run_folder(run_id) / CURVE_FILE).read_text(encoding="utf-8"))
        return dict(sorted((float(key), float(value)) for key, value in values.items()))
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def remember_loss(ledger: Ledger, run_id: str, scale: float, loss: float) -> None:
    """Keep a measured loss with the run."""
    path = ledger.run_folder(run_id) / CURVE_FILE
    values = {f"{key:g}": value for key, value in (read_losses(ledger, run_id) | {float(scale): loss}).items()}
    partial = path.with_name(f".{CURVE_FILE}.{os.getpid()}")
    partial.write_text(json.dumps(values), encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    raise SystemExit(main())
