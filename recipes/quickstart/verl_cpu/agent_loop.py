"""A single-turn agent loop that seeds every sample and scores it on the spot."""

import hashlib
import json
from typing import Any
from uuid import uuid4

from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopOutput
from verl.trainer.ppo.reward import get_custom_reward_fn
from verl.utils.profiler import simple_timer


class SeededSingleTurnAgentLoop(AgentLoopBase):
    """One question, one answer.

    - Every sample is named by what it is, not by when it arrived. verl's own identifiers (`uid`,
      `request_id`) are random, and the samples of a group ask for the same prompt; the training step,
      the row of the data set and the place in the group tell them apart.
    - The answer is scored here with `reward.custom_reward_function`, as verl allows an agent loop to.
      Asking verl's reward worker for each of them would take longer than generating it.
    """

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> AgentLoopOutput:
        seed = _seed(
            self.rollout_config.seed, int(kwargs["global_steps"]), int(kwargs["index"]), int(kwargs["session_id"])
        )
        if self.rollout_config.name == "vllm":
            seed >>= 1  # a signed integer there
        prompt_ids = self._cap_text_prompt_length(self._tokenize(kwargs["raw_prompt"]))
        metrics: dict[str, Any] = {}
        with simple_timer("generate_sequences", metrics):
            generated = await self.server_manager.generate(
                request_id=uuid4().hex, prompt_ids=prompt_ids, sampling_params={**sampling_params, "seed": seed}
            )
        response_ids = generated.token_ids[: self.rollout_config.response_length]
        score = self._score(response_ids, kwargs)
        return AgentLoopOutput(
            prompt_ids=prompt_ids,
            response_ids=response_ids,
            response_mask=[1] * len(response_ids),
            response_logprobs=generated.log_probs[: len(response_ids)] if generated.log_probs else None,
            reward_score=score,
            num_turns=2,
            metrics=metrics,
            extra_fields={
                **generated.extra_fields,
                "reward_extra_info": {"acc": score},
                "turn_scores": [],
                "tool_rewards": [],
            },
        )

    def _tokenize(self, messages: Any) -> list[int]:
        key = json.dumps([dict(message) for message in messages])
        if key not in _PROMPT_IDS:
            _PROMPT_IDS[key] = self.tokenizer.apply_chat_template(
                json.loads(key), add_generation_prompt=True, tokenize=True, return_dict=False
            )
        return list(_PROMPT_IDS[key])

    def _score(self, response_ids: list[int], row: dict[str, Any]) -> float:
        answer = self.tokenizer.decode(response_ids, skip_special_tokens=True)
        truth = row["reward_model"]["ground_truth"]
        reward_fn = _reward_fn(self.config)
        return float(reward_fn(row["data_source"], answer, truth, row.get("extra_info")))


# verl makes a new agent loop for every sample, so what they share lives in the module.
_PROMPT_IDS: dict[str, list[int]] = {}
_REWARD_FN: list[Any] = []


def _reward_fn(config: Any) -> Any:
    if not _REWARD_FN:
        _REWARD_FN.append(get_custom_reward_fn(config))
    return _REWARD_FN[0]


def _seed(*identity: int) -> int:
    digest = hashlib.blake2b(repr(identity).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
