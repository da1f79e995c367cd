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
from math import nan
from pathlib import Path
from typing import Any

import torch
from verl.experimental.separation.engine_workers import DetachActorWorker
from verl.single_controller.base.decorator import Dispatch, register
from verl.utils.device import get_device_id
from verl.workers.engine_workers import ActorRolloutRefWorker

from relex_verl import budget, collectives, report, tracking
from relex_verl.assembly import whole_tensors
from relex_verl.config import Plan, RelexConfig
from relex_verl.diagnostics import describe, split_half_agreement
from relex_verl.encodings import encoding_name
from relex_verl.observer import Observer
from relex_verl.prediction import Prediction, check_method
from relex_verl.verl_plugin.source import EngineSource, has_float32_master

__all__ = ["Answer", "RelexActorWorker", "RelexDetachActorWorker", "Setup"]

logger = logging.getLogger("relex_verl")


@dataclass(frozen=True)
class Setup:
    """What a rank is told at the start.

    Attributes:
        config: the checked `relex` node.
        plans: the first cut, for each kind of trajectory.
        predictions: checkpoints to be written.
        output_dir: of the configuration, made absolute by the driver: a worker may stand in another folder.
        base_model: folder or Hub id of the base model.
        run: what identifies the run.
    """

    config: RelexConfig
    plans: dict[str, Plan]
    predictions: int
    output_dir: Path
    base_model: str
    run: dict[str, Any]


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
    def relex_start(self, setup: Setup) -> tuple[str, str | None, str]:
        """Check memory and disk and take theta_0 (call it between `init_model` and `load_checkpoint`).

        Returns:
            The kind of trajectory that this engine allows; why it is not what was configured (None when it is); what
            following the run will cost, in words.
        """
        engine = self.actor.engine
        with collectives.together():
            config = setup.config
            reason = has_float32_master(engine) if config.trajectory != "bf16" else None
            # A sketch follows whatever weights there are.
            self._relex_kind = "bf16" if reason is not None and config.trajectory == "fp32" else config.trajectory
            self._relex_setup, self._relex_cost = setup, ""
            self._relex_source = EngineSource(engine, master=self._relex_kind != "bf16" and reason is None)
            encoding = encoding_name(self._relex_kind, config.quantization, config.sketch_size)
            folder, aliases = setup.output_dir / "trajectory", self._relex_source.aliases
            self._relex = Observer(folder, setup.base_model, aliases, setup.run, encoding)
        self._relex.start(self._relex_source, admit=self._admit)
        return self._relex_kind, reason, self._relex_cost

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
        (gram_LTT, steps), rank, energy_L = self._fitted_rows(), self._relex_setup.config.rank, self._relex.energy()
        figures = describe(gram_LTT, steps, rank, energy_L)
        figures |= {"changed_share": seen.changed_share_L, "stored_bytes": seen.stored_bytes_L}
        live = tracking.half_backtest(gram_LTT, steps, "relex", rank) if energy_L is None else nan
        return tracking.step_metrics(figures, seen.changed_share, seen.stored_bytes, live)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    @_answers
    def relex_save(self) -> None:
        """Put on disk what only memory holds, since verl is about to save a checkpoint of this step."""
        self._relex.save()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    @_answers
    def relex_fit(self, methods: list[str], targets: list[int]) -> dict[str, Any]:
        """Rank 0 answers with the fits of all tensors, backtests, figures and the observed steps."""
        self._relex.save()
        if collectives.rank():
            return {}
        observer, rank, energy_L = self._relex, self._relex_setup.config.rank, self._relex.energy()
        names, shapes = list(observer.shapes), list(observer.shapes.values())
        gram_LTT, steps = self._fitted_rows()
        found: dict[str, Any] = {
            "fits": tracking.fit_report(names, shapes, gram_LTT, steps, rank, energy_L),
            "steps": list(observer.steps),
            "backtests": dict.fromkeys(methods, nan),
            "drift": nan,
            "agreement": nan,
        }
        if energy_L is None:  # the smoothed rows of a sketch agree with one another whatever the real ones do
            found["backtests"] = {one: tracking.half_backtest(gram_LTT, steps, one, rank) for one in methods}
            found["drift"] = found["fits"]["summary"]["drift"].get("mean", nan)
            found["agreement"] = split_half_agreement(gram_LTT).nanmean().item()
        return {**found, "figures": self._figures(names, gram_LTT, steps, methods, targets)}

    def _figures(
        self, names: list[str], gram_LTT: torch.Tensor, steps: list[int], methods: list[str], targets: list[int]
    ) -> dict[str, Path]:
        """Pictures of the window; a plotting library that fails costs nothing but them."""
        folder, smoothed = self._relex_setup.output_dir / "figures", self._relex.energy() is not None
        try:
            return report.window_figures(folder, names, gram_LTT, steps, targets, methods, smoothed)
        except Exception:
            logger.warning("RELEX: the figures of the window could not be drawn", exc_info=True)
            return {}

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
        if isinstance(weights, Prediction):  # now, not while the rollout waits for its weights
            check_method(observer.encoding, weights, observer.steps)

        def export(**_: Any) -> tuple[Iterator[tuple[str, torch.Tensor]], None]:
            if isinstance(weights, Prediction):
                shards = observer.predicted_tensors(weights)
            else:
                shards = observer.observed_now(self._relex_source)
            return whole_tensors(observer.shapes, observer.aliases, shards, get_device_id()), None

        engine.get_per_tensor_param = export

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    @_answers
    def relex_room(self, rows: int) -> None:
        """Check that so many more rows fit into host memory."""
        elements = sum(held.placement.numel for held in self._relex.held.values())
        self._check_budget(elements, len(self._relex.shapes), rows, already=True)

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
        skipped = min(sum(step < self._relex_setup.config.fit_from for step in steps), len(steps) - 1)
        return self._relex.gram()[:, skipped:, skipped:], steps[skipped:]

    def _admit(self, elements: int, tensors: int) -> None:
        """Before memory is taken: does it all fit? Keeps the estimate, in words."""
        rows = self._relex_setup.plans[self._relex_kind].rows
        self._relex_cost = self._check_budget(elements, tensors, rows, already=False)

    def _check_budget(self, elements: int, tensors: int, rows: int, already: bool) -> str:
        """Raise BudgetError on all ranks where a node lacks memory for so many rows, or the folder disk.

        Args:
            elements: that this rank holds.
            tensors: of the model.
            rows: still to come.
            already: state and moments are in memory by now.
        """
        host, setup, encoding = socket.gethostname(), self._relex_setup, self._relex.encoding
        # Adam's two moments, float32, come with the first step where they are kept on the host.
        optimizer = 8 * elements if self.actor.engine.is_optimizer_offload_enabled and not already else 0
        everyone = collectives.gather((host, elements, budget.available_memory(), optimizer))
        total, here = sum(one[1] for one in everyone), [one for one in everyone if one[0] == host]
        rate = budget.change_between_rows(budget.ASSUMED_CHANGE_RATE, setup.plans[self._relex_kind].observe_every)
        mine = sum(one[1] for one in here)
        need = budget.budget(encoding, mine, total, rows, setup.predictions, rate, tensors * len(here))
        held = mine * (encoding.state_bytes + encoding.fixed_bytes) if already else 0
        available, later = min(one[2] for one in here), sum(one[3] for one in here)
        with collectives.together():
            budget.check_memory(need.memory - held, available, len(here), later)
            if collectives.rank() == 0:
                budget.check_disk(need, setup.output_dir)
        return (
            f"{total:.3g} parameters on {len(everyone)} ranks, {rows} rows of {self._relex.encoding_name}: about "
            f"{budget.gib(need.memory)} of host memory on this node ({budget.gib(available)} available), "
            f"{budget.gib(need.trajectory)} of trajectory and {budget.gib(need.predictions)} of predictions in "
            f"{setup.output_dir}"
        )


class RelexActorWorker(_RelexWorkerMixin, ActorRolloutRefWorker):
    """verl's actor worker of the sync and colocate_async modes, observed."""


class RelexDetachActorWorker(_RelexWorkerMixin, DetachActorWorker):
    """verl's actor worker of the separate_async mode, observed."""
