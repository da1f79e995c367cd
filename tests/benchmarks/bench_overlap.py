"""How long training waits for an observed step that is made beside it, against one plain copy of the shard.

    .venv/bin/python tests/benchmarks/bench_overlap.py [--params 60e6] [--tries 7]

Runs the product's own `RelexRank` on weights in memory. For each kind of trajectory: medians over successive rows of the
time for which `observe` keeps the caller, of its ratio to a plain copy of the same float32 weights measured right before it,
and of the time that the row then takes beside it. Exits with 1 where the ratio is above 1.5.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench_observe import Weights, timed, workplace
from safetensors.torch import save_file

from relex_verl.run.config import RelexConfig
from relex_verl.run.protocol import RunFacts, Setup
from relex_verl.run.rank import RelexRank
from relex_verl.run.schedule import Schedule
from relex_verl.trajectory.shards import TensorShard

MOST = 1.5
KINDS: dict[str, dict[str, Any]] = {
    "fp32-int8": {"trajectory": "fp32"},
    "bf16": {"trajectory": "bf16"},
    "sketch-4": {"trajectory": "sketch"},
}


class Engine:
    """A rank's weights, as `protocol.Engine`."""

    no_master = None
    adapters = None
    optimizer_on_host = False

    def __init__(self, weights: Weights) -> None:
        self.aliases: dict[str, str] = {}
        self._weights = weights

    def shards(self, master: bool) -> "Engine":
        return self

    def __iter__(self) -> Iterator[TensorShard]:
        return iter(self._weights)


def rank_of(weights: Weights, folder: Path, options: dict[str, Any], rows: int) -> RelexRank:
    """Ready for the first step."""
    save_file({k: v.to(torch.bfloat16) for k, v in weights.tensors.items()}, folder / "model.safetensors")
    config = RelexConfig.from_mapping({"t_cut": rows, "targets": [2 * rows], "observe_every": 1, **options})
    setup = Setup(config, Schedule(config, 2 * rows).plans, 0, folder / "relex", RunFacts(str(folder), "p", "e"))
    rank = RelexRank(setup, Engine(weights))  # type: ignore[arg-type]
    rank.start()
    rank.open(0)
    return rank


def measure(options: dict[str, Any], params: int, tries: int) -> list[float]:
    """Medians: seconds waited, times a plain copy, seconds beside."""
    weights = Weights(params)
    shard = torch.cat(list(weights.tensors.values()))
    copy = torch.empty_like(shard)
    copy.fill_(0)
    found = []
    with workplace() as folder:
        rank = rank_of(weights, folder, options, tries + 1)
        for step in range(1, tries + 2):
            weights.leap(0.01, step)
            plain, _ = timed(lambda: copy.copy_(shard))
            waited, _ = timed(lambda step=step: rank.observe(step, now=False))
            began = time.perf_counter()
            rank.save()
            if step > 1:  # the first touches its memory
                found.append([waited, waited / plain, time.perf_counter() - began])
    return [median(one) for one in zip(*found, strict=True)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=float, default=60e6, help="parameters of the shard")
    parser.add_argument("--tries", type=int, default=7, help="successive rows whose median is taken")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    print(f"{arguments.params:.3g} parameters, load {load:.1f} of {os.cpu_count()} processors")
    kept = True
    for name, options in KINDS.items():
        waited, ratio, beside = measure(options, int(arguments.params), arguments.tries)
        kept &= ratio <= MOST
        said = f"{name:10} waits {waited * 1e3:6.1f} ms: {ratio:4.2f} plain copies, at most {MOST}"
        print(f"{said} | beside it {beside * 1e3:6.0f} ms", flush=True)
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
