"""RELEX for verl: rank-1 extrapolation of RLVR weight trajectories (https://arxiv.org/abs/2605.21468).

A run with `+relex=default` records a trajectory by itself; so does `ingest`, of a run that is finished. Then, in a notebook:

    >>> from relex_verl import METHODS, Trajectory, diagnose, extrapolate, ingest, reconstruct
    >>> trajectory = ingest("base", "run", out="trajectory")
    >>> trajectory.steps
    [1, 2, 3, 4, 5, 6]

How straight is the path of each tensor, and how straight would noise be?

    >>> diagnosis = diagnose(trajectory)
    >>> figures = ("explained_variance", "line_r2", "spectral_gap", "drift")
    >>> all(diagnosis.summary[name].keys() == {"mean", "p10", "min"} for name in figures)
    True
    >>> round(diagnosis.random_walk["line_r2"], 2)
    0.96

A prediction is a Hugging Face checkpoint, laid out like the base. Score it before you use it: no figure above says whether
it is any good.

    >>> "relex" in METHODS
    True
    >>> extrapolate(trajectory, target=40, out="predictions").name
    'relex-step_40'
    >>> reconstruct(trajectory, step=6, rank=1, out="rank_1").name
    'rank_1'

Importing this package loads neither torch nor verl, ray or wandb: `import verl` imports it as a plugin in every process. The
names above are loaded when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["METHODS", "Diagnosis", "Trajectory", "__version__", "diagnose", "extrapolate", "ingest", "reconstruct"]

_HOME = {
    "METHODS": "relex_verl.maths.extrapolators",
    "Trajectory": "relex_verl.trajectory.store",
    **dict.fromkeys(("Diagnosis", "diagnose", "extrapolate", "ingest", "reconstruct"), "relex_verl.offline.face"),
}

if TYPE_CHECKING:
    from relex_verl.maths.extrapolators import METHODS
    from relex_verl.offline.face import Diagnosis, diagnose, extrapolate, ingest, reconstruct
    from relex_verl.trajectory.store import Trajectory
else:  # a type checker would take a module's __getattr__ for leave to use any name

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(_HOME[name]), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
