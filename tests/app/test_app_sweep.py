"""The Sweep page as Streamlit runs it, without a browser."""

import os
from dataclasses import replace

import pytest
from app_pages import finished_run, open_page, parcels, texts

from lora_engine.config import DataConfig, LoraConfig, RunConfig, TrainConfig
from lora_engine.config import to_dict as config_dict
from lora_engine.runs import Ledger, runs_frame, this_process
from lora_engine.sweeps import SweepSpec, expand_grid

BASE = RunConfig(data=DataConfig(path="p.jsonl"), train=TrainConfig(steps=4))


@pytest.fixture
def submitted(monkeypatch):
    """Ids of the runs that a worker would have been started for."""
    from lora_engine.executors import LocalExecutor

    ids = []
    monkeypatch.setattr(LocalExecutor, "submit", lambda _self, run_ids: ids.extend(run_ids))
    return ids


def new_sweep(home, **axes):
    """(sweep id, [(run id, config)]), nothing of it begun."""
    spec = SweepSpec(base=BASE, **{"lora_alphas": (16.0,), "lrs": (3e-3,), "seeds": (0,)} | axes)
    configs = expand_grid(spec)
    sweep_id, ids = Ledger(home).create_sweep(
        spec.to_dict(), [(config_dict(c), {"peak_bytes": 2**27}) for c in configs]
    )
    return sweep_id, list(zip(ids, configs, strict=True))


def finish(home, run_id, config, loss, **more):
    method, train = config.method, config.train
    finished_run(
        home, r=method.r, alpha=method.lora_alpha, lr=train.lr, seed=train.seed, loss=loss, sweep=run_id, **more
    )


def drop(home, run_id, loss):
    ledger = Ledger(home)
    ledger.claim_run(run_id, os.getpid(), 0.0)
    ledger.record_step(run_id, 2, train_loss=5, lr=1e-3, grad_norm=1.0, tokens=9, seconds=1)
    ledger.record_eval(run_id, 2, eval_loss=loss)
    mark = {"step": 2, "steps": 4, "eval_loss": loss, "rank": 2, "of": 2}
    ledger.finish_run(run_id, "cancelled", result={"early_exit": mark})


def headings(app):
    return [heading.value for heading in app.subheader]


def test_a_finished_sweep_gives_advice_time_and_charts(home):
    sweep_id, runs = new_sweep(home, rs=(1, 4, 16), seeds=(0, 1))
    losses = {1: (4.5, 4.52), 4: (3.94, 3.96), 16: (3.93, 3.97)}
    for run_id, config in runs:
        finish(home, run_id, config, losses[config.method.r][config.train.seed])
    app = open_page("views/sweep.py", sweep=sweep_id)
    assert "Rank 4 is" in headings(app)[0]
    for expected in ("Loss against rank", "Loss against trainable parameters", "Loss over rank and alpha", "Every run"):
        assert expected in headings(app)
    assert "**6 runs in " in texts(app)
    assert "one after another." in texts(app)
    assert not [group for group in app.button_group if group.key == f"rate_{sweep_id}"]  # there is one rate only


def test_best_over_the_learning_rate_is_the_default_and_one_rate_is_called_misleading(home):
    sweep_id, runs = new_sweep(home, rs=(1, 4), lrs=(1e-3, 1e-2))
    # Rank 1 is best at the higher rate, rank 4 at the lower one.
    losses = {(1, 1e-3): 4.4, (1, 1e-2): 4.0, (4, 1e-3): 3.9, (4, 1e-2): 4.3}
    for run_id, config in runs:
        finish(home, run_id, config, losses[config.method.r, config.train.lr])
    app = open_page("views/sweep.py", sweep=sweep_id)
    advice = headings(app)[0]
    assert not app.warning
    assert "Loss against rank" in headings(app)

    app.button_group(key=f"rate_{sweep_id}").set_value(1e-2).run()
    assert not app.exception
    assert "misleading" in app.warning[0].value
    assert "alpha acts much like a learning rate" in app.warning[0].value
    assert "Loss against rank at learning rate 0.01" in headings(app)
    assert "Loss over rank and alpha at learning rate 0.01" in headings(app)
    assert headings(app)[0] == advice  # which is over all rates, whatever is looked at


