"""The README's tables of training speed, from results/*.json."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import grid
from benchmarks.machine import RESULTS

BEGIN, END = "<!-- run.py readme writes from here -->", "<!-- to here -->"


def markdown() -> str:
    """Every table whose results are there; what is missing is said."""
    sections = []
    for name, section in SECTIONS.items():
        path = RESULTS / f"{name}.json"
        if path.exists():
            result = json.loads(path.read_text())
            sections.append(f"#### {TITLES[name]}\n\n{section(result['figures'])}\n\n{taken_on(result['machine'])}")
        else:
            sections.append(f"#### {TITLES[name]}\n\n`{name}` has not been run.")
    return "\n\n".join(sections)


def write_into(path: Path) -> None:
    """Put the tables between the two marks of a Markdown file."""
    before, rest = path.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    path.write_text(f"{before}{BEGIN}\n{markdown()}\n{END}{after}", encoding="utf-8")


def taken_on(machine: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {machine['versions'][name]}" for name in ("torch", "transformers", "peft"))
    memory = machine["memory_bytes"] / 2**30
    where = f"{machine['cores']} cores of {machine['processor']}, {memory:.0f} GiB"
    return f"<sub>{machine['date']}, {where}; {versions}.</sub>"


def grid_section(figures: dict[str, Any]) -> str:
    cells = figures["cells"]
    return "\n\n".join(
        [
            _grid_table(cells, grid.PACKED),
            _memory_table(cells),
            _notes(cells, f"{figures['threads']} threads."),
        ]
    )


def single_section(figures: dict[str, Any]) -> str:
    lines = []
    for case, found in figures["cases"].items():
        cells = [case, f"{1000 * found['our_seconds']['median']:.0f} ms"]
        for theirs in found["peft"].values():
            cells += [f"{1000 * theirs['seconds']['median']:.0f} ms", _times(theirs["times_ours"])]
        lines.append(cells)
    names = [text for name in next(iter(figures["cases"].values()))["peft"] for text in (name, "times ours")]
    return _table(["One training step", "ours", *names], lines)


def pack_memory_section(figures: dict[str, Any]) -> str:
    lines = [
        [
            cell["tokens"],
            ", ".join(map(str, sorted(cell["ranks"]))),
            size["size"],
            _mib(size["measured_bytes"]),
            _mib(size["predicted_bytes"]),
            f"{size['off_percent']:+.1f} %",
            "" if size["measured_added_bytes"] is None else _mib(size["measured_added_bytes"]),
            "" if size["predicted_added_bytes"] is None else _mib(size["predicted_added_bytes"]),
        ]
        for cell in figures["cells"]
        for size in cell["sizes"]
    ]
    heads = ["Tokens", "ranks", "configurations", "peak", "predicted", "off by", "each one more", "predicted"]
    return _table(heads, lines)


def early_exit_section(figures: dict[str, Any]) -> str:
    sequential, full, early = figures["sequential"], figures["full"], figures["early_exit"]
    lines = [
        ["one after another (from a run of every rank)", f"{sequential['seconds']:.0f} s", "", figures["runs"]],
        ["packed", f"{full['seconds']:.0f} s", f"{full['times_faster']:.2f} x", full["runs_finished"]],
        [
            "packed, early exit",
            f"{early['seconds']:.0f} s",
            f"{early['times_faster']:.2f} x",
            early["runs_finished"],
        ],
    ]
    regret = figures["regret"]
    dropped = "was dropped" if regret["best_was_dropped"] else "was kept"
    text = (
        f"Early exit saved {100 * figures['share_saved']:.0f} % of the packed time. "
        f"The full grid's best cell {dropped}; the loss given up is {regret['regret_nats']:.4f} nats, "
        f"of {regret['spread_nats']:.2f} between the best and the worst cell."
    )
    head = f"{figures['runs']} runs of {figures['steps']} steps"
    return _table([head, "whole sweep", "times faster", "runs finished"], lines) + "\n\n" + text


def gpu_section(figures: dict[str, Any]) -> str:
    if "rows" in figures:
        return _table(["On a GPU", ""], [[name, reason] for name, reason in figures["rows"].items()])
    parts = [
        _grid_table(figures["grids"], grid.PACKED),
        _grid_table(figures["singles"], grid.ALONE),
        _grid_table(figures["crossover"], grid.PACKED),
        _notes([*figures["grids"], *figures["singles"], *figures["crossover"]], ""),
    ]
    return "\n\n".join(parts)


def _grid_table(cells: Sequence[dict[str, Any]], reference: str) -> str:
    """Milliseconds of a configuration's step, and how many times ours the others take (least to most of all rounds)."""
    names = [name for name in cells[0]["runs"] if name != reference]
    lines = []
    for cell in cells:
        ours = cell["runs"][reference]
        sizes = f", packs of {'/'.join(map(str, ours['pack_sizes']))}" if "pack_sizes" in ours else ""
        line = [f"{cell['model']}, {cell['configurations']} x {cell['tokens']}{sizes}"]
        line += [f"{ours['milliseconds_per_step']:.1f} ms", f"{100 * ours['share_of_matrix_rate']:.0f} %"]
        lines.append(line + [_times(cell["runs"][n]["times_ours"]) if n in cell["runs"] else "" for n in names])
    heads = ["Configurations x tokens", reference, "of the matrix rate", *(f"{name}: times ours" for name in names)]
    return _table(heads, lines)


def _memory_table(cells: Sequence[dict[str, Any]]) -> str:
    names = list(cells[0]["runs"])
    lines = [[cell["tokens"], *(_mib(cell["runs"][name]["peak_bytes"]) for name in names)] for cell in cells]
    return _table(["Peak memory, tokens", *names], lines)


def _notes(cells: Sequence[dict[str, Any]], more: str) -> str:
    furthest = max(run.get("max_loss_difference", 0.0) for cell in cells for run in cell["runs"].values())
    planning = [run["planning_seconds"] for cell in cells for run in cell["runs"].values() if "planning_seconds" in run]
    text = f"The losses of all steps agree within {furthest:.1g} nats."
    if planning:
        text += f" Choosing the pack size took {min(planning):.1f} to {max(planning):.1f} s more, once a sweep."
    return f"{text} {more}".strip()


def _times(found: dict[str, float]) -> str:
    if found["repeats"] == 1:
        return f"{found['median']:.2f} x"
    return f"{found['median']:.2f} x ({found['min']:.2f} to {found['max']:.2f})"


def _mib(value: float) -> str:
    return f"{value / 2**20:,.1f} MiB"


def _table(heads: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)


SECTIONS = {
    "grid": grid_section,
    "single": single_section,
    "early_exit": early_exit_section,
    "pack_memory": pack_memory_section,
    "grid_gpu": gpu_section,
}
TITLES = {
    "grid": "A grid of 16 configurations",
    "single": "One run",
    "early_exit": "A grid of 108 runs, and early exit",
    "pack_memory": "Memory of a pack",
    "grid_gpu": "On a GPU",
}
