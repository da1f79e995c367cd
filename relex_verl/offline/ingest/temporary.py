"""What lies beside a trajectory while it is written, and which a killed command cannot leave there for ever."""

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from relex_verl.offline.ingest.errors import IngestError
from relex_verl.trajectory.alone import hold

__all__ = ["alone_in", "temporary_folder"]

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


@contextmanager
def alone_in(workspace: Path, out: Path) -> Iterator[None]:
    """Keep other commands from recording into the same folder until the block ends.

    Raises:
        IngestError: another one is at it.
    """
    lock, holder = workspace / f".{out.name}.relex-lock", _Holder()
    lock.touch()
    if not hold(lock, holder):
        raise IngestError(f"--out {out} is being written by another command: wait for it, or give another folder")
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)


class _Holder:
    """What a lock is held for."""


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True
