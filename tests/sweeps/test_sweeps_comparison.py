"""Planning, choosing and summing up a comparison, exactly; and on a real ledger, without training."""

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_engine import comparisons
from lora_engine.calc import count_parameters, estimate_memory, estimate_step_flops, load_shape, shape_from_config
from lora_engine.calc.predict import shape_to_train
from lora_engine.config import (
    DEFAULT_LRS,
    METHOD_CONFIGS,
    BottleneckConfig,
    DataConfig,
    FullConfig,
    HeadConfig,
    LoraConfig,
    PrefixConfig,
    RunConfig,
    TrainConfig,
    run_config_from_dict,
    to_dict,
)
from lora_engine.errors import ConfigError, InputError
from lora_engine.runs import Ledger, this_process
from lora_engine.sweeps.comparison import (
    ComparisonSpec,
    Entry,
    choose_rates,
    count_runs,
    default_rates,
    make_cell,
    missing_cells,
    rates_around,
    repeat_cells,
    search_cells,
)
from lora_engine.sweeps.sizes import fit_size, plan_comparison
from lora_engine.sweeps.verdict import conclude, noise_of, summarize_methods, within_spread

BASE = RunConfig(data=DataConfig(path="a.csv"), train=TrainConfig(steps=30))
LORA = Entry(method=LoraConfig(), lrs=(1e-3, 3e-3, 1e-2), steps=30)
FULL = Entry(method=FullConfig(), lrs=(1e-4, 3e-4, 1e-3), steps=30)
SPEC = ComparisonSpec(base=BASE, entries=(LORA, FULL), seeds=(0, 1, 2))
SHAPE = load_shape("embedded")


@dataclass
class Cell:
    config: dict[str, Any]
    status: str = "done"
    result: dict[str, Any] | None = None
    prediction: dict[str, Any] | None = None
    error: str | None = None
    id: str = field(default="r1")


def done(config, loss, **more):
    result = {"eval_loss_after": loss, "eval_loss_before": 5.0, "trainable_parameters": 10, "peak_bytes": 7}
    return Cell(to_dict(config), result=result | {"step_seconds": 0.5} | more)


def searched(losses):
    """Finished runs of the search, one for each (method, rate) of `losses`."""
    return [done(make_cell(SPEC, SPEC.entry(name), lr, 0), loss) for (name, lr), loss in losses.items()]


LOSSES = {
    ("lora", 1e-3): 4.2, ("lora", 3e-3): 4.0, ("lora", 1e-2): 4.1,
    ("full", 1e-4): 4.3, ("full", 3e-4): 3.98, ("full", 1e-3): float("nan"),
}  # fmt: skip


def test_default_rates_are_three_around_each_default():
    assert default_rates("lora") == (1e-3, 3e-3, 1e-2)
    assert default_rates("full") == (1e-4, 3e-4, 1e-3)
    assert default_rates("prefix") == (3e-3, 1e-2, 3e-2)
    assert set(DEFAULT_LRS) == set(METHOD_CONFIGS)


@given(st.floats(1e-7, 1.0))
def test_rates_around_any_rate_hold_it_and_ascend(lr):
    rates = rates_around(lr)
    assert len(rates) == 3
    assert lr in rates
    assert list(rates) == sorted(rates)
    assert all(b / a < 15 for a, b in pairwise(rates))


def test_the_search_gives_every_method_the_same_budget_and_the_middle_rate_first():
    cells = search_cells(SPEC)
    assert [(c.method.method, c.train.lr) for c in cells] == [
        ("lora", 3e-3), ("full", 3e-4), ("lora", 1e-3), ("full", 1e-4), ("lora", 1e-2), ("full", 1e-3),
    ]  # fmt: skip
    # Same data, same batches, same steps: nothing but method and rate differs.
    assert {replace(c, method=LoraConfig(), train=replace(c.train, lr=1.0)) for c in cells} == {
        replace(BASE, method=LoraConfig(), train=replace(BASE.train, lr=1.0))
    }
    repeats = repeat_cells(SPEC, {"lora": 3e-3, "full": 3e-4})
    assert [(c.method.method, c.train.lr, c.train.seed) for c in repeats] == [
        ("lora", 3e-3, 1), ("full", 3e-4, 1), ("lora", 3e-3, 2), ("full", 3e-4, 2),
    ]  # fmt: skip
    assert count_runs(SPEC) == len(cells) + len(repeats) == 10


