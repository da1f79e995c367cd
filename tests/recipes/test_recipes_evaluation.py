"""Evaluation of checkpoints and sweeps, and the paper's tables."""

import csv
import json
import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("verl", reason="the recipes are verl's")

from recipe_tools import bash, check_by_verl, composed, datasets_table, module, verl_commands
from verl.trainer.ppo.utils import need_reference_policy


def sweep(folder: Path, targets: tuple[int, ...] = (200, 500)) -> Path:
    """A manifest as `relex-verl sweep` writes it."""
    predictions = []
    for target in targets:
        (folder / f"relex-step_{target}").mkdir(parents=True)
        predictions.append({"path": f"relex-step_{target}", "t_cut": 75, "target": target, "method": "relex"})
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps({"predictions": predictions}))
    return manifest


@pytest.mark.parametrize("family", ["qwen2_5_math", "qwen3"])
def test_the_printed_evaluation_composes(family, tmp_path):
    manifest = sweep(tmp_path / "a b=c", targets=(200,))
    done = bash("evaluate.sh", family, "--manifest", manifest, "--data", "/d", "--out", tmp_path / "out", "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    commands = verl_commands(done.stdout)
    assert len(commands) == 2
    for group, (name, overrides, environment) in zip(("math", "ood"), commands, strict=True):
        config = composed(name, overrides)
        check_by_verl(config)
        assert "relex" not in config
        assert config.trainer.val_only
        assert not need_reference_policy(config)
        assert config.actor_rollout_ref.model.path == str(manifest.parent / "relex-step_200")
        log = f"{tmp_path}/out/relex-cut_75-step_200/{group}.jsonl"
        assert environment == {"VERL_FILE_LOGGER_PATH": log}
        sampling, length = config.actor_rollout_ref.rollout.val_kwargs, config.data.max_response_length
        assert length == (4096 if family == "qwen2_5_math" else 16384)
        if group == "math":
            assert config.data.val_files == ["/d/math_test.parquet"]
            assert (sampling.n, sampling.temperature) == (1, 0 if family == "qwen2_5_math" else 0.7)
        else:
            names = [name for name, spec in datasets_table().items() if spec.get("group") == "ood"]
            assert config.data.val_files == [f"/d/{name}.parquet" for name in names]
            assert (sampling.n, sampling.temperature, sampling.do_sample) == (8, 0.7, True)
    assert "collect.py" in done.stdout.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_one_checkpoint_is_named_by_its_relex_json_or_its_label(tmp_path):
    folder = tmp_path / "relex-step_500"
    folder.mkdir()
    provenance = {"base_model": "base", "method": "relex", "rank": 1, "t_cut": 75, "target": 500}
    (folder / "relex.json").write_text(json.dumps(provenance))
    one = module("checkpoints").one
    assert one(str(folder), None)[2] == {"method": "relex", "t_cut": 75, "target": 500, "model": str(folder)}
    assert one(str(folder), "mine")[2] == {"method": "mine", "t_cut": 75, "target": 500, "model": str(folder)}
    name, path, facts = one("Qwen/Qwen3-4B-Base", "Base model")
    assert (name, path) == ("Base_model", "Qwen/Qwen3-4B-Base")
    assert (facts["method"], facts["target"]) == ("Base model", None)


def test_an_observed_checkpoint_is_no_prediction(tmp_path):
    """What `relex-verl checkout` writes has a relex.json, too."""
    folder = tmp_path / "step_30"
    folder.mkdir()
    (folder / "relex.json").write_text(json.dumps({"base_model": "base", "step": 30, "max_error": 0.0}))
    name, path, facts = module("checkpoints").one(str(folder), None)
    assert (name, path) == ("step_30", str(folder))
    assert facts == {"method": "observed step 30", "t_cut": None, "target": None, "model": str(folder)}
    done = bash("evaluate.sh", "qwen3", "--model", folder, "--out", tmp_path / "out", "--dry-run")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("predictions", "hint"),
    [
        ([], "no predictions"),
        ([{"path": "gone", "t_cut": 75, "target": 200, "method": "relex"}], "not there"),
        ([{"path": ".", "t_cut": 75, "target": 200, "method": "relex"}] * 2, "two predictions"),
    ],
)
def test_a_broken_manifest_is_refused(predictions, hint, tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"predictions": predictions}))
    done = bash("evaluate.sh", "qwen3", "--manifest", tmp_path / "manifest.json", "--dry-run")
    assert done.returncode == 1
    assert hint in done.stderr


