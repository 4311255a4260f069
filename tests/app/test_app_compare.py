"""The Compare page, the promises and the dial, without a browser and without training."""

from pathlib import Path

import pandas as pd
import pytest
from charts import compare as charts
from promises import FAILS, HOLDS, OPEN, promises
from streamlit.testing.v1 import AppTest

from lora_engine import comparisons
from lora_engine.config import (
    BottleneckConfig,
    DataConfig,
    FullConfig,
    LoraConfig,
    RunConfig,
    TrainConfig,
)
from lora_engine.runs import Ledger, store_upload, this_process
from lora_engine.sweeps.comparison import ComparisonSpec, Entry

MAIN = Path(__file__).resolve().parents[2] / "app" / "main.py"
PAGE = "views/compare.py"
TERMS = {"weights": 12_000_000, "adapter": 600_000, "activations": 20_000_000}


def open_page(**parameters):
    app = AppTest.from_file(MAIN, default_timeout=60)
    for name, value in parameters.items():
        app.query_params[name] = value
    app.run()
    app.switch_page(PAGE).run()
    assert not app.exception, [e.value for e in app.exception]
    return app


def texts(app):
    kinds = (app.markdown, app.caption, app.subheader, app.header, app.warning)
    return " ".join(str(e.value) for kind in kinds for e in kind)


@pytest.fixture
def upload(home):
    lines = "\n".join(f'{{"prompt": "Where is parcel {i}", "completion": "It left on day {i}."}}' for i in range(30))
    path = store_upload(home, "parcels.jsonl", lines.encode())
    return f"{path.parent.name}/{path.name}"


INFERENCE = {
    "base_seconds_per_token": 0.005, "noise_low": 0.97, "noise_high": 1.04, "unit": "generated token", "rounds": 15,
    "timings": {
        name: {"seconds_per_token": 0.005 * r, "ratio": r, "ratio_low": 0.98 * r, "ratio_high": 1.02 * r}
        for name, r in [("base", 1.0), ("lora", 1.4), ("lora merged", 1.01), ("full", 1.0), ("bottleneck", 1.3)]
    },
    "methods": {
        "lora": {
            "inference_seconds_per_token": 0.007, "inference_ratio": 1.4, "merged_seconds_per_token": 0.005,
            "merged_ratio": 1.01, "merged_within_noise": True, "mergeable": True, "merge_max_abs_diff": 2e-6,
            "merge_loss_diff": 1e-8,
        },
        "full": {"mergeable": False, "inference_seconds_per_token": 0.005, "inference_ratio": 1.0},
        "bottleneck": {"mergeable": False, "inference_seconds_per_token": 0.0065, "inference_ratio": 1.3},
    },
}  # fmt: skip
SIZES = {"lora": 162_816, "full": 3_148_224, "bottleneck": 57_744}
LOSSES = {"lora": (3.94, 3.96), "full": (3.93, 3.97), "bottleneck": (4.2, 4.25)}


def spec_of(names=("lora", "full", "bottleneck")):
    configs = {"lora": LoraConfig(), "full": FullConfig(), "bottleneck": BottleneckConfig()}
    base = RunConfig(data=DataConfig(path="parcels.jsonl"), train=TrainConfig(steps=4))
    entries = tuple(Entry(method=configs[name], lrs=(1e-3,), steps=4) for name in names)
    return ComparisonSpec(base=base, entries=entries, seeds=(0, 1))


class Nobody:
    def submit(self, run_ids):
        pass

    def cancel(self, run_id):
        pass


def finish(ledger, run_id, *, labelled=False):
    record = ledger.get_run(run_id)
    method, seed = record.config["method"]["method"], record.config["train"]["seed"]
    ledger.claim_run(run_id, *this_process())
    for step in range(1, 5):
        ledger.record_step(run_id, step, train_loss=5.0, lr=1e-3, grad_norm=1.0, tokens=100, seconds=0.5 * step)
    ledger.record_eval(run_id, 0, eval_loss=5.0)
    ledger.record_eval(run_id, 4, eval_loss=LOSSES[method][seed])
    result = {
        "eval_loss_before": 5.0, "eval_loss_after": LOSSES[method][seed], "trainable_parameters": SIZES[method],
        "total_parameters": 3_148_224, "step_seconds": 0.3 if method == "full" else 0.2, "seconds": 2.0,
        "peak_bytes": 2**27 if method == "full" else 2**26, "peak_kind": "tracked",
        "sample": {"prompt": "Where is it", "before": "", "after": ""},
    }  # fmt: skip
    if labelled:
        result |= {"eval_accuracy": 0.75, "classes": ["bad", "good"], "confusion_matrix": [[3, 1], [1, 3]]}
    ledger.finish_run(run_id, "done", result=result)


def finished_comparison(home, *, measured=True, labelled=False, names=("lora", "full", "bottleneck")):
    ledger = Ledger(home)
    comparison = comparisons.start_comparison(
        ledger, spec_of(names), Nobody(), lambda _: {"terms": TERMS, "peak_bytes": 33_000_000}
    )
    sweep, runs = comparisons.read_cells(ledger, comparison)
    for run in runs:
        finish(ledger, run.id, labelled=labelled)
    for run_id in comparisons.add_missing(ledger, comparison):
        finish(ledger, run_id, labelled=labelled)
    if measured:
        comparisons.write_state(ledger, sweep, {"doing": None, "inference": INFERENCE})
    return comparison


