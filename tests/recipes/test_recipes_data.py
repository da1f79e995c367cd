"""Data and reward of the recipe for MATH."""

import sys
import types

import pandas as pd
import pytest
from omegaconf import OmegaConf

pytest.importorskip("verl", reason="the recipes are verl's")

from recipe_tools import datasets_table, module


def test_the_table_of_datasets_has_the_papers_benchmarks():
    table = datasets_table()
    columns = [spec["column"] for spec in table.values() if "column" in spec]
    assert columns == ["MATH", "MATH-500", "AIME25", "AIME26", "HMMT25", "OlympBench", "AMC23"]
    required = {"hub", "split", "problem", "answer", "rows", "data_source"}
    for spec in table.values():
        assert required <= set(spec)
        assert spec.get("group") in ((None,) if "column" not in spec else ("math", "ood"))


@pytest.mark.parametrize(
    ("value", "boxed", "answer"),
    [
        (204, False, "204"),
        ("  \\frac{1}{2} ", False, "\\frac{1}{2}"),
        (["$2\\sqrt{3}$", "other"], False, "2\\sqrt{3}"),
        ("First \\boxed{1}. So the answer is $\\boxed{\\frac{3}{4}}$.", True, "\\frac{3}{4}"),
        ("27.0", False, "27.0"),
    ],
)
def test_an_answer_is_bare(value, boxed, answer):
    assert module("prepare").ground_truth(value, boxed) == answer


@pytest.mark.parametrize(("value", "boxed"), [("no box", True), ("", False), ([], False)])
def test_a_row_without_an_answer_is_refused(value, boxed):
    with pytest.raises(ValueError, match=r"boxed|empty"):
        module("prepare").ground_truth(value, boxed)


def fake_hub(monkeypatch, rows: int = 3) -> list[tuple[str, str]]:
    """load_dataset that invents `rows` rows with exactly the fields that datasets.yaml names."""
    asked = []

    def load_dataset(hub: str, split: str) -> list[dict]:
        asked.append((hub, split))
        spec = next(spec for spec in datasets_table().values() if (spec["hub"], spec["split"]) == (hub, split))
        answer = "So \\boxed{7}." if spec.get("boxed") else 7
        return [{spec["problem"]: f"Problem {index}?", spec["answer"]: answer} for index in range(rows)]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    return asked


def test_every_dataset_becomes_what_verls_loader_reads(monkeypatch, tmp_path, capsys):
    asked = fake_hub(monkeypatch)
    module("prepare").main(["--out", str(tmp_path)])
    assert asked == [(spec["hub"], spec["split"]) for spec in datasets_table().values()]
    assert "7500 expected" in capsys.readouterr().err
    monkeypatch.undo()

    from verl.utils.dataset.rl_dataset import RLHFDataset

    # Only the length filter needs a tokenizer.
    config = OmegaConf.create({"filter_overlong_prompts": False, "cache_dir": str(tmp_path / "cache")})
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for name in datasets_table():
        row = pd.read_parquet(tmp_path / f"{name}.parquet").iloc[1]
        assert row["reward_model"]["ground_truth"] == "7"
    data = RLHFDataset([str(tmp_path / "math_500.parquet"), str(tmp_path / "aime_2026.parquet")], None, config)
    assert len(data) == 6
    assert data[4]["data_source"] == "aime_2026"
    assert data[4]["reward_model"]["ground_truth"] == "7"
    roles = [message["role"] for message in data[4]["raw_prompt"]]
    assert roles == ["system", "user"]
    assert data[4]["raw_prompt"][1]["content"].startswith("Problem 1?\nPlease reason step by step")


def test_the_holdout_leaves_the_training_set(monkeypatch, tmp_path):
    fake_hub(monkeypatch, rows=10)
    module("prepare").main(["--out", str(tmp_path), "--only", "math_train", "--holdout", "4"])
    files = [pd.read_parquet(tmp_path / f"math_{part}.parquet") for part in ("train", "holdout")]
    indices = [[row["index"] for row in file["extra_info"]] for file in files]
    assert [len(part) for part in indices] == [6, 4]
    assert sorted(indices[0] + indices[1]) == list(range(10))


def test_verls_built_in_reward_knows_the_sources_of_math():
    from verl.utils.reward_score import default_compute_score

    for name in ("math_train", "math_test", "math_500"):
        assert default_compute_score(datasets_table()[name]["data_source"], "so \\boxed{7}", "7") == 1.0


def test_the_reward_asks_math_verify(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", types.ModuleType("math_verify"))
    asked = []
    monkeypatch.setattr("verl.utils.reward_score.math_verify.compute_score", lambda *given: asked.append(given) or True)
    score = module("reward").compute_score("aime_2025", "so \\boxed{7}", "7", {"index": 0}, reward_router_address=None)
    assert (score, type(score)) == (1.0, float)
    assert asked == [("so \\boxed{7}", "7")]


@pytest.mark.parametrize(
    ("answer", "truth", "right"),
    [
        ("The sum is \\boxed{\\frac{1}{2}}.", "0.5", True),
        ("so $x = \\boxed{2\\sqrt{3}}$", "\\sqrt{12}", True),
        ("\\boxed{7}", "8", False),
        ("I do not know.", "8", False),
    ],
)
def test_math_verify_itself_judges_answers(answer, truth, right):
    pytest.importorskip("math_verify", reason="pip install math-verify")
    assert module("reward").compute_score("aime_2025", answer, truth) == float(right)


def test_the_reward_without_math_verify_fails_at_once(monkeypatch):
    # verl's module would print a line and give 0 to every answer.
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ImportError):
        module("reward")