STAND_IN = """#!/usr/bin/env bash
# Python for everything but verl, which logs what its file logger would, and fails for one checkpoint.
if [[ "$1 $2" != "-m verl.trainer.main_ppo" ]]; then exec "{python}" "$@"; fi
echo "$VERL_FILE_LOGGER_PATH" >>"{calls}"
[[ $VERL_FILE_LOGGER_PATH != *step_200/ood* ]] || exit 1
cat "{logs}/$(basename "$VERL_FILE_LOGGER_PATH")" >"$VERL_FILE_LOGGER_PATH"
"""


def write_logs(folder: Path, scores: dict[str, dict[str, list[list[float]]]]) -> None:
    """Logs in verl's own words: its metrics, its names for them, its file logger.

    Args:
        folder: one file a group goes here.
        scores: group -> data_source -> problem -> one score an answer.
    """
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer
    from verl.utils.tracking import FileLogger

    folder.mkdir(parents=True, exist_ok=True)
    for group, by_source in scores.items():
        sources, uids, acc = [], [], []
        for source, problems in by_source.items():
            for number, answers in enumerate(problems):
                sources += [source] * len(answers)
                uids += [f"{source}-{number}"] * len(answers)
                acc += answers
        metrics = PPOTrainer._val_metrics_update(None, sources, uids, {"reward": acc, "acc": acc}, [])
        os.environ["VERL_FILE_LOGGER_PATH"] = str(folder / f"{group}.jsonl")
        try:
            logger = FileLogger("project", "experiment")
        finally:
            del os.environ["VERL_FILE_LOGGER_PATH"]
        logger.log(metrics, step=0)
        logger.finish()


def ood_scores(right: int) -> dict[str, list[list[float]]]:
    """Two problems a benchmark, `right` of the 16 answers right."""
    flat = [1.0] * right + [0.0] * (16 - right)
    sources = [spec["data_source"] for spec in datasets_table().values() if spec.get("group") == "ood"]
    return {source: [flat[:8], flat[8:]] for source in sources}


