"""One writer at a time: what a process holds for as long as it lives. What a killed one leaves is held by nobody."""

import fcntl
import os
import shutil
import weakref
from pathlib import Path

__all__ = ["hold", "is_held", "remove_left_behind"]


def hold(place: Path, holder: object) -> bool:
    """Hold a folder or file until `holder` is let go of, or this process ends; False where another process does.

    Where the file system has no locks, nobody is kept out.
    """
    descriptor = os.open(place, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return False
    except OSError:
        pass
    weakref.finalize(holder, os.close, descriptor)
    return True


def is_held(place: Path) -> bool:
    """Whether a process holds it."""
    descriptor = os.open(place, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held, or no locks here: it may be
        return True
    finally:
        os.close(descriptor)
    return False


def remove_left_behind(folder: Path) -> None:
    """Delete the unfinished checkpoints in a folder that nobody is writing any more."""
    for left in [*folder.glob(".*.partial"), *folder.glob(".*.replaced")]:
        ours = left.is_dir() and (any(left.glob("*.safetensors")) or not any(left.iterdir()))
        if ours and not is_held(left):
            shutil.rmtree(left, ignore_errors=True)
