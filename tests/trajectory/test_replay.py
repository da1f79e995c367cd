"""The weights of observed steps, from the files alone."""

from pathlib import Path

import torch
from fakes import DriftingModel
from pipeline import STEPS, weights_of

from relex_verl.trajectory import replay
from relex_verl.trajectory.store import Trajectory


def test_states_are_bit_for_bit(base: Path, two_ranks: dict[str, Path]) -> None:
    trajectory, model = Trajectory(two_ranks["bf16"] / "trajectory"), DriftingModel(weights_of(base))
    for step in [0, *STEPS]:
        expected, seen = model.at(step), dict.fromkeys(trajectory.names, 0)
        for shard in replay.states(trajectory, step):
            flat = expected[shard.name].to(torch.bfloat16).flatten()
            for local, full, length in shard.placement.runs():
                part = shard.data[local : local + length]
                assert torch.equal(part.view(torch.int16), flat[full : full + length].view(torch.int16))
            seen[shard.name] += shard.placement.numel
        assert seen == {name: tensor.numel() for name, tensor in expected.items()}
