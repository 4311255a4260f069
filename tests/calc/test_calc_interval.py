"""The interval of predictions: it covers what it promises, by counting."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_engine.calc import Interval, calibrate, estimate_memory, load_shape, with_interval
from lora_engine.calc.interval import LEVEL_PERCENT, MIN_RUNS
from lora_engine.config import LoraConfig


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-(10**6), 10**6), min_size=MIN_RUNS + 1, max_size=80))
def test_each_of_the_runs_left_out_is_covered_as_often_as_promised(numbers):
    """The claim itself: of n + 1 exchangeable errors, each is equally likely to be the one to come."""
    errors = [number / 997 for number in numbers]
    covered, promised = 0, 0
    for i, error in enumerate(errors):
        interval = calibrate(errors[:i] + errors[i + 1 :])
        covered += interval.low_percent <= error <= interval.high_percent
        promised = interval.level_percent
    assert covered >= promised * len(errors) / 100
    assert promised == min(LEVEL_PERCENT, 100 * (len(errors) - 1) // len(errors))


def test_few_runs_promise_nothing():
    assert calibrate([]) is None
    assert calibrate([1.0] * (MIN_RUNS - 1)) is None
    assert calibrate([1.0] * (MIN_RUNS - 1) + [math.nan, math.inf]) is None
    assert calibrate([1.0] * MIN_RUNS).count == MIN_RUNS


def test_nineteen_runs_reach_the_full_level_and_a_hundred_leave_outliers_out():
    assert calibrate([float(i) for i in range(18)]).level_percent == 94
    assert calibrate([float(i) for i in range(19)]) == Interval(95, -18.0, 18.0, 19)
    many = calibrate([0.1] * 99 + [-50.0])
    assert (many.level_percent, many.high_percent) == (95, 0.1)


def test_an_estimate_gets_the_bounds_and_keeps_the_rest():
    estimate = estimate_memory(load_shape("gpt2"), LoraConfig())
    assert with_interval(estimate, None) is estimate
    bounded = with_interval(estimate, Interval(95, -3.0, 3.0, 24))
    assert bounded.low_bytes == math.floor(estimate.peak_bytes * 0.97)
    assert bounded.high_bytes == math.ceil(estimate.peak_bytes * 1.03)
    assert (bounded.terms, bounded.peak_bytes, bounded.moment) == (estimate.terms, estimate.peak_bytes, estimate.moment)
    assert Interval(88, -150.0, 150.0, 8).bounds(1000) == (0, 2500)


@pytest.mark.parametrize("peak", [1, 999, 10**12])
def test_bounds_hold_the_prediction(peak):
    low, high = Interval(95, -0.01, 0.01, 20).bounds(peak)
    assert low <= peak <= high
