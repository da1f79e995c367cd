"""RELEX on a rank: verl's actor workers with a few more remote methods. They compute; the driver decides.

Every method answers with an `Answer` instead of raising: the driver sees which rank failed and why, and switches RELEX
off without the training noticing.
"""

import functools
import logging
import socket
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from verl.experimental.separation.engine_workers import DetachActorWorker
from verl.single_controller.base.decorator import Dispatch, register
from verl.utils.device import get_device_id
from verl.workers.engine_workers import ActorRolloutRefWorker

from relex_verl import budget, collectives, report, tracking
from relex_verl.diagnostics import describe, split_half_agreement
from relex_verl.encodings import encoding_name
from relex_verl.observer import Observer
from relex_verl.prediction import Prediction
from relex_verl.verl_plugin.source import EngineSource, has_float32_master

__all__ = ["Answer", "RelexActorWorker", "RelexDetachActorWorker", "Setup"]

logger = logging.getLogger("relex_verl")


@dataclass(frozen=True)
class Setup:
    """What a rank is told at the start.

    Attributes:
        output_dir: as in the configuration.
        base_model: folder or Hub id of the base model.
        run: what identifies the run.
        trajectory, quantization: as in the configuration.
        rows: observed steps up to the cut, for each kind of trajectory.
        predictions: checkpoints to be written.
        rank, fit_from: of the fit, for the figures that are logged.
    """

    output_dir: Path
    base_model: str
    run: dict[str, Any]
    trajectory: str
    quantization: str
    rows: dict[str, int]
    predictions: int
    rank: int
    fit_from: int


@dataclass(frozen=True)
class Answer:
    """What a rank reports: a value, or the error that stopped it (`peer` when another rank's)."""

    value: Any = None
    error: str | None = None
    kind: str = ""
    peer: bool = False


def _answers(method: Callable[..., Any]) -> Callable[..., Answer]:
    @functools.wraps(method)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Answer:
        try:
            return Answer(value=method(self, *args, **kwargs))
        except Exception as error:
            peer = isinstance(error, collectives.PeerError)
            return Answer(error=f"{error}\n{traceback.format_exc()}", kind=type(error).__name__, peer=peer)

    return wrapper


