"""SIGTERM, which a scheduler sends before it takes the machine away, ends a command like Ctrl-C."""

import signal
from typing import NoReturn

__all__ = ["TERMINATED", "end_cleanly_when_terminated"]

TERMINATED = "SIGTERM"


def end_cleanly_when_terminated() -> None:
    """From here on SIGTERM is an interrupt that says so; a second one does not disturb the cleaning up."""

    def interrupt(number: int, frame: object) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt(TERMINATED)

    signal.signal(signal.SIGTERM, interrupt)
