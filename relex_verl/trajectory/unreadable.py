"""Why a file cannot be read, in words: what a library says of it is rarely the cause."""

import os
from pathlib import Path

__all__ = ["why_unreadable"]

LFS = b"version https://git-lfs"


def why_unreadable(path: Path) -> str | None:
    """The cause and its cure in a sentence; None where nothing is wrong that can be told from outside."""
    if path.is_symlink() and not path.exists():
        return f"{path.name} is a link to {os.readlink(path)}, which is not there: copy what it stands for (cp -L)"
    try:
        with open(path, "rb") as stream:
            beginning = stream.read(len(LFS))
    except FileNotFoundError:
        return f"{path.name} is missing: copy it there"
    except PermissionError:
        return f"{path.name} may not be read by this user: chmod it, or ask its owner ({_owner(path)})"
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror or error}"
    if beginning == LFS:
        return f"{path.name} is a Git LFS pointer, not the file itself: run `git lfs pull` in that folder"
    return f"{path.name} is empty: copy it again" if not beginning else None


def _owner(path: Path) -> str:
    try:
        return path.owner()
    except (KeyError, OSError):
        return "unknown"
