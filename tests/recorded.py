"""Small trajectories with known weights, recorded as a run records them."""

import torch
from safetensors.torch import save_file

from relex_verl.pipeline.observer import Observer
from relex_verl.trajectory.encodings import PackedStep
from relex_verl.trajectory.index import TrajectoryIndex, WindowRecord
from relex_verl.trajectory.kinds import KINDS
from relex_verl.trajectory.shards import TensorShard, block_placement, whole
from relex_verl.trajectory.store import Trajectory

SHAPES = {
    "model.embed_tokens.weight": (12, 6),
    "model.layers.0.self_attn.q_proj.weight": (6, 8),
    "model.layers.0.mlp.up_proj.weight": (10, 6),
    "model.layers.0.mlp.down_proj.weight": (6, 10),
    "model.layers.0.input_layernorm.weight": (6,),
    "model.layers.1.self_attn.q_proj.weight": (6, 8),
}
MATRICES = [name for name in SHAPES if "attn" in name or "mlp" in name]


def random_weights(shapes=SHAPES, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def rank_one_directions(shapes=SHAPES, seed=1):
    """One matrix of rank 1 and norm 1 for each 2-D tensor, any vector for the others."""
    generator = torch.Generator().manual_seed(seed)
    directions = {}
    for name, shape in shapes.items():
        vectors = [torch.nn.functional.normalize(torch.randn(size, generator=generator), dim=0) for size in shape]
        directions[name] = torch.outer(*vectors) if len(vectors) == 2 else vectors[0]
    return directions


def moved(base, directions, amount):
    return {name: tensor + amount * directions[name] for name, tensor in base.items()}


def write_base(folder, base):
    folder.mkdir(parents=True)
    save_file({name: tensor.clone() for name, tensor in base.items()}, folder / "model.safetensors")
    return folder


def record(folder, base, states, kind="fp32-none"):
    """A trajectory of one rank: `states` is step -> name -> tensor."""

    def source(weights):
        return [TensorShard(name, tuple(one.shape), whole(one.shape), one.flatten()) for name, one in weights.items()]

    observer = Observer(folder / "trajectory", str(write_base(folder / "base", base)), {}, {}, KINDS[kind])
    observer.start(source(base))
    observer.open(0)
    for step, weights in states.items():
        observer.observe(step, source(weights))
    return Trajectory(folder / "trajectory")


def record_cut_up(folder, base, states, kind="fp32-none", origin="base"):
    """The same trajectory as two ranks write it that hold half of the columns each; the second in another order."""
    kind = KINDS[kind]
    shapes = {name: list(tensor.shape) for name, tensor in sorted(base.items())}
    index = TrajectoryIndex(
        str(write_base(folder / "base", base)), kind.name, 2, shapes, {}, {}, [WindowRecord(origin=origin)]
    )
    trajectory = Trajectory.create(folder / "trajectory", index)
    for rank in range(2):
        names = sorted(base, reverse=rank == 1)
        placements = {name: _half(base[name].shape, rank) for name in names}

        def part(weights, name, placements=placements):
            flat = weights[name].flatten().to(kind.dtype)
            return torch.cat([flat[start : start + length] for _, start, length in placements[name].runs()])

        held = {name: part(base, name) for name in names}
        trajectory.declare_rank(rank, placements, None if origin == "base" else torch.cat(list(held.values())))
        for step, weights in states.items():
            increments = [kind.rows.encode(held[name], part(weights, name)) for name in names]
            for name, increment in zip(names, increments, strict=True):
                kind.rows.advance(held[name], increment)
            row = torch.zeros(len(names), list(states).index(step) + 1, dtype=torch.float64)
            trajectory.append(rank, step, PackedStep.pack(kind.part, increments, row))
    for step in states:
        trajectory.commit(step)
        trajectory.write_index()
    return trajectory


def _half(shape, rank):
    half = shape[-1] // 2
    local = (*shape[:-1], half if rank == 0 else shape[-1] - half)
    return block_placement(local, (*(0 for _ in shape[:-1]), rank * half), tuple(shape))


def by_name(shards):
    """name -> tensor of its full shape, from whole shards."""
    return {one.name: one.data.view(one.shape) for one in shards}
