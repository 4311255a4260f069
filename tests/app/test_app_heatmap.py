"""The map of a sweep and its lines of equal scaling: tables exactly, figures by traces and hover."""

import math

import charts
import pytest
from charts.iso import place_of, value_at
from hypothesis import given
from hypothesis import strategies as st
from sweep_runs import NAN, change, drop, grid

from lora_engine.sweeps import best_over


def table_of(frame):
    return charts.heatmap_table(frame, best_over(frame, ("r", "lora_alpha")))


def scatters(figure, mode):
    return [trace for trace in figure.data if trace.type == "scatter" and trace.mode == mode]


def cell(table, r, alpha):
    return table[(table["r"] == r) & (table["lora_alpha"] == alpha)].iloc[0]


def test_a_finished_cell_is_the_best_rate_by_the_mean_over_seeds():
    table = table_of(grid())
    assert list(zip(table["r"], table["lora_alpha"], strict=True)) == [(1, 8), (1, 16), (4, 8), (4, 16)]
    assert set(table["state"]) == {"final"}
    assert cell(table, 1, 8)["eval_loss"] == pytest.approx(4 - 0.1 + 0.005 + 0.008 + 0.001)
    assert cell(table, 1, 8)["lr"] == 1e-3
    assert list(table["done"]) == list(table["total"]) == [4] * 4
    assert list(table["share"]) == [1.0] * 4


def test_an_unfinished_cell_shows_its_latest_evaluation():
    frame = grid()
    four = (frame["r"] == 4) & (frame["lora_alpha"] == 8)
    change(frame, four, status="running", eval_loss_after=NAN, last_step=10.0, last_eval_step=8.0, last_eval_loss=5.0)
    change(frame, four & (frame["lr"] == 3e-3) & (frame["seed"] == 1), last_eval_loss=4.6)
    # The same at the other alpha, but nothing was evaluated beyond the base model; one run is done, another waits.
    other = (frame["r"] == 4) & (frame["lora_alpha"] == 16)
    change(frame, other, status="running", eval_loss_after=NAN, last_step=2.0, last_eval_step=0.0, last_eval_loss=6.0)
    mixed = (frame["r"] == 1) & (frame["lora_alpha"] == 16) & (frame["seed"] == 1)
    change(frame, mixed, status="queued", eval_loss_after=NAN, last_step=NAN, last_eval_step=NAN)
    table = table_of(frame)

    so_far = cell(table, 4, 8)
    assert (so_far["state"], so_far["eval_loss"], so_far["lr"]) == ("so far", pytest.approx(4.8), 3e-3)
    assert (so_far["share"], so_far["running"], so_far["done"]) == (0.25, 4, 0)
    begun = cell(table, 4, 16)
    assert (begun["state"], begun["share"]) == ("running", 0.05)
    assert math.isnan(begun["eval_loss"])
    half = cell(table, 1, 16)
    assert (half["state"], half["done"], half["share"]) == ("so far", 2, 0.5)
    assert half["eval_loss"] == pytest.approx(4 - 0.1 + 0.016 + 0.001)  # of the seed that is done


def test_what_early_exit_stopped_is_marked_only_where_nothing_else_is_left():
    frame = grid()
    drop(frame, frame["lr"] == 3e-3, step=20)
    gone = (frame["r"] == 1) & (frame["lora_alpha"] == 8)
    drop(frame, gone & (frame["lr"] == 1e-3), step=10, loss=4.2)
    table = table_of(frame)
    dropped = cell(table, 1, 8)
    assert (dropped["state"], dropped["dropped_step"], dropped["dropped_loss"], dropped["lr"]) == (
        "dropped", 20, pytest.approx(4.5), 3e-3,
    )  # fmt: skip
    assert math.isnan(dropped["eval_loss"])
    kept = cell(table, 4, 16)
    assert (kept["state"], kept["lr"], kept["dropped"]) == ("final", 1e-3, 2)

    # Resumed to their end, they are runs like any other, and while they are at it, they are unfinished.
    change(frame, gone, status="running")
    assert cell(table_of(frame), 1, 8)["state"] == "so far"
    change(frame, gone, status="done", eval_loss_after=3.0)
    assert cell(table_of(frame), 1, 8)[["state", "eval_loss", "dropped"]].tolist() == ["final", 3.0, 0]


@pytest.mark.parametrize(
    ("values", "state"),
    [
        ({"status": "failed"}, "failed"),
        ({"status": "cancelled"}, "cancelled"),
        ({"status": "done"}, "diverged"),
        ({"status": "queued", "last_eval_step": NAN}, "queued"),
        ({"status": "interrupted", "last_eval_step": NAN}, "interrupted"),
    ],
)
def test_a_cell_without_a_loss_says_why(values, state):
    frame = change(grid(seeds=(0,)), slice(None), eval_loss_after=NAN, **values)
    assert set(table_of(frame)["state"]) == {state}


