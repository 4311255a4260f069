"""The benchmarks run, and compare the same work: on a tiny model, in seconds."""

import json

import pandas as pd
import pytest
import torch
from benchmarks import early_exit, grid, machine, pack_memory, peft_side, single, table
from benchmarks.rounds import max_difference
from benchmarks.workload import Workload

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def cells():
    return grid.run_grid(smoke=True)["cells"]


def test_grid_everybody_learns_the_same(cells):
    for cell in cells:
        assert set(cell["runs"]) == {grid.PACKED, grid.ALONE, grid.LOOP, grid.LOOP_FUSED, grid.TRAINER}
        for name, run in cell["runs"].items():
            assert run["max_loss_difference"] < 1e-4, name
            assert run["peak_bytes"] > 0


def test_grid_a_packed_peak_holds_all_adapters(cells):
    runs = cells[0]["runs"]
    assert runs[grid.PACKED]["peak_bytes"] > 0.9 * runs[grid.LOOP]["peak_bytes"]


def test_peft_reads_our_rows_in_our_order():
    work = grid._tiny(Workload(masked=4))
    other = grid._tiny(Workload(masked=4, steps=3))
    assert max_difference(
        peft_side.train_in_loop(work.load(), work, fused=False), peft_side.train_in_loop(other.load(), other)
    ) == pytest.approx(0.0, abs=1e-5)


def test_single_the_losses_of_the_loop_are_those_of_peft():
    for found in single.run_single(smoke=True)["cases"].values():
        assert found["max_loss_difference"] < 1e-4


def test_pack_memory_grows_with_every_configuration():
    sizes = pack_memory.cell(grid._tiny(Workload()), (2, 8, 4))["sizes"]
    assert [size["size"] for size in sizes] == list(pack_memory.SIZES)
    assert all(size["measured_added_bytes"] > 0 for size in sizes[1:])


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures on this machine")
def test_gpu_rows_are_listed_as_unmeasured():
    rows = grid.run_grid_gpu()["rows"]
    assert set(rows.values()) == {grid.UNMEASURED}
    assert any("Llama 1B" in name for name in rows)


def test_regret_is_what_the_dropped_cell_would_have_given():
    full = pd.DataFrame(
        [(r, 8.0, 1e-3, seed, "done", loss + seed) for r, loss in ((1, 3.0), (2, 2.0), (4, 2.5)) for seed in (0, 1)],
        columns=["r", "lora_alpha", "lr", "seed", "status", "eval_loss_after"],
    )
    early = full.assign(status=["done", "done", "cancelled", "cancelled", "done", "done"])
    found = early_exit.regret(full, early)
    assert found["best_was_dropped"]
    assert found["best"]["r"] == 2
    assert found["chosen"]["r"] == 4
    assert found["regret_nats"] == pytest.approx(0.5)
    assert not early_exit.regret(full, full)["best_was_dropped"]


def test_table_is_made_of_the_results(cells, tmp_path, monkeypatch):
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    figures = {"threads": 2, "cells": cells}
    (tmp_path / "grid.json").write_text(json.dumps({"machine": machine.machine_facts(), "figures": figures}))
    text = table.markdown()
    assert f"{cells[0]['runs'][grid.PACKED]['milliseconds_per_step']:.1f} ms" in text
    assert "`early_exit` has not been run." in text
