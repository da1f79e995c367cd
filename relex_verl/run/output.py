"""The run's output folder as the driver keeps it: whose it is, what earlier cuts found, what is recommended now."""

import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from relex_verl.maths.extrapolators import Prediction
from relex_verl.pipeline.resuming import appears
from relex_verl.reporting.findings import CutReport, EarlierCut
from relex_verl.reporting.records import RecordError, strict
from relex_verl.run.config import ConfigError
from relex_verl.run.validation import Validation
from relex_verl.trajectory.alone import hold
from relex_verl.trajectory.files import write_json
from relex_verl.trajectory.index import TrajectoryError

__all__ = ["OutputFolder"]

logger = logging.getLogger("relex_verl")

RESULTS = (
    "predicted", "recommended", "scores", "figures", "before_jump", "report.json", "report.html", "best",
    "validations.jsonl",
)  # fmt: skip


class OutputFolder:
    """`relex.output_dir`.

    Every cut keeps its report and its scores in `scores/cut_<t>`; `report.json`, `report.html`, `figures` and
    `recommended` at the top are those of the latest.
    """

    def __init__(self, path: Path) -> None:
        """Nothing is read or written yet."""
        self.path = path

    @property
    def index(self) -> Path:
        """index.json of the trajectory."""
        return self.path / "trajectory" / "index.json"

    def predicted(self, prediction: Prediction) -> Path:
        """Where a predicted checkpoint goes."""
        return self.path / "predicted" / prediction.folder_name

    def cut(self, t_cut: int) -> Path:
        """Where the report and the scores of a cut go; made if need be."""
        folder = self.path / "scores" / f"cut_{t_cut}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    # Whose it is

    def hold(self) -> None:
        """Keep the runs of other processes out for as long as this one lives; what a killed run held is nobody's.

        Raises:
            ConfigError: another run that is alive writes there.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock, this = self.path / ".lock", f"process {os.getpid()} on {platform.node()}"
        lock.touch()
        owner = lock.read_text().strip()
        if hold(lock, self):
            lock.write_text(f"{this}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        elif not owner.startswith(f"{this},"):
            cure = "give this run its own relex.output_dir, or end the other"
            said = f"another run writes there ({owner or 'it does not say which'}): {cure}"
            raise ConfigError("relex.output_dir", str(self.path), said)

    def claim(self, run: Mapping[str, Any], resume_mode: str) -> None:
        """Make room for a run that starts at step 0, without losing what another one left here.

        A run that was killed before verl's first checkpoint and is started again with resume_mode=auto starts at step 0
        as well: it must not be refused each time, so what lies here is set aside, never deleted.

        Args:
            run: what identifies the run.
            resume_mode: verl's `trainer.resume_mode`.

        Raises:
            ConfigError: the folder holds the observed steps of another run.
            TrajectoryError: its index cannot be read.
        """
        index = self._found()
        observed = any(window.get("steps") for window in index.get("windows", []))
        if observed:
            known = {"base model": index.get("base_model"), **index.get("run", {})}
            differing = [
                f"{key} {known.get(key)!r} there, {run[key]!r} here" for key in run if known.get(key) != run[key]
            ]
            if differing:
                self._refuse("; ".join(differing))
            if resume_mode != "auto":
                self._refuse(f"trainer.resume_mode={resume_mode} starts a new one")
        left = [self.path / name for name in RESULTS if (self.path / name).exists()]
        left += self.path.glob("best-step_*")
        left += [self.index.parent] if observed else []
        if not left:
            return
        now, number = time.strftime("superseded-%Y%m%d-%H%M%S"), 1
        while (aside := self.path / (now if number == 1 else f"{now}-{number}")).exists():  # clocks are set back, too
            number += 1
        aside.mkdir()
        for path in left:
            path.rename(aside / path.name)
        logger.warning(
            "RELEX: this run starts at step 0, as verl has no checkpoint of it, but %s holds an earlier attempt: it is set "
            "aside in %s", self.path, aside,
        )  # fmt: skip

    def _found(self) -> dict[str, Any]:
        if not self.index.exists():
            return {}
        try:
            index: dict[str, Any] = json.loads(self.index.read_text())
            return index
        except ValueError:
            cure = f"give this run its own relex.output_dir, or remove {self.index.parent}"
            raise TrajectoryError(f"{self.index} cannot be read: {cure}") from None

    def _refuse(self, why: str) -> None:
        cure = "give this run its own relex.output_dir, or remove that folder"
        raise ConfigError("relex.output_dir", str(self.path), f"holds the trajectory of another run ({why}): {cure}")

    # What earlier cuts found

    def earlier_cuts(self, step: int) -> list[EarlierCut]:
        """The cuts up to a step that came to a verdict, in their order.

        Raises:
            TrajectoryError: a report cannot be read.
        """
        cuts = []
        for path in sorted(self.path.glob("scores/cut_*/report.json"), key=_cut_of):
            if _cut_of(path) <= step:
                try:
                    cuts.append(CutReport.read(path).summary)
                except RecordError as error:
                    raise TrajectoryError(f"{error}: remove that file, or this run's output folder") from None
        return cuts

    def begin_cut(self, t_cut: int) -> None:
        """Clear what must not be taken for this cut's: pictures of the one before, and all of cuts that are made again.

        Training that resumes from before a cut makes it anew; what it gave then belongs to steps that are gone.
        """
        shutil.rmtree(self.path / "figures", ignore_errors=True)
        for path in self.path.glob("scores/cut_*"):
            if _number(path) >= t_cut:
                shutil.rmtree(path)

    def decide(self, report: CutReport, validations: Mapping[str, Validation]) -> None:
        """Write what was decided at a cut, before it is carried out: it counts as soon as the window after it begins."""
        self.keep_scores(report.t_cut, validations)
        write_json(self._decided(report.t_cut), report.to_json())

    def decided(self, t_cut: int) -> CutReport | None:
        """What was decided at a cut whose report was never written; None where that is not there, or damaged."""
        try:
            return CutReport.read(self._decided(t_cut))
        except (OSError, RecordError):
            return None

    def _decided(self, t_cut: int) -> Path:
        return self.cut(t_cut) / "decided.json"

    def keep(self, report: CutReport) -> None:
        """Write the report of a cut, for good and as the latest."""
        content = report.to_json()
        write_json(self.cut(report.t_cut) / "report.json", content)
        write_json(self.path / "report.json", content)
        self._decided(report.t_cut).unlink(missing_ok=True)

    def keep_scores(self, t_cut: int, validations: Mapping[str, Validation]) -> None:
        """Write every sample's score, one file a scored set of weights: prompt -> scores."""
        for name, validation in validations.items():
            write_json(self.cut(t_cut) / f"{name}.json", strict(validation.samples))

    def observed_scores(self, t_cut: int) -> Validation | None:
        """What the weights of a cut scored, prompt by prompt; None where that is not there, or damaged."""
        path = self.path / "scores" / f"cut_{t_cut}" / f"observed-step_{t_cut}.json"
        try:
            samples = {
                str(prompt): [float(one) for one in scores] for prompt, scores in json.loads(path.read_text()).items()
            }
        except (OSError, ValueError, TypeError, AttributeError):
            return None
        return Validation({}, "", {prompt: scores for prompt, scores in samples.items() if scores}, 0.0)

    # What is recommended

    def recommend(self, winner: Prediction | None) -> None:
        """Put the winner's checkpoint at `recommended`, whole or not at all; where none has won, none stays.

        Files are linked where the file system can. The old checkpoint is there until the new one is complete.

        Raises:
            TrajectoryError: the driver does not see what the ranks have written.
        """
        if winner is not None and not appears(self.predicted(winner) / "relex.json"):
            raise TrajectoryError(f"the driver does not see {self.predicted(winner)}: use a shared file system")
        recommended = self.path / "recommended"
        partial, replaced = (recommended.with_name(f".recommended.{name}") for name in ("partial", "replaced"))
        for leftover in (partial, replaced):
            shutil.rmtree(leftover, ignore_errors=True)
        if winner is not None:
            shutil.copytree(self.predicted(winner), partial, copy_function=_link_or_copy)
        if recommended.exists():
            recommended.rename(replaced)
        if winner is not None:
            partial.rename(recommended)
        shutil.rmtree(replaced, ignore_errors=True)


def _cut_of(path: Path) -> int:
    return _number(path.parent)


def _number(folder: Path) -> int:
    return int(folder.name.removeprefix("cut_"))


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
