from pathlib import Path

import psutil
import pytest
from machines import GIB, limit, limit_container

from relex_verl.run.machine import available_memory, free_disk


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 10 * GIB),
        ({"memory.max": "max\n", "memory.current": f"{GIB}\n"}, 10 * GIB),
        ({"memory.max": f"{8 * GIB}\n", "memory.current": f"{3 * GIB}\n"}, 5 * GIB),
        ({"memory.max": f"{80 * GIB}\n", "memory.current": f"{3 * GIB}\n"}, 10 * GIB),
        ({"memory.max": f"{8 * GIB}\n"}, 10 * GIB),
        ({"memory.max": "nonsense\n", "memory.current": "0\n"}, 10 * GIB),
    ],
)
def test_available_memory_is_the_less_of_machine_and_container(
    monkeypatch: pytest.MonkeyPatch, files: dict[str, str], expected: int
) -> None:
    limit_container(monkeypatch, files)
    assert available_memory() == expected


def test_file_cache_does_not_count_as_used(monkeypatch: pytest.MonkeyPatch) -> None:
    stat = f"anon {2 * GIB}\nfile {6 * GIB}\ninactive_file {5 * GIB}\nactive_file {GIB}\n"
    files = {"memory.max": f"{8 * GIB}\n", "memory.current": f"{8 * GIB}\n", "memory.stat": stat}
    limit_container(monkeypatch, files)
    assert available_memory() == 6 * GIB


def test_available_memory_of_this_machine_is_plausible() -> None:
    assert 0 < available_memory() <= psutil.virtual_memory().total


def test_a_folder_that_is_not_there_yet_is_asked_for_where_it_would_be(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = limit(monkeypatch, disk=3 * GIB)
    folder = tmp_path / "not" / "there" / "yet"
    assert free_disk(folder) == 3 * GIB
    assert not (tmp_path / "not").exists()
    folder.mkdir(parents=True)  # it may be a disk of its own
    assert free_disk(folder) == 3 * GIB
    assert asked == [tmp_path, folder]
