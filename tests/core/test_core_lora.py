"""The numpy core against its own definition and finite properties; torch and PEFT hold it in tests/methods."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_engine import core
from lora_engine.errors import ConfigError

SCALINGS = [3 / 2, 12 / 8]


def factors(r=3, n_in=7, n_out=5, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((r, n_in)), rng.standard_normal((n_out, r)), rng.standard_normal((n_out, n_in))


def test_init_starts_from_the_base_model():
    A, B = core.init_A(4, 64, seed=1, name="q"), core.init_B(32, 4)
    assert A.shape == (4, 64)
    assert B.shape == (32, 4)
    assert not core.delta_W(A, B, 2.0).any()


def test_init_A_has_the_stated_width_and_its_own_stream_per_module():
    A = core.init_A(64, 4096, seed=0, name="q")
    assert np.std(A) == pytest.approx(1 / 64, rel=0.01)
    assert np.array_equal(A, core.init_A(64, 4096, seed=0, name="q"))
    assert not np.array_equal(A, core.init_A(64, 4096, seed=0, name="k"))
    assert not np.array_equal(A, core.init_A(64, 4096, seed=1, name="q"))


@pytest.mark.parametrize(
    ("r", "alpha", "rslora", "expected"), [(2, 3, False, 1.5), (8, 12, False, 1.5), (9, 6, True, 2.0)]
)
def test_scaling(r, alpha, rslora, expected):
    assert core.scaling_factor(r, alpha, use_rslora=rslora) == expected


def test_scaling_refuses_rank_zero():
    with pytest.raises(ConfigError, match="r is 0; allowed: a whole number of at least 1"):
        core.scaling_factor(0, 1)


def test_forward_equals_the_merged_weight():
    A, B, W0 = factors()
    x = np.random.default_rng(1).standard_normal((2, 6, 7))
    np.testing.assert_allclose(core.forward(x, W0, A, B, 1.5), x @ core.merge(W0, A, B, 1.5).T, atol=1e-12)


def test_backward_equals_finite_differences():
    A, B, W0 = factors()
    rng = np.random.default_rng(2)
    x, grad_h = rng.standard_normal((4, 7)), rng.standard_normal((4, 5))
    grads = core.backward(grad_h, x, W0, A, B, 1.5)
    for i, value in enumerate((x, A, B)):
        numeric = np.zeros_like(value)
        for index in np.ndindex(value.shape):
            for sign in (1, -1):
                moved = value.copy()
                moved[index] += sign * 1e-6
                args = [x, A, B]
                args[i] = moved
                numeric[index] += sign * np.sum(grad_h * core.forward(args[0], W0, args[1], args[2], 1.5)) / 2e-6
        np.testing.assert_allclose(grads[i], numeric, atol=1e-7)


def test_unmerge_undoes_merge_to_rounding():
    A, B, W0 = factors()
    np.testing.assert_allclose(core.unmerge(core.merge(W0, A, B, 1.5), A, B, 1.5), W0, atol=1e-14)


@given(r=st.integers(1, 6), n_in=st.integers(1, 12), n_out=st.integers(1, 12), seed=st.integers(0, 1000))
def test_singular_values_equal_those_of_the_product(r, n_in, n_out, seed):
    A, B, _ = factors(r, n_in, n_out, seed)
    values = core.singular_values(A, B, 1.5)
    expected = np.linalg.svd(1.5 * B @ A, compute_uv=False)[: len(values)]
    assert len(values) == min(r, n_in, n_out)
    np.testing.assert_allclose(values, expected, atol=1e-10)


def test_effective_rank_counts_equal_directions():
    assert core.effective_rank(np.ones(5)) == pytest.approx(5)
    assert core.effective_rank(np.array([1.0, 0, 0])) == pytest.approx(1)
    assert core.effective_rank(np.zeros(3)) == 0.0


def test_energy_rank():
    assert core.energy_rank(np.array([3.0, 1.0, 0.1]), 0.9) == 2
    assert core.energy_rank(np.array([3.0, 0.1]), 0.9) == 1
    assert core.energy_rank(np.zeros(3)) == 0


def test_best_rank_r_is_the_truncated_svd():
    A, B, _ = factors(r=5, n_in=9, n_out=8)
    A2, B2 = core.best_rank_r(A, B, 2)
    U, values, Vt = np.linalg.svd(B @ A)
    np.testing.assert_allclose(B2 @ A2, (U[:, :2] * values[:2]) @ Vt[:2], atol=1e-12)


def test_subspace_similarity_is_one_with_itself_and_zero_across():
    A = np.eye(6)[:3]
    assert core.subspace_similarity(A, A, 3, 3) == pytest.approx(1)
    assert core.subspace_similarity(A, np.eye(6)[3:], 3, 3) == pytest.approx(0)
