"""What a run left on disk, scored, as a table."""

from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from schedule import Schedule

from relex_verl.reporting.findings import CutReport
from relex_verl.reporting.provenance import Provenance


@dataclass
class Checkpoint:
    """A Hugging Face checkpoint and where it comes from."""

    origin: str
    step: int
    folder: Path
    accuracy: float | None = None


def predicted(out: Path) -> list[Checkpoint]:
    """All predicted checkpoints of the run, by method and step."""
    checkpoints = []
    for path in (out / "relex" / "predicted").glob("[!.]*/relex.json"):
        made = Provenance.read(path)
        if made.target is not None:
            checkpoints.append(Checkpoint(f"predicted ({made.method})", made.target, path.parent))
    return sorted(checkpoints, key=lambda checkpoint: (checkpoint.origin, checkpoint.step))


def trained(out: Path, schedule: Schedule) -> list[Checkpoint]:
    """The checkpoint that real training ended with, if it went on beyond the cut."""
    folder = out / "checkpoints" / f"global_step_{schedule.steps}" / "actor" / "huggingface"
    return [Checkpoint("trained", schedule.steps, folder)] if schedule.full and folder.exists() else []


def jumps(out: Path) -> Table:
    """What came of every cut of a run that jumps."""
    latest = CutReport.read(out / "relex" / "report.json")
    result = Table(title="Cuts")
    for column in ("step", "what", "to", "observed weights", "that prediction", "scores spent"):
        result.add_column(column, justify="left" if column in ("what", "to") else "right")
    for cut in (*latest.earlier_cuts, latest.summary):
        scores = ["-" if score is None else f"{score:.3f}" for score in (cut.advice.hold_score, cut.advice.score)]
        to = "" if cut.advice.target is None else f"step {cut.advice.target.target}"
        what = cut.advice.action.replace("_", " ")
        result.add_row(str(cut.t_cut), what, to, *scores, str(len(cut.validation_scores)))
    return result


def table(checkpoints: list[Checkpoint], real_run: dict[int, float]) -> Table:
    """Accuracy by checkpoint; with scores of the real run at the same steps, they stand beside it."""
    result = Table(title="Greedy accuracy on the validation set")
    result.add_column("weights")
    result.add_column("step", justify="right")
    result.add_column("accuracy", justify="right")
    compare = any(one.step in real_run for one in checkpoints if one.origin.startswith("predicted"))
    if compare:
        result.add_column("real run at that step", justify="right")
    result.add_column("folder", overflow="fold")
    best = max(one.accuracy or 0.0 for one in checkpoints)
    for one in checkpoints:
        score = "-" if one.accuracy is None else f"{one.accuracy:.3f}"
        row = [one.origin, str(one.step), f"[bold green]{score}[/]" if one.accuracy == best else score]
        if compare:
            row.append(f"{real_run[one.step]:.3f}" if one.step in real_run else "-")
        result.add_row(*row, str(one.folder))
    return result
