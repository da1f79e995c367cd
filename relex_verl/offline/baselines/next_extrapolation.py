"""NExt: small networks that predict the top singular triple of the change over the next steps from those of past changes.

Chen et al. 2026, "Low-rank Optimization Trajectories Modeling for LLM RLVR Acceleration", https://arxiv.org/abs/2604.11446,
code https://github.com/RUCAIBox/NExt.

For each matrix and each checkpoint t, every `interval` steps: the triples (u, s, v) of the global change W_t - W_0, of the
local one W_t - W_{t - interval} and, as the label, of W_{t + look_ahead} - W_t. One network for the left vectors of each
height, one for the right vectors of each width and one for the singular values learn (global, local) -> label over all
checkpoints that have a label. From the last checkpoint they predict (u, s, v), and the prediction is
W_last + coefficient * s u v^T with u and v brought to norm 1.

Differences from the authors' code, whose settings are the defaults here:
- They leave the signs of the triples as LAPACK gives them. Here they are aligned (global ones from the last checkpoint
  backwards, local ones and labels to the global one of their step): else u and -u of two steps are noise to the network.
- They feed raw values. Here vectors are scaled to a mean square of 1 and each matrix's singular values by its last
  global one, so that nothing depends on the size of the updates.
- They train on merged LoRA checkpoints, in which only attention and MLP matrices move. Here those are predicted,
  whatever the training was; everything else stays as at the last checkpoint.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from relex_verl.offline.baselines.rank_one import RankOne, differences, same_sign
from relex_verl.offline.baselines.whole_tensors import WholeTensors, is_attention_or_mlp_matrix
from relex_verl.trajectory.index import TrajectoryError
from relex_verl.trajectory.shards import TensorShard
from relex_verl.trajectory.store import Trajectory

__all__ = ["NextFit", "NextSettings", "fit_next", "next_tensors"]


@dataclass(frozen=True)
class NextSettings:
    """The authors' settings.

    Attributes:
        interval: steps between checkpoints, and of the local change.
        look_ahead: steps from a checkpoint to its label.
        width: of the hidden layers.
        epochs: of full-batch training; the paper's 1000 take minutes for a 1B model on a GPU, fewer will often do.
        learning_rate: of AdamW; falls along a cosine to a tenth.
        seed: of the initial weights.
    """

    interval: int = 10
    look_ahead: int = 50
    width: int = 256
    epochs: int = 1000
    learning_rate: float = 2e-5
    seed: int = 0


class NextFit(NamedTuple):
    """What the trained networks say.

    Attributes:
        changes: name -> the predicted triple of W_{last + look_ahead} - W_last.
        last: the checkpoint that they were made from.
        first_loss, last_loss: mean absolute error over the training set before and after training.
    """

    changes: dict[str, RankOne]
    last: int
    first_loss: float
    last_loss: float


class _Example(NamedTuple):
    global_change: RankOne
    local_change: RankOne
    label: RankOne | None  # None at the last checkpoint


class _Predictor(nn.Module):
    """(global, local) -> label; each of the three parts has two bottlenecks of `width` and one ReLU between them."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.on_global = _part(size, width, size)
        self.on_local = _part(size, width, size)
        self.combine = _part(2 * size, width, size)

    def forward(self, global_Bn: torch.Tensor, local_Bn: torch.Tensor) -> torch.Tensor:
        return self.combine(torch.cat([self.on_global(global_Bn), self.on_local(local_Bn)], dim=-1))


def _part(size: int, width: int, out: int) -> nn.Sequential:
    before, after = (nn.Linear(size, width), nn.Linear(width, size)), (nn.Linear(size, width), nn.Linear(width, out))
    return nn.Sequential(*before, nn.ReLU(), *after)


def fit_next(trajectory: Trajectory, cut: int, settings: NextSettings | None = None) -> NextFit:
    """Train the networks on the steps up to the cut and predict from the last of them.

    Memory: the triples of all matrices at all checkpoints (3 (m + n) floats each), about look_ahead / interval copies of one
    tensor while they are made, and one network with its optimizer state at a time.

    Args:
        trajectory: an open trajectory.
        cut: no step after this one is used.
        settings: the authors' when None.

    Raises:
        ValueError: a model without attention and MLP matrices.
        TrajectoryError: the steps that the intervals ask for were not observed, or leave no checkpoint with a label.
    """
    settings = settings or NextSettings()
    reader = WholeTensors(trajectory, cut)
    names = [name for name, shape in reader.shapes.items() if is_attention_or_mlp_matrix(name, shape)]
    if not names:
        raise ValueError("no tensor's name says that it is a matrix of an attention or MLP block")
    anchors = _anchors(reader, settings)
    examples = {name: _examples(reader, name, anchors, settings) for name in names}
    predicted: dict[str, dict[str, torch.Tensor]] = {name: {} for name in names}
    errors: list[tuple[float, float]] = []
    for (part, _), group in _groups(examples).items():
        outputs, error = _train_and_predict({name: examples[name] for name in group}, part, settings)
        errors.append(error)
        for name, output in zip(group, outputs, strict=True):
            predicted[name][part] = output
    changes = {name: _triple(examples[name][-1], predicted[name]) for name in names}
    first, last = (sum(column) / len(errors) for column in zip(*errors, strict=True))
    return NextFit(changes, reader.steps[-1], first, last)


