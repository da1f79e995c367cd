"""Where RELEX's lines go: to the root logger's handlers, and to standard error where these would keep them back.

vLLM's server module sets the handler that verl made for the root logger to ERROR, and with it would go every line of
RELEX, "scoring failed" too. verl gives its own logger a handler and cuts it off from the root logger; ours stays
attached, for the files and services that a user's own handlers write to.
"""

import logging
import os
import sys
from typing import TextIO

__all__ = ["configure"]

FORMAT = "%(levelname)s:%(asctime)s:%(message)s"  # as verl's own lines


class _LastConsole(logging.StreamHandler):
    """Standard error, whichever it is by then, for records that no handler of the root logger shows on a console."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)  # StreamHandler's own would keep the stream of now
        self.setFormatter(logging.Formatter(FORMAT))

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    def filter(self, record: logging.LogRecord) -> bool:
        """Pass what would not be seen otherwise."""
        consoles = {sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__}
        return not any(
            isinstance(handler, logging.StreamHandler)
            and handler.stream in consoles
            and record.levelno >= handler.level
            for handler in logging.getLogger().handlers
        )


def configure() -> None:
    """Set the level that RELEX_LOGGING_LEVEL names (INFO), and add the handler; a second call changes nothing."""
    logger = logging.getLogger("relex_verl")
    logger.setLevel(os.environ.get("RELEX_LOGGING_LEVEL", "INFO").upper())
    if not any(isinstance(handler, _LastConsole) for handler in logger.handlers):
        logger.addHandler(_LastConsole())
