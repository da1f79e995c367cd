"""A machine with so much left, for tests of what depends on it."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

GIB = 2**30


def limit_container(monkeypatch: pytest.MonkeyPatch, files: dict[str, str], available: int = 10 * GIB) -> None:
    """Pretend that the machine has `available` and that the container's control files hold this text."""
    read_text = Path.read_text

    def fake(path: Path, *args: object, **kwargs: object) -> str:
        if not str(path).startswith("/sys/fs/cgroup"):
            return read_text(path, *args, **kwargs)
        if path.name not in files:
            raise FileNotFoundError(path)
        return files[path.name]

    monkeypatch.setattr(Path, "read_text", fake)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=available))


def limit(monkeypatch: pytest.MonkeyPatch, memory: int = 2**50, disk: int = 2**50) -> list[Path]:
    """Pretend that so many bytes are left; returns the folders whose disk will be asked for."""
    asked = []

    def disk_usage(folder: Path) -> SimpleNamespace:
        asked.append(folder)
        return SimpleNamespace(free=disk)

    limit_container(monkeypatch, {}, memory)
    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    return asked