def test_rates_are_chosen_by_loss_and_what_diverged_is_no_choice():
    assert choose_rates(SPEC, searched(LOSSES)) == {"lora": 3e-3, "full": 3e-4}
    tie = searched(LOSSES | {("lora", 1e-3): 4.0})
    assert choose_rates(SPEC, tie)["lora"] == 1e-3
    nowhere = searched({key: float("nan") for key in LOSSES})
    assert choose_rates(SPEC, nowhere) == {}
    assert missing_cells(SPEC, nowhere) == []


def test_missing_cells_go_stage_by_stage_and_never_twice():
    assert missing_cells(SPEC, []) == search_cells(SPEC)
    runs = searched(LOSSES)
    assert missing_cells(SPEC, runs[1:]) == [make_cell(SPEC, LORA, 1e-3, 0)]
    assert missing_cells(SPEC, [*runs[1:], replace(runs[0], status="running")]) == []
    repeats = repeat_cells(SPEC, {"lora": 3e-3, "full": 3e-4})
    assert missing_cells(SPEC, runs) == repeats
    queued = [Cell(to_dict(c), status="queued") for c in repeats[:3]]
    assert missing_cells(SPEC, runs + queued) == repeats[3:]
    failed = replace(runs[0], status="failed")
    assert missing_cells(SPEC, [failed, *runs[1:]]) == repeats


def test_spec_round_trip_and_refusals():
    assert ComparisonSpec.from_dict(SPEC.to_dict()) == SPEC
    for more, words in [
        ({"entries": (LORA, LORA)}, "methods is 'lora,lora'; allowed: at least one of"),
        ({"entries": ()}, "methods"),
        ({"seeds": ()}, "seeds"),
        ({"match": "luck"}, "match is 'luck'; allowed: one of steps, parameters, memory, seconds"),
        ({"entries": (LORA, replace(FULL, lrs=(1e-4,)))}, "equally many learning rates"),
        ({"entries": (replace(LORA, lrs=(-1.0,)),)}, "lr is -1.0; allowed"),
        ({"seeds": tuple(range(600))}, "at most 500"),
    ]:
        with pytest.raises(ConfigError, match=words):
            replace(SPEC, **more)
    with pytest.raises(ConfigError, match="kind is None; allowed: comparison"):
        ComparisonSpec.from_dict({"base": {}})


METHODS = [LoraConfig(), FullConfig(), HeadConfig(), BottleneckConfig(), PrefixConfig()]


def test_matched_parameters_are_the_nearest_there_are():
    spec = plan_comparison(BASE, METHODS, SHAPE, match="parameters")

    def count(method):
        return count_parameters(SHAPE, method).trainable_parameters

    wanted = count(LoraConfig())
    bottleneck, prefix = spec.entry("bottleneck").method, spec.entry("prefix").method
    every = [count(BottleneckConfig(reduction_factor=f)) for f in range(1, SHAPE.hidden_size + 1)]
    assert abs(count(bottleneck) - wanted) == min(abs(n - wanted) for n in every)
    assert prefix.prefix_length == SHAPE.max_positions - BASE.train.max_length  # all the room there is
    assert spec.entry("lora").method == LoraConfig()
    assert spec.notes == ("full, head: no size to choose, so not matched.",)


@given(st.integers(1, 400_000))
def test_a_fitted_rank_is_the_nearest(wanted):
    def cost(method):
        return count_parameters(SHAPE, method).trainable_parameters

    fitted = fit_size(LoraConfig(), cost, wanted, SHAPE.hidden_size, 0)
    one = cost(LoraConfig(r=1))  # linear in the rank
    assert abs(fitted.r - min(max(1, wanted / one), SHAPE.hidden_size)) <= 0.5 + 1e-9
    assert fitted.scaling == LoraConfig().scaling