def test_a_sweep_is_scored_once_and_ends_in_the_papers_table(tmp_path):
    math = {"DigitalLearningGmbH/MATH-lighteval": [[1.0], [1.0], [0.0], [1.0]]}
    write_logs(tmp_path / "logs", {"math": math, "ood": ood_scores(4)})
    calls, python = tmp_path / "calls", tmp_path / "python"
    python.write_text(STAND_IN.format(python=sys.executable, calls=calls, logs=tmp_path / "logs"))
    python.chmod(0o755)
    manifest, out = sweep(tmp_path / "sweep"), tmp_path / "out"

    first = bash("evaluate.sh", "qwen3", "--manifest", manifest, "--out", out, PYTHON=str(python))
    assert first.returncode == 1  # one of four runs failed, the others were made
    assert "failed: relex-cut_75-step_200 (ood)" in first.stderr
    assert len(calls.read_text().splitlines()) == 4
    with (out / "table.csv").open(newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["Method", "Cut", "Target", "MATH", "AIME25", "AIME26", "HMMT25", "OlympBench", "AMC23", "Average"]
    assert rows[0] == ["relex", "75", "200", "75.0", "", "", "", "", "", ""]
    assert rows[1] == ["relex", "75", "500", "75.0", *["25.0"] * 5, "33.3"]
    assert "avg@8" in first.stdout
    assert "pass@1" in first.stdout

    # Another checkpoint under a name that is taken must not count as scored.
    (tmp_path / "other" / "relex-cut_75-step_500").mkdir(parents=True)
    other = bash("evaluate.sh", "qwen3", "--model", tmp_path / "other" / "relex-cut_75-step_500", "--out", out)
    assert other.returncode == 2
    assert "--label" in other.stderr

    second = bash("evaluate.sh", "qwen3", "--manifest", manifest, "--out", out, PYTHON=str(python))
    assert second.stdout.count("already scored") == 3
    assert len(calls.read_text().splitlines()) == 5


def checkpoint(
    results: Path,
    name: str,
    method: str,
    target: int | None,
    score: float,
    samples: int = 8,
    t_cut: int | None = 75,
) -> None:
    """What evaluate.sh leaves of one checkpoint: `score` on every out-of-domain benchmark."""
    sources = [spec["data_source"] for spec in datasets_table().values() if spec.get("group") == "ood"]
    data = {f"val-core/{source}/acc/mean@{samples}": score for source in sources}
    data |= {f"val-aux/{source}/acc/std@{samples}": 0.3 for source in sources} | {"val-aux/num_turns/mean": 2.0}
    (results / name).mkdir(parents=True)
    (results / name / "ood.jsonl").write_text(json.dumps({"step": 0, "data": data}) + "\n")
    (results / name / "checkpoint.json").write_text(json.dumps({"method": method, "t_cut": t_cut, "target": target}))


def test_the_table_puts_what_was_trained_first_and_marks_the_best_prediction(tmp_path):
    collect = module("collect")
    checkpoint(tmp_path, "b", "relex", 500, 0.5)
    checkpoint(tmp_path, "a", "relex", 1000, 0.125)
    checkpoint(tmp_path, "f", "alpharl", None, 0.75)  # for a score, not for a step
    checkpoint(tmp_path, "c", "Base", None, 0.0625, t_cut=None)
    checkpoint(tmp_path, "d", "RLVR 500", None, 1.0, t_cut=None)
    checkpoint(tmp_path, "e", "reconstruction", 50, 0.875)  # of a step that was observed
    rows, columns = collect.collect(tmp_path)
    assert [(row.method, row.target) for row in rows] == [
        ("Base", None),
        ("RLVR 500", None),
        ("reconstruction", 50),
        ("alpharl", None),
        ("relex", 500),
        ("relex", 1000),
    ]
    assert [row.average(columns) for row in rows] == [6.25, 100.0, 87.5, 75.0, 50.0, 12.5]
    table = collect.rich_table(rows, columns)
    assert list(table.columns[-1].cells) == ["6.2", "100.0", "87.5", "[bold]75.0[/bold]", "50.0", "12.5"]


def test_a_sweep_over_cuts_is_the_papers_table_3(tmp_path, capsys):
    """Rows are cuts, columns targets, the best of a row is bold, and a dash stands where there is no checkpoint."""
    collect = module("collect")
    grid = {(50, 200): 0.5, (50, 500): 0.625, (75, 200): 0.375, (75, 500): 0.25, (75, 750): 0.375}
    for (cut, target), score in grid.items():
        checkpoint(tmp_path, f"relex-{cut}-{target}", "relex", target, score, t_cut=cut)
    checkpoint(tmp_path, "poly", "poly", 500, 0.1)  # one cut: no grid
    checkpoint(tmp_path, "Base", "Base", None, 0.0625, t_cut=None)
    rows, columns = collect.collect(tmp_path)
    [table] = collect.grids(rows, "AIME25")
    assert [column.header for column in table.columns] == ["Cut", "200", "500", "750"]
    assert [list(column.cells) for column in table.columns] == [
        ["50", "75"],
        ["50.0", "[bold]37.5[/bold]"],
        ["[bold]62.5[/bold]", "25.0"],
        ["—", "[bold]37.5[/bold]"],
    ]
    assert (table.title, table.caption) == ("relex, AIME25", "Base 6.2")
    collect.main([str(tmp_path), "--grid", "AMC23"])
    assert "relex, AMC23" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        collect.main([str(tmp_path), "--grid", "MATH"])
    assert columns[0] == "AIME25"


def test_scores_that_cannot_be_compared_are_refused(tmp_path):
    collect = module("collect")
    checkpoint(tmp_path, "a", "relex", 500, 0.5)
    checkpoint(tmp_path, "b", "other", None, 0.5, samples=1)
    with pytest.raises(SystemExit, match="AIME25: scored with \\[1, 8\\]"):
        collect.collect(tmp_path)
    with pytest.raises(SystemExit, match="no scores"):
        collect.collect(tmp_path / "a" / "nothing")
