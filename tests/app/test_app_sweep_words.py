"""How far a grid is, what it took and what early exit cost: exact figures and sentences from tables made by hand."""

from dataclasses import replace

import pytest
import sweep_progress
import sweep_words
from sweep_progress import add_sample, count_progress, pace, progress_words, seconds_left
from sweep_runs import NAN, change, drop, grid

from lora_engine.config import DataConfig, LoraConfig, RunConfig, TrainConfig
from lora_engine.sweeps import SweepSpec, early_exit_bill


def spec(**changes):
    base = RunConfig(data=DataConfig(path="/a.csv"), train=TrainConfig(steps=40))
    return SweepSpec(
        base=base, rs=(1, 4), lora_alphas=(8.0, 16.0), lrs=(1e-3, 3e-3), seeds=(0, 1), **changes
    )  # the grid of `grid()`


def half_way():
    """Of 16 runs four are done, four dropped at step 10, four at step 15 and four wait."""
    frame = grid()
    groups = frame["seed"] * 2 + (frame["r"] == 4)
    drop(frame, groups == 1, step=10)
    change(frame, groups == 2, status="running", eval_loss_after=NAN, last_step=15.0)
    change(frame, groups == 3, status="queued", eval_loss_after=NAN, last_step=NAN)
    change(frame, groups == 0, last_step=NAN)  # done is done, whatever its steps say
    return frame


def test_progress_counts_steps_over_all_runs():
    progress = count_progress(half_way())
    assert (progress.runs, progress.over, progress.dropped, progress.begun) == (16, 8, 4, 4)
    assert progress.steps_done == 4 * 40 + 4 * 10 + 4 * 15
    assert progress.steps == 4 * 40 + 4 * 10 + 8 * 40  # the rest of the dropped is not to be done
    assert progress.share == pytest.approx(260 / 520)
    assert count_progress(grid()).share == 1
    assert count_progress(grid()[:0]).share == 0


def test_seconds_left_come_from_the_last_seconds():
    samples = []
    for second in range(200):  # slow at first, three steps a second of late
        samples = add_sample(samples, float(second), second if second < 100 else 100 + 3 * (second - 100))
    assert samples[0][0] == 199 - sweep_progress.WINDOW_SECONDS
    assert pace(samples) == pytest.approx(3)
    assert seconds_left(count_progress(half_way()), pace(samples)) == pytest.approx(260 / 3)


def test_the_time_before_the_first_step_is_not_the_pace_of_steps():
    samples = []
    for second, done in [(0.0, 0), (20.0, 0), (40.0, 0), (42.0, 8), (44.0, 16)]:
        samples = add_sample(samples, second, done)
    assert pace(samples) == pytest.approx(4)


def test_without_a_pace_nothing_is_promised():
    assert pace([]) is None
    assert pace([(0.0, 5.0)]) is None
    assert pace([(0.0, 5.0), (1.0, 9.0)]) is None  # too short
    assert pace([(0.0, 5.0), (9.0, 5.0)]) is None  # stands still
    assert seconds_left(count_progress(half_way()), None) is None


def test_steps_that_come_in_packs_keep_their_pace_between_two_of_them():
    samples = [(0.0, 0), (2.0, 12), (4.0, 12), (6.0, 24), (8.0, 24), (10.0, 24)]
    assert pace(samples) == pytest.approx(4)
    assert pace([*samples, (16.0, 24)]) == pytest.approx(24 / 16)  # it came to a stop


def test_with_all_steps_done_no_time_is_promised():
    assert seconds_left(count_progress(grid()), 5.0) is None


def test_a_run_that_begins_again_does_not_count_backwards():
    samples = add_sample([(0.0, 100.0), (2.0, 120.0)], 4.0, 60.0)
    assert samples == [(4.0, 60.0)]


def test_progress_in_words():
    words = progress_words(count_progress(half_way()), "training", 87.0)
    assert words == (
        "260 of 520 steps over all runs; 8 of 16 runs over (4 stopped early); 4 begun; training; 1 min 27 s left"
    )
    alone = change(grid(), [0], status="running", last_step=3.0)
    words = progress_words(count_progress(alone), "training", None)
    assert words == "603 of 640 steps over all runs; 15 of 16 runs over; training"


PLACE = {"device": "cpu", "data_path": "/a.csv", "batch_size": 8, "max_length": 128, "targets": "all-linear"}


@pytest.fixture
def same_flops(monkeypatch):
    """Every rank costs the same."""
    monkeypatch.setattr("lora_engine.sweeps.timing.estimate_step_flops", lambda *_args, **_more: 100)


