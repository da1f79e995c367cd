"""The driver's decisions, with stand-ins for the ranks and for the trainer (real ones: tests/integration)."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from relex_verl.advice import decides
from relex_verl.config import ConfigError, RelexConfig
from relex_verl.prediction import Prediction
from relex_verl.trajectory import TrajectoryError
from relex_verl.verl_plugin.callback import RelexCallback, RelexError
from relex_verl.verl_plugin.cut import decide
from relex_verl.verl_plugin.scoring import Probe, Validation, ValidationTimeout, deadline, same_random_state
from relex_verl.verl_plugin.worker import Answer

METRIC = "val-core/sums/acc/mean@1"
PROMPTS = [f"prompt {i}" for i in range(400)]


def config(folder: Path, **relex: Any) -> Any:
    node = {**vars(RelexConfig()), "output_dir": str(folder), "targets": [20], "t_cut": 4, "observe_every": 1, **relex}
    return OmegaConf.create(
        {
            "relex": node,
            "trainer": {
                "use_v1": True, "v1": {"trainer_mode": "relex_sync"}, "resume_mode": "disable",
                "project_name": "p", "experiment_name": "e",
            },
            "actor_rollout_ref": {"model": {"path": "base"}},
        }
    )  # fmt: skip


class Ranks:
    """Two ranks that do nothing well; `fails` names the method in which rank 1 fails."""

    def __init__(self, folder: Path, fails: str = "", kind: str = "OSError") -> None:
        self.folder, self.fails, self.kind, self.calls = folder, fails, kind, []

    def __getattr__(self, method: str) -> Any:
        def call(*args: Any) -> list[Answer]:
            self.calls.append(method)
            if method == self.fails:
                return [
                    Answer(error="1 of 2 ranks failed", kind="PeerError", peer=True),
                    Answer(error=f"disk on fire\nTraceback: {self.kind}", kind=self.kind),
                ]
            return [Answer(self._value(method, args)), Answer({})]

        return call

    def _value(self, method: str, args: tuple[Any, ...]) -> Any:
        if method == "relex_start":
            return ("fp32", None)
        if method == "relex_open":
            (self.folder / "trajectory").mkdir(parents=True, exist_ok=True)
            (self.folder / "trajectory" / "index.json").write_text("{}")
            return []
        if method == "relex_observe":
            return {"relex/changed_share": 0.1}
        if method == "relex_fit":
            fits = {"summary": {}, "random_walk_null": {}, "tensors": [{"tensor": "w", "shape": [1]}]}
            backtests = {"backtests": {"relex": 0.5}, "drift": 0.1, "agreement": 0.9}
            return {"fits": fits, "steps": [1, 2, 3, 4], "figures": {}, **backtests}
        if method == "relex_write":
            _, folder, provenance = args
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "relex.json").write_text(json.dumps(provenance))
        return None


class Trainer:
    """Validates by a table: probability of a right answer for each target; 4 is the observed weights."""

    def __init__(self, quality: dict[int, float], fails: Exception | None = None) -> None:
        self.quality, self.fails = quality, fails
        self.asked: list[Prediction | str] = []
        self.restored = self.ended = 0

    def relex_validate(self, weights: Prediction | str, metric: str | None, timeout: float) -> Validation:
        self.asked.append(weights)
        if self.fails is not None:
            raise self.fails
        target = 4 if weights == "observed" else weights.target  # type: ignore[union-attr]
        nearest = min(self.quality, key=lambda known: abs(known - target))
        hard = torch.rand(len(PROMPTS), generator=torch.Generator().manual_seed(0)).tolist()
        scores = {p: float(h < self.quality[nearest]) for p, h in zip(PROMPTS, hard, strict=True)}
        return Validation({METRIC: sum(scores.values()) / len(scores)}, METRIC, scores, 1.0)

    def relex_restore(self) -> None:
        self.restored += 1

    def relex_end_training(self) -> None:
        self.ended += 1


def started(folder: Path, ranks: Ranks | None = None, **relex: Any) -> tuple[RelexCallback, Ranks]:
    callback, ranks = RelexCallback(config(folder, **relex)), ranks or Ranks(folder)
    callback.on_length_known(20 if "targets" in relex else 100)
    callback.on_model_ready(ranks)
    callback.on_checkpoint_loaded(0)
    return callback, ranks


def to_the_cut(callback: RelexCallback, first: int = 1, last: int = 4) -> None:
    for step in range(first, last + 1):
        callback.on_step_end(step, SimpleNamespace(logger={}))


def test_a_winner_is_recommended_and_stops_the_run(tmp_path: Path) -> None:
    callback, ranks = started(tmp_path, on_cut="stop")
    to_the_cut(callback)
    assert callback.wants_scores
    trainer = Trainer({4: 0.5, 20: 0.8})
    metrics = callback.on_rollout_ready(4, trainer)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["advice"]["action"] == "stop"
    assert report["advice"]["reason"].startswith("Stop: relex-step_")
    assert trainer.ended == trainer.restored == 1
    assert trainer.asked[0] == "observed"
    assert len(trainer.asked) <= 1 + callback.config.max_candidates
    recommended = json.loads((tmp_path / "recommended" / "relex.json").read_text())
    assert f"relex-step_{recommended['target']}" == report["advice"]["target"]
    assert metrics[f"relex/val/relex-step_20/{METRIC}"] == pytest.approx(0.8, abs=0.05)
    assert not callback.active
    assert ranks.calls[-1] == "relex_stop"


def test_advise_does_not_stop_the_run(tmp_path: Path) -> None:
    callback, _ = started(tmp_path)
    to_the_cut(callback)
    trainer = Trainer({4: 0.5, 20: 0.8})
    callback.on_rollout_ready(4, trainer)
    assert trainer.ended == 0


def test_a_loser_is_not_recommended_and_the_run_is_cut_again(tmp_path: Path) -> None:
    callback, ranks = started(tmp_path, on_cut="stop")
    to_the_cut(callback)
    trainer = Trainer({4: 0.7, 6: 0.6, 20: 0.1})
    callback.on_rollout_ready(4, trainer)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["advice"]["action"] == "keep_training"
    assert report["advice"]["target"] is None
    assert [row["score"] < 0.7 for row in report["validation_scores"][1:]]
    assert not (tmp_path / "recommended").exists()
    assert trainer.ended == 0
    assert callback.active
    assert callback.plan.t_cut == 8
    to_the_cut(callback, 5, 8)
    callback.on_rollout_ready(8, Trainer({4: 0.5, 20: 0.9}))
    assert json.loads((tmp_path / "report.json").read_text())["earlier_cuts"][0]["action"] == "keep_training"
    assert ranks.calls.count("relex_fit") == 2


@pytest.mark.parametrize(
    "failure", [ValidationTimeout("hung"), ValueError("the validation set is empty"), KeyError("x")]
)
def test_a_validation_that_fails_leaves_the_advice_unscored(
    tmp_path: Path, failure: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    callback, _ = started(tmp_path, on_cut="stop")
    to_the_cut(callback)
    trainer = Trainer({}, fails=failure)
    callback.on_rollout_ready(4, trainer)
    assert json.loads((tmp_path / "report.json").read_text())["advice"]["action"] == "unscored"
    assert trainer.restored == 1
    assert trainer.ended == 0
    assert "nothing is recommended" in caplog.text


def test_too_few_prompts_to_split(tmp_path: Path) -> None:
    one_half = [prompt for prompt in PROMPTS if decides(prompt)]

    class OneSided(Trainer):
        def relex_validate(self, weights: Any, metric: Any, timeout: float) -> Validation:
            return Validation({METRIC: 1.0}, METRIC, dict.fromkeys(one_half, 1.0), 0.1)

    relex = RelexConfig.from_mapping({"t_cut": 4, "observe_every": 1})
    window = {"backtests": {"relex": 0.5}, "drift": 0.0, "agreement": 1.0}
    verdict = decide(OneSided({}), relex, relex.plan(100), window)
    assert verdict.advice.action == "unscored"
    assert verdict.scored == []


@pytest.mark.parametrize("fails", ["relex_observe", "relex_fit", "relex_write"])
def test_an_error_is_logged_once_and_switches_relex_off(
    tmp_path: Path, fails: str, caplog: pytest.LogCaptureFixture
) -> None:
    callback, ranks = started(tmp_path, Ranks(tmp_path, fails))
    with caplog.at_level(logging.ERROR):
        to_the_cut(callback)
    assert not callback.active
    assert not callback.wants_scores
    assert [r.message for r in caplog.records if r.levelno == logging.ERROR] == [
        "RELEX failed and is switched off; the training goes on without it"
    ]
    assert "rank 1" in caplog.text
    assert "disk on fire" in caplog.text
    assert ranks.calls[-1] == "relex_stop"
    assert callback.on_step_end(5, SimpleNamespace(logger={})) == {}


def test_on_error_raise(tmp_path: Path) -> None:
    callback, _ = started(tmp_path, Ranks(tmp_path, "relex_observe"), on_error="raise")
    with pytest.raises(RelexError, match="rank 1, relex_observe: disk on fire"):
        to_the_cut(callback)


@pytest.mark.parametrize(
    ("method", "kind", "error"),
    [("relex_start", "BudgetError", RuntimeError), ("relex_open", "TrajectoryError", TrajectoryError)],
)
def test_a_rank_that_refuses_stops_the_run_before_it_starts(
    tmp_path: Path, method: str, kind: str, error: type[Exception]
) -> None:
    with pytest.raises(error, match="disk on fire"):
        started(tmp_path, Ranks(tmp_path, method, kind))


def test_another_runs_folder_is_refused(tmp_path: Path) -> None:
    started(tmp_path)
    with pytest.raises(ConfigError, match=r"relex\.output_dir=.*another run"):
        started(tmp_path)


def test_without_scoring(tmp_path: Path) -> None:
    callback, _ = started(tmp_path, validate_targets=False)
    to_the_cut(callback)
    assert not callback.wants_scores
    assert json.loads((tmp_path / "report.json").read_text())["advice"]["action"] == "unscored"
    assert not callback.active


def test_probe_pairs_by_prompt_and_takes_the_core_metric() -> None:
    probe = Probe(["a", "a", "b"], ["sums"] * 3, {"reward": [0.0, 1.0, 1.0], "acc": [1.0, 1.0, 0.0]})
    validation = probe.validation({"val-core/sums/acc/mean@2": 0.5, "val-aux/sums/reward/mean@2": 0.75}, None, 2.0)
    assert validation.prompts == {"a": 1.0, "b": 0.0}
    assert validation.score == 0.5
    chosen = probe.validation({"val-aux/sums/reward/mean@2": 0.75}, "val-aux/sums/reward/mean@2", 2.0)
    assert chosen.prompts == {"a": 0.5, "b": 1.0}
    with pytest.raises(ValueError, match="empty"):
        Probe().validation({}, None, 0.0)
    with pytest.raises(ValueError, match="not among"):
        probe.validation({}, "val-core/x/acc/mean@1", 0.0)


def test_deadline_interrupts_and_leaves_no_alarm() -> None:
    import signal
    import time

    with pytest.raises(ValidationTimeout, match="validation_timeout_s"), deadline(0.05):
        time.sleep(5)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_random_state_is_left_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    with same_random_state():
        torch.rand(100)
    assert torch.equal(torch.rand(3), expected)
