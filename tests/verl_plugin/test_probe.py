"""What is kept of a validation, sample by sample, and how one that hangs is given up."""

import contextlib
import random
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchdata.stateful_dataloader import StatefulDataLoader

from relex_verl.run.validation import Validation, ValidationTimeout
from relex_verl.verl_plugin.probe import Probe, core_metric, deadline, same_random_state


def probe_of(samples: list[tuple[str, str, str, dict[str, float | None]]], first: str = "sums", n: int = 1) -> Probe:
    """From (text, uid, source, values) of each sample; n of each prompt were asked for, and each text is one row."""
    names = {name: None for *_, values in samples for name in values}
    expected = {(source, uid): n for _, uid, source, _ in samples}
    return Probe(
        first,
        inputs=[text for text, *_ in samples],
        uids=[uid for _, uid, *_ in samples],
        sources=[source for _, _, source, _ in samples],
        values={name: [values.get(name) for *_, values in samples] for name in names},
        expected=expected,
        marks=[""] * len(expected),
    )


def test_samples_are_kept_by_prompt() -> None:
    probe = probe_of(
        [
            ("a", "1", "sums", {"reward": 0.0, "acc": 1.0}),
            ("a", "1", "sums", {"reward": 1.0, "acc": 1.0}),
            ("b", "2", "sums", {"reward": 1.0, "acc": 0.0}),
            ("b", "2", "sums", {"reward": 1.0, "acc": 1.0}),
        ],
        n=2,
    )
    validation = probe.validation({"val-core/sums/acc/mean@2": 0.75, "val-aux/sums/reward/mean@2": 0.75}, None, 2.0)
    assert validation.samples == {"a": [1.0, 1.0], "b": [0.0, 1.0]}
    assert validation.prompts == {"a": 1.0, "b": 0.5}
    assert validation.score == validation.mean(["a", "b", "never came back"]) == 0.75
    chosen = probe.validation({"val-aux/sums/reward/mean@2": 0.75}, "val-aux/sums/reward/mean@2", 2.0)
    assert chosen.prompts == {"a": 0.5, "b": 1.0}


def test_refused_validations() -> None:
    probe = probe_of([("a", "1", "sums", {"acc": 1.0})])
    with pytest.raises(ValueError, match="no validation sample"):
        Probe("sums").validation({}, None, 0.0)
    with pytest.raises(ValueError, match="not among"):
        probe.validation({}, "val-core/x/acc/mean@1", 0.0)
    metric = "val-aux/sums/acc_success_only/mean@1"
    with pytest.raises(ValueError, match="no sample carries acc_success_only"):
        probe.validation({metric: 1.0}, metric, 0.0)


def test_the_first_source_of_the_data_set_decides_by_its_own_variable() -> None:
    """Another source finished first, and is the only one with `acc`."""
    probe = probe_of(
        [
            ("c", "3", "proofs", {"reward": 0.2, "acc": 1.0}),
            ("a", "1", "sums", {"reward": 0.5}),
            ("b", "2", "sums", {"reward": 0.7}),
        ]
    )
    metrics = {
        "val-core/proofs/acc/mean@1": 1.0,
        "val-aux/proofs/reward/mean@1": 0.2,
        "val-core/sums/reward/mean@1": 0.6,
    }
    validation = probe.validation(metrics, None, 1.0)
    assert validation.metric == "val-core/sums/reward/mean@1"
    assert validation.samples == {"a": [0.5], "b": [0.7]}


def test_sources_with_slashes_are_told_apart() -> None:
    metrics = {
        "val-core/openai/gsm8k/acc/mean@4": 0.1,
        "val-core/openai/acc/mean@4": 0.2,
        "val-core/openai/acc/best@4": 0.3,
    }
    assert core_metric(metrics, "openai/gsm8k") == "val-core/openai/gsm8k/acc/mean@4"
    assert core_metric(metrics, "openai") == "val-core/openai/acc/mean@4"
    assert core_metric(metrics, "gsm8k") is None
    with pytest.raises(ValueError, match="no core metric of data source 'gsm8k'"):
        probe_of([("a", "1", "gsm8k", {"acc": 1.0})], first="gsm8k").validation(metrics, None, 1.0)
    probe = probe_of([("a", "1", "openai/gsm8k", {"acc": 1.0})], first="openai/gsm8k")
    assert probe.validation(metrics, None, 1.0).samples == {"a": [1.0]}


