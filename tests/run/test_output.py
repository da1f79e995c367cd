"""The output folder: nobody's results are lost or taken for another's, and what is at the top is the latest."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cut_reports import advised, cut_report

from relex_verl.maths.extrapolators import Prediction
from relex_verl.run.config import ConfigError
from relex_verl.run.output import RESULTS, OutputFolder
from relex_verl.run.validation import Validation
from relex_verl.trajectory.index import TrajectoryError

RUN = {"base model": "base", "project": "p", "experiment": "e"}


def left_by(folder: Path, steps: list[int], base: str = "base", experiment: str = "e") -> OutputFolder:
    """A folder in which a run has observed some steps and been cut."""
    output = OutputFolder(folder)
    output.index.parent.mkdir(parents=True)
    index = {"base_model": base, "run": {"project": "p", "experiment": experiment}, "windows": [{"steps": steps}]}
    output.index.write_text(json.dumps(index))
    for name in ("predicted", "recommended", "scores", "figures"):
        (folder / name).mkdir()
    (folder / "report.json").write_text("{}")
    return output


def test_an_empty_folder_is_anyones(tmp_path: Path) -> None:
    OutputFolder(tmp_path / "new").claim(RUN, "auto")
    OutputFolder(tmp_path).claim(RUN, "disable")
    assert list(tmp_path.iterdir()) == []


HOLDER = (
    "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); sys.stdin.read()"
)


def test_one_run_at_a_time(tmp_path: Path) -> None:
    """Across processes; the one that comes second is told who was first, and a killed one keeps nobody out."""
    (tmp_path / ".lock").write_text("process 7 on node-3, since yesterday\n")
    command = [sys.executable, "-c", HOLDER, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(ConfigError, match=r"output_dir=.*another run writes there \(process 7 on node-3.*end the"):
            OutputFolder(tmp_path).hold()
        other.kill()
    first = OutputFolder(tmp_path)
    first.hold()
    assert f"process {os.getpid()} on " in (tmp_path / ".lock").read_text()
    OutputFolder(tmp_path).hold()  # this process is one run


@pytest.mark.parametrize(
    ("there", "resume_mode", "says"),
    [
        ({}, "disable", "trainer.resume_mode=disable starts a new one"),
        ({}, "resume_path", "trainer.resume_mode=resume_path starts a new one"),
        ({"base": "other"}, "auto", "base model 'other' there, 'base' here"),
        ({"experiment": "other"}, "auto", "experiment 'other' there, 'e' here"),
    ],
)
def test_the_steps_of_another_run_are_refused(tmp_path: Path, there: Any, resume_mode: str, says: str) -> None:
    output = left_by(tmp_path, [1, 2], **there)
    with pytest.raises(ConfigError, match=re.escape(says)) as refusal:
        output.claim(RUN, resume_mode)
    assert "own relex.output_dir, or remove that folder" in str(refusal.value)
    assert output.index.exists()


def test_an_attempt_without_a_checkpoint_is_set_aside_whole(tmp_path: Path) -> None:
    output = left_by(tmp_path, [1, 2])
    before = {path.relative_to(tmp_path) for path in tmp_path.rglob("*")}
    output.claim(RUN, "auto")
    (aside,) = tmp_path.iterdir()
    assert aside.name.startswith("superseded-")
    assert {path.relative_to(aside) for path in aside.rglob("*")} == before


def test_results_without_a_trajectory_are_set_aside(tmp_path: Path) -> None:
    output = left_by(tmp_path, [])
    output.claim(RUN, "disable")
    (aside,) = tmp_path.glob("superseded-*")
    assert {path.name for path in aside.iterdir()} <= set(RESULTS)
    assert output.index.exists()  # with no step in it: there is nothing to keep


def test_attempts_of_one_second_are_set_aside_beside_each_other(tmp_path: Path) -> None:
    for _ in range(3):  # a clock can be set back, too
        left_by(tmp_path, [1]).claim(RUN, "auto")
    aside = list(tmp_path.glob("superseded-*"))
    assert len(aside) == 3
    assert all((one / "trajectory/index.json").exists() for one in aside)


def test_an_index_that_cannot_be_read_is_not_overwritten(tmp_path: Path) -> None:
    output = left_by(tmp_path, [1])
    output.index.write_text("{")
    with pytest.raises(TrajectoryError, match="cannot be read: give this run its own"):
        output.claim(RUN, "auto")


def test_cuts_are_kept_each_and_the_latest_at_the_top(tmp_path: Path) -> None:
    output = OutputFolder(tmp_path)
    first = cut_report(4, advice=advised("keep_training"), backtests={"relex": float("nan")})
    output.keep(first)
    output.keep(cut_report(16))
    output.keep_scores(16, {"relex-step_20": Validation({}, "", {"1+1=": [1.0, 0.0]}, 0.1)})
    assert json.loads((tmp_path / "report.json").read_text())["t_cut"] == 16
    assert json.loads((tmp_path / "scores/cut_4/report.json").read_text())["backtests"] == {"relex": None}
    assert json.loads((tmp_path / "scores/cut_16/relex-step_20.json").read_text()) == {"1+1=": [1.0, 0.0]}
    assert [cut.t_cut for cut in output.earlier_cuts(16)] == [4, 16]
    assert output.earlier_cuts(15) == [first.summary]
    assert output.earlier_cuts(3) == []


def test_a_cut_that_is_made_again_clears_itself_and_what_came_after(tmp_path: Path) -> None:
    output = OutputFolder(tmp_path)
    for t_cut in (4, 8, 12):
        output.keep(cut_report(t_cut))
    (tmp_path / "figures").mkdir()
    output.begin_cut(8)
    assert [cut.t_cut for cut in output.earlier_cuts(100)] == [4]
    assert not (tmp_path / "figures").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", r"cut_4/report\.json is damaged"),
        ("{}", r"cut_4/report\.json lacks t_cut"),
        ('{"schema_version": 9}', r"cut_4/report\.json has schema_version 9, this relex-verl reads up to 1"),
    ],
)
def test_a_report_that_cannot_be_read_is_named(tmp_path: Path, content: str, says: str) -> None:
    output = OutputFolder(tmp_path)
    output.keep(cut_report(4))
    (tmp_path / "scores/cut_4/report.json").write_text(content)
    with pytest.raises(TrajectoryError, match=f"{says}.*: remove that file, or this run's output folder"):
        output.earlier_cuts(9)


def test_recommended_is_replaced_whole_and_goes_with_the_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relex_verl.run.output.appears", Path.exists)  # without a minute's patience
    output, first, second = OutputFolder(tmp_path), Prediction("relex", 20), Prediction("relex", 30)
    for prediction in (first, second):
        output.predicted(prediction).mkdir(parents=True)
        (output.predicted(prediction) / "model.safetensors").write_text(prediction.folder_name)
        (output.predicted(prediction) / "relex.json").write_text("{}")
    output.recommend(first)
    weights = tmp_path / "recommended" / "model.safetensors"
    assert os.path.samefile(weights, output.predicted(first) / "model.safetensors")
    output.recommend(second)
    assert weights.read_text() == "relex-step_30"
    with pytest.raises(TrajectoryError, match="does not see"):
        output.recommend(Prediction("relex", 99))
    assert weights.read_text() == "relex-step_30"
    output.recommend(None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["predicted"]
    output.recommend(None)


def test_recommended_is_copied_where_files_cannot_be_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    output, winner = OutputFolder(tmp_path), Prediction("relex", 20)
    output.predicted(winner).mkdir(parents=True)
    (output.predicted(winner) / "relex.json").write_text("{}")
    output.recommend(winner)
    assert (tmp_path / "recommended" / "relex.json").read_text() == "{}"
