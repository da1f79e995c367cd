"""The ranks as the driver asks them: one question to all, one answer or one error back."""

import logging
from typing import Any

from relex_verl.run.protocol import Answer
from relex_verl.trajectory.index import TrajectoryError

__all__ = ["Ranks", "RelexError"]

logger = logging.getLogger("relex_verl")

# What a rank finds wrong with the request itself; the message says what to change.
REFUSALS: dict[str, type[Exception]] = {
    "BudgetError": RuntimeError,
    "ConfigError": ValueError,
    "TrajectoryError": TrajectoryError,
    "ValueError": ValueError,
}


class RelexError(RuntimeError):
    """A rank failed inside RELEX; the message holds its traceback.

    Attributes:
        kind: name of the exception's type on the rank.
    """

    def __init__(self, message: str, kind: str = "") -> None:
        super().__init__(message)
        self.kind = kind


class Ranks:
    """The host's group of ranks."""

    def __init__(self, workers: Any) -> None:
        """Keep the group, whose remote methods are named after those of `rank.RelexRank`, `relex_start` and so on."""
        self._workers = workers

    def ask(self, method: str, *args: Any) -> Any:
        """Call all ranks.

        Returns:
            Rank 0's value.

        Raises:
            RelexError: the error of the rank that failed first-hand.
        """
        answers: list[Answer] = getattr(self._workers, method)(*args)
        failed = [(answer.peer, rank, answer) for rank, answer in enumerate(answers) if answer.error is not None]
        if failed:
            _, rank, answer = min(failed, key=lambda failure: failure[:2])
            raise RelexError(f"rank {rank}, {method}: {answer.error}", answer.kind)
        return answers[0].value

    def ask_or_refuse(self, method: str, *args: Any) -> Any:
        """Call all ranks before the first step: nothing is trained yet, so that any error is better raised.

        A run that silently goes on without what was asked for is the worse loss, whatever `relex.on_error` says.

        Raises:
            RuntimeError, TrajectoryError, ValueError: the request cannot be met; the message says what to change.
            RelexError: anything else; the traceback is in the log.
        """
        try:
            return self.ask(method, *args)
        except RelexError as error:
            first_line = str(error).split(f"{method}: ", 1)[1].splitlines()[0]
            if error.kind in REFUSALS:
                raise REFUSALS[error.kind](first_line) from None
            logger.error("RELEX cannot follow this run", exc_info=True)
            cure = "Nothing has been trained. See the log for the traceback, or start without +relex"
            raise RelexError(f"RELEX cannot follow this run: {error.kind}: {first_line}. {cure}", error.kind) from None

    def release(self) -> None:
        """Let go of all that RELEX holds in memory; there is nothing to be done where that fails."""
        try:
            self.ask("relex_stop")
        except Exception:
            logger.debug("RELEX could not release its memory", exc_info=True)
