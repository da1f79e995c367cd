"""The run's own validation scores, kept beside its trajectory, and the best step by them."""

import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from relex_verl.pipeline.resuming import appears
from relex_verl.reporting.provenance import Checkout
from relex_verl.reporting.records import Record, RecordError
from relex_verl.run.config import RelexConfig
from relex_verl.run.ranks import Ranks
from relex_verl.trajectory.files import write_text
from relex_verl.trajectory.index import TrajectoryError

__all__ = ["FILE", "RunScores", "Validated", "best_of", "read_scores"]

logger = logging.getLogger("relex_verl")

FILE = "validations.jsonl"
KEPT = "val-core/"  # verl's core metrics, of all that a validation gives


@dataclass(frozen=True)
class Validated(Record):
    """One of the run's own validations, a line of `validations.jsonl`.

    Attributes:
        step: whose weights the rollout held; after a jump at that step, those that it jumped to.
        metric: the one that decides: `relex.score_metric`, or the host's core metric of the first data source; null: none.
        metrics: name -> value of the core metrics, and of that one.
    """

    step: int
    metric: str | None
    metrics: dict[str, float]
    schema_version: int = 1


def read_scores(path: Path) -> list[Validated]:
    """Of a file, one a step, ascending; none where there is no file.

    Raises:
        TrajectoryError: it is damaged.
    """
    if not path.exists():
        return []
    try:
        lines = enumerate(path.read_text().splitlines(), 1)
        return [Validated.from_json(json.loads(line), f"{path}, line {number}") for number, line in lines]
    except ValueError as error:
        raise TrajectoryError(f"{path} cannot be read: {error}. Remove it to go on without those scores") from None


def best_of(validated: Sequence[Validated], metric: str | None = None) -> tuple[Validated, str, float]:
    """The validation with the highest value; of equal ones the earliest.

    Args:
        validated: of a run.
        metric: by which; None for the one that decided at the last of them.

    Returns:
        It, the metric, and its value.

    Raises:
        ValueError: none has that metric.
    """
    by = metric or next((one.metric for one in reversed(validated) if one.metric is not None), None)
    having = [one for one in validated if by is not None and isfinite(one.metrics.get(by, float("nan")))]
    if by is None or not having:
        known = sorted({name for one in validated for name in one.metrics})
        raise ValueError(
            f"no validation of this run has {by or 'a metric to decide by'}; there: {', '.join(known) or 'none'}"
        )
    best = max(having, key=lambda one: (one.metrics[by], -one.step))
    return best, by, best.metrics[by]


class RunScores:
    """What the driver keeps of the run's own validations: every score, and the weights of the best."""

    def __init__(self, config: RelexConfig, base_model: str, folder: Path) -> None:
        """Nothing is read or written yet.

        Args:
            config: the `relex` node.
            base_model: folder or Hub id.
            folder: `relex.output_dir`.
        """
        self._config, self._base_model, self._folder = config, base_model, folder
        self._path, self._best = folder / FILE, folder / "best"

    def go_on_after(self, step: int) -> None:
        """Training goes on from a step: what was scored after it belongs to steps that are gone.

        Raises:
            TrajectoryError: the scores cannot be read.
        """
        scores = read_scores(self._path)
        if any(one.step > step for one in scores):
            self._write([one for one in scores if one.step <= step])

    def add(self, step: int, metrics: Mapping[str, float], core: str | None, ranks: Ranks) -> None:
        """Keep a validation, and with `relex.keep_best` the weights if none scored as much before.

        Args:
            step: of the weights, which are the engine's still.
            metrics: all that the host computed.
            core: its core metric, where it has one.
            ranks: all of them.
        """
        metric = self._config.score_metric or core
        kept = {name: float(value) for name, value in metrics.items() if name.startswith(KEPT) or name == metric}
        one = Validated(step, metric if metric in kept else None, kept)
        self._write([*(known for known in read_scores(self._path) if known.step < step), one])
        if not self._config.keep_best:
            return
        if one.metric is None:
            logger.warning(
                "RELEX: nothing is kept as best of step %d, whose validation has no %s", step, metric or "score"
            )
            return
        score, before = kept[one.metric], self._before(one.metric)
        if isfinite(score) and (before is None or score > before):
            self._keep(step, one.metric, score, ranks)

    def _before(self, metric: str) -> float | None:
        """What the weights that are kept scored; None where there are none, or by another metric."""
        try:
            known = Checkout.read(self._best / "relex.json")
        except (RecordError, OSError):
            return None
        return known.score if known.metric == metric else None

    def _keep(self, step: int, metric: str, score: float, ranks: Ranks) -> None:
        """`best` is a link: it leads to the old weights, all of them, until the new ones are complete."""
        folder = self._folder / f"best-step_{step}"
        trajectory = self._folder / "trajectory"
        facts = Checkout.of(step, 0.0, self._base_model, trajectory, metric=metric, score=score)
        ranks.ask("relex_keep", folder, facts.to_json())
        if not appears(folder / "relex.json"):
            raise TrajectoryError(f"the driver does not see {folder}: use a shared file system")
        link = self._folder / ".best.partial"
        link.unlink(missing_ok=True)
        link.symlink_to(folder.name, target_is_directory=True)
        os.replace(link, self._best)
        for other in self._folder.glob("best-step_*"):
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)
        logger.info("RELEX: step %d scores %.3f, the most so far: kept in %s", step, score, self._best)

    def _write(self, scores: Sequence[Validated]) -> None:
        write_text(self._path, "".join(json.dumps(one.to_json()) + "\n" for one in scores))