def test_packed_runs_say_that_theirs_is_a_share(home):
    sweep_id, runs = new_sweep(home, rs=(1, 4))
    pack = {"size": 2, "seconds": 6.0, "peak_bytes": 300 * 2**20, "alone_step_seconds": 2.0}
    for run_id, config in runs:
        finish(home, run_id, config, 4.0, pack=pack)
    text = texts(open_page("views/sweep.py", sweep=sweep_id))
    assert "(estimate from the speed-up measured before packing)" in text
    assert "2 runs shared each pass over the base." in text
    assert "an equal share of its pack's time" in text
    assert "one training step of one run of that rank by itself. A whole pack took 300 MiB at its peak." in text


def test_while_it_runs_the_whole_grid_is_counted_and_the_map_fills(home):
    sweep_id, runs = new_sweep(home, rs=(1, 2, 4, 8), lrs=(1e-3, 1e-2))
    ledger = Ledger(home)
    for run_id, _ in runs[:6]:
        ledger.claim_run(run_id, *this_process())
        for step in (1, 2):
            ledger.record_step(run_id, step, train_loss=5, lr=1e-3, grad_norm=1.0, tokens=9, seconds=step)
        ledger.note_progress(run_id, "training")
    ledger.record_eval(runs[0][0], 2, eval_loss=4.5)
    app = open_page("views/sweep.py", sweep=sweep_id)
    words = app.get("progress")[0].proto.text
    assert words == "12 of 32 steps over all runs; 0 of 8 runs over; 6 begun; training"
    assert app.get("progress")[0].proto.value == 100 * 12 // 32
    assert "Pale cells are not finished" in texts(app)
    assert "Every run" not in headings(app)

    # Two seconds later, at six steps a second.
    now, _ = app.session_state[f"_pace_{sweep_id}"][-1]
    app.session_state[f"_pace_{sweep_id}"] = [(now - 2.0, 0.0)]
    app.run()
    assert app.get("progress")[0].proto.text.endswith("s left")

    for run_id, _ in runs:
        ledger.request_cancel(run_id)
    app.button(key=f"stop_{sweep_id}").click().run()
    assert not app.exception


def test_the_refresh_asks_the_ledger_once_however_many_runs(home, monkeypatch):
    sweep_id, runs = new_sweep(
        home, rs=(1, 2, 4, 8, 16, 32), lora_alphas=(8.0, 16.0, 32.0), lrs=(1e-3, 3e-3, 1e-2), seeds=(0, 1)
    )
    ledger = Ledger(home)
    assert len(runs) == 108
    with ledger.kept_open():
        for run_id, _ in runs[:3]:
            ledger.claim_run(run_id, *this_process())
        ledger.assign_worker([run_id for run_id, _ in runs[3:]], *this_process())
    asked = []
    for name in ("list_runs", "get_run", "read_steps", "read_evals"):
        real = getattr(Ledger, name)
        monkeypatch.setattr(
            Ledger, name, lambda self, *a, real=real, name=name, **k: asked.append(name) or real(self, *a, **k)
        )
    app = open_page("views/sweep.py", sweep=sweep_id)
    assert "0 of 432 steps over all runs" in app.get("progress")[0].proto.text
    assert asked.count("list_runs") <= 3  # the page, its part that refreshes, nothing a run
    assert set(asked) == {"list_runs"}


