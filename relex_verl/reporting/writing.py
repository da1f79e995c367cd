"""Files that are whole or not there: written to a temporary name, then renamed."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["temporary_for"]


@contextmanager
def temporary_for(path: Path) -> Iterator[Path]:
    """A name to write to, which becomes `path` when the block ends; an error, such as a full disk, keeps no half of it.

    Raises:
        OSError: with the file, which the system does not name where it is a write that fails.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None and error.strerror:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    temporary.replace(path)
