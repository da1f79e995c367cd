"""Temporary folders beside a trajectory, which a killed command cannot leave there for ever."""

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["temporary_folder"]

PREFIX = ".relex-ingest-"


@contextmanager
def temporary_folder(workspace: Path | None) -> Iterator[Path]:
    """A folder that is there until the block ends; what killed commands of this machine left beside it is deleted.

    Args:
        workspace: where; the system's temporary folder for None.
    """
    place = workspace or Path(tempfile.gettempdir())
    mine = f"{PREFIX}{socket.gethostname()}-"
    for left in place.glob(f"{mine}*"):
        process = left.name.removeprefix(mine).split("-")[0]
        if process.isdigit() and not _runs(int(process)):
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{mine}{os.getpid()}-", dir=place) as temporary:
        yield Path(temporary)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True