class _RelexWorkerMixin:
    """The remote methods; `self.actor.engine` is verl's training engine."""

    actor: Any
    config: Any

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    @_answers
    def relex_start(self, setup: Setup) -> tuple[str, str | None]:
        """Take theta_0 (call it between `init_model` and `load_checkpoint`) and check memory and disk.

        Returns:
            The kind of trajectory that this engine allows, and why it is not the configured one (None when it is).
        """
        engine = self.actor.engine
        reason = has_float32_master(engine) if setup.trajectory == "fp32" else None
        trajectory = setup.trajectory if reason is None else "bf16"
        encoding = encoding_name(trajectory, setup.quantization)
        self._relex_setup = setup
        self._relex_source = EngineSource(engine, master=trajectory == "fp32")
        aliases = self._relex_source.aliases
        folder = setup.output_dir / "trajectory"
        self._relex = Observer(folder, setup.base_model, aliases, setup.run, encoding)
        self._relex.start(self._relex_source)
        self._check_budget(setup, setup.rows[trajectory])
        return trajectory, reason

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    @_answers
    def relex_open(self, step: int) -> list[int]:
        """Open the trajectory after the step that training goes on from; the steps that it holds."""
        self._relex.open(step)
        return self._relex.steps

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    @_answers
    def relex_observe(self, step: int) -> dict[str, float]:
        """Add the row of this step; rank 0 answers with the metrics."""
        seen = self._relex.observe(step, self._relex_source)
        if collectives.rank():
            return {}
        figures = describe(*self._fitted_rows(), self._relex_setup.rank)
        live = tracking.half_backtest(*self._fitted_rows(), "relex", self._relex_setup.rank)
        return tracking.step_metrics(figures, seen.changed_share, seen.stored_bytes, live)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    @_answers
    def relex_fit(self, methods: list[str], targets: list[int]) -> dict[str, Any]:
        """Rank 0 answers with the fits of all tensors, backtests, figures and the observed steps."""
        if collectives.rank():
            return {}
        observer, rank = self._relex, self._relex_setup.rank
        names, shapes = list(observer.shapes), list(observer.shapes.values())
        gram_LTT, steps = self._fitted_rows()
        figures = describe(gram_LTT, steps, rank)
        return {
            "fits": tracking.fit_report(names, shapes, gram_LTT, steps, rank),
            "steps": list(observer.steps),
            "backtests": {method: tracking.half_backtest(gram_LTT, steps, method, rank) for method in methods},
            "drift": figures["drift"].nanmean().item(),
            "agreement": split_half_agreement(gram_LTT).nanmean().item(),
            "figures": report.window_figures(
                self._relex_setup.output_dir / "figures", names, gram_LTT, steps, targets, methods
            ),
        }

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    @_answers
    def relex_substitute(self, weights: Prediction | str | None) -> None:
        """Let verl's next weight update export other weights than the actor's; None ends it.

        The engine's exporter is shadowed on this one object; the actor's weights are not touched.

        Args:
            weights: a prediction, or "observed" for the actor's own, rounded to bfloat16, along the same path.
        """
        engine = self.actor.engine
        vars(engine).pop("get_per_tensor_param", None)
        if weights is None:
            return
        if self.config.rollout.checkpoint_engine.backend == "delta_sharded":
            raise NotImplementedError("predictions cannot be sent by checkpoint_engine.backend=delta_sharded")
        observer = self._relex

        def export(**_: Any) -> tuple[Iterator[tuple[str, torch.Tensor]], None]:
            if isinstance(weights, Prediction):
                shards = observer.predicted_tensors(weights)
            else:
                shards = observer.observed_now(self._relex_source)
            return observer.whole_tensors(shards, get_device_id()), None

        engine.get_per_tensor_param = export

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    @_answers
    def relex_room(self, rows: int) -> None:
        """Check that so many more rows fit into host memory."""
        self._check_budget(self._relex_setup, rows)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    @_answers
    def relex_write(self, prediction: Prediction, folder: Path, provenance: dict[str, Any]) -> None:
        """Write one predicted checkpoint, each rank its own elements."""
        self._relex.write_prediction(prediction, folder, provenance)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    @_answers
    def relex_stop(self) -> None:
        """Let go of everything that RELEX holds in memory."""
        self._relex = self._relex_source = None  # type: ignore[assignment]

    def _fitted_rows(self) -> tuple[torch.Tensor, list[int]]:
        """G and the steps of the rows that take part in the fit (all, while there are none yet)."""
        steps = self._relex.steps
        skipped = min(sum(step < self._relex_setup.fit_from for step in steps), len(steps) - 1)
        return self._relex.gram()[:, skipped:, skipped:], steps[skipped:]

    def _check_budget(self, setup: Setup, rows: int) -> None:
        mine = sum(held.placement.numel for held in self._relex.held.values())
        everyone = collectives.gather((socket.gethostname(), mine, budget.available_memory()))
        total = sum(elements for _, elements, _ in everyone)
        host = socket.gethostname()
        here = [elements for node, elements, _ in everyone if node == host]
        encoding = self._relex.encoding
        need = budget.budget(encoding, sum(here), total, rows, setup.predictions)
        # theta_0 is already held: what is still to come is the rest.
        available = min(free for node, _, free in everyone if node == host)
        error: Exception | None = None
        try:
            budget.check_memory(need.memory - sum(here) * encoding.state_bytes, available, len(here))
            if collectives.rank() == 0:
                budget.check_disk(need, setup.output_dir)
        except budget.BudgetError as refused:
            error = refused
        collectives.all_or_nothing(error)


class RelexActorWorker(_RelexWorkerMixin, ActorRolloutRefWorker):
    """verl's actor worker of the sync and colocate_async modes, observed."""


class RelexDetachActorWorker(_RelexWorkerMixin, DetachActorWorker):
    """verl's actor worker of the separate_async mode, observed."""