def test_matched_memory_and_seconds():
    spec = plan_comparison(BASE, METHODS, SHAPE, match="memory")
    options = {"precision": "fp32", "batch_size": 8, "seq_length": 128}

    def peak(method):
        return estimate_memory(SHAPE, method, **options).peak_bytes

    wanted = peak(LoraConfig())
    assert abs(peak(spec.entry("bottleneck").method) - wanted) <= abs(peak(BottleneckConfig()) - wanted)
    spec = plan_comparison(BASE, METHODS, SHAPE, match="seconds")
    work = {e.name: e.steps * estimate_step_flops(SHAPE, e.method, 8, 128) for e in spec.entries}
    assert all(value == pytest.approx(work["lora"], rel=0.03) for value in work.values())
    assert spec.entry("full").steps < 30 < spec.entry("head").steps


def test_a_prefix_that_leaves_no_room_is_refused_before_anything_starts():
    with pytest.raises(ConfigError, match="prefix_length is 200; allowed: at most 128 beside 128 tokens"):
        plan_comparison(BASE, [PrefixConfig(prefix_length=200)], SHAPE)


def test_rows_are_means_over_the_seeds_of_the_chosen_rate():
    repeats = [
        done(make_cell(SPEC, LORA, 3e-3, 1), 4.1, confusion_matrix=[[1, 2], [3, 4]], eval_accuracy=0.5),
        done(make_cell(SPEC, LORA, 3e-3, 2), 4.2, confusion_matrix=[[5, 0], [0, 5]], eval_accuracy=1.0),
        done(make_cell(SPEC, FULL, 3e-4, 1), float("nan")),
    ]
    lora, full = summarize_methods(SPEC, searched(LOSSES) + repeats)
    assert (lora["lr"], lora["num_seeds"], lora["lr_at_edge"]) == (3e-3, 3, False)
    assert lora["eval_loss_after"] == pytest.approx(4.1)
    assert lora["eval_loss_after_std"] == pytest.approx(0.1)
    assert (lora["eval_loss_after_min"], lora["eval_loss_after_max"]) == (4.0, 4.2)
    assert lora["eval_accuracy"] == 0.75
    assert lora["confusion_matrix"] == [[6, 2], [3, 9]]
    assert [row["eval_loss_after"] for row in lora["tried"]] == [4.2, 4.0, 4.1]
    assert (full["num_seeds"], full["num_diverged"], full["eval_loss_after_std"]) == (1, 1, None)
    assert full["mergeable"] is None
    nothing = summarize_methods(SPEC, [])
    assert [row["eval_loss_after"] for row in nothing] == [None, None]
    assert conclude(nothing) == "No run has finished with a loss that is a number."


def row(method, loss, std=0.02, **more):
    known = {
        "method": method, "eval_loss_after": loss, "eval_loss_after_std": std, "num_seeds": 3 if std else 1,
        "eval_accuracy": None, "trainable_parameters": 50, "lr_at_edge": False,
    }  # fmt: skip
    return known | more


def test_the_sentence_says_what_the_numbers_say():
    rows = [row("lora", 3.94), row("full", 3.93, trainable_parameters=1000), row("prefix", 4.24)]
    assert conclude(rows) == (
        "LoRA's loss (3.940) is within the seeds' spread of full fine-tuning's (3.930), with 5 % of the parameters "
        "trained. Against LoRA's loss: prefix tuning's (4.240) is 0.3 higher. Over 3 seeds a loss varies by 0.02 "
        "(standard deviation)."
    )
    apart = conclude([row("lora", 4.5, lr_at_edge=True), row("full", 3.93, trainable_parameters=1000)])
    assert "is 0.57 higher than full fine-tuning's" in apart
    assert "At the edge of the learning rates tried, so perhaps better beyond: LoRA." in apart
    single = conclude([row("lora", 4.5, None), row("full", 3.9, None, trainable_parameters=1000)])
    assert "how much of a difference is chance is not known" in single
    assert within_spread(row("lora", 4.0, None), row("full", 4.0, None)) is None
    assert noise_of([row("lora", 4.0, 0.3), row("full", 4.0, 0.4)]) == pytest.approx((0.125) ** 0.5)


