"""Makes the tests' own helpers importable from every folder of tests, and in spawned processes."""

import os
import sys
from pathlib import Path

import pytest

HERE = str(Path(__file__).parent)
sys.path.insert(0, HERE)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [HERE, os.environ.get("PYTHONPATH")]))


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in several files."""
    from fakes import tiny_base

    return tiny_base(tmp_path_factory.mktemp("base"), shard_size="200KB")


@pytest.fixture(scope="session")
def two_ranks(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of a run on two ranks for each kind of trajectory."""
    from pipeline import on_two_ranks, train_rank

    folders = {name: tmp_path_factory.mktemp(name) for name in ("bf16", "fp32-int8", "sketch-4")}
    for name, folder in folders.items():
        on_two_ranks(train_rank, folder, base, name)
    return folders
