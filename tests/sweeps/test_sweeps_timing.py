"""Time estimates on tables made by hand; a FLOP here is one per rank and token."""

from typing import Any

import pandas as pd
import pytest

from lora_engine.config import DataConfig, FullConfig, LoraConfig, RunConfig, TrainConfig
from lora_engine.errors import ModelConfigError
from lora_engine.sweeps import (
    SweepSpec,
    estimate_alone_seconds,
    estimate_packed_sweep_seconds,
    estimate_run_seconds,
    estimate_sweep_seconds,
    find_throughput,
    trained_share,
)
from lora_engine.sweeps.timing import DEFAULT_FLOPS_PER_SECOND, DEFAULT_OVERHEAD_SECONDS


def config(r: int = 4, steps: int = 10, model: str = "embedded", device: str = "auto", **train: Any) -> RunConfig:
    return RunConfig(
        model=model,
        data=DataConfig(path="/a.csv"),
        method=LoraConfig(r=r),
        train=TrainConfig(steps=steps, batch_size=2, max_length=50, device=device, **train),
    )


@pytest.fixture
def _simple_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_shape(model: str) -> str:
        if model == "unknown":
            raise ModelConfigError("model is 'unknown'; allowed: a known one.")
        return model

    def step_flops(_shape: str, method: Any, batch_size: int, seq_length: int) -> int:
        return getattr(method, "r", 1000) * batch_size * seq_length

    monkeypatch.setattr("lora_engine.sweeps.timing.load_shape", load_shape)
    monkeypatch.setattr("lora_engine.sweeps.timing.estimate_step_flops", step_flops)


def past(**changes: Any) -> dict[str, Any]:
    """A done run of `config()`: 10 steps of 400 FLOPs in 2 s, 2000 FLOP/s, and 5 s beside."""
    row = {
        "status": "done", "model": "embedded", "data_path": "/a.csv", "device": "cpu", "method": "lora", "r": 4.0,
        "targets": "all-linear", "steps": 10, "batch_size": 2, "max_length": 50, "seconds": 2.0, "wall_seconds": 7.0,
        "started_seconds": 100.0, "finished_seconds": 107.0,
    }  # fmt: skip
    return row | changes


def frame(*rows: dict[str, Any]) -> pd.DataFrame:
    return pd.DataFrame(list(rows))


@pytest.mark.usefixtures("_simple_flops")
def test_scaled_from_an_earlier_run() -> None:
    runs = frame(past())
    assert estimate_run_seconds(config(), runs) == pytest.approx(7.0)
    assert estimate_run_seconds(config(r=8, steps=30), runs) == pytest.approx(5 + 2 * 2 * 3)
    assert estimate_run_seconds(config(accumulation=3), runs) == pytest.approx(5 + 2 * 3)
    assert find_throughput(config(), runs).basis == "from 1 earlier run of this model on this data"


@pytest.mark.usefixtures("_simple_flops")
def test_the_nearest_runs_are_asked_first() -> None:
    other_model = past(model="other", seconds=1.0)
    other_data = past(data_path="/b.csv", seconds=4.0)
    failed = past(status="failed", seconds=100.0)
    card = past(device="NVIDIA Something", seconds=0.1)
    runs = frame(other_model, other_data, failed, past(), past(seconds=2.2), past(seconds=1.8), card)
    assert find_throughput(config(device="cpu"), runs).flops_per_second == pytest.approx(2000)
    assert find_throughput(config(device="cuda"), runs).flops_per_second == pytest.approx(40000)
    assert find_throughput(config(device="mps"), runs).num_runs == 0
    found = find_throughput(config(device="cpu"), runs[runs["data_path"] != "/a.csv"])
    assert (found.flops_per_second, found.basis) == (pytest.approx(1000), "from 1 earlier run of this model")
    found = find_throughput(config(device="cpu", model="third"), frame(other_model))
    assert (found.flops_per_second, found.basis) == (pytest.approx(4000), "from 1 earlier run of other models")


@pytest.mark.usefixtures("_simple_flops")
def test_full_fine_tuning_and_own_targets_count_too() -> None:
    runs = frame(past(method="full", r=float("nan"), targets=None), past(targets="q_proj,v_proj"))
    assert find_throughput(config(), runs).num_runs == 2
    assert estimate_run_seconds(RunConfig(data=DataConfig(path="/a.csv"), method=FullConfig()), runs) > 0


@pytest.mark.parametrize("runs", [None, pd.DataFrame(), frame(past(status="running", seconds=float("nan")))])
@pytest.mark.usefixtures("_simple_flops")
def test_without_history_the_default_is_stated(runs: pd.DataFrame | None) -> None:
    found = find_throughput(config(), runs)
    assert (found.num_runs, found.basis) == (0, "a guess at 50 GFLOP/s until a first run is done")
    expected = DEFAULT_OVERHEAD_SECONDS + 10 * 400 / DEFAULT_FLOPS_PER_SECOND["cpu"]
    assert estimate_run_seconds(config(), runs) == pytest.approx(expected)
    assert find_throughput(config(device="cuda"), runs).flops_per_second == DEFAULT_FLOPS_PER_SECOND["cuda"]


