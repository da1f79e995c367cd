"""What a trajectory shows: Algorithm 1, backtests, alignment with the true later weights, and grids of predictions.

Plain numbers and checkpoints come out; the commands print and draw them.
"""

from relex_verl.offline.analysis.alignment import (
    Alignment,
    align_checkpoints,
    align_observed,
    align_reconstruction,
)
from relex_verl.offline.analysis.predictions import sweep, write_prediction
from relex_verl.offline.analysis.windows import backtests, observed_until, reconstruct, spread, window

__all__ = [
    "Alignment",
    "align_checkpoints",
    "align_observed",
    "align_reconstruction",
    "backtests",
    "observed_until",
    "reconstruct",
    "spread",
    "sweep",
    "window",
    "write_prediction",
]
