"""The trainers' hooks on verl's own classes, with stand-ins below them: what happens to the rollout, and in which order.

Each trainer is made as verl makes it, from a composed configuration; what verl's `init` would start is not there, and so
`_validate` and `_save_checkpoint` of verl's base class are replaced. With the real queue: test_leftovers.py. The same with
verl's real trainer: tests/integration.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from trainers import trainer
from verl.trainer.ppo.v1 import PPOTrainer
from verl.trainer.ppo.v1.trainer_separate_async import HybridEngineMode

from relex_verl.maths.extrapolators import Prediction
from relex_verl.run.ranks import RelexError
from relex_verl.run.validation import ValidationTimeout
from relex_verl.verl_plugin import leftovers

PREDICTION = Prediction("relex", 20)
METRIC = "val-core/sums/acc/mean@1"


class Queue:
    """TransferQueue: prompts of a partition with their status."""

    def __init__(self, log: list[str]) -> None:
        self.log = log
        self.tags: dict[str, dict[str, dict]] = {"train": {}, "val": {}}
        self.looks: list[str] = []

    def kv_list(self, partition: str) -> dict[str, dict]:
        self.looks.append(partition)
        if partition == "train" and len(self.looks) > 2:
            self.tags["train"] = {uid: {**tag, "status": "finished"} for uid, tag in self.tags["train"].items()}
        return {partition: dict(self.tags[partition])} if self.tags[partition] else {}

    def kv_clear(self, keys: list[str], partition_id: str) -> None:
        self.log.append(f"clear {partition_id} {sorted(keys)}")
        for key in keys:
            del self.tags[partition_id][key]


@pytest.fixture
def log() -> list[str]:
    """What happened, in this order."""
    return []


@pytest.fixture
def queue(log: list[str], monkeypatch: pytest.MonkeyPatch) -> Queue:
    queue = Queue(log)
    monkeypatch.setattr(leftovers, "tq", queue)
    monkeypatch.setattr(leftovers, "POLL_SECONDS", 0.001)
    return queue


@pytest.fixture(params=["default", "colocate_async", "separate_async"])
def host(
    request: pytest.FixtureRequest, base: Path, log: list[str], queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """A trainer of each mode after step 4; nothing of verl below its hooks is started."""
    host = trainer(request.param, base, log)

    def validate() -> dict[str, float]:
        log.append("validate")
        assert len(list(host.val_dataloader)) == 1
        host._maybe_log_val_generations(["1+1="], ["2"], [1.0])
        host._dump_generations([], [], [], [], {}, "nowhere")
        return host._val_metrics_update(["sums"], ["u"], {"acc": [1.0]}, [2], expected_acc_counts={("sums", "u"): 1})

    host._validate = validate
    monkeypatch.setattr(PPOTrainer, "_save_checkpoint", lambda self: log.append("save"))
    return host


def separate(host: Any) -> bool:
    return host.verl_mode == "separate_async"


def woken(host: Any) -> str:
    """The call that brings the exported weights to the rollout."""
    return "standalone update_weights" if separate(host) else "update_weights"


def test_a_prediction_is_sent_as_long_as_verl_validates(host: Any, log: list[str]) -> None:
    validation = host.relex_validate(PREDICTION, None, 60.0)
    assert validation.metric == METRIC
    assert validation.samples == {"1+1=": [1.0]}
    assert log[0] == "send relex-step_20"
    assert log[-1] == "send None"
    # verl may send the weights again while it validates (a reward model on the same devices).
    assert log[-2] == "validate"
    assert log.index("abort" if not separate(host) else "standalone abort") < log.index(woken(host))
    assert host._relex_probe is None


@pytest.mark.parametrize("host", ["default", "colocate_async"], indirect=True)
def test_the_colocated_rollout_sleeps_before_it_gets_weights(host: Any, log: list[str]) -> None:
    host.relex_validate("observed", METRIC, 60.0)
    assert log == ["send observed", "abort", "sleep", "update_weights", "resume_generation", "validate", "send None"]


@pytest.mark.parametrize("host", ["default", "colocate_async"], indirect=True)
def test_the_rollout_sleeps_once_while_the_engine_computes(host: Any, log: list[str]) -> None:
    host.relex_rest()
    assert log == ["abort", "sleep"]
    host.relex_restore()
    assert log == ["abort", "sleep", "send None", "update_weights", "resume_generation"]
    log.clear()
    host.relex_restore()
    assert log == ["send None", "abort", "sleep", "update_weights", "resume_generation"]


def test_training_prompts_are_answered_before_other_weights_come(host: Any, log: list[str], queue: Queue) -> None:
    queue.tags["train"] = {"a": {"is_prompt": True, "status": "running"}, "a_0_0": {"status": "success"}}
    host.relex_validate(PREDICTION, METRIC, 60.0)
    assert queue.looks.count("train") > 1
    queue.tags["train"] = {"a": {"is_prompt": True, "status": "pending"}}
    queue.looks.clear()
    log.clear()
    with pytest.raises(ValidationTimeout):
        host.relex_validate(PREDICTION, METRIC, -1.0)
    assert log == []


def test_an_empty_validation_set_is_refused_before_anything_is_sent(host: Any, log: list[str]) -> None:
    host.val_dataset = []
    with pytest.raises(ValueError, match="the validation set is empty"):
        host.relex_validate("observed", None, 60.0)
    assert log == []


@pytest.mark.parametrize("fails", ["abort_replicas", "update_weights", "validate"])
def test_whatever_fails_the_policys_weights_come_back(host: Any, log: list[str], queue: Queue, fails: str) -> None:
    manager = host.standalone_checkpoint_manager if separate(host) else host.checkpoint_manager
    if fails == "validate":
        host._validate = lambda: 1 / 0
    else:
        manager.fails = fails
    with pytest.raises((OSError, ZeroDivisionError)):
        host.relex_validate(PREDICTION, METRIC, 60.0)
    assert log[-1] == "send None"
    manager.fails = ""
    queue.tags["val"] = {"u": {"is_prompt": True, "status": "finished"}, "u_0_0": {}}
    log.clear()
    host.relex_restore()
    assert log[0] == "send None"
    abort, clear = log.index("standalone abort" if separate(host) else "abort"), log.index("clear val ['u', 'u_0_0']")
    assert abort < clear < log.index(woken(host))
    assert log.count(woken(host)) == 1


def test_a_failing_substitution_is_no_way_around_the_restore(host: Any, log: list[str]) -> None:
    def refuse(weights: Any) -> None:
        log.append("asked")
        raise RelexError("rank 0 is gone")

    host.relex.substitute = refuse
    with pytest.raises(RelexError):
        host.relex_validate(PREDICTION, METRIC, 60.0)
    assert log == ["asked", "asked"]
    assert host._relex_probe is None
    with pytest.raises(RelexError):  # the caller ends the run: see test_callback
        host.relex_restore()


@pytest.mark.parametrize("host", ["separate_async"], indirect=True)
@pytest.mark.parametrize("before", list(HybridEngineMode))
@pytest.mark.parametrize("fails", ["", "update_weights", "resume_generation_replicas"])
def test_hybrid_replicas_go_back_to_what_they_did(
    host: Any, log: list[str], before: HybridEngineMode, fails: str
) -> None:
    """Also when the switch to the rollout breaks off half way, before verl has written down the new mode."""
    host.current_mode, host.checkpoint_manager.fails = before, fails
    if fails:
        with pytest.raises(OSError, match="replica"):
            host.relex_validate(PREDICTION, METRIC, 60.0)
    else:
        host.relex_validate(PREDICTION, METRIC, 60.0)
        host.relex_validate(PREDICTION, METRIC, 60.0)
    host.checkpoint_manager.fails = ""
    log.clear()
    host.relex_restore()
    assert log[:3] == ["send None", "abort", "sleep"]
    assert host.current_mode == before
    assert ("update_weights" in log) == (before == HybridEngineMode.ROLLOUT)
    if before == HybridEngineMode.ROLLOUT:
        assert log.index("standalone update_weights") < log.index("update_weights")


def test_stop_saves_with_the_rollout_asleep_and_ends(host: Any, log: list[str]) -> None:
    host.current_mode = HybridEngineMode.ROLLOUT
    host.relex_end_training()
    assert host.total_training_steps == 4
    assert log.index("sleep") < log.index("on_save 4") < log.index("save") < log.index(woken(host))
    log.clear()
    host.relex_end_training()
    assert log == []  # saved already


def test_stop_ends_the_run_even_if_the_checkpoint_fails(
    host: Any, log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PPOTrainer, "_save_checkpoint", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        host.relex_end_training()
    assert host.total_training_steps == 4
    assert log[-1] in ("resume_generation", "standalone update_weights")  # verl may validate this step


def test_a_pending_cut_is_scored_as_of_the_step_that_was_resumed(host: Any) -> None:
    """verl has counted on to step 5 when it calls `on_train_begin`; the weights are those of step 4."""
    seen: list[Any] = []
    host.global_steps, host.relex.wants_scores = 5, True
    host.relex.on_train_begin = lambda step, trainer, log: (
        seen.append((step, trainer.global_steps)) or {"relex/val/x": 1.0}
    )
    host.logger = SimpleNamespace(log=lambda data, step: seen.append((data, step)))
    host.on_train_begin()
    assert seen == [(4, 4), ({"relex/val/x": 1.0}, 4)]
    assert host.global_steps == 5


def test_metrics_of_the_scoring_join_those_of_verls_own_synchronisation(host: Any) -> None:
    """Only separate_async has any."""
    host.relex.wants_scores = True
    host.relex.on_rollout_ready = lambda step, trainer: {"relex/val/x": float(step)}
    host.on_step_end()
    synchronised = {"sync": 1.0} if separate(host) else {}
    assert host._consume_sync_metrics() == {**synchronised, "relex/val/x": 4.0}
    assert host.timing_raw["relex_validation"] >= 0


def test_late_answers_of_a_given_up_validation_are_gone_before_the_next(
    host: Any, log: list[str], queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    del host._validate
    monkeypatch.setattr(PPOTrainer, "_validate", lambda self: log.append("validate") or {METRIC: 0.5})
    queue.tags["val"] = {"u": {"status": "finished"}, "u_0_0": {"status": "success"}}
    assert host._validate() == host._validate() == {METRIC: 0.5}
    assert host.relex.validated == [(4, {METRIC: 0.5}, METRIC)] * 2
    host.val_dataset = [{"data_source": "other"}]
    assert host._validate() == {METRIC: 0.5}
    assert host.relex.validated[-1] == (4, {METRIC: 0.5}, None)
    host._relex_probe = object()  # a candidate's are not the run's own
    host._validate()
    assert len(host.relex.validated) == 3
    del log[3:]
    assert log == ["clear val ['u', 'u_0_0']", "validate", "validate"]


def test_outside_the_scoring_verls_validation_is_verls(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(PPOTrainer, "_maybe_log_val_generations", lambda self, **_: seen.append("table"))
    monkeypatch.setattr(PPOTrainer, "_dump_generations", lambda self, *_: seen.append("dump"))
    assert host._validate()[METRIC] == 1.0
    assert seen == ["table", "dump"]


@pytest.mark.parametrize("host", ["default"], indirect=True)
@pytest.mark.parametrize(("steps", "length"), [(100, 6), (5, 5)])
def test_a_run_ends_with_its_epochs_however_many_steps_it_was_given(
    host: Any, tmp_path: Path, steps: int, length: int
) -> None:
    """verl's own dataset and loader: 2 epochs of 25 prompts in batches of 8."""
    prompts = {"prompt": [[{"role": "user", "content": "1+1="}]] * 25}
    Dataset.from_dict(prompts).to_parquet(tmp_path / "train.parquet")
    known: list[int] = []
    host.relex.on_length_known, host.tokenizer, host.processor = known.append, None, None
    host.config.data.train_files = host.config.data.val_files = str(tmp_path / "train.parquet")
    host.config.data.train_batch_size, host.config.trainer.total_epochs = 8, 2
    host.config.trainer.total_training_steps = steps
    host._init_dataloader()
    assert known == [length]
