"""What others do with one batch of samples: SFPO and GXPO by their published rules, in the loop's own terms.

Both update several times on the samples of one step, so from the second update on the policy is not the one that sampled:
the loss is PPO's clipped one. Both have a gate that ends the rule for good, plain GRPO from then on, once a statistic of the
run stands out from the `GATE_WINDOW` before it. What is not in the papers' abstracts is as the authors' code has it, at its
default of that window in both.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from study.grpo import ADVANTAGE_EPSILON, Batch, Grpo, advantages
from study.train import flat_weights

CLIP = 0.2
SFPO_STEPS, SFPO_BACK = 3, 0.8  # the authors' scripts for Qwen2.5-Math-1.5B
GXPO_STEPS, GXPO_PART = 5, 0.5
GXPO_RATIOS, GXPO_ACTIVE = (-2.0, 3.0), 1e-3
GATE_WINDOW = 30
SFPO_GATE = 1.0  # `zscore_threshold` of the authors' scripts
# A script for the paper's protocol has 0.5, those of its main table 2: the one that lets the rule go on longer.
GXPO_GATE = 2.0


class Merged:
    """A batch's distinct responses, each weighted with the sum of its advantages: equal ones have equal advantages."""

    def __init__(self, training: Grpo, batch: Batch) -> None:
        self.policy, pad = training.policy, training.policy.config.pad_token_id
        self.tokens = (batch.responses != pad).sum()
        prompts_PG6 = batch.prompts.unsqueeze(1).expand(-1, batch.responses.shape[1], -1)
        together = torch.cat([prompts_PG6, batch.responses], dim=-1).flatten(0, 1)
        self.all, which, self.times = together.unique(dim=0, return_inverse=True, return_counts=True)
        weight = torch.zeros(len(self.all)).index_add_(0, which, advantages(batch.rewards).flatten())
        counts = weight.abs() > ADVANTAGE_EPSILON
        self.rows, self.weight = self.all[counts], weight[counts].unsqueeze(1)
        self.prompt_length, self.pad = batch.prompts.shape[-1], pad
        self.mask = self._answers(self.rows) != pad
        with torch.no_grad():
            self.old = self._log_prob() if len(self.rows) else torch.zeros(0)

    def _answers(self, rows: torch.Tensor) -> torch.Tensor:
        return rows[:, self.prompt_length :]

    def _log_probs(self, rows: torch.Tensor) -> torch.Tensor:
        length = self._answers(rows).shape[1]
        return self.policy(input_ids=rows[:, :-1], logits_to_keep=length).logits.float().log_softmax(-1)

    def _log_prob(self) -> torch.Tensor:
        return self._log_probs(self.rows).gather(-1, self._answers(self.rows).unsqueeze(-1)).squeeze(-1)

    @torch.no_grad()
    def entropy(self) -> float:
        """Of the policy as it is now, the mean over all tokens of the samples."""
        log_probs_RAV, tokens_RA = self._log_probs(self.all), self._answers(self.all)
        entropy_RA = -(log_probs_RAV.exp() * log_probs_RAV).sum(-1)
        weight_RA = (tokens_RA != self.pad) * self.times.unsqueeze(1)
        return ((entropy_RA * weight_RA).sum() / weight_RA.sum()).item()

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


@dataclass
class Gate:
    """Ends a rule for good when its statistic is `threshold` deviations above the mean of `GATE_WINDOW` values.

    Attributes:
        threshold: upwards only; infinity is no gate.
        counts_itself: the newest value is one of the window's, else the window is of those before it.
        values: the statistic, a value for each step that was taken by the rule.
        closed: the last of those steps, once it is closed.
    """

    threshold: float
    counts_itself: bool = False
    values: list[float] = field(default_factory=list)
    closed: int | None = None

    def watch(self, step: int, value: float) -> None:
        """The statistic of a step."""
        self.values.append(value)
        window = (self.values if self.counts_itself else self.values[:-1])[-GATE_WINDOW:]
        if len(window) == GATE_WINDOW:
            above = value - statistics.fmean(window)
            if above >= self.threshold * (statistics.pstdev(window) + 1e-9):
                self.closed = step


def sfpo_step(training: Grpo) -> float:
    """SFPO (arXiv:2510.04072): K updates on the batch, back to start + 0.8 of the way, and one more update there.

    Returns the statistic of its gate, the entropy at that point. The paper's gate is on the entropy's z-score; the window of
    30 with the newest value in it, the threshold of 1, upwards only and without a way back are of the authors' trainer
    (github.com/Urheen/SFPO, `verl/trainer/ppo/ray_trainer.py` and `train-scripts/`).
    """
    batch = training.sampled()
    merged, start = Merged(training, batch), flat_weights(training)
    for _ in range(SFPO_STEPS):
        merged.update(training)
    training.set_master(start + SFPO_BACK * (flat_weights(training) - start))
    entropy = merged.entropy()
    merged.update(training)
    return entropy


def gxpo_step(training: Grpo) -> float:
    """GXPO (arXiv:2605.06755): two updates, half the way to the point where K would lead, and one more update there.

    Each weight's gradient is taken to shrink (or grow) by the same ratio r from update to update, so K updates lead
    S_K(r) / S_2(r) times as far as two, with S_K(r) = 1 + r + ... + r^(K-1). Weights whose first gradient is next to nothing
    in their tensor go as far as the two updates led.

    Returns the statistic of its gate, the norm of the last update's gradient before clipping: "when the lookahead signal
    becomes unstable" the paper goes back to GRPO, by the z-score of that norm against the norms before it, upwards only, for
    good (github.com/SwapniL-afk-now/final-gxpo, apparently its first author's, `verl/workers/actor/gxpo_state.py`: a full
    window of 30, population deviation). A later state of that code watches the entropy instead, as SFPO does.
    """
    batch = training.sampled()
    merged, start = Merged(training, batch), flat_weights(training)
    first, second = (merged.update(training) for _ in range(2))
    tensors = first.split([one.numel() for one in training.policy.parameters()])
    active = first.abs() > GXPO_ACTIVE * torch.cat([one.square().mean().sqrt().expand_as(one) for one in tensors])
    ratio = torch.where(active, second / torch.where(active, first, 1.0), 1.0).clamp(*GXPO_RATIOS)
    reach = sum(ratio**k for k in range(GXPO_STEPS)) / (1 + ratio)
    reach = torch.where(active & reach.isfinite(), reach, 1.0).clamp(1.0, GXPO_STEPS / 2 + 1)
    training.set_master(start + GXPO_PART * reach * (flat_weights(training) - start))
    return merged.update(training).norm().item()


class Rule(NamedTuple):
    """How a step is taken: returns what the gate watches."""

    step: Callable[[Grpo], float]
    backward_passes: int
    threshold: float = math.inf
    counts_itself: bool = False

    def gate(self) -> Gate:
        """A new one."""
        return Gate(self.threshold, self.counts_itself)


RULES = {
    "plain": Rule(Grpo.step, 1),
    "sfpo": Rule(sfpo_step, SFPO_STEPS + 1, SFPO_GATE, counts_itself=True),
    "gxpo": Rule(gxpo_step, 3, GXPO_GATE),
    "sfpo-open": Rule(sfpo_step, SFPO_STEPS + 1),
    "gxpo-open": Rule(gxpo_step, 3),
}
