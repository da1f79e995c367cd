import numpy as np
import pytest
import torch

from relex_verl.offline.baselines import rank_one as module
from relex_verl.offline.baselines.rank_one import RankOne, differences, rank_one, same_sign


def spiked(rows, columns, ratio, seed=0, dtype=torch.float32):
    """A matrix whose second singular value is `ratio` of the first, then falls off slowly."""
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.standard_normal((n, min(rows, columns))))[0] for n in (rows, columns))
    values = np.concatenate([[1.0], ratio * 0.99 ** np.arange(min(rows, columns) - 1)])
    return torch.from_numpy(left * values @ right.T).to(dtype)


@pytest.mark.parametrize(
    ("rows", "columns", "ratio"),
    [(1, 1, 0.0), (1, 9, 0.0), (7, 5, 0.5), (40, 300, 0.9), (400, 300, 0.5), (300, 500, 0.9), (500, 300, 0.999)],
)
def test_agrees_with_numpy(rows, columns, ratio):
    matrix = spiked(rows, columns, ratio)
    left, values, right = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    found = rank_one(matrix)
    assert found.value == pytest.approx(values[0], rel=1e-6)
    gap = 1.0 - ratio
    for vector, expected in ((found.left, left[:, 0]), (found.right, right[0])):
        assert torch.linalg.vector_norm(vector).item() == pytest.approx(1.0, abs=1e-5)
        assert abs(vector.numpy() @ expected) == pytest.approx(1.0, abs=1e-6 + 1e-9 / gap**2)
    assert found.left[found.left.abs().argmax()] > 0


def test_nearly_equal_singular_values_go_to_the_exact_way(monkeypatch):
    monkeypatch.setattr(module, "MAX_ITERATIONS", 2)
    for matrix in (spiked(300, 400, 0.9), spiked(400, 300, 0.9)):
        left, values, _ = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
        found = rank_one(matrix)
        assert found.value == pytest.approx(values[0], rel=1e-6)
        assert abs(found.left.numpy() @ left[:, 0]) == pytest.approx(1.0, abs=1e-5)


def test_the_scale_of_the_matrix_does_not_matter():
    tiny = rank_one(1e-12 * spiked(300, 400, 0.5))
    torch.testing.assert_close(tiny.left, rank_one(spiked(300, 400, 0.5)).left, rtol=1e-3, atol=1e-5)
    assert tiny.value == pytest.approx(1e-12, rel=1e-5)


@pytest.mark.parametrize("shape", [(3, 5), (300, 400)])
def test_a_zero_matrix_has_no_direction(shape):
    found = rank_one(torch.zeros(shape))
    assert found.value == 0
    assert not found.left.any()
    assert torch.equal(found.matrix(), torch.zeros(shape))


def test_is_the_same_every_time_and_leaves_the_random_state_alone():
    before = torch.random.get_rng_state()
    one, two = rank_one(spiked(300, 400, 0.9)), rank_one(spiked(300, 400, 0.9))
    assert torch.equal(one.left, two.left)
    assert torch.equal(before, torch.random.get_rng_state())


def test_bfloat16_input():
    matrix = spiked(30, 20, 0.3, dtype=torch.bfloat16)
    assert rank_one(matrix).value == pytest.approx(np.linalg.norm(matrix.double().numpy(), 2), rel=1e-6)


def test_refuses_what_is_no_finite_matrix():
    with pytest.raises(ValueError, match="need a matrix"):
        rank_one(torch.ones(3))
    with pytest.raises(ValueError, match="not finite"):
        rank_one(torch.tensor([[1.0, float("nan")]]))


def test_signs():
    one = rank_one(spiked(6, 4, 0.2))
    assert torch.equal(one.flipped().matrix(), one.matrix())
    assert torch.equal(same_sign(one.flipped(), one).left, one.left)
    assert same_sign(one, one) is one


def test_differences_are_those_of_the_pairs():
    states = [(step, spiked(6, 4, 0.3, seed=step)) for step in (0, 2, 5, 6, 9)]
    pairs = [(0, 2), (0, 9), (2, 6), (5, 6)]
    found = differences(iter(states), pairs)
    assert set(found) == set(pairs)
    for (a, b), one in found.items():
        expected = rank_one(dict(states)[b] - dict(states)[a])
        torch.testing.assert_close(one.matrix(), expected.matrix())


def test_differences_keep_no_more_states_than_they_need():
    alive = 0

    class Counted:
        def __init__(self, tensor):
            nonlocal alive
            alive += 1
            self.tensor = tensor

        def __del__(self):
            nonlocal alive
            alive -= 1

        def float(self):
            return self.tensor

    most = 0

    def states():
        nonlocal most
        for step in range(30):
            yield step, Counted(spiked(3, 3, 0.3, seed=step))
            most = max(most, alive)

    differences(states(), [(step, step + 2) for step in range(28)])
    assert most <= 4


@pytest.mark.parametrize("pair", [(0, 7), (7, 9), (2, 2)])
def test_a_pair_that_was_not_observed(pair):
    states = [(step, spiked(4, 3, 0.3)) for step in (0, 2, 9)]
    with pytest.raises(ValueError, match=f"steps .{pair[0]}, {pair[1]}"):
        differences(states, [(0, 9), pair])


def test_matrix_is_the_outer_product():
    one = RankOne(torch.tensor([1.0, 0.0]), 3.0, torch.tensor([0.0, 1.0, 0.0]))
    assert one.matrix().tolist() == [[0.0, 3.0, 0.0], [0.0, 0.0, 0.0]]
