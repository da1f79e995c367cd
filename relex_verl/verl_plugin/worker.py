"""verl's actor workers with a few more remote methods: each hands one question of the driver to `RelexRank`.

Every method answers with an `Answer` instead of raising: the driver sees which rank failed and why, and switches RELEX
off without the training noticing.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from verl.experimental.separation.engine_workers import DetachActorWorker
from verl.single_controller.base.decorator import Dispatch, register
from verl.utils.device import get_device_id
from verl.workers.engine_workers import ActorRolloutRefWorker

from relex_verl.maths.extrapolators import Prediction
from relex_verl.reporting.findings import Findings
from relex_verl.run.protocol import Opened, Setup, Started, Weights, answers
from relex_verl.run.rank import RelexRank
from relex_verl.verl_plugin.adapters import AdapterEngine, peft_config
from relex_verl.verl_plugin.samples import LastSamples
from relex_verl.verl_plugin.source import VerlEngine

__all__ = ["RelexActorWorker", "RelexDetachActorWorker"]


class _RelexWorkerMixin:
    """The remote methods; `self.actor.engine` is verl's training engine."""

    actor: Any
    _relex: RelexRank
    _relex_engine: VerlEngine | AdapterEngine
    _relex_exported: Any = None
    _relex_samples: LastSamples | None = None

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    @answers
    def relex_start(self, setup: Setup) -> Started:
        """Check memory and disk and take theta_0 (call it between `init_model` and `load_checkpoint`)."""
        engine = self.actor.engine
        self._relex_engine = VerlEngine(engine) if peft_config(engine) is None else AdapterEngine(engine)
        if setup.config.jump_kl_max is not None:
            self._relex_samples = LastSamples(engine)
        self._relex = RelexRank(setup, self._relex_engine, samples=self._relex_samples)
        return self._relex.start()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    @answers
    def relex_open(self, step: int, recording: bool = False) -> Opened:
        """See `RelexRank.open`."""
        return self._relex.open(step, recording)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    @answers
    def relex_record(self) -> None:
        """See `RelexRank.record`."""
        self._relex.record()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    @answers
    def relex_observe(self, step: int, now: bool) -> dict[str, float]:
        """See `RelexRank.observe`."""
        return self._relex.observe(step, now)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    @answers
    def relex_save(self) -> None:
        """See `RelexRank.save`."""
        self._relex.save()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    @answers
    def relex_fit(self, methods: list[str], targets: list[int]) -> Findings | None:
        """See `RelexRank.fit`."""
        return self._relex.fit(methods, targets)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    @answers
    def relex_substitute(self, weights: Weights | None) -> None:
        """Let verl's next weight update export other weights than the actor's; None ends it.

        The engine's exporter is shadowed on this one object; the actor's weights are not touched, but for adapters that
        are merged: those come back when the transfer ends, or here where it broke off.
        """
        engine = self.actor.engine
        vars(engine).pop("get_per_tensor_param", None)
        exported, self._relex_exported = self._relex_exported, None
        if exported is not None:
            exported.close()
        if weights is None:
            return
        self._relex.check(weights)

        exporter = self._relex_engine.exporter(lambda: self._relex.export(weights, get_device_id()))

        def export(**how: Any) -> tuple[Iterator[tuple[str, torch.Tensor]], Any]:
            self._relex_exported, config = exporter(**how)
            return self._relex_exported, config

        engine.get_per_tensor_param = export

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    @answers
    def relex_room(self, rows: int) -> None:
        """See `RelexRank.room`."""
        self._relex.room(rows)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    @answers
    def relex_write(self, prediction: Prediction, folder: Path, provenance: dict[str, Any]) -> None:
        """See `RelexRank.write`."""
        self._relex.write(prediction, folder, provenance)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    @answers
    def relex_keep(self, folder: Path, provenance: dict[str, Any]) -> None:
        """See `RelexRank.keep`."""
        self._relex.keep(folder, provenance)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    @answers
    def relex_jump(self, step: int, prediction: Prediction, optimizer: str, undoable: bool) -> float:
        """See `JumpingRank.jump`."""
        return self._relex.jumping.jump(step, prediction, optimizer, undoable)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    @answers
    def relex_kl(self, step: int, prediction: Prediction) -> float:
        """See `JumpingRank.kl`."""
        return self._relex.jumping.kl(step, prediction)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    @answers
    def relex_undo(self, step: int) -> None:
        """See `JumpingRank.undo`."""
        self._relex.jumping.undo(step)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    @answers
    def relex_begin(self, step: int) -> None:
        """See `JumpingRank.begin`."""
        self._relex.jumping.begin(step)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    @answers
    def relex_replay(self) -> str | None:
        """See `JumpingRank.replay`."""
        return self._relex.jumping.replay()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    @answers
    def relex_stop(self) -> None:
        """Let go of everything that RELEX holds in memory."""
        if self._relex_samples is not None:
            self._relex_samples.release()
        self._relex = self._relex_engine = None  # type: ignore[assignment]


class RelexActorWorker(_RelexWorkerMixin, ActorRolloutRefWorker):
    """verl's actor worker of the sync and colocate_async modes, observed."""


class RelexDetachActorWorker(_RelexWorkerMixin, DetachActorWorker):
    """verl's actor worker of the separate_async mode, observed."""
