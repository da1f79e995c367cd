"""RELEX on one rank of a run, whatever the host: it computes, the driver decides. All ranks call the same methods."""

import logging
import socket
from collections.abc import Iterator
from math import nan
from pathlib import Path
from typing import Any

import torch

from relex_verl.maths.diagnostics import describe, split_half_agreement
from relex_verl.maths.extrapolators import Prediction
from relex_verl.pipeline import collectives
from relex_verl.pipeline.gathering import whole_tensors
from relex_verl.pipeline.observer import Observer
from relex_verl.pipeline.prediction import check_method
from relex_verl.reporting import metrics, report
from relex_verl.run import admission, machine
from relex_verl.run.budget import Workload
from relex_verl.run.protocol import Engine, Setup, Started, Weights
from relex_verl.trajectory.encodings import encoding_name

__all__ = ["RelexRank"]

logger = logging.getLogger("relex_verl")


class RelexRank:
    """What RELEX holds and does on one rank."""

    def __init__(self, setup: Setup, engine: Engine) -> None:
        """Choose the kind of trajectory; nothing is read yet.

        Args:
            setup: what the driver says.
            engine: the host's.
        """
        with collectives.together():
            config = setup.config
            self._reason = engine.no_master if config.trajectory != "bf16" else None
            # A sketch follows whatever weights there are.
            fallen = self._reason is not None and config.trajectory == "fp32"
            self._kind = "bf16" if fallen else config.trajectory
            self._setup, self._engine, self._cost = setup, engine, ""
            self._source = engine.shards(master=self._kind != "bf16" and self._reason is None)
            encoding = encoding_name(self._kind, config.quantization, config.sketch_size)
            folder, run = setup.output_dir / "trajectory", setup.run
            self._observer = Observer(folder, run.base_model, engine.aliases, run.names, encoding)

    def start(self) -> Started:
        """Check memory and disk and take theta_0, before a checkpoint is loaded."""
        self._observer.start(self._source, admit=self._admit)
        return Started(self._kind, self._reason, self._cost)

    def open(self, step: int) -> list[int]:
        """Open the trajectory after the step that training goes on from; the steps that it holds."""
        self._observer.open(step)
        return self._observer.steps

    def observe(self, step: int) -> dict[str, float]:
        """Add the row of this step; rank 0 answers with the metrics."""
        seen = self._observer.observe(step, self._source)
        if collectives.rank():
            return {}
        (gram_LTT, steps), rank, energy_L = self._fitted_rows(), self._setup.config.rank, self._observer.energy()
        figures = describe(gram_LTT, steps, rank, energy_L)
        figures |= {"changed_share": seen.changed_share_L, "stored_bytes": seen.stored_bytes_L}
        live = metrics.half_backtest(gram_LTT, steps, "relex", rank) if energy_L is None else nan
        return metrics.step_metrics(figures, seen.changed_share, seen.stored_bytes, live)

    def save(self) -> None:
        """Put on disk what only memory holds, since the host is about to save a checkpoint of this step."""
        self._observer.save()

    def fit(self, methods: list[str], targets: list[int]) -> dict[str, Any]:
        """Rank 0 answers with the fits of all tensors, backtests, figures and the observed steps."""
        self._observer.save()
        if collectives.rank():
            return {}
        observer, rank, energy_L = self._observer, self._setup.config.rank, self._observer.energy()
        names, shapes = list(observer.shapes), list(observer.shapes.values())
        gram_LTT, steps = self._fitted_rows()
        found: dict[str, Any] = {
            "fits": metrics.fit_report(names, shapes, gram_LTT, steps, rank, energy_L),
            "steps": list(observer.steps),
            "backtests": dict.fromkeys(methods, nan),
            "drift": nan,
            "agreement": nan,
        }
        if energy_L is None:  # the smoothed rows of a sketch agree with one another whatever the real ones do
            found["backtests"] = {one: metrics.half_backtest(gram_LTT, steps, one, rank) for one in methods}
            found["drift"] = found["fits"]["summary"]["drift"].get("mean", nan)
            found["agreement"] = split_half_agreement(gram_LTT).nanmean().item()
        return {**found, "figures": self._figures(names, gram_LTT, steps, methods, targets)}

    def _figures(
        self, names: list[str], gram_LTT: torch.Tensor, steps: list[int], methods: list[str], targets: list[int]
    ) -> dict[str, Path]:
        """Pictures of the window; a plotting library that fails costs nothing but them."""
        folder, smoothed = self._setup.output_dir / "figures", self._observer.energy() is not None
        try:
            return report.window_figures(folder, names, gram_LTT, steps, targets, methods, smoothed)
        except Exception:
            logger.warning("RELEX: the figures of the window could not be drawn", exc_info=True)
            return {}

    def check(self, weights: Weights) -> None:
        """Refuse now, not while the rollout waits for its weights.

        Raises:
            ValueError: a prediction that this trajectory cannot give.
        """
        if isinstance(weights, Prediction):
            check_method(self._observer.encoding, weights, self._observer.steps)

    def export(self, weights: Weights, device: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and whole tensor, bfloat16, of other weights than the engine's. Collective: all ranks iterate, to the end.

        Args:
            weights: a prediction, or the weights observed last, along the same path.
            device: where the tensors go.
        """
        observer = self._observer
        if isinstance(weights, Prediction):
            shards = observer.predicted_tensors(weights)
        else:
            shards = observer.observed_now(self._source)
        return whole_tensors(observer.shapes, observer.aliases, shards, device)

    def room(self, rows: int) -> None:
        """Check that so many more rows fit into host memory and on disk."""
        elements, held = sum(shard.placement.numel for shard in self._observer.held.values()), self._observer.steps
        self._check_budget(elements, len(self._observer.shapes), len(held) + rows, len(held))

    def write(self, prediction: Prediction, folder: Path, provenance: dict[str, Any]) -> None:
        """Write one predicted checkpoint, each rank its own elements."""
        self._observer.write_prediction(prediction, folder, provenance)

    def _fitted_rows(self) -> tuple[torch.Tensor, list[int]]:
        """G and the steps of the rows that take part in the fit (all, while there are none yet)."""
        steps = self._observer.steps
        skipped = min(sum(step < self._setup.config.fit_from for step in steps), len(steps) - 1)
        return self._observer.gram()[:, skipped:, skipped:], steps[skipped:]

    def _admit(self, elements: int, tensors: int) -> None:
        """Before memory is taken: does it all fit? Keeps the estimate, in words."""
        self._cost = self._check_budget(elements, tensors, self._setup.plans[self._kind].rows, None)

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
        setup, name = self._setup, self._observer.encoding_name
        with collectives.together():
            available, on_host = machine.available_memory(), self._engine.optimizer_on_host
            facts = admission.RankFacts(socket.gethostname(), elements, available, on_host)
            free = machine.free_disk(setup.output_dir) if collectives.rank() == 0 else None
        everyone = collectives.gather((facts, free))
        every = setup.plans[self._kind].observe_every
        workload = Workload(name, tensors, rows, every, setup.predictions, rows_held=rows_held)
        ranks = [rank for rank, _ in everyone]
        estimate = admission.estimate(workload, ranks, disk_free=everyone[0][1], output_dir=setup.output_dir)
        with collectives.together():
            estimate.admit()
        return estimate.words
