"""lora-explorer: the engine for shells and scripts. Each command is a function in `lora_engine.commands`.

Exit codes: 0 done, 1 the work failed, 2 the request is wrong (one line on standard error)."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from lora_engine import __version__
from lora_engine.commands import find_command
from lora_engine.config import BATCH, DEFAULT_LRS, DEVICES, METHOD_CONFIGS, OPTIMIZERS, PRECISIONS, STEPS
from lora_engine.errors import ConfigError, InputError, LoraExplorerError

# As lora_engine.sweeps.packing has them: importing that takes pandas, which most commands do without.
PACKED = ("auto", "always", "never")

# What the engine calls an argument, and what the command line calls it.
FLAGS = {
    "lora_alpha": "alpha", "lora_alphas": "alpha", "rs": "r", "lrs": "lr", "max_length": "seq", "seq_length": "seq",
    "batch_size": "batch", "encoder_hidden_size": "encoder-hidden", "prefix_length": "prefix-length",
    "reduction_factor": "reduction-factor", "target_modules": "targets",
    "hidden_size": "hidden", "num_layers": "layers", "layers_to_transform": "layers", "exclude_modules": "exclude",
    "adapter_dtype": "adapter-dtype", "target_parameters": "target-parameters",
}  # fmt: skip


class _Parser(argparse.ArgumentParser):
    """Errors are one line; argparse's own usage dump is not."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help.\n")


def list_of(kind: Callable[[str], Any], name: str) -> Callable[[str], tuple[Any, ...]]:
    """argparse type: "1,2,4" -> (1, 2, 4)."""

    def parse(text: str) -> tuple[Any, ...]:
        try:
            return tuple(kind(part) for part in text.split(",") if part.strip())
        except ValueError:
            raise argparse.ArgumentTypeError(f"is {text!r}; allowed: {name} separated by commas") from None

    return parse


def pair_of(kind: Callable[[str], Any], name: str) -> Callable[[str], tuple[str, Any]]:
    """argparse type: "q_proj=4" -> ("q_proj", 4). The key may be a regular expression, with = in it."""

    def parse(text: str) -> tuple[str, Any]:
        key, sign, value = text.rpartition("=")
        try:
            if not sign or not key:
                raise ValueError
            return key, kind(value)
        except ValueError:
            raise argparse.ArgumentTypeError(f"is {text!r}; allowed: KEY=VALUE, the value {name}") from None

    return parse