def test_the_map_tells_finished_from_unfinished_and_from_dropped():
    frame = grid(rs=(1, 2, 4))
    change(
        frame, frame["r"] == 2, status="running", eval_loss_after=NAN, last_step=30.0, last_eval_step=28.0,
        last_eval_loss=4.25,
    )  # fmt: skip
    drop(frame, frame["r"] == 4)
    figure = charts.plot_heatmap(table_of(frame), ink="#123456")
    final, so_far = (trace for trace in figure.data if trace.type == "heatmap")
    assert final.opacity > so_far.opacity
    assert [value is None for value in final.z[0]] == [False, True, True]
    assert list(so_far.z[0]) == [None, 4.25, None]
    texts = {text: trace for trace in scatters(figure, "text") for text in trace.text}
    assert "<i>4.25</i><br>75%" in texts
    assert "✕<br>step 10" in texts
    assert texts["<i>4.25</i><br>75%"].textfont.color == "#123456"
    hover = " ".join(hover for trace in scatters(figure, "text") for hover in trace.customdata)
    assert "loss 4.2500 so far, 75% of its steps, at learning rate 0.001" in hover
    assert "stopped early at step 10 with a loss of 4.5000" in hover
    assert "0 of 4 runs done, 4 stopped early" in hover
    assert (figure.layout.xaxis.title.text, figure.layout.yaxis.title.text) == ("Rank (r)", "Scaling (alpha)")


RANKS = st.lists(st.integers(1, 512), min_size=1, max_size=9, unique=True).map(sorted)
ALPHAS = st.lists(st.sampled_from([0.5, 1, 3, 8, 10, 16, 24, 32, 64, 100]), min_size=1, max_size=6, unique=True)


@given(RANKS, st.floats(-0.5, 8.5))
def test_places_and_values_are_each_others_inverse(values, place):
    place = min(place, len(values) - 0.5)
    assert place_of(value_at(place, values), values) == pytest.approx(place, abs=1e-6)
    assert [place_of(v, values) for v in values] == pytest.approx(list(range(len(values))))


@pytest.mark.parametrize("power", [1.0, 0.5])
@given(RANKS, ALPHAS)
def test_along_a_line_the_scaling_is_what_it_says(power, ranks, alphas):
    iso = charts.iso_table(ranks, alphas, power=power)
    for row in iso.to_dict("records"):
        assert row["lora_alpha"] / row["r"] ** power == pytest.approx(row["scaling"], rel=1e-6)
        assert -0.5 <= row["x"] <= len(ranks) - 0.5
        assert -0.5 <= row["y"] <= len(alphas) - 0.5
    assert iso["scaling"].nunique() <= 10
    for _, line in iso.groupby("scaling"):
        assert line["x"].is_monotonic_increasing
        assert line["y"].is_monotonic_increasing


def test_lines_join_the_cells_of_equal_scaling():
    iso = charts.iso_table((1, 2, 4), (8, 16), power=1.0)
    assert sorted(iso["scaling"].unique()) == [4, 8]  # alone on their diagonals: 2 and 16
    eight = iso[iso["scaling"] == 8]
    assert {(0, 0), (1, 1)} <= set(zip(eight["x"], eight["y"], strict=True))
    roots = charts.iso_table((1, 2, 4, 8), (8, 16), power=0.5)
    assert sorted(roots["scaling"].unique()) == pytest.approx([8 / math.sqrt(2), 8])
    eight = roots[roots["scaling"] == 8]
    assert {(0, 0), (2, 1)} <= set(zip(eight["x"], eight["y"], strict=True))


def test_where_no_two_cells_agree_powers_of_two_are_drawn():
    assert set(charts.iso_table((1, 4, 16), (10,), power=1.0)["scaling"]) <= {2.0**k for k in range(-4, 5)}
    assert len(charts.iso_table((1, 4, 16), (10,), power=1.0)) > 0


def test_each_line_carries_its_value_and_leaves_the_numbers_free():
    table = table_of(grid(rs=(1, 2), alphas=(8.0, 16.0, 32.0)))
    iso = charts.iso_table(table["r"], table["lora_alpha"], power=1.0)
    figure = charts.plot_heatmap(table, iso=iso, iso_word="alpha / r")
    lines = scatters(figure, "lines")
    assert {line.name for line in lines} == {"alpha / r = 8.0", "alpha / r = 16.0"}
    for line in lines:
        points = [(x, y) for x, y in zip(line.x, line.y, strict=True) if x is not None]
        assert min(math.hypot(x - i, y - j) for x, y in points for i in range(2) for j in range(3)) > 0.2
    assert {note.text for note in figure.layout.annotations} == {"alpha / r", "8.0", "16.0"}
