"""The recipe of the paper's figures: its plan, verl's command, and the report from scores."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("transformers")
from studied import base  # puts the recipes on the path
from verl_config import composed

# isort: split
from paper_figures import __main__ as recipe
from paper_figures import analysis, report, run
from paper_figures.design import CUTS, FULL, QUICK, TARGETS, Design

from relex_verl.run.schedule import Schedule
from relex_verl.verl_plugin.settings import checked_config

__all__ = ["base"]

SMALL = Design(steps=20, validate_every=4)


def test_the_papers_run_has_the_papers_cuts_and_targets() -> None:
    paper = Design(steps=500, validate_every=10)
    assert (tuple(paper.cuts), tuple(paper.targets), paper.aligned_cut) == (CUTS, TARGETS, 75)
    assert FULL.cuts == [20, 30, 40, 50]
    assert FULL.points[-1] == FULL.steps
    assert len(QUICK.cuts) == 3  # two of its shares are three steps, the least


def test_the_run_is_recorded_and_nothing_else(base: Path, tmp_path: Path) -> None:
    command = run.command(SMALL, base, tmp_path, (tmp_path / "train.parquet", tmp_path / "val.parquet"))
    options = command[command.index("verl.trainer.main_ppo") + 1 :]
    config = composed(*(option for option in options if not option.startswith(("+relex", "hydra."))), relex="default")
    relex = checked_config(config)
    assert (relex.t_cut, relex.record, relex.trajectory, relex.keep_best) == (None, "run", "bf16", True)
    schedule = Schedule(relex, 20)
    assert schedule.plan is None
    assert [step for step in range(22) if schedule.observes(step)] == list(range(1, 21))
    assert (config.trainer.total_training_steps, config.trainer.test_freq, config.trainer.save_freq) == (20, 4, 4)


def test_a_dry_run_says_what_would_be_done(monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["recipe", "--out", str(tmp_path), "--steps", "100", "--dry-run"])
    recipe.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("sweep: cuts [10, 15, 20, 25], targets [40, 60, 80, 100, 150, 200], 24 predictions")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(sys, "argv", ["recipe", "--steps", "19"])
    with pytest.raises(SystemExit, match="give 20 or more"):
        recipe.main()


def test_the_report_is_of_the_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is scored already is not scored again; the page gets the table."""
    design = replace(SMALL, steps=20)
    pairs = [(cut, target) for cut in design.cuts for target in design.targets if target > cut]
    swept = [{"t_cut": cut, "target": target, "path": f"cut_{cut}/relex-step_{target}"} for cut, target in pairs]
    metric = "val-core/addition/acc/mean@1"
    own = {step: 0.5 + step / 100 for step in range(0, 21, 4)}
    lines = [{"step": step, "metric": metric, "metrics": {metric: value}} for step, value in own.items()]
    scores = {f"swept/{one['path']}": 0.4 + one["target"] / 1000 for one in swept}
    scores |= {f"reconstructed/step_{step}": 0.5 + step / 110 for step in design.points}
    for path, content in {
        "swept/manifest.json": json.dumps({"predictions": swept}),
        "run/relex/validations.jsonl": "".join(json.dumps(line) + "\n" for line in lines),
        "scores.json": json.dumps(scores),
        "compared.json": json.dumps({"names": [], "rows": [], "tensors": [], "figures": ["/some/where"]}),
        "compared/alignment.png": "a picture",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(content)
    page = tmp_path / "page" / "README.md"
    page.parent.mkdir()
    page.write_text("# Page\n<!-- table accuracy -->\nold\n<!-- end -->\n")
    monkeypatch.setattr(report, "PAGE", page)
    monkeypatch.setattr(analysis, "EVALUATE", tmp_path / "never.py")
    folder, table = report.write(design, tmp_path, publish=True)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert rows[0] == ["T_cut", "Base", "observed at T_cut", *(f"step {target}" for target in design.targets)]
    assert rows[2] == ["the run itself, 20 steps", "50.0", "—", "58.0", "62.0", "66.0", "70.0", "—", "—"]
    assert rows[3] == ["3", "50.0", "—", "40.8", "41.2", "41.6", "42.0", "43.0", "**44.0**"]
    assert rows[4][:3] == ["4", "50.0", "54.0"]
    assert page.read_text() == f"# Page\n<!-- table accuracy -->\n{table}\n<!-- end -->\n"
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        path.name for path in (page.parent / "results").iterdir()
    )
    assert json.loads((folder / "scores.json").read_text())["run"]["20"] == pytest.approx(0.7)
    assert (folder / "figure_2.png").stat().st_size > 5000
