"""What others do with one batch of samples: SFPO and GXPO by their published rules, in the loop's own terms.

Both update several times on the samples of one step, so from the second update on the policy is not the one that sampled:
the loss is PPO's clipped one. Both papers have a gate that ends the rule for good once a run has become unstable; it is left
out here, since within these runs none does.
"""

import torch

from study.grpo import ADVANTAGE_EPSILON, Batch, Grpo, advantages
from study.task import ANSWER_TOKENS, PROMPT_TOKENS
from study.train import flat_weights

CLIP = 0.2
SFPO_STEPS, SFPO_BACK = 3, 0.8  # the authors' scripts for Qwen2.5-Math-1.5B
GXPO_STEPS, GXPO_PART = 5, 0.5
GXPO_RATIOS, GXPO_ACTIVE = (-2.0, 3.0), 1e-3


class Merged:
    """A batch's distinct responses, each weighted with the sum of its advantages: equal ones have equal advantages."""

    def __init__(self, training: Grpo, batch: Batch) -> None:
        self.policy, pad = training.policy, training.policy.config.pad_token_id
        self.tokens = (batch.responses != pad).sum()
        prompts_PG6 = batch.prompts.unsqueeze(1).expand(-1, batch.responses.shape[1], -1)
        together = torch.cat([prompts_PG6, batch.responses], dim=-1).flatten(0, 1)
        rows, which = together.unique(dim=0, return_inverse=True)
        weight = torch.zeros(len(rows)).index_add_(0, which, advantages(batch.rewards).flatten())
        counts = weight.abs() > ADVANTAGE_EPSILON
        self.rows, self.weight = rows[counts], weight[counts].unsqueeze(1)
        self.mask = self.rows[:, PROMPT_TOKENS:] != pad
        with torch.no_grad():
            self.old = self._log_prob() if len(self.rows) else torch.zeros(0)

    def _log_prob(self) -> torch.Tensor:
        logits = self.policy(input_ids=self.rows[:, :-1], logits_to_keep=ANSWER_TOKENS).logits.float()
        return logits.log_softmax(-1).gather(-1, self.rows[:, PROMPT_TOKENS:].unsqueeze(-1)).squeeze(-1)

    def update(self, training: Grpo) -> torch.Tensor:
        """One update on these samples, from where the policy is now; returns the gradient as it was before clipping."""
        if len(self.rows):
            ratio = (self._log_prob() - self.old).exp()
            gain = torch.minimum(ratio * self.weight, ratio.clamp(1 - CLIP, 1 + CLIP) * self.weight)
            (-(gain * self.mask).sum() / self.tokens).backward()
        found = [torch.zeros_like(one) if one.grad is None else one.grad for one in self.policy.parameters()]
        gradient = torch.cat([one.flatten().float() for one in found])
        training.update()
        return gradient


def sfpo_step(training: Grpo) -> float:
    """SFPO (arXiv:2510.04072): K updates on the batch, back to start + 0.8 of the way, and one more update there."""
    batch = training.sampled()
    merged, start = Merged(training, batch), flat_weights(training)
    for _ in range(SFPO_STEPS):
        merged.update(training)
    training.set_master(start + SFPO_BACK * (flat_weights(training) - start))
    merged.update(training)
    return batch.rewards.mean().item()


def gxpo_step(training: Grpo) -> float:
    """GXPO (arXiv:2605.06755): two updates, half the way to the point where K would lead, and one more update there.

    Each weight's gradient is taken to shrink (or grow) by the same ratio r from update to update, so K updates lead
    S_K(r) / S_2(r) times as far as two, with S_K(r) = 1 + r + ... + r^(K-1).
    """
    batch = training.sampled()
    merged, start = Merged(training, batch), flat_weights(training)
    first, second = (merged.update(training) for _ in range(2))
    active = first.abs() > GXPO_ACTIVE * first.square().mean().sqrt()
    ratio = torch.where(active, second / torch.where(active, first, 1.0), 1.0).clamp(*GXPO_RATIOS)
    reach = sum(ratio**k for k in range(GXPO_STEPS)) / (1 + ratio)
    reach = torch.where(active & reach.isfinite(), reach, 1.0).clamp(1.0, GXPO_STEPS / 2 + 1)
    training.set_master(start + GXPO_PART * reach * (flat_weights(training) - start))
    merged.update(training)
    return batch.rewards.mean().item()


# Rule -> (one step of it, backward passes a step).
RULES = {"plain": (Grpo.step, 1), "sfpo": (sfpo_step, SFPO_STEPS + 1), "gxpo": (gxpo_step, 3)}
