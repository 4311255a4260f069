"""Threads: no more than there are cores to run on, and the user's word counts."""

import os

import psutil
import pytest
import torch

from lora_engine.training.threads import count_cores, read_quota, use_all_cores


@pytest.mark.parametrize(
    ("text", "cores"),
    [("200000 100000\n", 2), ("150000 100000\n", 2), ("50000 100000\n", 1), ("max 100000\n", None), ("", None)],
)
def test_quotas(tmp_path, text, cores):
    (tmp_path / "cpu.max").write_text(text)
    assert read_quota(tmp_path / "cpu.max") == cores
    assert read_quota(tmp_path / "absent") is None


def test_the_smallest_of_cores_affinity_and_quota(monkeypatch, tmp_path):
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 16 if logical else 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(12)), raising=False)
    quota = tmp_path / "cpu.max"
    assert count_cores(quota) == 8
    quota.write_text("300000 100000")
    assert count_cores(quota) == 3
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {5}, raising=False)
    assert count_cores(quota) == 1
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 16 if logical else None)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(12)), raising=False)
    assert count_cores(tmp_path / "absent") == 12


def test_threads_are_the_cores_unless_the_user_set_them(monkeypatch):
    before = torch.get_num_threads()
    try:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        assert use_all_cores() == torch.get_num_threads() == count_cores()
        torch.set_num_threads(3)
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        assert use_all_cores() == 3
    finally:
        torch.set_num_threads(before)
