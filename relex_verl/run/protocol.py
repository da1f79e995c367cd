"""What the driver, the ranks and the host say to each other: plain data, and what a host has to lend."""

import functools
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from relex_verl.maths.extrapolators import Prediction
from relex_verl.pipeline.collectives import PeerError
from relex_verl.run.config import Plan, RelexConfig
from relex_verl.run.plan import Recording
from relex_verl.run.validation import Validation
from relex_verl.trajectory.shards import ShardSource, TensorShard

__all__ = [
    "OBSERVED",
    "Answer",
    "Engine",
    "Host",
    "JumpingEngine",
    "Opened",
    "RunFacts",
    "Samples",
    "Setup",
    "Started",
    "Weights",
    "answers",
]

OBSERVED = "observed"
# What can be scored: a prediction, or the weights observed last (`OBSERVED`), rounded and sent along the same path.
Weights = Prediction | str


@dataclass(frozen=True)
class RunFacts:
    """What identifies a training run, and how it was started.

    Attributes:
        base_model: folder or Hub id of the base model.
        project, experiment: the names that the host logs it under.
        resume_mode: of the host: with "auto" it looks for a checkpoint by itself, and a start at step 0 may be a second
        samples_a_step: that a training step generates, by which the cost of scoring is told; None where nobody knows.
    """

    base_model: str
    project: str
    experiment: str
    resume_mode: str = "auto"
    samples_a_step: int | None = None

    @property
    def names(self) -> dict[str, str]:
        """What a trajectory's index keeps of it."""
        return {"project": self.project, "experiment": self.experiment}


@dataclass(frozen=True)
class Setup:
    """What a rank is told at the start.

    Attributes:
        config: the checked `relex` node.
        plans: the first cut, by the name of each kind of trajectory that it may come to.
        predictions: checkpoints to be written.
        output_dir: of the configuration, made absolute by the driver: a rank may stand in another folder.
        run: what identifies the run.
        recordings: what is recorded after the last cut, by the name of each kind; empty where nothing is.
    """

    config: RelexConfig
    plans: Mapping[str, Plan]
    predictions: int
    output_dir: Path
    run: RunFacts
    recordings: Mapping[str, Recording] = field(default_factory=dict)


@dataclass(frozen=True)
class Started:
    """What a rank says once theta_0 is taken.

    Attributes:
        kind: name of the kind of trajectory that the engine allows, see `kinds.KINDS`.
        reason: why it is not what was configured; None when it is.
        cost: what following the run will take, in words.
    """

    kind: str
    reason: str | None
    cost: str


@dataclass(frozen=True)
class Opened:
    """What a rank says once the trajectory is open.

    Attributes:
        steps: that its last window holds.
        began: the window began at the very step that the run goes on from.
    """

    steps: list[int]
    began: bool


@dataclass(frozen=True)
class Answer:
    """What a rank reports: a value, or the error that stopped it (`peer` when another rank's)."""

    value: Any = None
    error: str | None = None
    kind: str = ""
    peer: bool = False


def answers(method: Callable[..., Any]) -> Callable[..., Answer]:
    """Have a rank's method answer instead of raise: the driver sees which rank failed, the training does not notice."""

    @functools.wraps(method)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Answer:
        try:
            return Answer(value=method(self, *args, **kwargs))
        except Exception as error:
            peer = isinstance(error, PeerError)
            return Answer(error=f"{error}\n{traceback.format_exc()}", kind=type(error).__name__, peer=peer)

    return wrapper


class Engine(Protocol):
    """What a rank needs of the host's training engine."""

    @property
    def no_master(self) -> str | None:
        """None where float32 master weights can be read shard by shard, else the reason why not."""

    @property
    def optimizer_on_host(self) -> bool:
        """Whether the optimizer's state is kept in host memory."""

    @property
    def aliases(self) -> dict[str, str]:
        """Tied name -> the name that holds its elements."""

    @property
    def adapters(self) -> Mapping[str, Any] | None:
        """`adapter_config.json` where LoRA adapters are trained and `shards` hands out those; None where the weights are.

        Raises:
            ValueError: adapters that cannot be followed.
        """

    def shards(self, master: bool) -> ShardSource:
        """The weights: float32 master weights, or their bfloat16 rounding. Called once."""


class JumpingEngine(Engine, Protocol):
    """What a rank of a run that jumps needs besides."""

    def assign(self, shards: Sequence[TensorShard]) -> None:
        """Set the float32 master weights that this rank holds; nothing is set if it raises."""

    def reset_optimizer(self) -> None:
        """Forget the optimizer's state; the learning-rate schedule goes on."""

    def state(self) -> Mapping[str, torch.Tensor]:
        """This rank's weights and optimizer state, in place."""

    def set_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Set weights and optimizer state to what `state` gave, bit by bit; nothing is set if it raises."""


class Samples(Protocol):
    """What a rank needs to compare the policy before and after a jump: the samples that it was trained on last."""

    def keep(self, step: int, file: Path) -> None:
        """Write this rank's samples of a step, for a run that is resumed there."""

    def log_probs(self, step: int, file: Path) -> torch.Tensor:
        """Of the tokens that the policy drew in them, by the weights as they are now: (N,) float64, on the host.

        Collective. After a resume they are those of `file`.

        Raises:
            ValueError, OSError: no samples of this step are at hand.
        """


class Host(Protocol):
    """What a trainer lends to a cut."""

    @property
    def relex_rewards(self) -> Mapping[int, float]:
        """Training step -> mean reward of its samples, of the steps that this process has trained and logged."""

    def relex_validate(
        self, weights: Weights, metric: str | None, timeout: float, places: Collection[int] | None = None
    ) -> Validation: ...

    def relex_rest(self) -> None:
        """Put the rollout to sleep, so that the engine may compute; `relex_restore` wakes it."""

    def relex_restore(self) -> None: ...

    def relex_end_training(self) -> None: ...
