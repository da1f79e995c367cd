"""What this machine has left: host memory and disk."""

import shutil
from pathlib import Path

import psutil

__all__ = ["available_memory", "free_disk"]


def available_memory() -> int:
    """Bytes of host memory that can still be used: what the machine has, or less if this container is limited."""
    available = psutil.virtual_memory().available
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit == "max":
            return available
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        return min(available, int(limit) - used + _file_cache())
    except (OSError, ValueError):  # not a cgroup-v2 host
        return available


def _file_cache() -> int:
    """Bytes of cached files: they count as used until somebody wants the memory."""
    try:
        lines = Path("/sys/fs/cgroup/memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(("inactive_file ", "active_file ")))


def free_disk(folder: Path) -> int:
    """Free bytes where a folder is, or where it would be made."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return shutil.disk_usage(existing).free
