"""Taking turns: everybody does the same work round after round, in another order each time."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from benchmarks.machine import summary
from benchmarks.peft_side import Losses
from benchmarks.workload import Workload

from lora_engine.training.base import resolve_model
from lora_engine.training.batches import rows_of_step
from lora_engine.training.measure import LiveBytes

SCRIPT = Path(__file__).with_name("peft_script.py")


def take_turns(runs: Mapping[str, Callable[[], Losses]], repeats: int, device: str) -> dict[str, dict[str, Any]]:
    """`seconds` of every round and the `losses` of the last, by name."""
    taken: dict[str, dict[str, Any]] = {name: {"seconds": [], "losses": []} for name in runs}
    names = list(runs)
    for i in range(repeats):
        turn = i % len(names)
        for name in names[turn:] + names[:turn]:
            settle(device)
            began = time.perf_counter()
            losses = runs[name]()
            settle(device)
            taken[name]["seconds"].append(time.perf_counter() - began)
            taken[name]["losses"] = losses
    return taken


def paired(theirs: list[float], ours: list[float]) -> dict[str, float]:
    """How many times as long they take, round by round."""
    return summary([t / o for t, o in zip(theirs, ours, strict=True)])


def max_difference(a: Losses, b: Losses) -> float:
    """The furthest that any step of any configuration is apart, in nats per token."""
    return max(abs(x - y) for row, other in zip(a, b, strict=True) for x, y in zip(row, other, strict=True))


def settle(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@contextmanager
def peak_bytes(base: Any, device: str) -> Iterator[dict[str, Any]]:
    """`peak_bytes` of what runs inside: the allocator's on CUDA, else all live tensors with the base's among them."""
    found: dict[str, Any] = {"peak_bytes": 0, "kind": "allocated" if device == "cuda" else "tracked"}
    if device == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()  # of the other bases
        torch.cuda.reset_peak_memory_stats()
        yield found
        own = sum(p.numel() * p.element_size() for p in base.parameters())
        found["peak_bytes"] = torch.cuda.max_memory_allocated() - before + own
        return
    mode = LiveBytes()
    for tensor in (*base.parameters(), *base.buffers()):
        mode.add(tensor)
    with mode:
        yield found
    found["peak_bytes"] = mode.peak_bytes


def script_per_config(work: Workload, how_many: int) -> dict[str, Any]:
    """`peft_script.py` started for the first `how_many` configurations: wall seconds and peak RSS of each process."""
    seconds, peaks, first_losses = [], [], []
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HUB_OFFLINE": "1"}
    for config in work.configs[:how_many]:
        train = config.train
        batches = [
            [work.rows[i].input_ids for i in rows_of_step(len(work.rows), train.batch_size, k, train.seed)]
            for k in range(train.steps)
        ]
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "batches.json"
            file.write_text(json.dumps(batches))
            command = [sys.executable, str(SCRIPT), str(resolve_model(work.model)), str(file), f"{folder}/adapter"]
            command += ["--r", str(config.method.r), "--alpha", str(config.method.lora_alpha), "--lr", str(train.lr)]
            command += ["--weight-decay", str(train.weight_decay), "--seed", str(train.seed)]
            began = time.perf_counter()
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, text=True
            )
            assert process.stdout is not None
            printed = process.stdout.read()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            seconds.append(time.perf_counter() - began)
            if process.returncode:
                raise RuntimeError(f"{SCRIPT.name} ended with {process.returncode}")
        peaks.append(usage.ru_maxrss * 1024)
        first_losses.append(json.loads(printed)[0])
    return {"seconds": seconds, "peak_rss_bytes": max(peaks), "first_losses": first_losses}
