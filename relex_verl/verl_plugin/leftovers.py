"""What a validation that was given up leaves in verl's TransferQueue: prompts that are still being answered.

A key must not be cleared before its prompt has settled. TransferQueue gives the index of a cleared key to the next new
one, and a status is written in two parts, so the second half of a write that was under way would land on another key.
"""

import logging
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import transfer_queue as tq

__all__ = ["POLL_SECONDS", "being_answered", "clear_settled", "drain", "left_out", "settle"]

logger = logging.getLogger("relex_verl")

POLL_SECONDS = 0.2
UNSETTLED = (
    "pending",
    "running",
)  # verl writes "finished" or "failure" once no sample of the prompt is written any more


def being_answered(partition: str) -> set[str]:
    """The prompts of a partition ("train" or "val") that have not settled."""
    return _unsettled(_tags(partition))


def drain(check: Callable[[], None]) -> None:
    """Wait until no training prompt is being generated: none may be answered by other weights than the policy's.

    Args:
        check: called while waiting; it may raise.
    """
    while being_answered("train"):
        check()
        time.sleep(POLL_SECONDS)


def clear_settled() -> set[str]:
    """Clear what earlier validations have left and nobody writes to any more.

    Returns:
        The prompts that are still being answered; they and their samples stay.
    """
    tags = _tags("val")
    waiting = _unsettled(tags)
    settled = [key for key in tags if key.split("_")[0] not in waiting]  # a sample's is <prompt>_<session>_<turn>
    if settled:
        tq.kv_clear(keys=settled, partition_id="val")
    return waiting


def settle(seconds: float, lost: Collection[str] = ()) -> set[str]:
    """Clear the leftovers, waiting for those that are still being answered.

    Args:
        seconds: to wait, at most.
        lost: prompts that were waited for before, in vain.

    Returns:
        The prompts that have not settled.
    """
    until = time.monotonic() + seconds
    while not (waiting := clear_settled()) <= set(lost):
        if time.monotonic() > until:
            said = (
                "RELEX: %d prompts of a validation that was given up are not answered after %g s: no longer waited for"
            )
            logger.warning(said, len(waiting), seconds)
            break
        time.sleep(POLL_SECONDS)
    return waiting


@contextmanager
def left_out(buffer: Any, prompts: Collection[str]) -> Iterator[None]:
    """Have verl's replay buffer not see these prompts: one that settles now would count to a later validation.

    Args:
        buffer: verl's replay buffer, whose look at the queue is shadowed on this one object.
        prompts: of validations that were given up.
    """
    if not prompts or not hasattr(buffer, "_sync_metadata_from_transfer_queue"):  # a buffer of another make
        yield
        return
    look = buffer._sync_metadata_from_transfer_queue

    def look_past_them() -> None:
        look()
        for seen in (buffer.pending_keys, buffer.running_keys, buffer.finished_keys, buffer.failure_keys):
            seen["val"].difference_update(prompts)

    buffer._sync_metadata_from_transfer_queue = look_past_them
    try:
        yield
    finally:
        buffer._sync_metadata_from_transfer_queue = look


def _tags(partition: str) -> dict[str, dict[str, Any]]:
    return (tq.kv_list(partition) or {}).get(partition, {})


def _unsettled(tags: dict[str, dict[str, Any]]) -> set[str]:
    return {key for key, tag in tags.items() if tag.get("is_prompt") and tag.get("status") in UNSETTLED}
