"""`relex-verl plan` and the run: the same bytes, the same decision, the same words."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import DriftingModel, RankSource
from machines import GIB, limit
from pipeline import weights_of
from shell import call, json_of

from relex_verl.run.callback import RelexCallback
from relex_verl.run.config import RelexConfig
from relex_verl.run.protocol import Answer, RunFacts, Setup, answers
from relex_verl.run.rank import RelexRank
from relex_verl.trajectory.kinds import KINDS

TOTAL = 200
METHODS = ["relex", "raw-ols"]
EIGHT = ("plan", "--params", "8e9", "--t-cut", 75, "--no-overlap")
# Encoding -> options of `plan`, each the value of the key under `relex` with its name.
ENCODED: dict[str, dict[str, Any]] = {
    "bf16": {"trajectory": "bf16", "t_cut": 75},  # 75 rows
    "fp32-int8": {"trajectory": "fp32", "quantization": "int8", "t_cut": 80},  # auto: 16 rows
    "fp32-int4": {"trajectory": "fp32", "quantization": "int4", "t_cut": 80},
    "fp32-none": {"trajectory": "fp32", "quantization": "none", "t_cut": 30, "observe_every": 7},
    **{f"sketch-{size}": {"trajectory": "sketch", "sketch_size": size, "t_cut": 75} for size in range(3, 7)},
    "sketch-2": {"trajectory": "sketch", "sketch_size": 2, "t_cut": 20},
}


class Workers:
    """One rank, with an engine around the base model's own weights."""

    def __init__(self, base: Path, optimizer_on_host: bool) -> None:
        source = RankSource(DriftingModel(weights_of(base)).at(0))
        facts = {"no_master": None, "optimizer_on_host": optimizer_on_host, "aliases": {}, "adapters": None}
        self._engine = SimpleNamespace(**facts, shards=lambda master: source)
        self.cost = ""

    def relex_start(self, setup: Setup) -> list[Answer]:
        return [self._start(setup)]

    @answers
    def _start(self, setup: Setup) -> Any:
        started = RelexRank(setup, self._engine).start()
        self.cost = started.cost
        return started


def starts(base: Path, folder: Path, relex: dict[str, Any], optimizer_on_host: bool = False) -> str:
    """Start a run up to the point where it has taken theta_0: what it says of its cost."""
    targets = {} if relex.get("on_cut") == "jump" else {"targets": [100, 200]}
    node = {"output_dir": str(folder), **targets, "methods": METHODS, **relex}
    if node.get("t_cut", 1) is None:
        del node["targets"], node["methods"]
    callback = RelexCallback(RelexConfig.from_mapping(node), RunFacts(str(base), "p", "e"))
    workers = Workers(base, optimizer_on_host)
    callback.on_length_known(TOTAL)
    callback.on_model_ready(workers)
    return workers.cost


def options(base: Path, relex: dict[str, Any], **others: Any) -> list[Any]:
    """Of `plan`, for that run."""
    sizes = [tensor.numel() for tensor in weights_of(base).values()]
    given = {"params": sum(sizes), "tensors": len(sizes), "ranks": 1, "targets": 2 * len(METHODS), **relex, **others}
    given |= {"steps": TOTAL} if "record" in relex else {}
    return [part for key, value in given.items() for part in (f"--{key.replace('_', '-')}", value)]


JUMP = {"on_cut": "jump", "t_cut": 20}


RECORDED = {"trajectory": "bf16", "t_cut": 75, "record": "run"}


