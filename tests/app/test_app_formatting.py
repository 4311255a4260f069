"""Numbers to text."""

import formatting
import pytest


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"), (1023, "0.999 KiB"), (512, "512 B"), (1024, "1.00 KiB"), (61.2 * 2**20, "61.2 MiB"),
        (12 * 2**30, "12.0 GiB"), (999.4 * 2**20, "999 MiB"), (999.6 * 2**20, "0.976 GiB"), (None, "unknown"),
    ],
)  # fmt: skip
def test_bytes(value, text):
    assert formatting.format_bytes(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(162_816, "162,816"), (3_148_224, "3.15 M"), (8_030_261_248, "8.03 B"), (999_999, "1.00 M"), (None, "unknown")],
)
def test_counts(value, text):
    assert formatting.format_count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.31, "0.3 s"), (41.4, "41 s"), (59.7, "1 min"), (125, "2 min 5 s"), (3600, "1 h"), (3790, "1 h 3 min")],
)
def test_durations(seconds, text):
    assert formatting.format_duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(2, "2.0"), (0.125, "0.125"), (2**0.5, "1.41"), (512, "512"), (1.5, "1.5")]
)
def test_ratios(value, text):
    assert formatting.format_ratio(value) == text


def test_small_numbers_keep_three_digits():
    assert formatting.format_percent(0.08488) == "0.0849 %"
    assert formatting.format_loss(0.012345) == "0.0123"
    assert formatting.format_loss(float("nan")) == "unknown"
    assert formatting.format_number(0.003) == "0.003"
    assert formatting.plural(1, "row") == "1 row"
    assert formatting.plural(1204, "row") == "1,204 rows"


def test_operations_energy_and_short_times():
    from formatting import format_duration, format_flops, format_watt_hours

    assert [format_flops(v) for v in (12, 15.6e9, 4.86e15, 999.9e9)] == [
        "12.0 FLOP", "15.6 GFLOP", "4.86 PFLOP", "1.00 TFLOP",
    ]  # fmt: skip
    assert [format_watt_hours(v) for v in (0.145, 12, 4320)] == ["145 mWh", "12.0 Wh", "4.32 kWh"]
    assert [format_duration(v) for v in (0.00306, 0.0995, 3.06)] == ["3.06 ms", "0.1 s", "3.1 s"]
