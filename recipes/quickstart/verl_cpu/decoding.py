"""Batched decoding whose result for a row depends on that row alone."""

from dataclasses import dataclass

import numpy as np
import torch

BATCH_ROWS = 64
"""Every forward pass has this many rows; short batches are filled up with copies of their last row."""


@dataclass
class Sampling:
    """How to choose one request's tokens."""

    temperature: float
    """0 takes the likeliest token."""
    uniforms: np.ndarray
    """One number in [0, 1) for each token that may be generated: all the chance there is."""


@dataclass
class Decoded:
    """What one request generated, the stop token included."""

    token_ids: list[int]
    log_probs: list[float]


@torch.inference_mode()
def decode(
    model: torch.nn.Module, prompts: list[list[int]], samplings: list[Sampling], stop_ids: set[int]
) -> list[Decoded]:
    """Continue prompts of equal length, at most `BATCH_ROWS` of them, until each one stops."""
    count = len(prompts)
    rows = list(range(count)) + [count - 1] * (BATCH_ROWS - count)
    input_ids = torch.tensor([prompts[row] for row in rows])
    results = [Decoded([], []) for _ in range(count)]
    unfinished = set(range(count))
    cache = None
    while unfinished:
        output = model(input_ids=input_ids, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        tokens, log_probs = _choose(output.logits[:, -1], [samplings[row] for row in rows], results, rows)
        for row in sorted(unfinished):
            results[row].token_ids.append(tokens[row])
            results[row].log_probs.append(log_probs[row])
            if tokens[row] in stop_ids or len(results[row].token_ids) == len(samplings[row].uniforms):
                unfinished.discard(row)
        input_ids = torch.tensor(tokens).unsqueeze(1)
    return results


def _choose(
    logits: torch.Tensor, samplings: list[Sampling], results: list[Decoded], rows: list[int]
) -> tuple[list[int], list[float]]:
    """Invert each row's cumulative distribution at its next uniform number; greedy rows take the mode."""
    temperatures = torch.tensor([sampling.temperature or 1.0 for sampling in samplings], dtype=torch.float64)
    log_probs = torch.log_softmax(logits.double() / temperatures.unsqueeze(1), dim=-1)
    uniforms = torch.tensor(
        [
            sampling.uniforms[min(len(results[row].token_ids), len(sampling.uniforms) - 1)]
            for sampling, row in zip(samplings, rows, strict=True)
        ],
        dtype=torch.float64,
    )
    cumulative = log_probs.exp().cumsum(dim=-1)
    sampled = (cumulative <= uniforms.unsqueeze(1)).sum(dim=-1).clamp(max=logits.shape[-1] - 1)
    greedy = torch.tensor([sampling.temperature == 0 for sampling in samplings])
    tokens = torch.where(greedy, logits.argmax(dim=-1), sampled)
    chosen = log_probs.gather(1, tokens.unsqueeze(1)).squeeze(1)
    return tokens.tolist(), chosen.tolist()
