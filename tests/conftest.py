"""Shared fixtures: an empty home for every test, tiny models made on the spot."""

import os
import sys
from pathlib import Path

# Before torch is imported: two small threads beat a crowd on a small machine, one where two tests run at a time.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "app"))

pytest.register_assert_rewrite("real_models")  # its asserts speak as those of a test file


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """An empty LORA_EXPLORER_HOME."""
    folder = tmp_path / "home"
    monkeypatch.setenv("LORA_EXPLORER_HOME", str(folder))
    return folder


@pytest.fixture
def one_thread():
    """Two threads on models of a few thousand parameters only wait for each other."""
    import torch  # not at the top: tests without it start without it

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
