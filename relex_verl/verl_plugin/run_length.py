"""How many steps verl will train, as far as configuration and data files tell before Ray starts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from relex_verl.maths.extrapolators import METHODS
from relex_verl.run.config import ConfigError, RelexConfig
from relex_verl.run.schedule import Schedule

__all__ = ["Length", "check_length", "known_length"]


@dataclass(frozen=True)
class Length:
    """Of a run.

    Attributes:
        most: steps; there will not be more.
        exact: there will not be fewer, either. verl drops prompts that are too long, and counts only then.
        key: of verl's configuration that says so.
    """

    most: int
    exact: bool
    key: str


def check_length(relex: RelexConfig, config: DictConfig) -> None:
    """Refuse cuts and targets that fit no length that the run may turn out to have.

    Raises:
        ConfigError: they cannot fit, or the length is none.
    """
    length = known_length(config)
    if length is None or relex.t_cut is None:
        return
    rows = max(METHODS[method].min_rows for method in relex.methods)
    if length.most <= rows:
        cure = (
            f"the run has {length.most} steps; {relex.methods} need {rows} before the cut, and one after it to predict: "
            f"train {rows + 1} or more, or without +relex"
        )
        raise ConfigError(length.key, OmegaConf.select(config, length.key), cure)
    refusal: ConfigError | None = None
    for steps in range(length.most, -1, -1):
        try:
            Schedule(relex, steps)
            return
        except ConfigError as error:
            refusal = refusal or error
            # In a shorter run a cut at a share of it comes earlier, and a target may lie behind it; all else gets worse.
            if length.exact or error.key != "relex.targets":
                break
    assert refusal is not None
    raise refusal


def known_length(config: DictConfig) -> Length | None:
    """The lesser of `trainer.total_training_steps` and the steps of all epochs; None where neither is known.

    Raises:
        ConfigError: a number of steps that is none, or fewer prompts than a batch takes.
    """
    total = config.trainer.total_training_steps
    if total is not None and not _is_count(total):
        cure = "give a whole number of steps, without quotes, or leave it out"
        raise ConfigError("trainer.total_training_steps", total, cure)
    by_epochs = _steps_of_epochs(config)
    if total is not None and (by_epochs is None or total <= by_epochs):
        return Length(int(total), True, "trainer.total_training_steps")
    if by_epochs is None:
        return None
    return Length(by_epochs, not config.data.filter_overlong_prompts, "trainer.total_epochs")


def _steps_of_epochs(config: DictConfig) -> int | None:
    rows, batch, epochs = _prompts(config.data), config.data.train_batch_size, config.trainer.total_epochs
    if rows is None or not _is_count(batch) or not _is_count(epochs) or batch < 1:
        return None
    if rows < batch:
        cure = f"data.train_files hold {rows} prompts, which is not one batch: give a smaller one, or more prompts"
        raise ConfigError("data.train_batch_size", batch, cure)
    return int(rows // batch * epochs)


def _prompts(data: DictConfig) -> int | None:
    """Rows that verl's own dataset takes, before it drops the long ones; None where the files are not here."""
    if data.custom_cls.path is not None:
        return None
    files = [data.train_files] if isinstance(data.train_files, str) else list(data.train_files)
    counts = [_rows(Path(str(file)).expanduser()) for file in files]
    known = [count for count in counts if count is not None]
    if len(known) < len(counts):
        return None
    most = data.train_max_samples
    return min(sum(known), most) if most > 0 else sum(known)


def _rows(file: Path) -> int | None:
    """Of a Parquet file, from its footer."""
    if file.suffix != ".parquet" or not file.is_file():
        return None
    import pyarrow.parquet

    try:
        return int(pyarrow.parquet.read_metadata(file).num_rows)
    except (OSError, ValueError):
        return None


def _is_count(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == int(value) and value >= 0
