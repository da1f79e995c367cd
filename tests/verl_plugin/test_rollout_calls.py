"""Calls that come back, that fail, and that never come back."""

import threading

import pytest

from relex_verl.run.validation import RolloutSilent
from relex_verl.verl_plugin.rollout_calls import RolloutCalls


def test_a_call_is_carried_out_and_its_error_is_the_callers() -> None:
    call, done = RolloutCalls(60.0), []
    call("waking", lambda: done.append(1))
    assert done == [1]
    with pytest.raises(KeyError, match="engine"):
        call("waking", lambda: {}["engine"])
    assert call.silent is None


def test_one_that_does_not_come_back_is_the_last() -> None:
    call, released = RolloutCalls(0.05), threading.Event()
    said = r"did not come back from taking weights within relex\.rollout_timeout_s=0\.05"
    with pytest.raises(RolloutSilent, match=said):
        call("taking weights", released.wait)
    with pytest.raises(RolloutSilent, match=said):
        call("falling asleep", lambda: pytest.fail("asked again"))
    assert call.silent is not None
    released.set()
