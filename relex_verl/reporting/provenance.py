"""What made a result: versions of the packages, and the facts of a checkpoint that was not trained so (`relex.json`)."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from relex_verl.maths.extrapolators import Prediction
from relex_verl.reporting.records import IF_KNOWN, Record

__all__ = ["Checkout", "Provenance", "versions"]


def versions() -> dict[str, str]:
    """Versions of what produced a result."""
    installed = {"python": platform.python_version()}
    for package in ("relex-verl", "verl", "torch", "transformers", "safetensors"):
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return installed


@dataclass(frozen=True)
class Provenance(Record):
    """What `relex.json` says of a predicted or reconstructed checkpoint.

    Attributes:
        base_model: folder or Hub id of the base.
        method: a name in METHODS, a baseline's, or "reconstruction".
        rank: r.
        t_cut: the last step that took part.
        target: the step that was predicted; None where something else was aimed at, which `settings` say.
        observed_steps: those up to the cut.
        trajectory: its folder.
        versions: of what made it.
        fit_from: the first step that took part in the fit, of a method in METHODS.
        step: the step that was reconstructed.
        settings: of a baseline.
        window: of the trajectory, where it is not the first.
    """

    base_model: str
    method: str
    rank: int
    t_cut: int
    target: int | None
    observed_steps: list[int]
    trajectory: str
    versions: dict[str, str]
    fit_from: int | None = field(default=None, kw_only=True, metadata=IF_KNOWN)
    step: int | None = field(default=None, kw_only=True, metadata=IF_KNOWN)
    settings: dict[str, Any] | None = field(default=None, kw_only=True, metadata=IF_KNOWN)
    window: int | None = field(default=None, kw_only=True, metadata=IF_KNOWN)
    schema_version: int = 1

    @classmethod
    def of(
        cls,
        prediction: Prediction,
        base_model: str,
        t_cut: int,
        observed: Sequence[int],
        trajectory: Path,
        window: int = 0,
    ) -> "Provenance":
        """Of the prediction of a method in METHODS, made now."""
        return cls(
            base_model,
            prediction.method,
            prediction.rank,
            t_cut,
            prediction.target,
            list(observed),
            str(trajectory),
            versions(),
            fit_from=prediction.fit_from,
            window=window or None,
        )

    @classmethod
    def of_baseline(
        cls,
        method: str,
        target: int | None,
        settings: dict[str, Any],
        base_model: str,
        t_cut: int,
        observed: Sequence[int],
        trajectory: Path,
        window: int = 0,
    ) -> "Provenance":
        """Of the prediction of a baseline, made now."""
        made = (base_model, method, 1, t_cut, target, list(observed), str(trajectory), versions())
        return cls(*made, settings=settings, window=window or None)

    @classmethod
    def of_reconstruction(
        cls, step: int, rank: int, base_model: str, observed: Sequence[int], trajectory: Path, window: int = 0
    ) -> "Provenance":
        """Of an observed step as the top directions of the observed steps give it, made now."""
        made = (base_model, "reconstruction", rank, observed[-1], step, list(observed), str(trajectory), versions())
        return cls(*made, step=step, window=window or None)

    def differing(self, other: "Provenance") -> list[tuple[str, Any, Any]]:
        """Key, ours and theirs of what makes other weights; versions are said not to."""
        ours, theirs = ({**record.to_json(), "fit_from": record._first()} for record in (self, other))
        passed = ("versions", "schema_version")
        keys = [key for key in {**ours, **theirs} if key not in passed]
        return [(key, ours.get(key), theirs.get(key)) for key in keys if ours.get(key) != theirs.get(key)]

    def _first(self) -> int | None:
        """Steps start at 1: from step 0 on is from step 1 on."""
        return None if self.fit_from is None else max(1, self.fit_from)


@dataclass(frozen=True)
class Checkout(Record):
    """What `relex.json` says of an observed checkpoint that was given back.

    Attributes:
        base_model: folder or Hub id of the base.
        step: the observed step.
        max_error: how far a weight can be from the engine's own.
        trajectory: its folder.
        versions: of what gave it back.
        window: of the trajectory, where it is not the first.
        after_jump: whether these are the weights with which training went on after a jump at that step, or an undone one.
        encodings: tensor -> how it was followed, of those that were in another way than the rest.
        metric, score: of the run's own validation, where the step was chosen by it.
    """

    base_model: str
    step: int
    max_error: float
    trajectory: str
    versions: dict[str, str]
    window: int | None = field(default=None, kw_only=True, metadata=IF_KNOWN)
    after_jump: bool | None = field(default=None, kw_only=True, metadata=IF_KNOWN)
    encodings: dict[str, str] | None = field(default=None, kw_only=True, metadata=IF_KNOWN)
    metric: str | None = field(default=None, kw_only=True, metadata=IF_KNOWN)
    score: float | None = field(default=None, kw_only=True, metadata=IF_KNOWN)
    schema_version: int = 1

    @classmethod
    def of(
        cls,
        step: int,
        max_error: float,
        base_model: str,
        trajectory: Path,
        window: int = 0,
        after_jump: bool = False,
        encodings: Mapping[str, str] | None = None,
        metric: str | None = None,
        score: float | None = None,
    ) -> "Checkout":
        """Of a step that is given back now."""
        made = (base_model, step, max_error, str(trajectory), versions())
        own = dict(encodings or {}) or None
        where = cls(*made, window=window or None, after_jump=after_jump or None, encodings=own)
        return replace(where, metric=metric, score=score)
