import shutil
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from relex_verl.run.budget import (
    Budget,
    BudgetError,
    available_memory,
    budget,
    change_between_rows,
    check_disk,
    check_memory,
)
from relex_verl.trajectory.kinds import KINDS

GIB = 2**30
BILLION = 10**9


def test_the_estimate_is_state_and_rows_of_a_rank_and_two_bytes_a_predicted_weight():
    encoding = SimpleNamespace(state_bytes=8, fixed_bytes=0, row_bytes=lambda change_rate: 100 * change_rate)
    cost = budget(encoding, rank_elements=1000, all_elements=4000, rows=10, predictions=3, change_rate=0.5)
    assert cost == Budget(memory=1000 * (8 + 10 * 50), trajectory=4000 * 10 * 50, predictions=3 * 4000 * 2)
    with_gram = budget(encoding, 1000, 4000, 10, 3, 0.5, tensors=7)
    assert with_gram.memory - cost.memory == 2 * 7 * 10**2 * 8


def test_a_sketch_costs_the_same_however_many_rows():
    few, many = (budget(KINDS["sketch-4"], BILLION, 4 * BILLION, rows, 0) for rows in (16, 1000))
    assert few == many
    assert few.memory == 20 * BILLION
    assert few.trajectory == 3 * 16 * 4 * BILLION


def test_more_weights_change_between_rows_that_lie_apart():
    assert change_between_rows(0.01, 5) == pytest.approx(0.05)
    assert change_between_rows(0.3, 5) == 1.0


@pytest.mark.parametrize(
    ("name", "rows", "bytes_each"),
    # DESIGN's own figures, a parameter: bf16 at the published 0.9-3 % a step, fp32 with a byte a row.
    [("bf16", 75, (9, 12)), ("fp32-int8", 12, (16, 17)), ("fp32-int4", 12, (10, 11)), ("fp32-none", 12, (52, 52))],
)
def test_bytes_a_parameter(name, rows, bytes_each):
    memory = budget(KINDS[name], BILLION, 4 * BILLION, rows, 0).memory / BILLION
    assert bytes_each[0] <= memory <= bytes_each[1]


def limit_container(monkeypatch, files, available=10 * GIB):
    """Pretend that the machine has `available` and that the container's control files hold this text."""
    read_text = Path.read_text

    def fake(path, *args, **kwargs):
        if not str(path).startswith("/sys/fs/cgroup"):
            return read_text(path, *args, **kwargs)
        if path.name not in files:
            raise FileNotFoundError(path)
        return files[path.name]

    monkeypatch.setattr(Path, "read_text", fake)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=available))


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
def test_available_memory_is_the_less_of_machine_and_container(monkeypatch, files, expected):
    limit_container(monkeypatch, files)
    assert available_memory() == expected


def test_file_cache_does_not_count_as_used(monkeypatch):
    stat = f"anon {2 * GIB}\nfile {6 * GIB}\ninactive_file {5 * GIB}\nactive_file {GIB}\n"
    files = {"memory.max": f"{8 * GIB}\n", "memory.current": f"{8 * GIB}\n", "memory.stat": stat}
    limit_container(monkeypatch, files)
    assert available_memory() >= 5 * GIB


def test_available_memory_of_this_machine_is_plausible():
    assert 0 < available_memory() <= psutil.virtual_memory().total


def test_memory_that_does_not_fit_is_refused_with_both_figures():
    check_memory(GIB, GIB, ranks=2)
    with pytest.raises(BudgetError, match=r"about 3\.0 GiB .*\(2 ranks\), 1\.5 GiB are available: lower relex\.t_cut"):
        check_memory(3 * GIB, 3 * GIB // 2, ranks=2)


def test_memory_that_the_optimizer_will_take_is_not_there():
    check_memory(GIB, 3 * GIB, ranks=2, reserved=2 * GIB)
    with pytest.raises(BudgetError, match=r"3\.0 GiB are available, of which the optimizer will take 2\.5 GiB: lower"):
        check_memory(GIB, 3 * GIB, ranks=2, reserved=5 * GIB // 2)


def test_disk_that_does_not_fit_is_refused_with_the_figures(monkeypatch, tmp_path):
    asked = []

    def disk_usage(folder):
        asked.append(folder)
        return SimpleNamespace(free=3 * GIB)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    folder = tmp_path / "not" / "there" / "yet"
    check_disk(Budget(memory=100 * GIB, trajectory=GIB, predictions=2 * GIB), folder)
    with pytest.raises(
        BudgetError, match=r"3\.0 GiB free, about 3\.5 GiB .*1\.5 GiB for the trajectory, 2\.0 GiB for pr"
    ):
        check_disk(Budget(memory=0, trajectory=3 * GIB // 2, predictions=2 * GIB), folder)
    assert not (tmp_path / "not").exists()
    folder.mkdir(parents=True)  # it may be a disk of its own
    check_disk(Budget(memory=0, trajectory=0, predictions=0), folder)
    assert asked == [tmp_path, tmp_path, folder]