@given(st.integers(1, 200), st.integers(0, 200), st.integers(1, 3))
def test_survivors_of_a_failed_rollout_are_not_compared(asked: int, came: int, n: int) -> None:
    """Nothing is decided on 6 of 100; a few that are missing are left out, whole."""
    came = min(came, asked)
    samples = [(f"p{i}", str(i), "sums", {"acc": 1.0}) for i in range(asked) for _ in range(n if i < came else n - 1)]
    probe = probe_of(samples, n=n)
    probe.expected, probe.marks = {("sums", str(i)): n for i in range(asked)}, [""] * asked
    metrics = {"val-core/sums/acc/mean@1": 0.5}
    if came < 0.95 * asked or not samples:
        with pytest.raises(ValueError, match="came back"):
            probe.validation(metrics, None, 1.0)
    else:
        assert probe.validation(metrics, None, 1.0).samples == {f"p{i}": [1.0] * n for i in range(came)}


def test_a_sample_without_a_value_counts_as_missing() -> None:
    probe = probe_of([(f"p{i}", str(i), "sums", {"acc": None if i == 7 else 1.0}) for i in range(50)])
    assert "p7" not in probe.validation({"val-core/sums/acc/mean@1": 0.5}, None, 1.0).prompts


def test_standard_error_comes_from_the_spread_whatever_the_scale() -> None:
    scores = [-3.0, 1.0, 5.0, 9.0]
    validation = Validation({}, "", {str(i): [one, one] for i, one in enumerate(scores)}, 0.0)
    assert validation.standard_error() == pytest.approx(np.std(scores, ddof=1) / 2)
    assert validation.standard_error(["0", "1", "gone"]) == pytest.approx(2.0)
    assert validation.standard_error(["0"]) == 0.0


class Buffer:
    """Looks for samples that never come."""

    looks = 0

    def _wait_for_next_poll(self, partition_id: str, last: float) -> float:
        self.looks += 1
        time.sleep(0.01)
        return last

    def sample(self) -> None:
        while True:
            self._wait_for_next_poll("val", 0.0)


def test_a_deadline_ends_the_wait_and_leaves_nothing_behind() -> None:
    buffer = Buffer()
    with pytest.raises(ValidationTimeout, match=r"relex\.validation_timeout_s=0\.05"), deadline(buffer, 0.05):
        buffer.sample()
    assert buffer.looks >= 2
    assert buffer._wait_for_next_poll == Buffer._wait_for_next_poll.__get__(buffer)
    with deadline(buffer, -1.0) as check, pytest.raises(ValidationTimeout):
        check()
    with deadline(buffer, 60.0) as check:
        check()
        assert buffer._wait_for_next_poll("val", 3.0) == 3.0


def test_a_replay_buffer_of_another_make_has_no_deadline(caplog: pytest.LogCaptureFixture) -> None:
    with deadline(SimpleNamespace(), 1.0):
        pass
    assert "has no effect" in caplog.text


def test_random_state_is_left_alone() -> None:
    def draw() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(1))]

    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    expected = draw()
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    with contextlib.suppress(KeyError), same_random_state(SimpleNamespace()):
        draw()
        raise KeyError
    assert draw() == expected


def test_the_validation_set_is_shuffled_as_if_nothing_had_been_scored() -> None:
    """verl's loader draws on from one validation to the next, from a generator of its own."""
    loader = StatefulDataLoader(range(20), batch_size=20, shuffle=True)
    with same_random_state(loader):
        scored = next(iter(loader)).tolist()
    assert next(iter(loader)).tolist() == scored
    assert next(iter(loader)).tolist() != scored


def test_rows_that_read_alike_are_told_apart_by_their_marks() -> None:
    probe = probe_of([("What is it?", uid, "sums", {"acc": float(uid == "1")}) for uid in "123"])
    probe.marks = [" [row a]", " [row b]", " [row a]"]
    validation = probe.validation({"val-core/sums/acc/mean@1": 1 / 3}, None, 1.0)
    assert validation.samples == {"What is it? [row a]": [1.0, 0.0], "What is it? [row b]": [0.0]}
    probe.marks = []
    with pytest.raises(ValueError, match="0 rows left the dataloader, verl asked for 3 prompts"):
        probe.validation({"val-core/sums/acc/mean@1": 1 / 3}, None, 1.0)
