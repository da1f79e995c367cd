"""Calls to the rollout with an end: an engine that has died may not say so, and Ray and verl wait for ever."""

import threading
from collections.abc import Callable

from relex_verl.run.validation import RolloutSilent

__all__ = ["RolloutCalls"]


class RolloutCalls:
    """Carries out what RELEX asks of the rollout, and gives up on it for good when it does not come back.

    A call runs in a thread of its own: a signal does not interrupt `ray.get`. The thread of one that was given up stays
    behind as a daemon; in the middle of a weight update so do the actor's ranks, which answer nobody from then on.

    Attributes:
        silent: why nothing more can be asked, of the rollout or of the ranks; None as long as all came back.
    """

    def __init__(self, seconds: float) -> None:
        """Args: seconds: that each call may take."""
        self.seconds = seconds
        self.silent: str | None = None

    def __call__(self, what: str, call: Callable[[], object]) -> None:
        """Wait until a call has come back.

        Args:
            what: it does, for the message.
            call: without a result.

        Raises:
            RolloutSilent: it did not come back, now or earlier.
            BaseException: whatever the call raised.
        """
        if self.silent is not None:
            raise RolloutSilent(self.silent)
        failed: list[BaseException] = []

        def carry_out() -> None:
            try:
                call()
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=carry_out, name=f"relex: {what}", daemon=True)
        thread.start()
        thread.join(self.seconds)
        if thread.is_alive():
            self.silent = f"the rollout did not come back from {what} within relex.rollout_timeout_s={self.seconds:g}"
            raise RolloutSilent(self.silent)
        if failed:
            raise failed[0]
