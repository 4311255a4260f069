"""What a sweep's packs keep on disk: which runs share a pass, and their state at the last checkpoint.

plan.json says which runs are together and in which file their tensors are; it is replaced in one move, so after
kill -9 the same rows form the same packs. A file holds each row as the run's own checkpoint would, so a row can also go
on alone."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_engine.training.checkpoint import load_tensors, save_tensors
from lora_engine.training.loop import LoopState
from lora_engine.training.pack_step import PackRow

PLAN = "plan.json"


@dataclass(frozen=True)
class Entry:
    """Runs that train together, in order, and the file of their tensors. One run: it trains alone.

    `stage` counts the rungs of early exit behind it, after each of which packs form anew; `size` and `reason` are what
    was found when their size was chosen, `times_faster` how much faster than one after another they were then."""

    file: str
    run_ids: tuple[str, ...]
    stage: int = 0
    size: int = 1
    reason: str = ""
    times_faster: float | None = None


@dataclass(frozen=True)
class Saved:
    """A run's state and its `parameter.*` and `optimizer.*` tensors; `pack` is its number in a pack that was halved."""

    state: LoopState
    tensors: dict[str, Tensor]
    pack: int = 0


class PackFiles:
    """The files of one sweep, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read: dict[str, dict[str, Saved]] = {}

    def entries(self) -> list[Entry]:
        """The plan; empty before there is one."""
        try:
            plan = json.loads((self.folder / PLAN).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return []
        return [Entry(**(entry | {"run_ids": tuple(entry["run_ids"])})) for entry in plan["packs"]]

    def add(self, packs: Sequence[Sequence[PackRow]], like: Entry) -> list[Entry]:
        """Plan these packs, all else as in `like`: what their rows have so far is written first, then the plan, then
        older files go that no entry needs. Rows leave the entries they were in."""
        old = self.entries()
        taken = {row.name for rows in packs for row in rows}
        numbers = [int(entry.file.partition(".")[0]) for entry in old]
        first = max(numbers, default=-1) + 1
        new = [
            replace(like, file=f"{first + i}.safetensors", run_ids=tuple(row.name for row in rows))
            for i, rows in enumerate(packs)
        ]
        for entry, rows in zip(new, packs, strict=True):
            if any(row.tensors is not None for row in rows):
                self.save(entry, rows)
        rest = [replace(entry, run_ids=tuple(r for r in entry.run_ids if r not in taken)) for entry in old]
        self._write([entry for entry in rest if entry.run_ids] + new)
        return new

    def save(self, entry: Entry, rows: Sequence[PackRow]) -> None:
        """The checkpoint of a pack: every row of it that has begun."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        facts: dict[str, Any] = {}
        for row in rows:
            if row.tensors is not None:
                facts[row.name] = {"state": state_facts(row.state), "pack": row.pack}
                tensors |= {f"{row.name}/{name}": value for name, value in row.tensors.items()}
        ranks = [row.method.r for row in rows]
        save_tensors(
            self.folder / entry.file, tensors, {"rows": facts, "run_ids": list(entry.run_ids), "R": max(ranks)}
        )

    def load(self, run_id: str) -> Saved | None:
        """A run's part of the checkpoint of its pack, if there is one."""
        entry = next((entry for entry in self.entries() if run_id in entry.run_ids), None)
        if entry is None or not (self.folder / entry.file).exists():
            return None
        if entry.file not in self._read:
            self._read[entry.file] = _split(*load_tensors(self.folder / entry.file))
        return self._read[entry.file].get(run_id)

    def forget(self) -> None:
        """Let go of what was read."""
        self._read.clear()

    def drop(self, entry: Entry) -> None:
        """A pack is over: its runs have their results, or checkpoints of their own."""
        self._write([other for other in self.entries() if other.file != entry.file])

    def keep(self, wanted: Callable[[str], bool]) -> None:
        """Drop all other runs from the plan, and the files that no run needs then."""
        kept = [replace(e, run_ids=tuple(filter(wanted, e.run_ids))) for e in self.entries()]
        self._write([entry for entry in kept if entry.run_ids])

    def _write(self, entries: Sequence[Entry]) -> None:
        if not entries:
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f".{PLAN}.{os.getpid()}"
        with partial.open("w", encoding="utf-8") as handle:
            json.dump({"packs": [vars(entry) for entry in entries]}, handle)
            handle.flush()
            os.fsync(handle.fileno())
        partial.replace(self.folder / PLAN)
        needed = {entry.file for entry in entries}
        for path in self.folder.glob("*.safetensors"):
            if path.name not in needed:
                path.unlink()


def load_single(path: Path) -> Saved | None:
    """A run's own checkpoint, if there is one."""
    if not path.exists():
        return None
    tensors, facts = load_tensors(path)
    return Saved(LoopState(**facts["state"]), tensors)


def save_single(path: Path, row: PackRow) -> None:
    """A row as the checkpoint of a run by itself, from which `training.loop.train` goes on."""
    if row.tensors is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path, row.tensors, {"state": state_facts(row.state), "scaler": {}})


def state_facts(state: LoopState) -> dict[str, Any]:
    """What a checkpoint keeps of a state."""
    return {key: value for key, value in vars(state).items() if key != "stopped"}


def _split(tensors: dict[str, Tensor], facts: dict[str, Any]) -> dict[str, Saved]:
    parts: dict[str, dict[str, Tensor]] = {run_id: {} for run_id in facts["rows"]}
    for name, value in tensors.items():
        run_id, _, own = name.partition("/")
        parts[run_id][own] = value
    return {
        run_id: Saved(LoopState(**row["state"]), parts[run_id], int(row["pack"]))
        for run_id, row in facts["rows"].items()
    }
