"""How long a run will be, from verl's configuration and real Parquet files; verl's own count is the oracle."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl_config import composed

from relex_verl.run.config import ConfigError
from relex_verl.verl_plugin.run_length import Length, check_length, known_length
from relex_verl.verl_plugin.settings import checked_config

BY_STEPS, BY_EPOCHS = "trainer.total_training_steps", "trainer.total_epochs"


@pytest.fixture
def files(tmp_path: Path) -> str:
    """70 prompts in two files."""
    for name, rows in (("a", 40), ("b", 30)):
        prompts = {"prompt": [[{"role": "user", "content": f"{i} + 1 ="}] for i in range(rows)]}
        Dataset.from_dict(prompts).to_parquet(tmp_path / f"{name}.parquet")
    return f"data.train_files=[{tmp_path / 'a.parquet'},{tmp_path / 'b.parquet'}]"


def config(*overrides: str, steps: object = "null") -> Any:
    return composed("data.train_batch_size=8", f"trainer.total_training_steps={steps}", *overrides)


@pytest.mark.parametrize(
    ("steps", "overrides", "length"),
    [
        ("null", ["trainer.total_epochs=3"], Length(24, True, BY_EPOCHS)),
        ("10", ["trainer.total_epochs=3"], Length(10, True, BY_STEPS)),
        ("24", ["trainer.total_epochs=3"], Length(24, True, BY_STEPS)),
        ("100", ["trainer.total_epochs=3"], Length(24, True, BY_EPOCHS)),
        ("null", ["trainer.total_epochs=3", "data.filter_overlong_prompts=True"], Length(24, False, BY_EPOCHS)),
        ("null", ["trainer.total_epochs=1", "data.train_max_samples=20"], Length(2, True, BY_EPOCHS)),
        ("null", ["trainer.total_epochs=1", "data.train_max_samples=200"], Length(8, True, BY_EPOCHS)),
        ("null", ["data.custom_cls.path=pkg://mine", "data.custom_cls.name=Mine"], None),
        ("7", ["data.custom_cls.path=pkg://mine", "data.custom_cls.name=Mine"], Length(7, True, BY_STEPS)),
    ],
)
def test_the_length_is_the_lesser_of_steps_and_epochs(
    files: str, steps: str, overrides: list[str], length: Length | None
) -> None:
    assert known_length(config(files, *overrides, steps=steps)) == length


def test_verl_counts_the_same_rows(files: str) -> None:
    """The dataset that verl's trainer makes of these files."""
    data = config(files, "data.train_max_samples=50").data
    dataset = RLHFDataset(data.train_files, None, data, max_samples=data.train_max_samples)
    assert known_length(config(files, "data.train_max_samples=50", f"{BY_EPOCHS}=1")).most == len(dataset) // 8  # type: ignore[union-attr]


def test_files_that_are_not_here_say_nothing(files: str, tmp_path: Path) -> None:
    (tmp_path / "broken.parquet").write_text("no Parquet")
    (tmp_path / "rows.jsonl").write_text("{}\n")
    for name in ("nowhere.parquet", "broken.parquet", "rows.jsonl"):
        assert known_length(config(f"data.train_files=[{tmp_path / 'a.parquet'},{tmp_path / name}]")) is None
        assert known_length(config(f"data.train_files={tmp_path / name}", steps=9)) == Length(9, True, BY_STEPS)
    assert known_length(config("data.train_files=hdfs://somewhere/train.parquet")) is None


@pytest.mark.parametrize(
    ("steps", "overrides", "says"),
    [
        ("'100'", [], r"trainer.total_training_steps='100': give a whole number of steps, without quotes"),
        ("10.5", [], r"trainer.total_training_steps=10.5: give a whole number"),
        ("true", [], r"trainer.total_training_steps=True: give a whole number"),
        ("2", [], r"trainer.total_training_steps=2: the run has 2 steps; .*'relex'.* need 2 .*train 3 or more"),
        ("null", ["trainer.total_epochs=0"], r"trainer.total_epochs=0: the run has 0 steps"),
        ("null", ["data.train_batch_size=71"], r"data.train_batch_size=71: data.train_files hold 70 prompts"),
        ("100", ["trainer.total_epochs=3", "relex.t_cut=30"], r"relex.t_cut=30: .*the run has 24"),
        ("null", ["trainer.total_epochs=3", "relex.t_cut=30", "data.filter_overlong_prompts=True"], r"the run has 24"),
        ("null", ["trainer.total_epochs=3", "relex.t_cut=.5", "relex.targets=[12]"], r"relex.targets=12: .*cut at 12"),
        ("null", ["trainer.total_epochs=3", "relex.targets=[.1]", "data.filter_overlong_prompts=True"], r"targets=0.1"),
    ],
)
def test_a_length_that_nothing_fits_is_refused(files: str, steps: str, overrides: list[str], says: str) -> None:
    composed_here = config(files, *overrides, steps=steps)
    with pytest.raises(ConfigError, match=says):
        check_length(checked_config(composed_here), composed_here)


@pytest.mark.parametrize(
    "overrides",
    [
        ["trainer.total_epochs=3"],
        # verl may drop prompts: in a run of 22 steps the cut is at 11, and 12 comes after it.
        ["trainer.total_epochs=3", "relex.t_cut=.5", "relex.targets=[12]", "data.filter_overlong_prompts=True"],
    ],
)
def test_a_length_that_may_fit_passes(files: str, overrides: list[str]) -> None:
    composed_here = config(files, *overrides)
    check_length(checked_config(composed_here), composed_here)