def test_early_exit_shows_what_was_dropped_and_offers_the_full_grid(home, submitted):
    sweep_id, runs = new_sweep(home, rs=(1, 4), seeds=(0, 1), early_exit=True)
    for run_id, config in runs:
        if config.method.r == 1:
            drop(home, run_id, 4.6)
        else:
            finish(home, run_id, config, 3.9)
    app = open_page("views/sweep.py", sweep=sweep_id)
    assert "Early exit stopped 2 of 4 runs and left out 25.0 % of the steps" in app.info[0].value
    assert "not known" in app.info[0].value
    assert "✕: all of the cell was stopped early" in texts(app)
    table = app.dataframe[-1].value
    assert sorted(table["status"]) == ["done", "done", "dropped at step 2", "dropped at step 2"]
    assert not [button for button in app.button if button.key == f"resume_{sweep_id}"]

    app.button(key=f"full_grid_{sweep_id}").click().run()
    assert sorted(submitted) == sorted(run_id for run_id, config in runs if config.method.r == 1)


def test_after_the_full_grid_the_page_says_what_early_exit_cost(home):
    sweep_id, runs = new_sweep(home, rs=(1, 4), early_exit=True)
    mark = {"step": 2, "steps": 4, "eval_loss": 4.6, "rank": 2, "of": 2}
    (one, config_one), (four, config_four) = runs
    finish(home, four, config_four, 3.95)
    finish(home, one, config_one, 3.90, early_exit=mark)
    app = open_page("views/sweep.py", sweep=sweep_id)
    assert "early exit had dropped the best, rank 1, alpha 16 at learning rate 0.003 (3.90)" in app.info[0].value
    assert "gave up 0.05 of loss" in app.info[0].value
    assert not [button for button in app.button if button.key == f"full_grid_{sweep_id}"]


def test_the_grid_counts_its_runs_before_the_start(home, submitted):
    app = open_page("views/sweep.py", data=parcels(home))
    assert "**32 runs** of 40 steps: one after another about" in texts(app)
    app.button_group(key="grid_seed").set_value([0]).run()
    assert "**16 runs** of 40 steps" in texts(app)
    app.toggle(key="grid_early_exit").set_value(True).run()
    app.button(key="start_sweep").click().run()
    assert not app.exception
    assert len(submitted) == 16
    ledger = Ledger(home)
    assert {run.config["method"]["r"] for run in ledger.list_runs()} == {1, 2, 4, 8}
    assert ledger.list_sweeps()[0].spec["early_exit"] is True


def test_the_chips_reach_a_hundred_and_eight_runs(home, submitted):
    app = open_page("views/sweep.py", data=parcels(home))
    app.button_group(key="grid_r").set_value([1, 2, 4, 8, 16, 32])
    app.button_group(key="grid_alpha").set_value([8.0, 16.0, 32.0])
    app.button_group(key="grid_lr").set_value([1e-3, 3e-3, 1e-2]).run()
    assert "**108 runs** of 40 steps" in texts(app)
    app.button(key="start_sweep").click().run()
    assert not app.exception
    assert len(submitted) == len(runs_frame(Ledger(home))) == 108


def test_lines_follow_the_scaling_of_the_sweep(home):
    spec = SweepSpec(base=replace(BASE, method=LoraConfig(use_rslora=True)), rs=(1, 4), lora_alphas=(8.0, 16.0))
    sweep_id, ids = Ledger(home).create_sweep(spec.to_dict(), [(config_dict(c), None) for c in expand_grid(spec)])
    for run_id, config in zip(ids, expand_grid(spec), strict=True):
        finish(home, run_id, config, 4.0)
    app = open_page("views/sweep.py", sweep=sweep_id)
    assert "Dotted lines: equal alpha / √r" in texts(app)
    app.button_group(key=f"iso_{sweep_id}").set_value("alpha / r").run()
    assert "Dotted lines: equal alpha / r," in texts(app)


def test_an_unfinished_sweep_offers_to_resume(home, submitted):
    app = open_page("views/sweep.py", data=parcels(home))
    app.button(key="start_sweep").click().run()
    sweep_id = app.session_state["_sweep"]
    submitted.clear()
    app.button(key=f"resume_{sweep_id}").click().run()
    assert len(submitted) == 32
