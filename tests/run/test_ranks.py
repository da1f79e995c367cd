"""One error of many, and what a rank's error means before the first step."""

import logging
from types import SimpleNamespace

import pytest

from relex_verl.run.protocol import Answer
from relex_verl.run.ranks import Ranks, RelexError
from relex_verl.trajectory.index import TrajectoryError


def ranks(*answers: Answer) -> Ranks:
    return Ranks(SimpleNamespace(relex_open=lambda step: list(answers)))


def failed(kind: str) -> Answer:
    return Answer(error=f"relex.rank=9: too many\nTraceback (most recent call last): {kind}", kind=kind)


def test_rank_0_answers() -> None:
    assert ranks(Answer([1, 2]), Answer([])).ask("relex_open", 3) == [1, 2]


def test_the_rank_that_failed_first_hand_is_named() -> None:
    peer = Answer(error="1 of 3 ranks failed", kind="PeerError", peer=True)
    with pytest.raises(RelexError, match=r"rank 2, relex_open: relex\.rank=9: too many\nTraceback") as error:
        ranks(peer, peer, failed("KeyError")).ask("relex_open", 0)
    assert error.value.kind == "KeyError"
    with pytest.raises(RelexError, match="rank 0, relex_open: 1 of 3"):
        ranks(peer, Answer()).ask("relex_open", 0)


@pytest.mark.parametrize(
    ("kind", "raised"),
    [
        ("BudgetError", RuntimeError),
        ("ConfigError", ValueError),
        ("TrajectoryError", TrajectoryError),
        ("ValueError", ValueError),
    ],
)
def test_a_request_that_cannot_be_met_is_refused_with_its_cure_alone(kind: str, raised: type[Exception]) -> None:
    with pytest.raises(raised) as refusal:
        ranks(failed(kind)).ask_or_refuse("relex_open", 0)
    assert str(refusal.value) == "relex.rank=9: too many"
    assert not isinstance(refusal.value, RelexError)


@pytest.mark.parametrize(
    "kind", ["NotImplementedError", "AssertionError", "FileNotFoundError", "PermissionError", "OSError", "KeyError"]
)
def test_anything_else_is_refused_as_well_with_the_traceback_in_the_log(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(RelexError) as refusal:
        ranks(failed(kind)).ask_or_refuse("relex_open", 0)
    said = str(refusal.value)
    assert said.startswith(f"RELEX cannot follow this run: {kind}: relex.rank=9: too many. Nothing has been trained")
    assert "Traceback" not in said
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert f"Traceback (most recent call last): {kind}" in caplog.text


def test_release_never_fails() -> None:
    Ranks(None).release()
    Ranks(SimpleNamespace(relex_stop=lambda: [failed("OSError")])).release()