class Notebook:
    """An executor that starts nothing and says that this process will come."""

    def __init__(self, ledger):
        self.ledger, self.submitted = ledger, []

    def submit(self, run_ids):
        self.submitted.append(list(run_ids))
        self.ledger.assign_worker(run_ids, *this_process())

    def cancel(self, run_id):
        self.ledger.request_cancel(run_id)


COUNTED = {"trainable_parameters": 10, "total_parameters": 100}


def finish(ledger, run_id, loss):
    assert ledger.claim_run(run_id, *this_process())
    ledger.finish_run(run_id, "done", result={"eval_loss_after": loss, "eval_loss_before": 5.0} | COUNTED)


def test_on_a_ledger_stage_by_stage(tmp_path):
    ledger = Ledger(tmp_path)
    executor = Notebook(ledger)
    comparison = comparisons.start_comparison(ledger, SPEC, executor, lambda c: {"peak_bytes": len(c.method.method)})
    sweep, runs = comparisons.read_cells(ledger, comparison)
    assert [run_config_from_dict(run.config) for run in runs] == search_cells(SPEC)
    assert executor.submitted == [[run.id for run in runs]]
    assert comparisons.read_comparison(ledger, comparison)["status"] == "running"
    # The same request again, while it is going on: the same comparison, nothing new.
    assert comparisons.start_comparison(ledger, SPEC, executor) == comparison
    assert len(executor.submitted) == len(ledger.list_sweeps()) == 1
    for i, run in enumerate(runs):
        finish(ledger, run.id, 4.0 + i)
    assert comparisons.read_comparison(ledger, comparison)["status"] == "interrupted"

    added = comparisons.add_missing(ledger, comparison)
    assert comparisons.add_missing(ledger, comparison) == []
    records = [ledger.get_run(run_id) for run_id in added]
    assert {r.config["train"]["lr"] for r in records} == {3e-3, 3e-4}
    assert {r.prediction["peak_bytes"] for r in records} == {4}
    assert not comparisons.needs_measuring(ledger, comparison)
    for run_id in added:
        finish(ledger, run_id, 4.0)
    assert comparisons.needs_measuring(ledger, comparison)
    assert set(comparisons.finished_runs(ledger, comparison)) == {"lora", "full"}

    assert comparisons.resume_comparison(ledger, comparison, executor)
    assert executor.submitted[-1] == [runs[0].id]
    assert comparisons.is_active(ledger, comparison)  # on its way
    assert not comparisons.resume_comparison(ledger, comparison, executor)
    comparisons.write_state(ledger, sweep, {"doing": "measuring latency"})
    assert comparisons.read_comparison(ledger, comparison)["doing"] == "measuring latency"
    measured = {"methods": {"lora": {"mergeable": True}, "full": {"mergeable": False}}, "unit": "generated token"}
    comparisons.write_state(ledger, sweep, {"doing": None, "inference": measured})
    found = comparisons.read_comparison(ledger, comparison)
    assert found["status"] == "done"
    assert [row["mergeable"] for row in found["methods"]] == [True, False]
    assert not comparisons.resume_comparison(ledger, comparison, executor)


def test_a_grid_is_no_comparison(tmp_path):
    ledger = Ledger(tmp_path)
    sweep_id, _ = ledger.create_sweep({"base": {}}, [(to_dict(BASE), None)])
    with pytest.raises(InputError, match="a sweep over ranks; allowed: the id of a comparison"):
        comparisons.read_comparison(ledger, sweep_id)


def test_an_encoder_without_a_head_is_compared_as_a_classifier():
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    encoder = shape_from_config(config.to_dict() | {"architectures": ["BertModel"]}, "tiny")
    spec = plan_comparison(BASE, METHODS, encoder, match="seconds")
    assert spec.entry("head").steps > spec.entry("full").steps
    with torch.device("meta"):
        real = BertForSequenceClassification(config)
    wanted = sum(p.numel() for p in real.classifier.parameters())
    assert count_parameters(shape_to_train(encoder), HeadConfig()).trainable_parameters == wanted
    assert shape_to_train(SHAPE) is SHAPE
