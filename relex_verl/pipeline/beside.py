"""Work beside the training: one piece at a time, in a thread, whose outcome waits until somebody asks for it."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

__all__ = ["Beside"]

Result = TypeVar("Result")


class Beside(Generic[Result]):
    """At most one piece of work is under way: who begins another has taken the outcome of the one before."""

    def __init__(self) -> None:
        self._under_way: Future[Result] | None = None

    def begin(self, work: Callable[[], Result]) -> None:
        """Start it. The thread does not keep a process alive that is about to end: what it has written by then is whole."""
        assert self._under_way is None
        outcome: Future[Result] = Future()
        self._under_way = outcome

        def run() -> None:
            try:
                outcome.set_result(work())
            except BaseException as error:
                outcome.set_exception(error)

        threading.Thread(target=run, name="relex", daemon=True).start()

    @property
    def has_outcome(self) -> bool:
        """Whether work was begun whose outcome nobody has taken."""
        return self._under_way is not None

    def outcome(self) -> Result:
        """Wait for the work that was begun last; what came of it is handed out once.

        Raises:
            BaseException: the work's error.
        """
        assert self._under_way is not None
        under_way, self._under_way = self._under_way, None
        return under_way.result()