@pytest.mark.usefixtures("same_flops")
def test_the_total_time_stands_beside_the_sequential_estimate():
    # 40 steps of 0.5 s alone; of the 130 s of the sweep 98 were beside its steps, 6.125 s a run.
    frame = grid(pack_size=8.0, alone_step_seconds=0.5, wall_seconds=130.0, **PLACE)
    assert sweep_words.time_sentence(spec(), frame, frame) == (
        "**16 runs in 2 min 10 s**; one after another about 6 min 58 s (estimate from the speed-up measured before "
        "packing). 8 runs shared each pass over the base."
    )
    change(frame, [0], pack_size=1)
    change(frame, [1], pack_size=4)
    assert sweep_words.shared_words(frame) == "4 to 8 runs shared each pass over the base; 1 went alone."


@pytest.mark.usefixtures("same_flops")
def test_without_a_measured_step_earlier_runs_give_the_estimate():
    earlier = grid(rs=(4,), alphas=(8.0,), lrs=(1e-3,), wall_seconds=5.0, **PLACE)
    seconds, basis = sweep_words.sequential_estimate(spec(), grid(pack_size=8.0), earlier)
    assert basis == "from 2 earlier runs of this model on this data"
    assert seconds == pytest.approx(16 * 5)  # 2 s in 40 steps and 3 s beside them


def test_why_so_many_shared_a_pass_is_said_once():
    frame = grid(pack_reason="four are faster than one")
    assert sweep_words.reason_words(frame) == "Four are faster than one."
    assert sweep_words.reason_words(grid()) == ""


def test_runs_that_shared_nothing_went_one_after_another():
    frame = grid()
    assert sweep_words.time_sentence(spec(), frame, frame[:0]) == "**16 runs in 2 min 10 s**, one after another."
    drop(frame, frame["r"] == 1)
    assert sweep_words.time_sentence(spec(), frame, frame[:0]).startswith("**8 of 16 runs to the end in 2 min 10 s**")


def test_a_pause_before_the_full_grid_is_not_counted_as_time():
    frame = grid(pack_size=8.0)
    change(frame, frame["r"] == 1, early_exit_step=10.0, finished_seconds=90_000.0)
    assert sweep_words.took_seconds(frame) is None
    assert sweep_words.time_sentence(None, frame, frame[:0]) == (
        "**16 runs, 32 s of training steps in all**. At the end 8 runs shared each pass over the base."
    )


def test_the_bill_before_the_full_grid_is_run():
    frame = drop(grid(), grid()["r"] == 1, step=10)
    assert sweep_words.bill_sentence(early_exit_bill(frame)) == (
        "Early exit stopped 8 of 16 runs and left out 37.5 % of the steps, about 12 s in steps. Whether the best of "
        "them was among those is not known: nobody trained them to the end."
    )


def test_the_bill_when_the_best_was_kept_and_when_it_was_dropped():
    frame = grid()
    change(frame, frame["r"] == 1, early_exit_step=10.0)
    assert sweep_words.bill_sentence(early_exit_bill(frame)) == (
        "Checked against the full grid: early exit kept the best, rank 4, alpha 8 at learning rate 0.001 (3.61), so "
        "it gave up nothing and saved 37.5 % of the steps, about 12 s in steps."
    )
    frame = grid()
    change(frame, frame["r"] == 4, early_exit_step=20.0)
    assert sweep_words.bill_sentence(early_exit_bill(frame)) == (
        "Checked against the full grid: early exit had dropped the best, rank 4, alpha 8 at learning rate 0.001 "
        "(3.61). What it kept reaches 3.91, so it gave up 0.30 of loss to save 25.0 % of the steps, about 8.0 s in "
        "steps."
    )


def test_the_table_says_where_a_run_was_dropped():
    frame = drop(grid(rs=(1,), alphas=(8.0,), lrs=(1e-3,)), [0], step=12)
    assert list(sweep_words.status_words(frame)) == ["dropped at step 12", "done"]


def test_what_a_grid_will_take():
    frame = grid()[:0]
    words = sweep_words.predicted_words(spec(), frame)
    assert words.startswith("one after another about")
    assert words.endswith("(a guess at 50 GFLOP/s until a first run is done), less where runs can share passes")
    base = spec().base
    dora = replace(spec(), base=replace(base, method=LoraConfig(use_dora=True)))
    assert "They cannot share passes: DoRA" in sweep_words.predicted_words(dora, frame)


def test_a_grid_that_shares_passes_is_predicted_from_the_latest_one():
    earlier = grid(
        pack_size=8.0, pack_seconds=16.0, wall_seconds=40.0, finished_seconds=140.0, alone_step_seconds=0.5, **PLACE
    )
    whole = sweep_words.predicted_words(spec(), earlier)
    # The same grid again: 32 s in steps, 8 s beside them.
    assert whole.startswith("sharing passes about 40 s (from 16 runs of this model on this data")
    assert "; one after another about " in whole
    halved = sweep_words.predicted_words(spec(early_exit=True), earlier)
    # 8 cells to step 12, 4 to step 20, 2 to the end: 52.5 % of the steps.
    assert halved.startswith("sharing passes and stopping the worst half early about 25 s (from 16 runs")
