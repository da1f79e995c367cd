"""What cannot be used, in words."""

import errno

__all__ = ["IngestError", "first_line", "is_full"]


class IngestError(RuntimeError):
    """A checkpoint that cannot be used, in one line: which, why, and what to do."""


def is_full(error: BaseException) -> bool:
    """Whether an error says that a disk is full; libraries and subprocesses wrap the system's error in their own."""
    return (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)) or (
        "No space left on device" in str(error)
    )


def first_line(error: BaseException) -> str:
    """The first line of what an error says; its name where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
