"""What cannot be used, in words."""

__all__ = ["IngestError", "first_line"]


class IngestError(RuntimeError):
    """A checkpoint that cannot be used, in one line: which, why, and what to do."""


def first_line(error: BaseException) -> str:
    """The first line of what an error says; its name where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