def rows_of(home, comparison):
    return comparisons.read_comparison(Ledger(home), comparison)["methods"]


def test_runs_and_time_are_said_before_the_start(home, upload, monkeypatch):
    from lora_engine.executors import LocalExecutor

    submitted = []
    monkeypatch.setattr(LocalExecutor, "submit", lambda _self, run_ids: submitted.extend(run_ids))
    app = open_page(data=upload, r="4")
    assert "**25 runs**, one after another: each method at 3 learning rates with seed 0" in texts(app)
    assert "LoRA 81,408" in texts(app)
    app.button_group(key="compare_methods").set_value(["lora", "bottleneck"]).run()
    app.button_group(key="compare_seeds").set_value([0, 1]).run()
    assert "**8 runs**" in texts(app)
    app.button_group(key="compare_match").set_value("parameters").run()
    app.button(key="start_comparison").click().run()
    assert not app.exception
    assert len(submitted) == 2 * 3
    runs = Ledger(home).list_runs()
    assert {run.config["method"]["method"] for run in runs} == {"lora", "bottleneck"}
    assert {run.config["method"].get("r", 4) for run in runs} == {4}
    assert {run.config["method"].get("reduction_factor", 11) for run in runs} != {16}
    assert all(run.prediction["terms"] for run in runs)
    assert app.session_state["_comparison"] == runs[0].sweep_id


def test_nothing_chosen_is_said(upload):
    app = open_page(data=upload)
    app.button_group(key="compare_methods").set_value([]).run()
    assert any("at least one method" in str(info.value) for info in app.info)


def test_an_empty_page_says_what_will_be_here():
    app = open_page()
    assert "each at its best of a few learning rates" in texts(app)
    assert app.button(key="first_example")


def test_a_finished_comparison_answers_first(home):
    app = open_page(comparison=finished_comparison(home))
    headings = [heading.value for heading in app.subheader]
    assert headings[0].startswith("LoRA's loss (3.950) is within the seeds' spread of full fine-tuning's (3.950)")
    for expected in (
        "Five promises of low rank, in your figures", "Loss against trainable parameters", "Loss against time",
        "Memory to train", "Time at inference", "Every method",
    ):  # fmt: skip
        assert expected in headings
    assert "adapter layers' (4.225) is 0.27 higher" in texts(app)
    frame = app.dataframe[0].value
    assert list(frame["method"]) == ["LoRA", "Full fine-tuning", "Adapter layers"]
    assert list(frame["trainable_parameters"]) == [162_816, 3_148_224, 57_744]
    assert "eval_accuracy" not in frame.columns


def test_labels_get_their_confusion_matrix(home):
    app = open_page(comparison=finished_comparison(home, labelled=True))
    assert "Which class was taken for which" in [heading.value for heading in app.subheader]
    assert "Accuracy: LoRA 75.0 %" in texts(app)


def test_what_was_interrupted_can_be_resumed(home, monkeypatch):
    from lora_engine.executors import LocalExecutor

    submitted = []
    monkeypatch.setattr(LocalExecutor, "submit", lambda _self, run_ids: submitted.append(run_ids))
    comparison = finished_comparison(home, measured=False)
    app = open_page(comparison=comparison)
    assert "This comparison is interrupted" in texts(app)
    app.button(key=f"resume_{comparison}").click().run()
    assert len(submitted) == 1
    assert not app.exception


def test_a_comparison_that_is_not_there_is_forgotten():
    app = open_page(comparison="s00000000000000")
    assert app.error
    app.run()
    assert not app.error


def test_promises_say_what_was_measured(home):
    rows = rows_of(home, finished_comparison(home))
    kept = promises(rows, INFERENCE)
    assert [p.title for p in kept] == [
        "Fewer weights", "Less training time", "Lower memory", "Easy merge", "No overhead",
    ]  # fmt: skip
    assert [p.figure for p in kept] == ["5.17 %", "0.67 times", "0.50 times", "2.0e-06", "1.01 times"]
    assert {p.verdict for p in kept} == {HOLDS}
    slow = [
        row | ({"step_seconds": 0.4, "merged_within_noise": False} if row["method"] == "lora" else {}) for row in rows
    ]
    assert [p.verdict for p in promises(slow, INFERENCE)] == [HOLDS, FAILS, HOLDS, HOLDS, FAILS]
    alone = promises([row for row in rows if row["method"] == "lora"], INFERENCE)
    assert [p.verdict for p in alone] == [HOLDS, OPEN, OPEN, HOLDS, HOLDS]
    assert "not in this comparison" in alone[1].note
    assert promises([row for row in rows if row["method"] == "full"], INFERENCE) == []