@pytest.mark.parametrize(("encoding", "relex"), [*ENCODED.items(), ("fp32-int8", JUMP), ("bf16", RECORDED)])
def test_the_run_takes_what_plan_says_to_the_byte(
    encoding: str, relex: dict[str, Any], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = json_of("plan", *options(base, relex))
    assert (planned["admitted"], planned["refusal"]) == (None, None)
    memory, disk = planned["memory_a_node"], planned["disk_trajectory"] + planned["disk_predictions"]
    for less_memory, less_disk in ((0, 0), (1, 0), (0, 1)):
        there = {"memory_gib": (memory - less_memory) / GIB, "disk_gib": (disk - less_disk) / GIB}
        answer = json_of("plan", *options(base, relex, **there))
        limit(monkeypatch, memory=memory - less_memory, disk=disk - less_disk)
        if not less_memory + less_disk:
            assert (answer["admitted"], answer["refusal"]) == (True, None)
            more = f" and {planned['steps_on_disk_alone']} more, on disk alone," if "record" in relex else ""
            assert f"{planned['observed_steps']} rows{more} of {encoding}" in starts(base, tmp_path, relex)
            continue
        assert answer["admitted"] is False
        with pytest.raises(RuntimeError) as caught:
            starts(base, tmp_path, relex)
        assert str(caught.value).replace(f"relex.output_dir={tmp_path}", "relex.output_dir") == answer["refusal"]


def test_what_is_only_recorded_is_planned(base: Path, tmp_path: Path) -> None:
    relex = {"trajectory": "bf16", "record": "run"}
    planned = json_of("plan", *options(base, relex))
    assert (planned["observed_steps"], planned["steps_on_disk_alone"], planned["disk_predictions"]) == (0, TOTAL, 0)
    assert "0 rows and 200 more, on disk alone, of bf16" in starts(base, tmp_path, {**relex, "t_cut": None})
    assert "--record run: give --steps" in call("plan", "--params", "8e9", "--record", "run").stderr
    assert "relex.t_cut=None: without a cut" in call("plan", "--params", "8e9").stderr


def test_every_encoding_is_planned() -> None:
    assert set(ENCODED) == set(KINDS)


def test_an_offloaded_optimizer_is_reckoned_with(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    relex = ENCODED["fp32-int8"]
    parameters = sum(tensor.numel() for tensor in weights_of(base).values())
    memory = json_of("plan", *options(base, relex))["memory_a_node"] + 8 * parameters
    for short, admitted in ((0, True), (1, False)):
        there = options(base, relex, memory_gib=(memory - short) / GIB)
        assert json_of("plan", *there, "--optimizer-offload")["admitted"] is admitted
        assert json_of("plan", *there)["admitted"]
        limit(monkeypatch, memory=memory - short)
        if admitted:
            starts(base, tmp_path, relex, optimizer_on_host=True)
        else:
            with pytest.raises(RuntimeError, match="the optimizer will take"):
                starts(base, tmp_path, relex, optimizer_on_host=True)


@pytest.mark.parametrize(
    ("arguments", "bytes_a_parameter"),
    [
        (("--trajectory", "bf16"), 2 + 75 * 0.12),
        (("--trajectory", "bf16", "--change-rate", "0.01"), 2 + 75 * 0.04),
        (("--trajectory", "fp32", "--quantization", "none", "--observe-every", "25"), 4 + 3 * 4),
        (("--trajectory", "sketch", "--sketch-size", "6"), 4 + 6 * 4),
    ],
)
def test_bytes_a_parameter(arguments: tuple[str, ...], bytes_a_parameter: float) -> None:
    found = json_of(*EIGHT, "--tensors", 0, *arguments)
    assert found["bytes_a_parameter"] == pytest.approx(bytes_a_parameter)
    assert found["memory_a_node"] == pytest.approx(8e9 * bytes_a_parameter, rel=1e-6)
    with_gram = json_of(*EIGHT, "--tensors", 300, *arguments)["memory_a_rank"]
    assert with_gram - found["memory_a_rank"] == 2 * 300 * found["observed_steps"] ** 2 * 8
    copied = json_of(*EIGHT, "--overlap", "--tensors", 0, *arguments)
    assert copied["memory_a_rank"] - found["memory_a_rank"] == copied["memory_for_overlap_a_rank"]
    assert copied["memory_for_overlap_a_rank"] == (2 if "bf16" in arguments else 4) * 1e9


def test_nodes_may_be_unevenly_full() -> None:
    found = json_of(*EIGHT, "--ranks", 12, "--memory-gib", 100, "--disk-gib", 200)
    assert found["memory_a_node"] == pytest.approx(8 * found["memory_a_rank"], abs=100)
    assert found["admitted"] is True
    assert json_of(*EIGHT, "--ranks", 12, "--memory-gib", 99)["admitted"] is False


def test_a_typical_figure_stands_beside_the_careful_one_and_decides_nothing() -> None:
    found = json_of(*EIGHT, "--trajectory", "bf16", "--tensors", 0, "--memory-gib", 80)
    assert found["bytes_a_parameter_typical"] == pytest.approx([2 + 75 * 0.02, 2 + 75 * 0.04])
    assert (found["change_rate"], found["change_rate_typical"]) == (0.03, [0.005, 0.01])
    assert found["memory_a_node_typical"][1] < 80 * GIB < found["memory_a_node"]
    assert found["admitted"] is False
    # The run will not know of an option of `plan`.
    hopeful = json_of(*EIGHT, "--trajectory", "bf16", "--memory-gib", 80, "--change-rate", 0.01)
    assert hopeful["memory_a_node"] < 80 * GIB
    assert hopeful["admitted"] is False
    assert not [key for key in json_of(*EIGHT) if "change_rate" in key or "typical" in key]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "admitted: not checked, give --memory-gib and --disk-gib\n"),
        (("--memory-gib", 83), "admitted: yes, as far as is known without --disk-gib\n"),
        (("--memory-gib", 83, "--disk-gib", 100), "admitted: yes\n"),
        (("--memory-gib", 80), "admitted: no, following this run takes about 82.2 GiB of host memory on a node (8 ranks, 3"),
        ((), "memory a node: 82.2 GiB\n"),
        ((), "memory a node, typical: 26.3 GiB to 37.5 GiB\n"),
    ],
)  # fmt: skip
def test_figures_are_told_in_one_unit_and_the_decision_in_words(arguments: tuple[Any, ...], says: str) -> None:
    said = call(*EIGHT, "--trajectory", "bf16", *arguments).stdout
    assert says in said
    assert " GB" not in said


def test_what_the_scores_of_a_cut_take() -> None:
    known = ("--on-cut", "jump", "--max-candidates", 5, "--validation-samples", 256)
    planned = json_of(*EIGHT, *known, "--samples-a-step", 128)
    assert planned["samples_scored_a_cut"] == 6 * 256
    assert planned["samples_scored_a_cut_in_steps"] == 12
    assert planned["disk_predictions"] == 0
    assert "samples_scored_a_cut_in_steps" not in json_of(*EIGHT, *known)
    assert call(*EIGHT, "--on-cut", "leap").exit_code != 0
