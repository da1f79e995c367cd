"""Batched decoding whose result for a request depends on that request alone.

A matrix product rounds a row differently from place to place in a batch. In float64 those differences
are around 1e-16, and they are gone once a result is rounded to float32: which requests were decoded
together, and in which order, leaves no trace.
"""

from dataclasses import dataclass

import numpy as np
import torch

BATCH_ROWS = 256
"""Decode at most this many requests together; bounds the memory of the key-value cache."""


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
    """Continue prompts of equal length until each one stops. The model is in float64."""
    input_ids = torch.tensor(prompts)
    temperatures = torch.tensor([sampling.temperature for sampling in samplings], dtype=torch.float64)
    limits = [len(sampling.uniforms) for sampling in samplings]
    uniforms = torch.zeros(len(prompts), max(limits), dtype=torch.float64)
    for row, sampling in enumerate(samplings):
        uniforms[row, : limits[row]] = torch.from_numpy(sampling.uniforms)

    results = [Decoded([], []) for _ in prompts]
    unfinished = set(range(len(prompts)))
    cache = None
    for position in range(max(limits)):
        output = model(input_ids=input_ids, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        chosen, log_probs = _choose(output.logits[:, -1], temperatures, uniforms[:, position])
        tokens = chosen.tolist()
        for row in sorted(unfinished):
            results[row].token_ids.append(tokens[row])
            results[row].log_probs.append(log_probs[row].item())
            if tokens[row] in stop_ids or position + 1 == limits[row]:
                unfinished.discard(row)
        if not unfinished:
            break
        input_ids = chosen.unsqueeze(1)
    return results


def _choose(
    logits: torch.Tensor, temperatures: torch.Tensor, uniforms: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Invert each row's cumulative distribution at its uniform number; greedy rows take the likeliest token."""
    greedy = temperatures == 0
    scale = torch.where(greedy, 1.0, temperatures).unsqueeze(1)
    log_probs = torch.log_softmax(logits / scale, dim=-1)
    cumulative = log_probs.exp().cumsum(dim=-1)
    sampled = (cumulative <= uniforms.unsqueeze(1)).sum(dim=-1).clamp(max=logits.shape[-1] - 1)
    chosen = torch.where(greedy, logits.argmax(dim=-1), sampled)
    return chosen, log_probs.gather(1, chosen.unsqueeze(1)).squeeze(1).float()
