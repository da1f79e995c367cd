"""A plain GRPO loop: what verl's trainer does with one update a step, without its processes.

Float32 master weights under AdamW; the forward and backward pass and the rollout use a bfloat16 copy of them (FSDP's mixed
precision). With one update a step the policy that sampled is the policy that learns: the importance ratio is 1, nothing
is clipped, and the gradient is that of -advantage * log-probability, averaged over the batch's response tokens.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import Qwen2ForCausalLM

from relex_verl.trajectory.shards import TensorShard, whole
from study.grid import PROMPTS, SAMPLES
from study.task import Questions, load_model

ADVANTAGE_EPSILON = 1e-6


@torch.no_grad()
def sample(
    policy: Qwen2ForCausalLM, prompts_P6: torch.Tensor, generator: torch.Generator, length: int = 4
) -> torch.Tensor:
    """`SAMPLES` responses to each prompt at temperature 1, (P, SAMPLES, length), padded after the end token.

    Samples of a prompt that begin alike share one row of the batch until they part.
    """
    end, pad = policy.config.eos_token_id, policy.config.pad_token_id
    out = policy(input_ids=prompts_P6, use_cache=True, logits_to_keep=1)
    row_N = torch.arange(len(prompts_P6)).repeat_interleave(SAMPLES)
    tokens: list[torch.Tensor] = []
    ended_N = torch.zeros(len(row_N), dtype=torch.bool)
    for position in range(length):
        chances_RV = out.logits[:, -1].float().softmax(-1)
        token_N = torch.multinomial(chances_RV[row_N], 1, generator=generator).squeeze(1).masked_fill(ended_N, pad)
        tokens.append(token_N)
        ended_N |= token_N == end
        if position < length - 1:
            beginnings, row_N = torch.stack([row_N, token_N], dim=1).unique(dim=0, return_inverse=True)
            out.past_key_values.batch_select_indices(beginnings[:, 0])
            out = policy(input_ids=beginnings[:, 1:], past_key_values=out.past_key_values, use_cache=True)
    return torch.stack(tokens, dim=1).view(len(prompts_P6), SAMPLES, length)


def advantages(rewards_PG: torch.Tensor) -> torch.Tensor:
    """(reward - mean of its group) / (std of its group + 1e-6), (P, G)."""
    mean_P1, std_P1 = rewards_PG.mean(1, keepdim=True), rewards_PG.std(1, keepdim=True)
    return (rewards_PG - mean_P1) / (std_P1 + ADVANTAGE_EPSILON)


def policy_loss(
    policy: Qwen2ForCausalLM, prompts_P6: torch.Tensor, responses_PG4: torch.Tensor, advantages_PG: torch.Tensor
) -> torch.Tensor:
    """-sum advantage * log pi(token) / number of response tokens.

    Equal responses to one prompt have one gradient: each is computed once, weighted with the sum of its advantages, and
    those with weight 0 (all right or all wrong) not at all.
    """
    pad = policy.config.pad_token_id
    token_count = (responses_PG4 != pad).sum()
    prompts_PG6 = prompts_P6.unsqueeze(1).expand(-1, responses_PG4.shape[1], -1)
    rows, which = torch.cat([prompts_PG6, responses_PG4], dim=-1).flatten(0, 1).unique(dim=0, return_inverse=True)
    weight = torch.zeros(len(rows)).index_add_(0, which, advantages_PG.flatten())
    rows, weight = rows[weight.abs() > ADVANTAGE_EPSILON], weight[weight.abs() > ADVANTAGE_EPSILON]
    if not len(rows):
        return torch.zeros((), requires_grad=True)
    answer = rows[:, prompts_P6.shape[1] :]
    logits = policy(input_ids=rows[:, :-1], logits_to_keep=answer.shape[1]).logits.float()
    log_prob = logits.log_softmax(-1).gather(-1, answer.unsqueeze(-1)).squeeze(-1).masked_fill(answer == pad, 0.0)
    return -(weight * log_prob.sum(1)).sum() / token_count


class Batch(NamedTuple):
    """What was sampled for a step: (P, 6), (P, SAMPLES, 4), (P, SAMPLES); of three-digit addition 8 and 5."""

    prompts: torch.Tensor
    responses: torch.Tensor
    rewards: torch.Tensor


class MasterWeights:
    """The float32 master weights, as the shards of a single process."""

    def __init__(self, policy: Qwen2ForCausalLM) -> None:
        self.tensors = {name: one.detach().float().requires_grad_() for name, one in policy.named_parameters()}

    def __iter__(self) -> Iterator[TensorShard]:
        for name, tensor in self.tensors.items():
            yield TensorShard(name, tuple(tensor.shape), whole(tensor.shape), tensor.detach().flatten())


class Grpo:
    """One training run as verl's defaults have it: constant rate, weight decay 0.01, gradient clipped at norm 1, no KL."""

    def __init__(self, base: Path, train: Questions, learning_rate: float, seed: int) -> None:
        self.policy, self.train = load_model(base), train
        self.master = MasterWeights(self.policy)
        self.optimizer = torch.optim.AdamW(
            self.master.tensors.values(), lr=learning_rate, betas=(0.9, 0.999), weight_decay=0.01, fused=True
        )
        self.generator = torch.Generator().manual_seed(seed)
        self.queue = torch.empty(0, dtype=torch.int64)

    def step(self) -> float:
        """Sample, score, update; returns the mean reward of the samples."""
        batch = self.sampled()
        policy_loss(self.policy, batch.prompts, batch.responses, advantages(batch.rewards)).backward()
        self.update()
        return batch.rewards.mean().item()

    def sampled(self) -> Batch:
        """The next step's samples with their rewards."""
        rows = self._next_rows()
        prompts, answers = self.train.prompts[rows], self.train.answers[rows]
        responses = sample(self.policy, prompts, self.generator, answers.shape[1])
        return Batch(prompts, responses, (responses == answers.unsqueeze(1)).all(-1).float())

    @torch.no_grad()
    def set_master(self, flat: torch.Tensor) -> None:
        """Set the master weights, end to end as `flat_weights` has them, and the policy to them."""
        sizes = [tensor.numel() for tensor in self.master.tensors.values()]
        for tensor, part in zip(self.master.tensors.values(), flat.split(sizes), strict=True):
            tensor.copy_(part.view(tensor.shape))
        self._follow()

    @torch.no_grad()
    def _follow(self) -> None:
        for parameter, master in zip(self.policy.parameters(), self.master.tensors.values(), strict=True):
            parameter.copy_(master)

    @torch.no_grad()
    def update(self) -> None:
        """One step of the optimizer with the gradients that the policy has."""
        for parameter, master in zip(self.policy.parameters(), self.master.tensors.values(), strict=True):
            master.grad = torch.zeros_like(master) if parameter.grad is None else parameter.grad.float()
        torch.nn.utils.clip_grad_norm_(self.master.tensors.values(), 1.0)
        self.optimizer.step()
        self.policy.zero_grad()
        self._follow()

    def _next_rows(self) -> torch.Tensor:
        """Every training question once before any a second time, in the seed's order."""
        if len(self.queue) < PROMPTS:
            self.queue = torch.randperm(len(self.train.prompts), generator=self.generator)
        rows, self.queue = self.queue[:PROMPTS], self.queue[PROMPTS:]
        return rows
