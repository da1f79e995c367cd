"""Observing weights that lie on a GPU: the bits of the CPU, how long training waits, and what memory it takes. See run.sh.

Three ranks' parts follow the same weights, shaped like Qwen2.5-1.5B's: one beside the training (`relex.overlap=true`), one
in the training's time, on the device, and one that is given copies on the host. Their files have to be the same.
"""

import argparse
import json
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file

from relex_verl.maths.extrapolators import Prediction
from relex_verl.run.config import RelexConfig
from relex_verl.run.protocol import RunFacts, Setup
from relex_verl.run.rank import RelexRank
from relex_verl.run.schedule import Schedule
from relex_verl.trajectory.shards import TensorShard, whole

HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY, KV = 1536, 8960, 28, 151_936, 256
KINDS = {"fp32-int8": {"trajectory": "fp32"}, "bf16": {"trajectory": "bf16"}}
WAYS = {"beside": {"overlap": True}, "on the device": {"overlap": False}, "on the host": {"overlap": False}}


def shapes(scale: float) -> dict[str, tuple[int, int]]:
    """Name -> shape of each matrix; `scale` of their rows."""
    layer = {"q": (HIDDEN, HIDDEN), "k": (KV, HIDDEN), "v": (KV, HIDDEN), "o": (HIDDEN, HIDDEN)}
    layer |= {"gate": (INTERMEDIATE, HIDDEN), "up": (INTERMEDIATE, HIDDEN), "down": (HIDDEN, INTERMEDIATE)}
    found = {"embed": (VOCABULARY, HIDDEN)}
    found |= {f"layers.{i}.{name}": shape for i in range(LAYERS) for name, shape in layer.items()}
    return {name: (max(1, round(rows * scale)), columns) for name, (rows, columns) in found.items()}


class Engine:
    """Float32 weights, as `protocol.Engine`; where they lie, or copies on the host."""

    no_master = None
    adapters = None
    optimizer_on_host = False

    def __init__(self, weights: dict[str, torch.Tensor], on_host: bool) -> None:
        self.aliases: dict[str, str] = {}
        self._weights, self._on_host = weights, on_host

    def shards(self, master: bool) -> "Engine":
        return self

    def __iter__(self) -> Iterator[TensorShard]:
        for name, tensor in self._weights.items():
            data = tensor.cpu() if self._on_host else tensor
            yield TensorShard(name, tuple(tensor.shape), whole(tensor.shape), data.flatten())


def settle() -> None:
    """Wait for the device."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def timed(work: Callable[[], object]) -> float:
    """Seconds, the device's work included."""
    settle()
    began = time.perf_counter()
    work()
    settle()
    return time.perf_counter() - began


def step(weights: dict[str, torch.Tensor]) -> None:
    """About one in a hundred bfloat16 weights changes."""
    for tensor in weights.values():
        tensor += tensor.abs() * 2**-8 * 0.01 * torch.randn_like(tensor)


def rank_of(weights: dict[str, torch.Tensor], folder: Path, base: Path, options: dict[str, Any], way: str) -> RelexRank:
    """Ready for the first step."""
    node = {"t_cut": 100, "targets": [200], "observe_every": 1, **options, **WAYS[way]}
    config = RelexConfig.from_mapping(node)
    setup = Setup(config, Schedule(config, 200).plans, 0, folder, RunFacts(str(base), "p", "e"))
    rank = RelexRank(setup, Engine(weights, way == "on the host"))  # type: ignore[arg-type]
    rank.start()
    rank.open(0)
    return rank


def files(folder: Path) -> dict[str, bytes]:
    """All of a trajectory."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check(name: str, weights: dict[str, torch.Tensor], base: Path, work: Path, rows: int) -> dict[str, Any]:
    """One kind of trajectory: seconds, gigabytes, and whether all ways come to the same files."""
    count = sum(tensor.numel() for tensor in weights.values())
    device, started = next(iter(weights.values())).device, {name: tensor.clone() for name, tensor in weights.items()}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    ranks = {way: rank_of(weights, work / name / way, base, KINDS[name], way) for way in WAYS}
    copy = torch.empty(count, pin_memory=device.type == "cuda")
    waits: dict[str, list[float]] = {way: [] for way in WAYS}
    copies, beside = [], []
    for number in range(1, rows + 1):
        step(weights)
        pieces = copy.split([tensor.numel() for tensor in weights.values()])
        copies.append(
            timed(
                lambda pieces=pieces: [
                    p.copy_(t.flatten(), True) for p, t in zip(pieces, weights.values(), strict=True)
                ]
            )
        )
        for way, rank in ranks.items():
            waits[way].append(timed(lambda rank=rank, number=number: rank.observe(number, now=False)))
            if way == "beside":
                beside.append(timed(rank.save))
    prediction, rank = Prediction("relex", 200), ranks["beside"]
    fit = timed(lambda: rank.fit(["relex"], [200]))
    write = timed(lambda: rank.write(prediction, work / name / "predicted", {"method": "relex"}))
    plain = timed(lambda: save_file({n: t.bfloat16().cpu() for n, t in weights.items()}, work / "plain.safetensors"))
    first, *others = (files(work / name / way / "trajectory") for way in WAYS)
    found = {
        "kind": name,
        "parameters": count,
        "same files": all(first == other for other in others),
        "plain copy": median(copies),
        "copy GB/s": 4 * count / median(copies) / 1e9,
        **{f"waits, {way}": median(found[1:] or found) for way, found in waits.items()},
        "row beside": median(beside),
        "fit": fit,
        "prediction": write,
        "save_file": plain,
        "device GB": torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0,
        "host GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }
    for key, tensor in started.items():
        weights[key].copy_(tensor)
    shutil.rmtree(work / name)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="of the rows of each matrix of the 1.5B shapes")
    parser.add_argument("--rows", type=int, default=4, help="observed steps")
    parser.add_argument(
        "--dir", type=Path, help="where the files go, 30 GB of them at full size; the system's by default"
    )
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = torch.cuda.get_device_name() if device.type == "cuda" else "no GPU: nothing is confirmed by this"
    print(f"{machine}, torch {torch.__version__}")
    torch.manual_seed(0)
    weights = {name: torch.randn(shape, device=device) * 0.02 for name, shape in shapes(arguments.scale).items()}
    with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
        base = Path(folder) / "base"
        base.mkdir()
        save_file({name: tensor.bfloat16().cpu() for name, tensor in weights.items()}, base / "model.safetensors")
        found = [check(name, weights, base, Path(folder), arguments.rows) for name in KINDS]
    for row in zip(*(one.items() for one in found), strict=True):
        values = [value for _, value in row]
        print(f"{row[0][0]:22}", *(f"{one:>14.4g}" if isinstance(one, float) else f"{one!s:>14}" for one in values))
    if arguments.json is not None:
        arguments.json.write_text(
            json.dumps({"machine": machine, "torch": torch.__version__, "kinds": found}, indent=1)
        )
    return 0 if all(one["same files"] for one in found) else 1


if __name__ == "__main__":
    sys.exit(main())
