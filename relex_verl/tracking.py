"""Values -> flat metrics, report.json, W&B tables and artifacts. It decides nothing."""

import math
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from relex_verl.diagnostics import describe, random_walk_gram, summary

__all__ = ["WANDB_UPLOAD_LIMIT", "fit_report", "log_to_wandb", "provenance", "step_metrics", "versions"]

WANDB_UPLOAD_LIMIT = 10**9  # bytes; larger checkpoints are logged by reference


def versions() -> dict[str, str]:
    """Versions of what produced a result."""
    found = {"python": platform.python_version()}
    for package in ("relex-verl", "verl", "torch", "transformers", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def provenance(base_model: str, prediction: Any, cut: int, steps: list[int], trajectory: Path) -> dict[str, Any]:
    """What `relex.json` says of a predicted checkpoint."""
    return {
        "base_model": base_model,
        "method": prediction.method,
        "rank": prediction.rank,
        "t_cut": cut,
        "target": prediction.target,
        "fit_from": prediction.fit_from,
        "observed_steps": steps,
        "trajectory": str(trajectory),
        "versions": versions(),
    }


def step_metrics(figures: Mapping[str, torch.Tensor], changed_share: float, stored_bytes: int) -> dict[str, float]:
    """The metrics of one observed step: `relex/<figure>/<mean, p10 or min>` over the tensors, and two totals.

    Args:
        figures: name -> one value a tensor, as `diagnostics.describe` gives them.
        changed_share: share of the weights whose bits changed.
        stored_bytes: size of the trajectory so far.
    """
    metrics = {"relex/changed_share": changed_share, "relex/stored_bytes": float(stored_bytes)}
    for name, values_L in figures.items():
        metrics |= {f"relex/{name}/{statistic}": value for statistic, value in summary(values_L).items()}
    return metrics


def fit_report(
    names: Sequence[str], shapes: Sequence[Sequence[int]], gram_LTT: torch.Tensor, steps: Sequence[int], rank: int
) -> dict[str, Any]:
    """The fits of a cut: a row for each tensor, their summary, and the random-walk null beside it.

    A tensor that never moved has null figures, not zeros.
    """
    figures = describe(gram_LTT, steps, rank)
    null = describe(random_walk_gram(steps), steps, rank)
    norms_L = gram_LTT[:, -1, -1].clamp_min(0.0).sqrt().tolist()
    columns = {name: values_L.tolist() for name, values_L in figures.items()}
    rows = [
        {
            "tensor": name,
            "shape": list(shape),
            "delta_norm": norms_L[i],
            **{column: _defined(values[i]) for column, values in columns.items()},
        }
        for i, (name, shape) in enumerate(zip(names, shapes, strict=True))
    ]
    return {
        "summary": {name: summary(values_L) for name, values_L in figures.items()},
        "random_walk_null": {name: _defined(values_1.item()) for name, values_1 in null.items()},
        "tensors": rows,
    }


def log_to_wandb(
    wandb: Any, step: int, fits: Mapping[str, Any], checkpoints: Sequence[tuple[Path, Mapping[str, Any]]]
) -> None:
    """Log the cut to the run that verl holds: a table of the tensors, and every predicted checkpoint as an artifact.

    Args:
        wandb: verl's W&B backend, the module with an active run.
        step: the training step, so that the table joins the step's other metrics.
        fits: from `fit_report`.
        checkpoints: folder and provenance of each prediction.
    """
    columns = list(fits["tensors"][0])
    rows = [[str(row[c]) if c == "shape" else row[c] for c in columns] for row in fits["tensors"]]
    wandb.log({"relex/tensors": wandb.Table(columns=columns, data=rows)}, step=step)
    for folder, provenance in checkpoints:
        name = f"{folder.name}-{wandb.run.id}"
        artifact = wandb.Artifact(name, type="model", metadata=dict(provenance), description="RELEX prediction")
        if sum(path.stat().st_size for path in folder.iterdir()) > WANDB_UPLOAD_LIMIT:
            artifact.add_reference(folder.as_uri())
        else:
            artifact.add_dir(str(folder))
        wandb.run.log_artifact(artifact)


def _defined(value: float) -> float | None:
    return value if math.isfinite(value) else None