def next_tensors(trajectory: Trajectory, fit: NextFit, coefficient: float = 1.0) -> Iterator[TensorShard]:
    """W_last + coefficient * s u v^T of every tensor; those without a predicted change stay as at the last checkpoint.

    Args:
        trajectory: the one that was fitted.
        fit: of `fit_next`.
        coefficient: 1 for the look-ahead that was learned; the authors evaluate 0.5 to 4.0.

    Yields:
        Every tensor, whole, float32; one in memory.
    """
    reader = WholeTensors(trajectory, fit.last)
    for name in reader.shapes:
        weights = reader.state(name, fit.last).float()
        if name in fit.changes:
            weights += coefficient * fit.changes[name].matrix()
        yield reader.shard(name, weights)


def _anchors(reader: WholeTensors, settings: NextSettings) -> list[int]:
    """The checkpoints with a label, ascending, and the last observed step, from which to predict."""
    there, last = {reader.origin_step, *reader.steps}, reader.steps[-1]
    back, ahead = settings.interval, settings.look_ahead
    if last - back not in there:
        raise TrajectoryError(f"NExt with interval {back} needs step {last - back} besides the last one, {last}")
    labelled = [
        step
        for step in reader.steps
        if (last - step) % back == 0 and step - back in there and step + ahead in there and step + ahead <= last
    ]
    if not labelled:
        raise TrajectoryError(
            f"NExt with interval {back} and look-ahead {ahead} finds no checkpoint to learn from in the steps up to {last}: "
            f"it needs steps t - {back}, t and t + {ahead}, t a multiple of {back} away from the last"
        )
    return [*labelled, last]


def _examples(reader: WholeTensors, name: str, anchors: list[int], settings: NextSettings) -> list[_Example]:
    """The triples of one matrix at each anchor, their signs aligned."""
    origin, back, ahead = reader.origin_step, settings.interval, settings.look_ahead
    wanted = {(origin, t) for t in anchors} | {(t - back, t) for t in anchors} | {(t, t + ahead) for t in anchors[:-1]}
    by_pair = differences(reader.states(name), sorted(wanted))
    examples: list[_Example] = []
    for t in reversed(anchors):
        change = by_pair[origin, t]
        if examples:
            change = same_sign(change, examples[-1].global_change)
        label = same_sign(by_pair[t, t + ahead], change) if t != anchors[-1] else None
        examples.append(_Example(change, same_sign(by_pair[t - back, t], change), label))
    return examples[::-1]


def _groups(examples: Mapping[str, list[_Example]]) -> dict[tuple[str, int], list[str]]:
    """(part of the triple, its length) -> the matrices that share that network."""
    groups: dict[tuple[str, int], list[str]] = defaultdict(list)
    for name, of_name in examples.items():
        groups["left", len(of_name[-1].global_change.left)].append(name)
        groups["right", len(of_name[-1].global_change.right)].append(name)
        groups["value", 1].append(name)
    return dict(groups)


def _part_of(factors: RankOne, part: str, scale: float) -> torch.Tensor:
    """u sqrt(m), v sqrt(n), or s / scale: numbers of the order of 1."""
    if part == "value":
        return torch.tensor([factors.value / scale])
    vector = factors.left if part == "left" else factors.right
    return vector * len(vector) ** 0.5


def _scale(last: _Example) -> float:
    return last.global_change.value or 1.0


def _train_and_predict(
    examples: Mapping[str, list[_Example]], part: str, settings: NextSettings
) -> tuple[list[torch.Tensor], tuple[float, float]]:
    """One network: its outputs at the last checkpoint of each matrix, and its error before and after training."""
    rows = [
        [_part_of(factors, part, _scale(of_name[-1])) for factors in example if factors is not None]
        for of_name in examples.values()
        for example in of_name
    ]
    learned = [row for row in rows if len(row) == 3]
    global_Bn, local_Bn, label_Bn = (torch.stack(column) for column in zip(*learned, strict=True))
    last_rows = [row for row in rows if len(row) == 2]
    last_global_Ln, last_local_Ln = (torch.stack(column) for column in zip(*last_rows, strict=True))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        network = _Predictor(global_Bn.shape[1], settings.width)
    errors = _train(network, global_Bn, local_Bn, label_Bn, len(learned) // len(examples), settings)
    with torch.no_grad():
        return list(network(last_global_Ln, last_local_Ln)), errors


def _train(
    network: _Predictor,
    global_Bn: torch.Tensor,
    local_Bn: torch.Tensor,
    label_Bn: torch.Tensor,
    checkpoints: int,
    settings: NextSettings,
) -> tuple[float, float]:
    """Full-batch AdamW on the L1 loss, summed over elements and matrices, averaged over checkpoints, as the authors do."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, T_max=max(1, settings.epochs), eta_min=settings.learning_rate / 10
    )
    errors: list[float] = []
    for _ in range(settings.epochs):
        optimizer.zero_grad()
        loss = (network(global_Bn, local_Bn) - label_Bn).abs().sum() / checkpoints
        loss.backward()
        errors.append(loss.item() * checkpoints / label_Bn.numel())
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        errors.append((network(global_Bn, local_Bn) - label_Bn).abs().mean().item())
    return errors[0], errors[-1]


def _triple(last: _Example, predicted: Mapping[str, torch.Tensor]) -> RankOne:
    """The predicted triple in the weights' own units; a matrix that never moved gets no change."""
    if last.global_change.value == 0:
        return RankOne(torch.zeros_like(last.global_change.left), 0.0, torch.zeros_like(last.global_change.right))
    value = predicted["value"].item() * _scale(last)
    left, right = (nn.functional.normalize(predicted[part], dim=0) for part in ("left", "right"))
    return RankOne(left, value, right)
