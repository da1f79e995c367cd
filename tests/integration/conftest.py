"""Runs of verl's real trainer that several files look at, and how many such runs there may be."""

from collections.abc import Iterator
from pathlib import Path

import harness
import pytest
from harness import CUT, RELEX, SHARDS, STEPS, Run, run

# Each start costs about a minute on two cores, whatever it trains: look at a run that is there before you add one.
MOST_STARTS = 19
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all tests of this folder, for `-m "not trainer"`, and give them the time that their fixtures take."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.trainer)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(1200), append=False)


@pytest.fixture(scope="session", autouse=True)
def few_starts() -> Iterator[None]:
    """Fail the session that starts the trainer more often than agreed."""
    yield
    assert len(harness.starts) <= MOST_STARTS, f"{len(harness.starts)} starts of verl's trainer: {harness.starts}"


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Without RELEX, FSDP1 on one rank, validated at the cut and at the last step."""
    return run(tmp_path_factory.mktemp("plain"), STEPS, relex=None, extra=[f"trainer.test_freq={CUT}"])


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Float32 master weights, the default, FSDP1 on two ranks, up to the cut."""
    # With FSDP1 on two gloo ranks verl 0.9.1 cannot save `hf_model`, with or without RELEX: torch's full state dict fails
    # on CPU storage. Its sharded checkpoint is merged by verl's own merger instead.
    relex = [*RELEX, "relex.observe_every=1", "relex.validate_targets=false"]
    extra = [SHARDS, f"trainer.save_freq={CUT}"]
    return run(tmp_path_factory.mktemp("two-ranks"), CUT, ranks=2, relex=relex, extra=extra)
