"""A jump on one rank: the weights are set to a prediction, or to what they were before one. All ranks call the same.

A window's origin is what its first row is compared with, and what a run that was killed sets its weights to when it comes
back to the jump: so it is written first, and only then are the weights set. Up to that write nothing has happened.
"""

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open

from relex_verl.maths.extrapolators import Prediction
from relex_verl.maths.harm import token_kl
from relex_verl.pipeline.gathering import with_copies
from relex_verl.pipeline.observer import Observer
from relex_verl.pipeline.prediction import predicted_tensors
from relex_verl.run.protocol import JumpingEngine, Samples
from relex_verl.trajectory.files import stream_tensors
from relex_verl.trajectory.shards import ShardSource, TensorShard

__all__ = ["JumpingRank"]


class JumpingRank:
    """What a rank does at the cuts of a run that jumps."""

    def __init__(
        self,
        engine: JumpingEngine,
        observer: Observer,
        source: ShardSource,
        folder: Path,
        samples: Samples | None = None,
    ) -> None:
        """Nothing is read or written yet.

        Args:
            engine: the host's.
            observer: of this rank, once it is open.
            source: the engine's float32 weights.
            folder: for weights and optimizer state from before a jump; those of the last one are kept.
            samples: to compare the policy before and after, where jumps have a bound.
        """
        self._engine, self._observer, self._source = engine, observer, source
        self._kept = folder / f"rank_{observer.ranks.rank:05d}.safetensors"
        self._samples, self._sampled = samples, folder / f"samples_{observer.ranks.rank:05d}.pt"

    def keep_samples(self, step: int) -> None:
        """Where jumps have a bound, keep the samples of a cut: a run that is killed before its jump has none of its own."""
        with self._observer.ranks.together():
            if self._samples is not None:
                self._samples.keep(step, self._sampled)

    def kl(self, step: int, prediction: Prediction) -> float:
        """How far a jump would lead from the policy. Afterwards the weights are bit for bit what they were before.

        Args:
            step: the training step just done.
            prediction: what the weights would be set to.

        Returns:
            Mean over the tokens that all ranks' policy drew in the samples trained on last, see `harm.token_kl`.

        Raises:
            ValueError: a prediction that is not finite, or no samples.
        """
        ranks, samples = self._observer.ranks, self._samples
        assert samples is not None
        shards = self._float32(prediction)
        with ranks.together():
            own = [replace(one, data=one.data.to("cpu", copy=True)) for one in self._source if one.placement.numel]
        # The passes are collective: an error that all ranks share is raised on each, as in the training's own.
        with ranks.together():
            before_N = samples.log_probs(step, self._sampled)
        with ranks.together():
            try:
                self._engine.assign(shards)
                after_N = samples.log_probs(step, self._sampled)
            finally:
                self._engine.assign(own)
        kl_N = token_kl(before_N, after_N)
        total, tokens = ranks.sum_over_ranks(torch.stack([kl_N.sum(), torch.tensor(len(kl_N), dtype=torch.float64)]))
        return float(total / tokens)

    def jump(self, step: int, prediction: Prediction, optimizer: str, undoable: bool) -> float:
        """Set the weights to a prediction of the window behind, and begin the next window from there.

        Args:
            step: the training step just done.
            prediction: what to set them to, rounded to float32.
            optimizer: "keep" its state, or "reset" it.
            undoable: keep weights and optimizer state from before.

        Returns:
            How far that is, |theta after - theta before| over all weights.

        Raises:
            ValueError: a prediction that is not finite. Nothing has been set.
        """
        ranks, shards = self._observer.ranks, self._float32(prediction)
        with ranks.together():
            if undoable:
                self._kept.parent.mkdir(parents=True, exist_ok=True)
                stream_tensors(self._kept, self._engine.state())
            else:
                self._kept.unlink(missing_ok=True)
        squared = ranks.sum_over_ranks(torch.tensor([self._squared_distance(shards)], dtype=torch.float64))
        said = {"method": prediction.method, "target": prediction.target, "rank": prediction.rank}
        said |= {"fit_from": prediction.fit_from, "optimizer": optimizer}
        self._observer.begin_window(step, shards, jump=said)
        with ranks.together():
            self._set(shards, optimizer)
        return math.sqrt(float(squared))

    def undo(self, step: int) -> None:
        """Set weights and optimizer state to what they were before the last jump, and begin the next window from there.

        Raises:
            ValueError, OSError: they are not there any more, or were cut otherwise. Nothing has been set.
        """
        ranks = self._observer.ranks
        with ranks.together():
            kept = _read(self._kept)
        with ranks.together():
            self._engine.set_state(kept)
        self._observer.begin_window(step, self._source, undone=True)

    def begin(self, step: int) -> None:
        """The next window begins from the weights as they are."""
        self._observer.begin_window(step, self._source)

    def replay(self) -> str | None:
        """Make the jump (or its undoing) again that was made after the checkpoint that the run was resumed from.

        Returns:
            What was done, in words; None where the window began without either.
        """
        record, ranks = self._observer.replays, self._observer.ranks
        if record is None or (record.jump is None and not record.undone):
            return None
        if record.jump is not None:
            with ranks.together():
                counted = list(self._observer.origin_shards())
            shards = self._everywhere(counted)
        with ranks.together():
            if record.jump is None:
                self._engine.set_state(_read(self._kept))
            else:
                self._set(shards, str(record.jump["optimizer"]))
        return f"the jump of step {record.origin_step} is {'undone' if record.undone else 'made'} again"

    def _float32(self, prediction: Prediction) -> list[TensorShard]:
        """This rank's part of a prediction, see `_everywhere`. Collective."""
        observer, counted = self._observer, []
        with observer.ranks.together():
            window, histories = observer.window(), observer.histories()
            for shard in predicted_tensors(histories, observer.kind, window, prediction, dtype=torch.float32):
                if not shard.data.isfinite().all():
                    raise ValueError(f"{prediction.folder_name} is not finite in {shard.name}: no jump")
                counted.append(shard)
        return self._everywhere(counted)

    def _everywhere(self, counted: Iterable[TensorShard]) -> list[TensorShard]:
        """Of what the ranks count, what this one has, in the order in which its engine hands it out. Collective.

        That is the same but where several ranks hold copies (hybrid sharding): one of them counts, and the others have to
        be told.
        """
        observer = self._observer
        with observer.ranks.together():
            has = {one.name: one.placement for one in self._source if one.placement.numel}
        copies = observer.ranks.sum_over_ranks(torch.tensor([float(len(has) - len(observer.held))]))
        if copies.item():
            counted = with_copies(observer.ranks, observer.shapes, counted, has)
        by_name = {shard.name: shard for shard in counted}
        return [by_name[name] for name in has]

    def _squared_distance(self, shards: list[TensorShard]) -> float:
        held = self._observer.held  # each element once
        counted = [shard for shard in shards if shard.name in held]
        return sum(float((shard.data - held[shard.name].state).double().square().sum()) for shard in counted)

    def _set(self, shards: list[TensorShard], optimizer: str) -> None:
        self._engine.assign(shards)
        if optimizer == "reset":
            self._engine.reset_optimizer()


def _read(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as handle:
        return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
