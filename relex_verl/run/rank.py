"""RELEX on one rank of a run, whatever the host: it computes, the driver decides. All ranks call the same methods."""

import logging
import socket
import time
from collections.abc import Iterator
from functools import cached_property, partial
from math import ceil, nan, prod
from pathlib import Path
from typing import Any, cast

import torch

from relex_verl.maths.diagnostics import describe, half_backtest, split_half_agreement
from relex_verl.maths.extrapolators import Prediction
from relex_verl.maths.window import Window
from relex_verl.pipeline.beside import Beside
from relex_verl.pipeline.collectives import Collectives
from relex_verl.pipeline.gathering import whole_tensors
from relex_verl.pipeline.observation import Observation
from relex_verl.pipeline.observer import Observer
from relex_verl.pipeline.prediction import predicted_tensors, write_together
from relex_verl.pipeline.staging import Staging
from relex_verl.reporting import figures, metrics
from relex_verl.reporting.findings import Findings
from relex_verl.run import admission, machine
from relex_verl.run.budget import Workload
from relex_verl.run.jumping_rank import JumpingRank
from relex_verl.run.protocol import Engine, JumpingEngine, Opened, Samples, Setup, Started, Weights
from relex_verl.trajectory.collectors import RowRecorder
from relex_verl.trajectory.kinds import KINDS
from relex_verl.trajectory.shards import ShardSource, TensorShard

__all__ = ["RelexRank"]

logger = logging.getLogger("relex_verl")
SAMPLE = 512  # tensors that the figures of a row are of, unless it is a cut's: G of 100,000 would be gigabytes


