"""What `relex-verl` gives of the recorded run, and the scores of what it gives. What is there is not made again."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from data import files
from rich.console import Console

from paper_figures.design import Design
from paper_figures.run import trajectory_of
from relex_verl.run.scores import FILE, read_scores
from relex_verl.trajectory.files import write_json

EVALUATE = Path(__file__).parents[1] / "quickstart" / "evaluate.py"


def relex_verl(*arguments: object) -> str:
    """A command; what it prints.

    Raises:
        RuntimeError: it failed.
    """
    command = [sys.executable, "-m", "relex_verl", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"relex-verl {' '.join(map(str, arguments))}: {done.stderr.strip()}")
    return done.stdout


def predict(design: Design, out: Path) -> None:
    """Table 3's grid of predictions, Figure 2's reconstructions, Figure 6's comparison."""
    trajectory, say = trajectory_of(out), Console()
    cuts, targets, points = (",".join(map(str, of)) for of in (design.cuts, design.targets, design.points))
    say.print(f"relex-verl sweep: cuts {cuts}, targets {targets}", highlight=False)
    relex_verl("sweep", trajectory, "--t-cut", cuts, "--target", targets, "--out", out / "swept", "--json")
    for step in design.points:
        if not (out / "reconstructed" / f"step_{step}" / "relex.json").exists():
            say.print(f"relex-verl reconstruct: step {step}", highlight=False)
            relex_verl("reconstruct", trajectory, "--step", step, "--out", out / "reconstructed" / f"step_{step}")
    if not (out / "compared.json").exists():
        say.print(f"relex-verl compare: cut {design.aligned_cut}, steps {points}", highlight=False)
        options = (
            "--t-cut",
            design.aligned_cut,
            "--steps",
            points,
            "--method",
            "relex,hold",
            "--out",
            out / "compared",
        )
        write_json(out / "compared.json", json.loads(relex_verl("compare", trajectory, *options, "--json")))


def predictions(out: Path) -> dict[tuple[int, int], Path]:
    """(cut, target) -> folder of each prediction."""
    manifest = json.loads((out / "swept" / "manifest.json").read_text())
    return {(one["t_cut"], one["target"]): out / "swept" / one["path"] for one in manifest["predictions"]}


def reconstructions(design: Design, out: Path) -> dict[int, Path]:
    """Step -> folder."""
    return {step: out / "reconstructed" / f"step_{step}" for step in design.points}


def own_scores(out: Path) -> dict[int, float]:
    """Step -> accuracy, by the run's own validations."""
    validated = read_scores(trajectory_of(out).parent / FILE)
    return {one.step: one.metrics[one.metric] for one in validated if one.metric is not None}


def score(design: Design, out: Path) -> dict[Path, float]:
    """Accuracy of every prediction and reconstruction on the run's validation set, in the quickstart's way."""
    path = out / "scores.json"
    known: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
    folders = [*predictions(out).values(), *reconstructions(design, out).values()]
    missing = [folder for folder in folders if str(folder.relative_to(out)) not in known]
    if missing:
        with Console().status(f"scoring {len(missing)} checkpoints"):
            for folder, accuracy in _evaluated(missing, files(out / "run" / "data")[1], out / "evaluate.log"):
                known[str(folder.relative_to(out))] = accuracy
                write_json(path, known)
    return {folder: known[str(folder.relative_to(out))] for folder in folders}


def _evaluated(folders: list[Path], validation_file: Path, log: Path) -> Iterator[tuple[Path, float]]:
    command = [sys.executable, str(EVALUATE), "--val", str(validation_file), *map(str, folders)]
    with log.open("w") as noise, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=noise, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith('{"checkpoint"'):
                scored = json.loads(line)
                yield Path(scored["checkpoint"]), scored["accuracy"]
    if process.returncode:
        raise RuntimeError(f"{EVALUATE.name} ended with {process.returncode}: see {log}")
