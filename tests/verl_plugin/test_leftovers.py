"""A validation that was given up, with verl's real queue, replay buffer and `_validate`: nothing of it comes back.

Stand-ins: the agent loops, which write to the queue in the order in which verl's do, and what is below the trainer.
"""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
import transfer_queue as tq
from trainers import trainer
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from relex_verl.maths.extrapolators import Prediction
from relex_verl.run.validation import ValidationTimeout
from relex_verl.verl_plugin import leftovers
from relex_verl.verl_plugin import trainer as plugin

PREDICTION = Prediction("relex", 20)
METRIC = "val-core/sums/acc/mean@1"
PROMPTS = 5
TIMEOUT = 0.5  # seconds, of RELEX's validation


class Answers:
    """verl's agent loops, a thread for each prompt: it is answered once `gate` is open, and scores `score`.

    Attributes:
        gate, score: of the prompts that are submitted from now on.
        asked: identifiers of all prompts, in their order.
    """

    def __init__(self) -> None:
        self.gate, self.score = threading.Event(), 1.0
        self.asked: list[str] = []
        self.threads: list[threading.Thread] = []

    def generate_sequences(self, batch: Any) -> None:
        for uid in batch["uid"]:
            self.asked.append(str(uid))
            self.threads.append(threading.Thread(target=self.answer, args=(str(uid), self.gate, self.score)))
            self.threads[-1].start()

    def answer(self, uid: str, gate: threading.Event, score: float) -> None:
        tq.kv_put(key=uid, partition_id="val", tag={"status": "running"})
        gate.wait(60)
        sample = {
            "uid": uid,
            "prompts": torch.tensor([1, 2]),
            "responses": torch.tensor([3]),
            "rm_scores": torch.tensor([score]),
            "num_turns": 2,
            "data_source": "sums",
            "extra_fields": {"reward_extra_info": {"acc": score}},
        }
        fields = list_of_dict_to_tensordict([sample])
        tq.kv_batch_put(keys=[f"{uid}_0_0"], fields=fields, tags=[{"status": "success"}], partition_id="val")
        tq.kv_put(key=uid, partition_id="val", tag={"status": "finished"})

    def settled(self) -> None:
        """Wait until nobody answers any more."""
        for thread in self.threads:
            thread.join(60)


@pytest.fixture(scope="module")
def queue() -> Iterator[None]:
    """verl's TransferQueue, as its main starts it."""
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False)
    tq.init()
    yield
    tq.close()
    ray.shutdown()


@pytest.fixture
def answers() -> Iterator[Answers]:
    answers = Answers()
    yield answers
    answers.gate.set()
    answers.settled()


@pytest.fixture(params=["default", "colocate_async", "separate_async"])
def host(request: pytest.FixtureRequest, base: Path, queue: None, answers: Answers) -> Iterator[Any]:
    """A trainer of each mode that can validate."""
    host = trainer(request.param, base, [])
    host.agent_loop_manager = answers
    host.reward_loop_manager = SimpleNamespace(reward_loop_worker_handles=["a worker"])
    host.tokenizer = SimpleNamespace(pad_token_id=0, decode=lambda ids, **_: "-".join(map(str, ids.tolist())))
    host.val_dataloader = [{"raw_prompt": [str(i) for i in range(PROMPTS)], "data_source": ["sums"] * PROMPTS}]
    host.replay_buffer.poll_interval = 0.02
    yield host
    if left := tq.kv_list("val").get("val"):
        answers.settled()
        tq.kv_clear(keys=list(left), partition_id="val")


def given_up(host: Any, answers: Answers) -> threading.Event:
    """Have a validation given up; what opens the gate that its answers, all of them wrong, wait behind."""
    gate, answers.score = answers.gate, 0.0
    with pytest.raises(ValidationTimeout):
        host.relex_validate(PREDICTION, METRIC, TIMEOUT)
    host.relex_restore()
    answers.gate, answers.score = threading.Event(), 1.0
    answers.gate.set()
    return gate


def test_the_next_validation_waits_for_what_was_given_up(host: Any, answers: Answers) -> None:
    """And only its own answers count, though verl takes the first that come."""
    gate = given_up(host, answers)
    assert leftovers.being_answered("val") == set(answers.asked)
    threading.Timer(1.0, gate.set).start()
    began = time.monotonic()
    assert host._validate()[METRIC] == 1.0
    assert time.monotonic() - began > 0.5
    assert len(answers.asked) == 2 * PROMPTS
    host.relex_validate(PREDICTION, METRIC, 60.0)
    assert not tq.kv_list("val")["val"]


def test_what_is_never_answered_is_waited_for_once_and_left_out(
    host: Any, answers: Answers, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(plugin, "SETTLE_SECONDS", 0.4)
    gate = given_up(host, answers)
    assert host._validate()[METRIC] == 1.0
    assert f"{PROMPTS} prompts of a validation that was given up" in caplog.text
    # They come after all, when a later validation has asked and not been answered yet.
    answers.gate = threading.Event()
    threading.Timer(0.3, gate.set).start()
    threading.Timer(1.0, answers.gate.set).start()
    began = time.monotonic()
    validation = host.relex_validate(PREDICTION, METRIC, 60.0)
    assert time.monotonic() - began > 0.9
    assert (validation.score, sum(map(len, validation.samples.values()))) == (1.0, PROMPTS)
    assert caplog.text.count("that was given up") == 1
    answers.settled()
    assert host._validate()[METRIC] == 1.0
    assert not tq.kv_list("val")["val"]


def test_a_status_that_is_half_written_lands_on_no_other_key(host: Any, answers: Answers) -> None:
    """TransferQueue gives a cleared key's index to the next: training's look at the queue met "Unknown status: success"."""
    gate = given_up(host, answers)
    client, late = tq.get_client(), answers.asked[0]
    half = client.kv_retrieve_meta(keys=[late], partition_id="val", create=True)
    host.relex_restore()
    half.update_custom_meta([{"status": "finished"}])
    client.set_custom_meta(half)
    assert tq.kv_list("val")["val"][late]["status"] == "finished"
    gate.set()
    answers.settled()
    assert all(not tag.get("is_prompt") for key, tag in tq.kv_list("val")["val"].items() if "_" in key)
    trained = {"is_prompt": True, "status": "finished", "global_steps": 5}
    tq.kv_batch_put(keys=["train", "train_0_0"], partition_id="train", tags=[trained, {"status": "success"}])
    batch, _ = host.replay_buffer.sample(global_steps=5, partition_id="train", batch_size=1)
    tq.kv_clear(keys=batch.keys, partition_id="train")
    assert batch.keys == ["train_0_0"]
    assert host._validate()[METRIC] == 1.0


def test_without_leftovers_nothing_is_waited_for_and_nothing_is_shadowed(host: Any, answers: Answers) -> None:
    answers.gate.set()
    look = host.replay_buffer._sync_metadata_from_transfer_queue
    began = time.monotonic()
    assert host._validate()[METRIC] == 1.0
    assert time.monotonic() - began < 5
    assert host.replay_buffer._sync_metadata_from_transfer_queue == look


def test_a_replay_buffer_of_another_make_is_left_as_it_is() -> None:
    with leftovers.left_out(SimpleNamespace(), ["lost"]):
        pass