class RelexRank:
    """What RELEX holds and does on one rank."""

    def __init__(
        self, setup: Setup, engine: Engine, ranks: Collectives | None = None, samples: Samples | None = None
    ) -> None:
        """Choose the kind of trajectory; nothing is read yet.

        Args:
            setup: what the driver says.
            engine: the host's.
            ranks: of the training; those of the default process group for None.
            samples: the engine's last ones, of a run whose jumps have a bound.
        """
        self._ranks, self._samples = ranks or Collectives(), samples
        with self._ranks.together():
            kind = setup.config.kind
            self._reason = engine.no_master if kind.wants_master else None
            if self._reason is not None and kind.fallback is not None:
                kind = KINDS[kind.fallback]
            self._setup, self._engine, self._cost = setup, engine, ""
            self._source = engine.shards(master=kind.wants_master and self._reason is None)
            folder, run, adapters = setup.output_dir / "trajectory", setup.run, engine.adapters
            made_of = run.base_model, engine.aliases, run.names, kind
        own_ranks = self._ranks.of_their_own() if setup.config.overlap else self._ranks
        self._observed = Observer(folder, *made_of, own_ranks, adapters)
        self._staging: Staging | None = None
        self._beside: Beside[dict[str, float]] = Beside()
        self._told: dict[str, float] = {}  # metrics of a row that was not waited for

    def start(self) -> Started:
        """Check memory and disk and take theta_0, before a checkpoint is loaded."""
        self._observer.start(self._source, admit=self._admit)
        with self._ranks.together():
            if self._setup.config.overlap:
                self._staging = Staging(self._observed.held, self._observed.shapes, self._observed.kind.dtype)
        return Started(self._observer.kind.name, self._reason, self._cost)

    @property
    def _observer(self) -> Observer:
        """What has been recorded, once no row is under way.

        Raises:
            Exception: what went wrong with the last row.
        """
        self._settle()
        return self._observed

    def _settle(self) -> None:
        """Wait for the row that is under way. One rank's error is raised on all: none may go on to a collective."""
        if self._beside.has_outcome:
            with self._observed.ranks.together():
                self._told = self._beside.outcome()

    def open(self, step: int, recording: bool = False) -> Opened:
        """Open the trajectory after the step that training goes on from; with no cut to come, to record alone."""
        if recording:
            self.record()
        self._observer.open(step)
        steps, fit_from = self._observer.steps, self._setup.config.fit_from
        with self._ranks.together():
            if steps and steps[0] < fit_from and not self._observer.kind.keeps_rows:
                raise ValueError(
                    f"relex.fit_from={fit_from}: the sketch that this run goes on with holds steps from {steps[0]} on, and "
                    "cannot leave them out. Give the value that the run began with"
                )
        return Opened(list(steps), self._observer.replays is not None)

    def record(self) -> None:
        """Let go of the rows in memory: there is no cut to come, and rows go on to disk alone. A sketch stays as it is."""
        observer = self._observer
        if observer.kind.keeps_rows:
            observer.collector = RowRecorder(observer.kind, observer.held, observer.steps)

    @property
    def jumping(self) -> JumpingRank:
        """What only a run that jumps needs, once no row is under way."""
        self._settle()
        return self._jumping

    @cached_property
    def _jumping(self) -> JumpingRank:
        folder = self._setup.output_dir / "before_jump"
        return JumpingRank(cast(JumpingEngine, self._engine), self._observed, self._source, folder, self._samples)

    def observe(self, step: int, now: bool) -> dict[str, float]:
        """Add the row of this step: now, or beside the training, once its weights are copied.

        Args:
            step: the training step just done.
            now: wait for the row.

        Returns:
            Rank 0's metrics: of this row where it was waited for, else of the row before, if that has not been asked for.

        Raises:
            Exception: what went wrong with this row, or with the one before.
        """
        if self._staging is None:
            return self._record(step, self._source, now)
        with self._observer.ranks.together():
            self._staging.copy(self._source)
        self._beside.begin(partial(self._record, step, self._staging, now))
        if now:
            self._settle()
        told, self._told = self._told, {}
        return told

    def _record(self, step: int, source: ShardSource, whole: bool) -> dict[str, float]:
        started, observer = time.perf_counter(), self._observed
        seen = observer.observe(step, source)
        if observer.ranks.rank:
            return {}
        alone = isinstance(observer.collector, RowRecorder)
        found = metrics.row_metrics(seen.changed_share, seen.stored_bytes) if alone else self._live(seen, whole)
        return {"relex/observed_step": float(step), "relex/seconds": time.perf_counter() - started, **found}

    def _live(self, seen: Observation, whole: bool) -> dict[str, float]:
        """Figures of the window so far, of all tensors or of a sample."""
        observer, config = self._observed, self._setup.config
        of = slice(None, None, 1 if whole else ceil(len(observer.shapes) / SAMPLE))
        # Before the fit begins, this row alone: rows of a warm-up say nothing of what will be fitted.
        window = observer.window(of).since(min(config.fit_from, seen.step))
        each_L = {"changed_share": seen.changed_share_L[of], "stored_bytes": seen.stored_bytes_L[of]}
        described, backtest = describe(window, config.rank) | each_L, half_backtest(window, "relex", config.rank)
        return metrics.step_metrics(described, seen.changed_share, seen.stored_bytes, backtest)

    def save(self) -> None:
        """Put on disk what only memory holds, since the host is about to save a checkpoint of this step."""
        self._observer.save()

    def fit(self, methods: list[str], targets: list[int]) -> Findings | None:
        """Rank 0 answers with the fits of all tensors, backtests, figures and the observed steps."""
        self._observer.save()
        if self._samples is not None:
            self.jumping.keep_samples(self._observer.steps[-1])
        if self._ranks.rank:
            return None
        observer, config = self._observer, self._setup.config
        window = observer.window().since(config.fit_from)
        fits = metrics.fit_report(window, list(observer.shapes.values()), config.rank)
        # The smoothed rows of a sketch agree with one another whatever the real ones do.
        agreement = nan if window.smoothed else split_half_agreement(window.gram_LTT).nanmean().item()
        return Findings(
            steps=list(observer.steps),
            origin_step=window.origin_step,
            fits=fits,
            backtests={method: half_backtest(window, method, config.rank) for method in methods},
            drift=fits.summary["drift"].get("mean", nan),
            agreement=agreement,
            figures=self._figures(window, methods, targets),
        )

    def _figures(self, window: Window, methods: list[str], targets: list[int]) -> dict[str, Path]:
        """Pictures of the window; a plotting library that fails costs nothing but them."""
        try:
            return figures.window_figures(self._setup.output_dir / "figures", window, targets, methods)
        except Exception:
            logger.warning("RELEX: the figures of the window could not be drawn", exc_info=True)
            return {}

    def check(self, weights: Weights) -> None:
        """Refuse now, not while the rollout waits for its weights.

        Raises:
            ValueError: a prediction that this trajectory cannot give.
        """
        if isinstance(weights, Prediction):
            self._observer.kind.check(weights, self._observer.steps)

    def export(self, weights: Weights, device: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and whole tensor, in the base's types, of other weights than the engine's.

        Collective: all ranks iterate, to the end.

        Args:
            weights: a prediction, or the weights observed last, along the same path.
            device: where the tensors go.
        """
        observer = self._observer
        shards = self._predicted(weights) if isinstance(weights, Prediction) else observer.current(self._source)
        followed = observer.kind.dtype
        return whole_tensors(self._ranks, observer.base, observer.shapes, observer.aliases, shards, device, followed)

    def keep(self, folder: Path, provenance: dict[str, Any]) -> None:
        """Write the engine's weights as they are now, in the base's types, each rank its own elements."""
        observer = self._observer
        shards, followed = observer.current(self._source), observer.kind.dtype
        write_together(
            self._ranks, observer.base, observer.aliases, observer.shapes, shards, folder, provenance, followed
        )

    def room(self, rows: int) -> None:
        """Check that so many more rows fit into host memory and on disk."""
        elements, held = sum(shard.placement.numel for shard in self._observer.held.values()), self._observer.steps
        self._check_budget(elements, len(self._observer.shapes), len(held) + rows, len(held))

    def write(self, prediction: Prediction, folder: Path, provenance: dict[str, Any]) -> None:
        """Write one predicted checkpoint, each rank its own elements."""
        observer = self._observer
        shards, followed = self._predicted(prediction), observer.kind.dtype
        write_together(
            self._ranks, observer.base, observer.aliases, observer.shapes, shards, folder, provenance, followed
        )

    def _predicted(self, prediction: Prediction) -> Iterator[TensorShard]:
        """This rank's part of a prediction; nothing is done before the first tensor is asked for."""
        observer = self._observer
        yield from predicted_tensors(observer.histories(), observer.kind, observer.window(), prediction)

    def _admit(self, elements: int, tensors: int) -> None:
        """Before memory is taken: does it all fit? Keeps the estimate, in words."""
        plan = self._setup.plans.get(self._observer.kind.name)
        self._cost = self._check_budget(elements, tensors, 0 if plan is None else plan.rows, None)

    @cached_property
    def _copies(self) -> int:
        """Ranks that hold the same weights. Collective."""
        with self._ranks.together():
            has = sum(shard.placement.numel for shard in self._source)
        everywhere = self._ranks.sum_over_ranks(torch.tensor([has], dtype=torch.float64))
        return round(everywhere.item() / sum(prod(shape) for shape in self._observer.shapes.values()))

    def _check_budget(self, elements: int, tensors: int, rows: int, rows_held: int | None) -> str:
        """Gather the facts of all ranks and ask the rule, on each of them; the estimate, in words.

        Args:
            elements: that this rank holds.
            tensors: of the model.
            rows: at the cut.
            rows_held: of these in memory already, beside the state; None before theta_0 is taken.

        Raises:
            BudgetError: a node lacks memory, or the folder disk; the same on all ranks.
        """
        setup, kind = self._setup, self._observer.kind
        with self._ranks.together():
            available, on_host = machine.available_memory(), self._engine.optimizer_on_host
            facts = admission.RankFacts(socket.gethostname(), elements, available, on_host)
            free = machine.free_disk(setup.output_dir) if self._ranks.rank == 0 else None
        everyone = self._ranks.gather((facts, free))
        following, held = setup.recordings.get(kind.name), self._observer.steps
        every = (setup.plans.get(kind.name) or setup.recordings[kind.name]).observe_every
        ranks = [rank for rank, _ in everyone]
        # Those after the last of all cuts, as if the coming one were it.
        recorded = 0 if following is None else following.rows_after(held[-1] if held else 0)
        # Adapters are written in float32, and have no base that could say so yet.
        adapters = 4 * sum(rank.elements for rank in ranks)
        checkpoint = self._observer.base.nbytes if self._observer.adapters is None else adapters
        config = setup.config
        jump, bounded = config.on_cut == "jump", config.jump_kl_max is not None
        workload = Workload(
            kind, tensors, rows, every, setup.predictions,
            rows_held=rows_held, checkpoint=checkpoint, jump=jump, bounded=bounded, copies=self._copies if jump else 1,
            overlap=config.overlap,
            recorded=max(0, recorded - (rows - (rows_held or 0))),
        )  # fmt: skip
        estimate = admission.estimate(workload, ranks, disk_free=everyone[0][1], output_dir=setup.output_dir)
        with self._ranks.together():
            estimate.admit()
        return estimate.words
