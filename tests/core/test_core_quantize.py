"""The reference quantisers: against bitsandbytes' own bytes and values, and their definitions."""

import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from lora_engine.core import quantize

sys.path.insert(0, str(Path(__file__).parent / "data"))
import bitsandbytes_oracle

SMALL = arrays.arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.integers(1, 70)),
    elements=st.floats(-4, 4, width=32, allow_subnormal=False),
)


@pytest.fixture(scope="module")
def oracle():
    with np.load(bitsandbytes_oracle.FILE) as stored:
        return dict(stored)


def check(weights, scales, found):
    """Bit for bit; the mean of the scales is bitsandbytes' own, whose order of summation is the machine's."""
    packed, absmax = quantize.quantize_nf4(weights)
    for name in ("nf4", "nf4_dq"):
        assert np.array_equal(packed, found[f"{name}_codes"])
    assert np.array_equal(absmax, found["nf4_absmax"])
    assert np.array_equal(quantize.dequantize_nf4(packed, absmax, weights.shape), found["nf4_values"])
    for name, values, expected in (
        ("nf4_dq", absmax, found["nf4_dq_absmax"]),
        ("scales", scales, found["scales_codes"]),
    ):
        assert quantize.quantize_absmax(values)[2] == pytest.approx(found[f"{name}_offset"], rel=1e-6)
        codes, nested, offset = quantize.quantize_absmax(values, np.float32(found[f"{name}_offset"]))
        assert np.array_equal(codes, expected)
        assert np.array_equal(nested, found[f"{name}_nested"])
        restored = quantize.dequantize_absmax(codes, nested, offset)
        if name == "scales":
            assert np.array_equal(restored, found["scales_values"])
        else:
            assert np.array_equal(quantize.dequantize_nf4(packed, restored, weights.shape), found["nf4_dq_values"])
    codes, absmax = quantize.quantize_int8(weights)
    assert np.array_equal(codes, found["int8_codes"])
    assert np.array_equal(absmax, found["int8_absmax"])
    assert np.array_equal(quantize.dequantize_int8(codes, absmax), found["int8_values"])
    assert np.array_equal(quantize.dynamic_code(), found["dynamic_code"])


def test_bytes_and_values_are_those_of_bitsandbytes(oracle):
    weights, scales = oracle.pop("weights"), oracle.pop("scales")
    assert all(np.array_equal(a, b) for a, b in zip((weights, scales), bitsandbytes_oracle.inputs(), strict=True))
    check(weights, scales, oracle)


@pytest.mark.parametrize("shape", [(64, 64), (7, 9), (33, 130), (256, 384)])
@pytest.mark.filterwarnings("default")
def test_against_bitsandbytes_itself(shape):
    pytest.importorskip("bitsandbytes")
    rng = np.random.default_rng(shape[0])
    weights = rng.standard_normal(shape).astype(np.float32)
    scales = np.abs(rng.standard_normal(5000)).astype(np.float32)
    check(weights, scales, bitsandbytes_oracle.expected(weights, scales))


def test_nf4_values_are_quantiles_of_the_normal_distribution():
    normal, last = statistics.NormalDist(), 0.9677083
    above = [normal.inv_cdf(p) for p in np.linspace(last, 0.5, 9)[:-1]]
    below = [-normal.inv_cdf(p) for p in np.linspace(last, 0.5, 8)[:-1]]
    values = np.sort([*above, 0.0, *below]) / max(above)
    np.testing.assert_allclose(quantize.NF4_CODE, values, atol=2e-7)


def test_the_dynamic_code_is_sorted_and_without_doubles():
    code = quantize.dynamic_code()
    assert code.dtype == np.float32
    assert len(code) == 256
    assert (np.diff(code) > 0).all()
    assert {0.0, 1.0} <= set(code.tolist())


@given(W=SMALL)
def test_nf4_takes_the_nearest_of_its_values(W):
    packed, absmax = quantize.quantize_nf4(W)
    assert packed.nbytes == -(-W.size // 2)
    assert len(absmax) == -(-W.size // 64)
    values = quantize.dequantize_nf4(packed, absmax, W.shape)
    scales = np.repeat(absmax, 64)[: W.size].reshape(W.shape)
    best = np.abs(W[..., None] - quantize.NF4_CODE * scales[..., None]).min(axis=-1)
    np.testing.assert_allclose(np.abs(W - values), best, atol=1e-6)


@given(W=SMALL)
def test_int8_is_within_half_a_step_of_each_row(W):
    codes, absmax = quantize.quantize_int8(W)
    error = np.abs(quantize.dequantize_int8(codes, absmax) - W)
    assert (error <= absmax[:, None] * (0.5 / 127 + 1e-6)).all()
    assert np.abs(codes.astype(int)).max() <= 127


@given(absmax=arrays.arrays(np.float32, st.integers(1, 700), elements=st.floats(0.125, 4, width=32)))
def test_double_quantisation_keeps_scales_to_eight_bits(absmax):
    codes, nested, offset = quantize.quantize_absmax(absmax)
    assert codes.dtype == np.uint8
    assert len(nested) == -(-absmax.size // 256)
    error = np.abs(quantize.dequantize_absmax(codes, nested, offset) - absmax)
    assert (error <= np.repeat(nested, 256)[: absmax.size] * 0.01 + 1e-5).all()


def test_zeros_stay_zeros():
    for shape in ((2, 64), (1, 3)):
        W = np.zeros(shape, np.float32)
        packed, absmax = quantize.quantize_nf4(W)
        assert not quantize.dequantize_nf4(packed, absmax, shape).any()
        assert not quantize.dequantize_absmax(*quantize.quantize_absmax(absmax)).any()
        assert not quantize.dequantize_int8(*quantize.quantize_int8(W)).any()