@pytest.mark.usefixtures("_simple_flops")
def test_a_model_of_unknown_shape_gets_a_figure_too() -> None:
    assert estimate_run_seconds(config(model="unknown")) > DEFAULT_OVERHEAD_SECONDS


def test_real_shapes_and_flops() -> None:
    def steps_alone(model: str, method: Any) -> float:
        run = RunConfig(model=model, data=DataConfig(path="/a.csv"), method=method)
        return estimate_run_seconds(run) - DEFAULT_OVERHEAD_SECONDS

    lora, full = steps_alone("gpt2", LoraConfig(r=8)), steps_alone("gpt2", FullConfig())
    assert 0 < lora < full
    assert steps_alone("meta-llama/Llama-3.1-8B", LoraConfig(r=8)) > 10 * lora


@pytest.mark.usefixtures("_simple_flops")
def test_a_sweep_is_the_sum_of_its_runs() -> None:
    runs = frame(past())
    spec = SweepSpec(base=config(), rs=(1, 4), lora_alphas=(8, 16), lrs=(1e-3,), seeds=(0, 1, 2))
    expected = 6 * (estimate_run_seconds(config(r=1), runs) + estimate_run_seconds(config(r=4), runs))
    assert estimate_sweep_seconds(spec, runs) == pytest.approx(expected)


def packed(size: float = 4, **changes: Any) -> dict[str, Any]:
    """A done run of `config()` in a pack: 10 steps of 400 FLOPs, its share 0.5 s, 2 s for the pack."""
    row = past(seconds=0.5, wall_seconds=6.0, sweep_id="s1", pack_size=size, pack_seconds=2.0, alone_step_seconds=0.2)
    row["finished_seconds"] = 106.0
    return row | changes


@pytest.mark.usefixtures("_simple_flops")
def test_a_packed_sweep_is_scaled_from_the_latest_packed_one() -> None:
    spec = SweepSpec(base=config(), rs=(4, 8), lora_alphas=(8,), lrs=(1e-3,), seeds=(0, 1))
    runs = frame(packed(sweep_id="s0", seconds=99.0), *[packed() for _ in range(4)])
    estimate = estimate_packed_sweep_seconds(spec, runs)
    assert estimate is not None
    # 4 s beside the steps of the four, one each; rank 8 has twice the FLOPs.
    assert estimate.seconds == pytest.approx(4 * 1 + 2 * (0.5 + 1.0))
    assert estimate.basis == "from 4 runs of this model on this data in the latest packed sweep"

    base = config(eval_every=1)
    halved = SweepSpec(base=base, rs=(4, 8), lora_alphas=(8,), lrs=(1e-3,), seeds=(0, 1), early_exit=True)
    shorter = estimate_packed_sweep_seconds(halved, runs)
    assert shorter is not None
    assert shorter.seconds == pytest.approx(4 * 1 + 3.0 * trained_share(base.train, 2))


@pytest.mark.usefixtures("_simple_flops")
def test_what_a_packed_sweep_takes_may_be_unknown() -> None:
    spec = SweepSpec(base=config(), rs=(4, 8))
    assert estimate_packed_sweep_seconds(spec) is None
    assert estimate_packed_sweep_seconds(spec, frame(past())) is None
    assert estimate_packed_sweep_seconds(spec, frame(packed(model="other"))) is None
    assert estimate_packed_sweep_seconds(SweepSpec(base=config(), packed="never"), frame(packed())) is None
    assert estimate_packed_sweep_seconds(SweepSpec(base=config(optimizer="sgd")), frame(packed())) is None


@pytest.mark.usefixtures("_simple_flops")
def test_a_share_of_a_pack_is_never_taken_for_a_run_alone() -> None:
    # Alone a step took 0.2 s as probed, so ten take 2 s: what `past()` says.
    assert find_throughput(config(), frame(packed())).flops_per_second == pytest.approx(2000)
    assert find_throughput(config(), frame(packed(alone_step_seconds=float("nan")))).num_runs == 0
    assert find_throughput(config(), frame(packed(), past(pack_size=1.0))).num_runs == 2


@pytest.mark.usefixtures("_simple_flops")
def test_one_after_another_is_what_the_sweeps_own_runs_would_take_alone() -> None:
    # Ten steps of 0.2 s and of 0.4 s; of the sweep's 6 s four are beside the steps, one a run.
    runs = frame(packed(), packed(), packed(alone_step_seconds=0.4), packed(alone_step_seconds=0.4))
    spec = SweepSpec(base=config(), rs=(4, 8), lora_alphas=(8,), lrs=(1e-3,), seeds=(0, 1))
    assert estimate_alone_seconds(spec, runs) == pytest.approx((2 + 1) * 2 + (4 + 1) * 2)
    assert estimate_alone_seconds(spec, frame(packed(alone_step_seconds=float("nan")))) is None
    # Two of them began when the others were done; a pause of an hour lay between.
    later = {"started_seconds": 3706.0, "finished_seconds": 3712.0}
    runs = frame(packed(), packed(), packed(**later), packed(**later))
    assert estimate_alone_seconds(spec, runs) == pytest.approx(4 * (2 + (12 - 2) / 4))
