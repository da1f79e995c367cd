"""Figure 2, Table 3 and the files beside them, from the scores."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from study.report import fill

from paper_figures import analysis
from paper_figures.design import Design
from relex_verl.trajectory.files import write_json

PAGE = Path(__file__).parent / "README.md"
DPI = 100
NONE = "—"  # as the paper has it


def figure_2(path: Path, own: Mapping[int, float], reconstructed: Mapping[int, float]) -> None:
    """Accuracy of the run and of its rank-1 reconstruction, by step."""
    figure, axes = plt.subplots(figsize=(5.2, 3.6))
    axes.axhline(own[0], color="0.5", linestyle=":", label="base")
    axes.plot(list(own), list(own.values()), color="tab:blue", marker=".", label="the run itself")
    steps = sorted(reconstructed)
    axes.plot(
        steps, [reconstructed[step] for step in steps], "--", color="tab:red", marker="o", label="rank-1 reconstruction"
    )
    axes.set_xlabel("training step")
    axes.set_ylabel("accuracy on the validation set")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def table_3(design: Design, own: Mapping[int, float], predicted: Mapping[tuple[int, int], float]) -> str:
    """Accuracy in percent by cut and target; the paper's layout, and the run's own scores at the cut and at each target."""
    columns = ["T_cut", "Base", "observed at T_cut", *(f"step {target}" for target in design.targets)]
    last = max(own)
    own_row = [_percent(own.get(step)) for step in (0, None, *design.targets)]
    lines = [columns, ["---"] * len(columns), [f"the run itself, {last} steps", *own_row]]
    for cut in design.cuts:
        scores = [predicted.get((cut, target)) for target in design.targets]
        best = max(score for score in scores if score is not None)
        row = [_percent(score, bold=score == best) for score in scores]
        lines.append([str(cut), _percent(own.get(0)), _percent(own.get(cut)), *row])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _percent(score: float | None, bold: bool = False) -> str:
    if score is None:
        return NONE
    return f"**{100 * score:.1f}**" if bold else f"{100 * score:.1f}"


def write(design: Design, out: Path, publish: bool) -> tuple[Path, str]:
    """Write `results/` below `out`; published, beside the page too, and the table into it.

    Returns:
        The folder, and the table.
    """
    folder, own, scores = out / "results", analysis.own_scores(out), analysis.score(design, out)
    folder.mkdir(parents=True, exist_ok=True)
    predicted = {where: scores[path] for where, path in analysis.predictions(out).items()}
    reconstructed = {step: scores[path] for step, path in analysis.reconstructions(design, out).items()}
    figure_2(folder / "figure_2.png", own, reconstructed)
    shutil.copy(out / "compared" / "alignment.png", folder / "figure_6.png")
    table = table_3(design, own, predicted)
    (folder / "table_3.md").write_text(f"{table}\n")
    by_cut = [{"t_cut": cut, "target": target, "accuracy": score} for (cut, target), score in sorted(predicted.items())]
    write_json(folder / "scores.json", {"run": own, "reconstructed": reconstructed, "predicted": by_cut})
    compared = json.loads((out / "compared.json").read_text())
    write_json(folder / "alignment.json", {key: compared[key] for key in ("names", "rows", "tensors")})
    if publish:
        shutil.copytree(folder, PAGE.parent / "results", dirs_exist_ok=True)
        fill(PAGE, {"accuracy": table})
    return folder, table
