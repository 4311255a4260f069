"""make bench: every figure, with machine and versions, into results/.

python tests/benchmarks/run.py [NAME ...] [--repeats N] [--smoke]

NAME: browser command memory memory_measured single grid pack_memory early_exit grid_gpu (default: all of them)
--repeats N   rounds or steps of single, grid, pack_memory and grid_gpu; default: as many as the figures in results/
--smoke       the same code on a tiny model, to see that it runs; prints and keeps nothing
python tests/benchmarks/run.py predict   writes the predictions that memory_measured is held against
python tests/benchmarks/run.py table     prints the README's tables from results/
python tests/benchmarks/run.py readme    puts them into the README"""

import argparse
import functools
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import browser, early_exit, grid, memory, pack_memory, single, table, training
from benchmarks.machine import save_result

BENCHMARKS = {
    "browser": browser.run,
    "command": training.run_command,
    "memory": memory.run_formula,
    "memory_measured": memory.run_measured,
}
# These take --smoke and --repeats.
TRAINING = {
    "single": single.run_single,
    "grid": grid.run_grid,
    "pack_memory": pack_memory.run_pack_memory,
    "early_exit": early_exit.run_early_exit,
    "grid_gpu": grid.run_grid_gpu,
}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--repeats", type=int, default=0)
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args(argv)
    names: list[str] = arguments.names
    if names == ["predict"]:
        print(memory.predict())
        return 0
    if names == ["table"]:
        print(table.markdown())
        return 0
    if names == ["readme"]:
        table.write_into(Path(__file__).resolve().parents[2] / "README.md")
        return 0
    more = {
        name: functools.partial(f, repeats=arguments.repeats, smoke=arguments.smoke) for name, f in TRAINING.items()
    }
    benchmarks = more if arguments.smoke else BENCHMARKS | more
    unknown = [name for name in names if name not in benchmarks]
    if unknown:
        print(f"benchmark is {unknown[0]!r}; allowed: {', '.join(benchmarks)}.", file=sys.stderr)
        return 2
    for name in names or benchmarks:
        figures = benchmarks[name]()
        print(json.dumps(figures, indent=1) if arguments.smoke else save_result(name, figures).read_text())
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
