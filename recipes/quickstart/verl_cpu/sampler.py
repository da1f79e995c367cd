"""Replay buffers that give a batch in the order of the data set, not in the order of arrival.

verl keeps a batch in the order in which samples finished, and its keys are random. Sums of floating
point numbers depend on their order, so two runs with the same seeds would drift apart.

Use through `trainer.v1.sampler.custom_sampler`; `sampler_kwargs.poll_interval` is the time in seconds
between two looks at the queue (verl's own two seconds would be most of a step here).
"""

from typing import Any

from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer, ReplayBufferAsync


class _DispatchOrder(ReplayBuffer):
    """Sorts by (order of dispatch, place in the group, turn).

    The queue lists prompts in the order in which the trainer put them there.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.poll_interval = float(self.sampler_kwargs.get("poll_interval", 0.02))

    def _select_prompt_uids(self, partition_id: str, sampleable_keys: set[str], batch_size: int) -> tuple:
        _, partition, steps = super()._select_prompt_uids(partition_id, sampleable_keys, batch_size)
        dispatched = [uid for uid in steps if uid in sampleable_keys]
        dispatched.sort(key=steps.__getitem__)  # stable: within a step, the order of dispatch
        return dispatched[:batch_size], partition, steps

    def _materialize_batch(
        self, partition_id: str, selected_prompt_uids: list[str], partition_snapshot: dict[str, dict]
    ) -> Any:
        place = {uid: rank for rank, uid in enumerate(selected_prompt_uids)}

        def order(key: str) -> tuple[int, int, int]:
            uid, session, turn = key.split("_")
            return place.get(uid, len(place)), int(session), int(turn)

        # Late answers of a batch that was given up may lie here too, under other names; verl passes over them.
        answers = [key for key in partition_snapshot if key.count("_") == 2]
        in_order = {key: partition_snapshot[key] for key in sorted(answers, key=order)}
        in_order |= {key: value for key, value in partition_snapshot.items() if key not in in_order}
        return super()._materialize_batch(partition_id, selected_prompt_uids, in_order)


class OrderedReplayBuffer(_DispatchOrder):
    """For the trainer mode `sync`."""


class OrderedReplayBufferAsync(_DispatchOrder, ReplayBufferAsync):
    """For the asynchronous trainer modes."""
