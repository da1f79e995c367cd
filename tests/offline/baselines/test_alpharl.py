import builtins
import itertools

import numpy as np
import pytest
import torch
from recorded import MATRICES, by_name, moved, random_weights, rank_one_directions, record, record_cut_up

from relex_verl.offline.baselines.alpharl import aligned_backwards, alpharl, invert_pls
from relex_verl.offline.baselines.rank_one import rank_one

BASE = random_weights(scale=0.1)
STEPS = (10, 20, 30, 40)


def noisy_states(noise=0.3):
    directions = rank_one_directions()
    return {
        step: {
            name: one + 1e-3 * noise * random_weights(seed=step)[name]
            for name, one in moved(BASE, directions, 1e-3 * step).items()
        }
        for step in STEPS
    }


def pls_by_hand(vectors, scores, wanted):
    """NIPALS with one component from its definition, in NumPy."""
    centre, spread = vectors.mean(0), vectors.std(0, ddof=1)
    scaled = (vectors - centre) / np.where(spread > 0, spread, 1.0)
    weight = scaled.T @ (scores - scores.mean())
    weight /= np.linalg.norm(weight)
    latent = scaled @ weight
    loading = scaled.T @ latent / (latent @ latent)
    slope = latent @ (scores - scores.mean()) / (latent @ latent)
    return centre + np.where(spread > 0, spread, 1.0) * loading * (wanted - scores.mean()) / slope


def alpharl_by_hand(states, steps, scores, wanted, name):
    """x* v_T^T, with NumPy's SVD."""
    triples = [np.linalg.svd((states[t][name] - BASE[name]).double().numpy()) for t in steps]
    left = [one[0][:, 0] for one in triples]
    for t in range(len(steps) - 2, -1, -1):
        left[t] = left[t] * np.sign(left[t] @ left[t + 1])
    vectors = np.stack([one[1][0] * vector for one, vector in zip(triples, left, strict=True)])
    return np.outer(pls_by_hand(vectors, np.array([scores[t] for t in steps]), wanted), triples[-1][2][0])


@pytest.mark.parametrize("recorder", [record, record_cut_up])
def test_against_a_dense_computation(tmp_path, recorder):
    states, scores = noisy_states(), {10: 0.31, 20: 0.36, 40: 0.47}
    found = by_name(alpharl(recorder(tmp_path, BASE, states), 40, scores, wanted=0.7))
    assert set(found) == set(BASE)
    for name in BASE:
        update = (found[name] - BASE[name]).double().numpy()
        if name in MATRICES:
            expected = alpharl_by_hand(states, [10, 20, 40], scores, 0.7, name)
            assert np.abs(update - expected).max() < 1e-4 * np.abs(expected).max()
        else:
            assert not update.any()


def test_scores_on_a_line_give_back_the_target_of_a_straight_rank_one_trajectory(tmp_path):
    directions = rank_one_directions()
    states = {step: moved(BASE, directions, 1e-2 * step) for step in STEPS}
    scores = {step: 0.3 + 0.002 * step for step in STEPS}
    found = by_name(alpharl(record(tmp_path, BASE, states), 40, scores, wanted=0.3 + 0.002 * 300))
    for name in MATRICES:
        expected = 1e-2 * 300 * directions[name]
        assert torch.linalg.norm(found[name] - BASE[name] - expected) < 1e-3 * torch.linalg.norm(expected)


def test_adding_to_the_last_checkpoint_as_the_authors_code_does(tmp_path):
    states, scores = noisy_states(), {10: 0.31, 20: 0.36, 30: 0.47}
    trajectory = record(tmp_path, BASE, states)
    to_base, to_last = (by_name(alpharl(trajectory, 40, scores, 0.7, add_to)) for add_to in ("base", "last"))
    for name in BASE:
        torch.testing.assert_close(to_last[name] - states[30][name], to_base[name] - BASE[name], rtol=1e-3, atol=1e-6)


def test_tensors_that_never_moved_stay_at_the_base(tmp_path):
    states = noisy_states()
    for weights in states.values():
        weights[MATRICES[0]] = BASE[MATRICES[0]]
    found = by_name(alpharl(record(tmp_path, BASE, states), 40, {10: 0.1, 20: 0.2, 30: 0.4}, 0.9))
    assert torch.equal(found[MATRICES[0]], BASE[MATRICES[0]])


def test_no_step_after_the_cut_is_seen(tmp_path):
    states, scores = noisy_states(), {10: 0.31, 20: 0.36, 30: 0.47, 40: 0.1}
    trajectory = record(tmp_path, BASE, states)
    with_later, without = (by_name(alpharl(trajectory, 30, dict(list(scores.items())[:n]), 0.7)) for n in (4, 3))
    assert all(torch.equal(with_later[name], without[name]) for name in BASE)


def test_signs_are_aligned_backwards():
    one = [rank_one(torch.randn(5, 4, generator=torch.Generator().manual_seed(0)) + t) for t in range(3)]
    mixed = [one[0].flipped(), one[1], one[2].flipped()]
    aligned = aligned_backwards(mixed)
    assert torch.equal(aligned[-1].left, mixed[-1].left)
    assert all(a.left @ b.left >= 0 for a, b in itertools.pairwise(aligned))
    assert all(torch.equal(a.matrix(), b.matrix()) for a, b in zip(aligned, mixed, strict=True))


def test_pls_is_inverted_exactly_at_a_score_of_the_line():
    vectors, scores = np.outer([1.0, 2.0, 3.0], [1.0, -2.0]), np.array([10.0, 20.0, 30.0])
    np.testing.assert_allclose(invert_pls(vectors, scores, 50.0), [5.0, -10.0], rtol=1e-9)
    np.testing.assert_allclose(invert_pls(np.ones((3, 2)), scores, 50.0), [1.0, 1.0])


@pytest.mark.parametrize(
    ("scores", "says"),
    [
        ({10: 0.1, 20: 0.2}, "scores of 3 observed steps"),
        ({10: 0.1, 20: 0.2, 40: 0.3}, "scores of 3 observed steps"),
        ({10: 0.1, 20: 0.1, 30: 0.1}, "to differ"),
        ({10: 0.1, 20: float("nan"), 30: 0.1}, "finite"),
        ({10: 0.1, 15: 0.2, 30: 0.3}, "step 15, which was not observed"),
    ],
)
def test_scores_that_do_not_do(tmp_path, scores, says):
    with pytest.raises(ValueError, match=says):
        alpharl(record(tmp_path, BASE, noisy_states()), 30, scores, 0.7)


def test_a_model_without_such_matrices(tmp_path):
    base = {"weight": torch.ones(3, 3)}
    states = {t: {"weight": torch.ones(3, 3) + t} for t in (1, 2, 3)}
    with pytest.raises(ValueError, match="no tensor's name"):
        alpharl(record(tmp_path, base, states), 3, {1: 0.1, 2: 0.2, 3: 0.3}, 0.7)


def test_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **more):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"relex-verl\[baselines\]"):
        invert_pls(np.eye(3), np.arange(3.0), 4.0)
