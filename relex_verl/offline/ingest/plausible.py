"""Whether a checkpoint can be the next step of a run, by how far it lies from the one before: exact, of every tensor.

Optimizers move all weights of a model by about as much a step. A tensor that moves much further than any has so far, and
by a good part of itself, was not trained so: it is zeros, of another model, or damaged. So is a model that moves further
as a whole.
"""

from collections.abc import Sequence
from itertools import pairwise
from math import prod

import torch

from relex_verl.offline.ingest.errors import IngestError

__all__ = ["check_moved", "check_plausible"]

FACTOR = 10.0  # times the largest change so far, for as many steps; warm-ups and schedules stay below
FIRST_FACTOR = 30.0  # of the first step: times the median over its tensors
# Parts of |theta_0| below which no change is odd: of the model, of one that has not moved before, of a tensor.
SMALL, STILL_SMALL, TENSOR_SMALL, FIRST_SMALL = 0.003, 0.03, 0.2, 0.5


def check_plausible(
    called: str,
    step: int,
    steps: Sequence[int],
    shapes: dict[str, tuple[int, ...]],
    norm_L: torch.Tensor,
    past_LT: torch.Tensor,
    now_L: torch.Tensor,
) -> None:
    """Refuse a step that moves much further than those before it.

    Args:
        called: what messages call it.
        step: its number.
        steps: those before it.
        shapes: of the tensors.
        norm_L: |theta_0| of each.
        past_LT: |e_s|^2, the squared changes from each step before to the next, from theta_0 on.
        now_L: |e_t|^2 of this one.

    Raises:
        IngestError: which tensor, how far, and what to do.
    """
    size_L = torch.tensor([prod(shape) for shape in shapes.values()], dtype=torch.float64)
    whole, norm = float(now_L.sum().sqrt()), float(norm_L.square().sum().sqrt())
    rms_L, jumped, before, known = (now_L / size_L).sqrt(), False, "the base", ""
    if steps:
        gaps = torch.tensor([late - early for early, late in pairwise([0, *steps])], dtype=torch.float64)
        longer_T = ((step - steps[-1]) / gaps).clamp_min(1.0)
        expected = float((past_LT.sum(0).sqrt() * longer_T).max())
        jumped = whole > max(FACTOR * expected, norm * (SMALL if expected else STILL_SMALL))
        own_L = ((past_LT / size_L[:, None]).sqrt() * longer_T).amax(1)
        limit_L = FACTOR * own_L.clamp_min(float(expected / size_L.sum().sqrt()))
        before, known = f"step {steps[-1]}", f", the steps before it at most {expected / norm:.2g} for as many steps"
    else:
        limit_L = FIRST_FACTOR * rms_L.median().expand_as(rms_L)
    small = TENSOR_SMALL if steps else FIRST_SMALL
    odd_L = (rms_L > limit_L) & (now_L.sqrt() > small * norm_L) & (norm_L > 0)
    if jumped or odd_L.any():
        among_L = odd_L if odd_L.any() else torch.ones_like(odd_L)
        worst = int(torch.where(among_L, rms_L / limit_L.clamp_min(1e-300), -1.0).argmax())
        own = float(now_L[worst].sqrt() / norm_L[worst].clamp_min(1e-300))
        raise IngestError(
            f"{called} lies {whole / norm:.2g} |theta_0| away from {before}{known}; most oddly {list(shapes)[worst]}, by "
            f"{own:.2g} of its own length ({int(odd_L.sum())} such tensors). Look at that checkpoint: leave its step out or "
            "copy it again (or --accept-jump if it was trained so)"
        )


def check_moved(steps: Sequence[int], changed_LT: torch.Tensor) -> None:
    """Refuse a run in which nothing moved.

    Args:
        steps: all of them.
        changed_LT: |e_t|^2.

    Raises:
        IngestError: with a question.
    """
    if steps and not changed_LT.any():
        many = f"all {len(steps)} checkpoints are" if len(steps) > 1 else "the checkpoint is"
        raise IngestError(
            f"{many} the base, bit by bit, so that there is nothing to follow. Were LoRA adapters trained (give the folders "
            "of adapter_model.safetensors and adapter_config.json)? Is --base the trained model? Or was nothing saved?"
        )
