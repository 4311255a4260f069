"""make bench: every figure, with machine and versions, into results/.

python tests/benchmarks/run.py [browser] [command] [step] [memory] [memory_measured]
python tests/benchmarks/run.py predict    writes the predictions that memory_measured is held against"""

import os
import sys
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import browser, memory, training
from benchmarks.machine import save_result

BENCHMARKS = {
    "browser": browser.run,
    "command": training.run_command,
    "step": training.step_against_peft,
    "memory": memory.run_formula,
    "memory_measured": memory.run_measured,
}


def main(names: list[str]) -> int:
    if names == ["predict"]:
        print(memory.predict())
        return 0
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        print(f"benchmark is {unknown[0]!r}; allowed: {', '.join(BENCHMARKS)}.", file=sys.stderr)
        return 2
    for name in names or BENCHMARKS:
        path = save_result(name, BENCHMARKS[name]())
        print(path.read_text())
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
