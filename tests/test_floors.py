"""The order of the floors: importing a torch-free package must not bring torch, and nobody looks upwards."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TORCH_FREE = [
    "lora_engine", "lora_engine.errors", "lora_engine.config", "lora_engine.core", "lora_engine.calc",
    "lora_engine.data", "lora_engine.runs", "lora_engine.sweeps", "lora_engine.executors",
    "lora_engine.cli", "lora_engine.commands", "lora_engine.comparisons", "lora_engine.comparer", "lora_engine.dialer",
]  # fmt: skip
FLOORS = [
    ["errors"],
    ["config"],
    ["core", "calc", "data", "runs", "sweeps"],
    ["methods"],
    ["training"],
    ["export"],
    ["worker"],
]


@pytest.mark.parametrize("package", TORCH_FREE)
def test_importing_it_never_imports_torch(package):
    code = (
        f"import sys, {package}; print([m for m in ('torch', 'transformers', 'peft', 'streamlit') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_calc_needs_the_standard_library_alone():
    code = "import sys, lora_engine.calc; print([m for m in ('numpy', 'pandas') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def engine_imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "lora_engine":
                yield from (f"lora_engine.{alias.name}" for alias in node.names)
            else:
                yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def floor_of(name):
    return next((i for i, floor in enumerate(FLOORS) if name in floor), None)


@pytest.mark.parametrize("floor", range(len(FLOORS)))
def test_each_floor_imports_only_from_below(floor):
    for name in FLOORS[floor]:
        paths = list((ROOT / "lora_engine" / name).rglob("*.py")) or [ROOT / "lora_engine" / f"{name}.py"]
        for path in paths:
            for module in engine_imports(path):
                if not module.startswith("lora_engine."):
                    continue
                other = module.split(".")[1]
                below = floor_of(other)
                if below is None or other == name:
                    continue
                allowed = below < floor or (name, other) == ("sweeps", "calc")
                assert allowed, f"{path.relative_to(ROOT)} imports {module}"


def test_the_app_never_reaches_for_training():
    for path in (ROOT / "app").rglob("*.py"):
        for module in engine_imports(path):
            assert not module.startswith(("torch", "transformers", "lora_engine.methods", "lora_engine.training")), path