def test_charts_are_tables_and_traces(home):
    rows = rows_of(home, finished_comparison(home))
    table = charts.methods_pareto_table(rows)
    assert list(table["method"]) == ["bottleneck", "lora", "full"]
    assert list(table["on_front"]) == [True, True, False]
    figure = charts.plot_methods_pareto(table)
    assert [trace.name for trace in figure.data[1:]] == ["Adapter layers", "LoRA", "Full fine-tuning"]
    assert figure.data[2].error_y.array == pytest.approx((0.01,))
    assert figure.layout.xaxis.type == "log"
    assert figure.layout.yaxis.title.text == "Evaluation loss (nats)"

    memory = charts.method_memory_table(rows)
    assert memory[memory["method"] == "lora"]["bytes"].tolist() == list(TERMS.values())
    figure = charts.plot_method_memory(memory)
    assert [trace.name for trace in figure.data] == ["Base weights", "Adapter", "Activations", "Measured peak"]
    assert list(figure.data[-1].y) == [64, 128, 64]
    assert figure.layout.barmode == "stack"

    latency = charts.latency_table(rows, INFERENCE)
    assert list(latency["name"]) == ["Base model", "LoRA", "LoRA, merged", "Full fine-tuning", "Adapter layers"]
    figure = charts.plot_latency(latency, unit="generated token", noise=(0.97, 1.04))
    assert list(figure.data[0].x) == pytest.approx([5.0, 7.0, 5.05, 5.0, 6.5])
    assert (figure.layout.shapes[0].x0, figure.layout.shapes[0].x1) == pytest.approx((4.85, 5.2))
    assert figure.layout.xaxis.title.text == "Time a generated token (ms)"
    assert charts.latency_table(rows, None).empty

    confusion = charts.confusion_table([[3, 1], [0, 4]], ["bad", "good"])
    assert confusion.to_dict("list") == {
        "true": ["bad", "bad", "good", "good"], "guessed": ["bad", "good", "bad", "good"], "sequences": [3, 1, 0, 4],
    }  # fmt: skip
    assert charts.plot_confusion(confusion).data[0].z == ([3, 1], [0, 4])


def test_loss_by_time_joins_evaluations_to_the_clock():
    evals = pd.DataFrame({"run_id": ["a", "a", "b"], "step": [0, 4, 4], "eval_loss": [5.0, 4.0, 4.5]})
    steps = pd.DataFrame({"run_id": ["a", "b"], "step": [4, 4], "seconds": [2.0, 3.0]})
    table = charts.loss_by_time_table(evals, steps, {"a": "lora", "b": "full"})
    assert table[["method", "seconds", "eval_loss"]].to_dict("list") == {
        "method": ["lora", "lora", "full"], "seconds": [0.0, 2.0, 3.0], "eval_loss": [5.0, 4.0, 4.5],
    }  # fmt: skip
    figure = charts.plot_loss_by_time(table)
    assert [trace.name for trace in figure.data] == ["LoRA", "Full fine-tuning"]
    assert figure.layout.xaxis.title.text == "Time in training steps, measured (s)"


@pytest.mark.parametrize(
    "figure",
    [
        charts.plot_methods_pareto(charts.methods_pareto_table([])),
        charts.plot_method_memory(charts.method_memory_table([])),
        charts.plot_latency(charts.latency_table([], None), unit="token", noise=(1, 1)),
        charts.plot_dial_curve({}, scale=1.0),
    ],
)
def test_charts_of_nothing_say_what_will_be_there(figure):
    assert figure.layout.annotations[0].text


def test_the_dial_asks_for_the_text_and_the_losses(home, monkeypatch):
    """The fold opened, as the page draws it; the warm process is played."""
    from lora_engine.dialer import read_losses, remember_loss
    from lora_engine.executors.warm import WarmProcess

    asked = []

    def play(_self, question):
        asked.append(dict(question))
        if question.get("eval"):
            remember_loss(Ledger(home), question["run_id"], question["scale"], 4 + (question["scale"] - 1) ** 2)
            return {"eval_loss": 0.0}
        return {"text": f"text at {question['scale']:g}"}

    monkeypatch.setattr(WarmProcess, "ask", play)
    finished_comparison(home)
    ledger = Ledger(home)
    run = next(run for run in ledger.list_runs() if run.config["method"]["method"] == "lora")
    ledger.run_folder(run.id).mkdir(parents=True, exist_ok=True)

    def page(run_id):
        import cache
        import scale_dial

        scale_dial._dial(cache.ledger().get_run(run_id))

    app = AppTest.from_function(page, args=(run.id,), default_timeout=60).run()
    assert not app.exception
    assert asked[0] == {"run_id": run.id, "scale": 1.0, "prompt": "Where is it", "temperature": 0.0, "seed": 0}
    losses = read_losses(ledger, run.id)
    assert list(losses) == [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0]
    assert "Evaluation loss here: 4.00." in texts(app)
    asked.clear()
    app.slider(key=f"scale_{run.id}").set_value(0.0).run()
    assert [question["scale"] for question in asked] == [0.0]  # every loss is known already
    assert "The base model." in texts(app)
    figure = charts.plot_dial_curve(losses, scale=0.0)
    assert list(figure.data[0].y) == [4 + (s - 1) ** 2 for s in losses]
    assert list(figure.data[1].x) == [0.0]
