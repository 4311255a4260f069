"""Tables exactly; figures by their traces, axes and hover."""

import itertools

import charts
import pandas as pd
import pytest
from charts.common import faded
from charts.explore import _places

NAN = float("nan")


def runs(*, done=True, rs=(1, 4), alphas=(8.0, 16.0), lrs=(1e-3, 3e-3), seeds=(0, 1)):
    """A sweep's tidy table; loss falls with rank and depends on alpha and rate a little."""
    rows = []
    for i, (seed, lr, alpha, r) in enumerate(itertools.product(seeds, lrs, alphas, rs)):
        rows.append(
            {
                "run_id": f"run{i}", "status": "done" if done else "queued", "method": "lora", "model": "embedded",
                "data": "a.csv", "data_path": "/a.csv", "r": float(r), "lora_alpha": alpha, "lr": lr, "seed": seed,
                "eval_loss_after": 4 - 0.1 * r + 0.01 * seed + alpha / 1000 + lr if done else float("nan"),
                "trainable_parameters": 1000.0 * r, "seconds": 10.0 + r + seed, "peak_bytes": 2.0**20 * (50 + r),
                "predicted_peak_bytes": 2.0**20 * (52 + r), "adapter_bytes": 4000.0 * r,
                "steps": 40, "last_step": 40.0 if done else NAN, "last_eval_step": NAN, "last_eval_loss": NAN,
                "pack_size": NAN, "pack_peak_bytes": NAN, "early_exit_step": NAN, "early_exit_loss": NAN,
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def titles(figure):
    return figure.layout.xaxis.title.text, figure.layout.yaxis.title.text


@pytest.fixture
def best():
    from lora_engine.sweeps import best_over

    return best_over(runs(), "r")


def test_parameter_table_is_sorted_and_bare():
    rows = [{"r": r, "trainable_parameters": 100 * r, "trainable_percent": r / 2, "peak_bytes": 1} for r in (4, 1)]
    table = charts.parameter_table(rows)
    assert table.to_dict("list") == {"r": [1, 4], "trainable_parameters": [100, 400], "trainable_percent": [0.5, 2.0]}


def test_parameters_chart_marks_your_rank():
    table = charts.parameter_table(
        [{"r": r, "trainable_parameters": 100 * r, "trainable_percent": r / 2} for r in (1, 2, 4)]
    )
    figure = charts.plot_parameters(table, r=2, full_parameters=10_000, target_word="attention")
    line, mark = figure.data
    assert list(line.y) == [100, 200, 400]
    assert (list(mark.x), list(mark.y), mark.text) == ([2], [200], ("<b>rank 2: 200</b>",))
    assert figure.layout.xaxis.type == figure.layout.yaxis.type == "log"
    assert list(figure.layout.xaxis.tickvals) == [1, 2, 4]
    assert titles(figure) == ("Rank (r)", "Trainable parameters")
    assert "10,000" in figure.layout.annotations[0].text


def memory(precisions=("fp32", "nf4")):
    rows = [
        (precision, method, term, size)
        for precision in precisions
        for method in (("full", "lora") if precision == "fp32" else ("lora",))
        for term, size in (("weights", 3 * 2**20), ("optimizer", 2**20), ("logits", 0))
    ]
    return pd.DataFrame(rows, columns=["precision", "method", "term", "bytes"])


def test_memory_chart_stacks_from_zero_and_names_each_bar():
    figure = charts.plot_memory(memory(), current="nf4", lora_word="LoRA r 8")
    bars = [trace for trace in figure.data if trace.type == "bar"]
    assert [bar.name for bar in bars] == ["Base weights", "Optimizer"]  # logits are nothing here
    assert list(bars[0].x) == [3.0, 3.0, 3.0]
    assert figure.layout.barmode == "stack"
    assert figure.layout.xaxis.range[0] == 0
    text = next(trace for trace in figure.data if trace.type == "scatter").text
    assert list(text) == [" full, 4.00 MiB", " LoRA r 8, 4.00 MiB", " LoRA r 8, 4.00 MiB"]
    assert list(figure.layout.yaxis.ticktext) == ["fp32", "<b>nf4</b>"]
    assert "MiB" in titles(figure)[0]
    assert bars[0].customdata[0][0] == "fp32, full fine-tuning"
    assert bars[0].customdata[0][2] == "3,145,728"


def test_card_line_only_where_it_does_not_squeeze_the_bars():
    near = charts.plot_memory(memory(), current="fp32", card_name="small card", card_bytes=5 * 2**20)
    far = charts.plot_memory(memory(), current="fp32", card_name="big card", card_bytes=12 * 2**30)
    assert len(near.layout.shapes) == 1
    assert "small card" in near.layout.annotations[0].text
    assert not far.layout.shapes


def test_bars_of_one_precision_touch():
    places = _places([("a", "full"), ("a", "lora"), ("b", "lora")])
    assert places["a", "lora"] - places["a", "full"] < places["b", "lora"] - places["a", "lora"]


def test_loss_by_rank_shows_the_band_only_with_seeds(best):
    figure = charts.plot_loss_by_rank(best, recommended=4)
    band, line, mark = figure.data
    assert band.name == "spread over 2 seeds"
    assert list(band.y) == [*best["eval_loss_max"], *reversed(list(best["eval_loss_min"]))]
    assert list(line.y) == list(best["eval_loss"])
    assert list(mark.x) == [4]
    assert list(figure.layout.xaxis.tickvals) == [1, 4]

    from lora_engine.sweeps import best_over

    alone = charts.plot_loss_by_rank(best_over(runs(seeds=(0,)), "r"))
    assert [trace.name for trace in alone.data] == ["best over alpha and learning rate"]
    assert alone.layout.showlegend is False


def test_loss_by_rank_at_one_rate_says_so(best):
    line = charts.plot_loss_by_rank(best, rate=3e-3).data[1]
    assert line.name == "best over alpha, learning rate 0.003 alone, mean"


def test_pareto_front_holds_what_nothing_smaller_beats():
    cells = pd.DataFrame(
        {
            "trainable_parameters": [400.0, 100.0, 200.0, 200.0], "eval_loss": [3.5, 4.0, 4.2, 3.8],
            "r": [4, 1, 2, 2], "lora_alpha": [8.0] * 4, "lr": [1e-3, 1e-3, 1e-3, 3e-3], "num_seeds": [1] * 4,
        }
    )  # fmt: skip
    table = charts.pareto_table(cells)
    assert list(table["eval_loss"]) == [4.0, 3.8, 4.2, 3.5]
    assert list(table["on_front"]) == [True, True, False, True]
    figure = charts.plot_pareto(table)
    assert [trace.name for trace in figure.data] == ["beaten by something smaller", "Pareto front"]
    assert figure.layout.xaxis.type == "log"


def test_an_empty_sweep_draws_nothing_but_words():
    from lora_engine.sweeps import best_over, summarize_cells

    frame = runs(done=False)
    for figure in (
        charts.plot_loss_by_rank(best_over(frame, "r")),
        charts.plot_pareto(charts.pareto_table(summarize_cells(frame))),
        charts.plot_time_by_rank(charts.cost_by_rank_table(frame)),
        charts.plot_memory_by_rank(charts.cost_by_rank_table(frame)),
    ):
        assert not figure.data
        assert figure.layout.annotations[0].text == "The first finished run starts this chart."


def test_costs_by_rank():
    frame = runs(done=True)
    table = charts.cost_by_rank_table(frame)
    assert list(table["seconds"]) == [11.5, 14.5]
    assert list(table["seconds_low"]) == [11.0, 14.0]
    assert list(table["runs"]) == [8, 8]
    assert list(table["shared"]) == [0, 0]
    time = charts.plot_time_by_rank(table)
    assert time.layout.yaxis.rangemode == "tozero"
    assert list(time.data[0].error_y.array) == [0.5, 0.5]
    memory_figure = charts.plot_memory_by_rank(table)
    assert [trace.name for trace in memory_figure.data] == ["measured", "predicted"]
    assert list(memory_figure.data[0].y) == [51, 54]
    assert titles(memory_figure)[1] == "Peak memory (MiB)"


def test_costs_of_runs_that_shared_their_passes_say_so():
    frame = runs().assign(pack_size=8.0, pack_peak_bytes=2.0**20 * 600)
    frame.loc[frame["r"] == 4, "pack_size"] = 1  # went alone, in the same sweep
    table = charts.cost_by_rank_table(frame)
    assert list(table["shared"]) == [8, 0]
    assert titles(charts.plot_time_by_rank(table))[1] == "Share of the pass a run, measured (s)"
    figure = charts.plot_memory_by_rank(table)
    assert [trace.name for trace in figure.data] == ["measured alone", "predicted alone", "whole pack, measured"]
    assert list(figure.data[2].y) == [600, 600]
    # 51 beside 600 from a baseline of zero: the two lines below would be one.
    assert figure.layout.yaxis.type == "log"
    assert {50, 100, 200, 500} <= set(figure.layout.yaxis.tickvals)


def test_curves_have_steps_smoothing_and_evaluations():
    steps = pd.DataFrame({"step": [1, 2, 3], "train_loss": [5.0, 4.0, 3.0]})
    evals = pd.DataFrame({"step": [0, 3], "eval_loss": [5.5, 3.5]})
    figure = charts.plot_curves(steps, evals, num_steps=10)
    assert [trace.name for trace in figure.data] == ["training, each step", "training, smoothed", "evaluation"]
    assert titles(figure) == ("Step", "Loss (nats a token)")
    assert not charts.plot_curves(steps[:0], evals[:0], num_steps=10).data


def test_overlay_keeps_the_order_asked_for():
    evals = pd.DataFrame({"run_id": ["a", "a", "b", "c"], "step": [3, 0, 0, 0], "eval_loss": [1.0, 2.0, 3.0, 4.0]})
    table = charts.overlay_table(evals, {"b": "second", "a": "first"})
    assert list(table["run_id"]) == ["b", "a", "a"]
    assert list(table["step"]) == [0, 0, 3]
    figure = charts.plot_overlay(table)
    assert [trace.name for trace in figure.data] == ["second", "first"]
    assert charts.plot_overlay(table[table["run_id"] == "a"]).layout.showlegend is False


def test_fading_keeps_the_colour():
    assert faded("#E69F00", 0.5) == "rgba(230,159,0,0.5)"


def accuracy(errors=(1.0, -2.0, 0.5), predicted=(2**20, 2**25, 2**30), kinds=("tracked", "allocated", "allocated")):
    rows = [
        {
            "run_id": f"run{i}", "model": "embedded", "method": ("lora", "full")[i % 2],
            "r": None if i % 2 else 8.0,
            "precision": "fp32", "batch_size": 8, "max_length": 128, "device": "cpu", "kind": kind,
            "predicted_bytes": size, "measured_bytes": round(size * (1 + error / 100)),
            "reserved_bytes": 2.0 * size if kind == "allocated" else float("nan"), "error_percent": error,
        }
        for i, (error, size, kind) in enumerate(zip(errors, predicted, kinds, strict=True))
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_predicted_against_measured_has_its_diagonal_and_a_point_a_run():
    table = accuracy()
    figure = charts.plot_predicted_measured(table)
    diagonal, *groups = figure.data
    assert list(diagonal.x) == list(diagonal.y)
    assert sum(len(group.x) for group in groups) == len(table)
    assert {group.name for group in groups} == {"lora", "full"}
    assert [group.name for group in groups if group.showlegend].count("lora") == 1
    # 1 MiB to 1 GiB: three decades, so both axes are logarithmic, over the same range.
    assert figure.layout.xaxis.type == figure.layout.yaxis.type == "log"
    assert figure.layout.xaxis.range == figure.layout.yaxis.range
    assert titles(figure) == ("Predicted peak (GiB)", "Measured peak (GiB)")
    text = " ".join(hover for group in groups for hover in group.customdata)
    assert "run1" in text
    assert "reserved" in text
    assert "−2.00 %" in text


def test_runs_alike_in_size_stand_on_axes_from_zero():
    table = accuracy(predicted=(100, 110, 120), kinds=("tracked",) * 3)
    figure = charts.plot_predicted_measured(table)
    assert figure.layout.xaxis.type != "log"
    assert figure.layout.xaxis.range[0] == 0
    assert titles(figure)[1] == "Measured peak, tensor bytes on the CPU (B)"


@pytest.mark.parametrize("errors", [[0.4], [0.0, 0.0], [-3.0, 5.0, 0.1, 0.2], [i / 7 for i in range(-40, 900)]])
def test_every_error_is_in_exactly_one_bin(errors):
    table = charts.error_table(errors)
    assert table["runs"].sum() == len(errors)
    assert len(table) <= 26
    for row in table.itertuples():
        inside = sum(row.low_percent - 1e-9 <= error < row.high_percent - 1e-9 for error in errors)
        assert abs(inside - row.runs) <= sum(abs(error - row.low_percent) < 1e-6 for error in errors)
    # 0 is an edge or outside: too much and too little are told apart.
    assert not ((table["low_percent"] < 0) & (table["high_percent"] > 0)).any()


def test_no_errors_no_bins():
    assert len(charts.error_table([])) == 0


def test_errors_chart_counts_runs_and_shades_the_interval():
    table = charts.error_table([-1.5, 0.5, 0.6])
    figure = charts.plot_errors(table, band=(-2.0, 2.0), band_text="shaded")
    assert list(figure.data[0].y) == list(table["runs"])
    assert figure.layout.yaxis.rangemode == "tozero"
    band = next(shape for shape in figure.layout.shapes if shape.type == "rect")
    assert (band.x0, band.x1) == (-2.0, 2.0)
    assert figure.layout.annotations[0].text == "shaded"
    assert not charts.plot_errors(table).layout.annotations