INTEGERS = list_of(int, "whole numbers")
NUMBERS = list_of(float, "numbers")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line, as in the README."""
    parser = _Parser(prog="lora-explorer", description="See what a LoRA rank costs and what it buys.")
    parser.add_argument("--version", action="version", version=f"lora-explorer {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    common = _Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    common.add_argument("--home", type=Path, help="where runs are kept (default: LORA_EXPLORER_HOME)")

    sizes = _Parser(add_help=False)
    sizes.add_argument("--r", type=int, default=8, help="rank")
    sizes.add_argument("--alpha", type=float, help="scaling numerator (default: twice the rank)")
    sizes.add_argument(
        "--targets", default="all-linear", help="attention, mlp, all-linear, names separated by commas, or a regex"
    )
    sizes.add_argument("--rslora", action="store_true", help="scale by alpha / sqrt(r)")
    sizes.add_argument("--dora", action="store_true", help="LoRA with trained magnitudes")
    sizes.add_argument("--layers", type=INTEGERS, help="layers to adapt, from 0, separated by commas")
    sizes.add_argument("--exclude", help="modules to leave alone: names separated by commas, or a regex")
    sizes.add_argument(
        "--rank-pattern", type=pair_of(int, "a whole number"), action="append", metavar="KEY=R",
        help="another rank for modules whose name ends in KEY; may be given several times",
    )  # fmt: skip
    sizes.add_argument(
        "--alpha-pattern", type=pair_of(float, "a number"), action="append", metavar="KEY=A",
        help="another alpha for modules whose name ends in KEY; may be given several times",
    )  # fmt: skip
    sizes.add_argument("--target-parameters", help="parameters to adapt, such as stacked experts, names with commas")
    sizes.add_argument("--reduction-factor", type=int, default=16, help="bottleneck: hidden size / inner width")
    sizes.add_argument("--placement", default="houlsby", choices=("houlsby", "pfeiffer"), help="bottleneck: where")
    sizes.add_argument("--activation", default="gelu", choices=("gelu", "relu"), help="bottleneck: nonlinearity")
    sizes.add_argument("--prefix-length", type=int, default=16, help="prefix: trained key-value pairs a layer")
    sizes.add_argument("--reparametrize", action="store_true", help="prefix: train through an MLP, dropped afterwards")
    sizes.add_argument("--encoder-hidden", type=int, default=0, help="prefix: width of that MLP (0: hidden size)")
    method = _Parser(add_help=False, parents=[sizes])
    method.add_argument("--method", default="lora", choices=tuple(METHOD_CONFIGS))

    loop = _Parser(add_help=False)
    loop.add_argument("--data", required=True, help="a .txt .md .csv .tsv .json .jsonl or .parquet file")
    for name, what, (text, labels) in (("--steps", "", STEPS), ("--batch", "sequences a step; ", BATCH)):
        loop.add_argument(name, type=int, help=f"{what}default: {text}, {labels} where the data has labels")
    loop.add_argument("--seq", type=int, default=128, help="tokens a sequence, at most")
    loop.add_argument(
        "--precision", choices=PRECISIONS, help="default: bf16 for adapters on a CUDA card that has it, else fp32"
    )
    loop.add_argument("--device", default="auto", choices=DEVICES)

    def add(name: str, text: str, *parents: _Parser) -> _Parser:
        return commands.add_parser(name, help=text, description=text, parents=[common, *parents])

    sub = add("app", "open the dashboard")
    sub.add_argument("--port", type=int, default=8501)
    sub.add_argument("--no-browser", action="store_true", help="serve without opening a browser")

    sub = add("count", "count trainable parameters", method)
    sub.add_argument("model", nargs="?", default="embedded")

    step = _Parser(add_help=False)
    step.add_argument("--precision", default="bf16", choices=PRECISIONS)
    step.add_argument("--batch", type=int, default=1)
    step.add_argument("--seq", type=int, default=512)
    step.add_argument("--accumulation", type=int, default=1, help="micro-batches of --batch sequences a step")
    step.add_argument("--optimizer", default="adamw", choices=OPTIMIZERS)
    step.add_argument("--checkpointing", action="store_true")
    step.add_argument("--attention", default="sdpa", choices=("sdpa", "eager"))
    step.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="whose kernels")

    sub = add("memory", "estimate memory for training and inference", method, step)
    sub.add_argument("model", nargs="?", default="embedded")
    sub.add_argument("--adapter-dtype", default="fp32", choices=("fp32", "bf16", "fp16"), help="of LoRA's matrices")

    sub = add("trace", "trace the memory of a step of any transformers model, allocating nothing", method, step)
    sub.add_argument("model", nargs="?", default="embedded")

    sub = add("data", "check a dataset: what is kept, what is trained on")
    sub.add_argument("file")
    sub.add_argument("--model", default="embedded")
    sub.add_argument("--seq", type=int, default=128)

    default_lrs = ", ".join(f"{name} {lr:g}" for name, lr in DEFAULT_LRS.items())
    sub = add("train", "fine-tune once", method, loop)
    sub.add_argument("model", nargs="?", default="embedded")
    sub.add_argument("--lr", type=float, help=f"learning rate (default: {default_lrs})")
    sub.add_argument("--seed", type=int, default=0)

    sub = add("sweep", "train a grid of r, alpha, learning rate and seed", loop)
    sub.add_argument("model", nargs="?", default="embedded")
    sub.add_argument("--r", type=INTEGERS, default=(1, 2, 4, 8))
    sub.add_argument("--alpha", type=NUMBERS, default=(8.0, 16.0))
    sub.add_argument("--lr", type=NUMBERS, default=(3e-3,))
    sub.add_argument("--seeds", type=INTEGERS, default=(0, 1))
    sub.add_argument("--targets", default="all-linear")
    sub.add_argument("--rslora", action="store_true")
    sub.add_argument(
        "--packed", default="auto", choices=PACKED,
        help="train many runs in one pass: where it is measured to be faster, wherever possible, or never",
    )  # fmt: skip
    sub.add_argument(
        "--early-exit", action="store_true", help="drop the worse half of the cells at a quarter and half of the steps"
    )
    sub.add_argument("--executor", default="local", choices=("local",))

    sub = add("compare", "train several methods on the same batches and set them side by side", sizes, loop)
    sub.add_argument("model", nargs="?", default="embedded")
    sub.add_argument("--methods", default="lora,full,head,bottleneck,prefix", help="names separated by commas")
    sub.add_argument("--seeds", type=INTEGERS, default=(0, 1, 2))
    sub.add_argument(
        "--lrs",
        "--lr",
        default="",
        help="learning rates of the search: for all methods (1e-3,3e-3) or for each (lora:1e-3,3e-3;full:1e-4,3e-4); "
        "default: three around each method's own",
    )
    sub.add_argument(
        "--match",
        default="steps",
        choices=("steps", "parameters", "memory", "seconds"),
        help="what is made equal to LoRA's",
    )
    sub.add_argument("--eval-rows", type=int, default=256, help="rows that losses are measured on, at most")

    sub = add("generate", "continue a prompt with a trained run")
    sub.add_argument("run")
    sub.add_argument("--prompt", required=True)
    sub.add_argument("--scale", type=float, default=1.0, help="0 is the base model, 1 the adapted one")
    sub.add_argument("--max-tokens", type=int, default=48)
    sub.add_argument("--temperature", type=float, default=0.0)
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--eval", action="store_true", help="also give the evaluation loss at this scale")

    sub = add("runs", "list, show, cancel, resume or delete runs")
    sub.add_argument("action", nargs="?", default="list", choices=("list", "show", "cancel", "resume", "delete"))
    sub.add_argument("run", nargs="?")

    sub = add("pretrain", "pretrain a small base model from a folder of text")
    sub.add_argument("--corpus", type=Path, required=True)
    sub.add_argument("--out", type=Path, required=True)
    sub.add_argument("--tokens", type=int, default=36_000_000)
    sub.add_argument("--hidden", type=int, default=192)
    sub.add_argument("--layers", type=int, default=6)
    sub.add_argument("--optimizer", default="muon", choices=("muon", "adamw"))
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--device", default="auto", choices=DEVICES)
    sub.add_argument("--fp32", action="store_true", help="compute in float32 instead of bfloat16")
    sub.add_argument("--compile", action="store_true", help="compile the step; needs a C++ compiler")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    if arguments.home is not None:
        os.environ["LORA_EXPLORER_HOME"] = str(arguments.home)
    try:
        payload, text = find_command(arguments.command)(arguments)
    except InputError as error:
        return _fail(2, arguments.command, error)
    except LoraExplorerError as error:
        return _fail(1, arguments.command, error)
    except KeyboardInterrupt:
        return _fail(1, arguments.command, "stopped.")
    except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError) as error:
        return _fail(2, arguments.command, f"{error.filename or 'file'}: {error.strerror or 'cannot be used'}.")
    except Exception as error:  # whatever else went wrong: one line, and the work has failed
        return _fail(1, arguments.command, f"{type(error).__name__}: {error}")
    if payload is not None:
        from lora_engine.runs import finite_only

        try:
            print(
                json.dumps(finite_only(payload), allow_nan=False, default=str) if arguments.json else text, flush=True
            )
        except BrokenPipeError:  # the reader of a pipe had enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if arguments.command in ("train", "sweep", "compare") and payload["status"] != "done":
            return 1
    return 0


def _fail(code: int, command: str, error: object) -> int:
    line = " ".join(str(error).split())
    if isinstance(error, ConfigError) and error.argument in FLAGS:
        line = line.replace(error.argument, FLAGS[error.argument], 1)
    print(f"lora-explorer {command}: {line}", file=sys.stderr)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
