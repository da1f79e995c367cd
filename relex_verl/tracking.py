"""Values -> flat metrics, report.json, W&B tables and artifacts. It decides nothing."""

import json
import math
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from relex_verl.diagnostics import backtest_ratio, describe, random_walk_gram, summary
from relex_verl.extrapolators import METHODS

__all__ = [
    "WANDB_UPLOAD_LIMIT",
    "fit_report",
    "half_backtest",
    "log_to_wandb",
    "provenance",
    "step_metrics",
    "strict",
    "versions",
]

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


def half_backtest(gram_LTT: torch.Tensor, steps: Sequence[int], method: str, rank: int) -> float:
    """Error of predicting the last row from the first half of the rows, against holding; NaN while there are too few."""
    prefix = (len(steps) + 1) // 2
    if prefix < METHODS[method].min_rows or prefix >= len(steps):
        return math.nan
    return backtest_ratio(gram_LTT, steps, prefix, method, rank)


def step_metrics(
    figures: Mapping[str, torch.Tensor], changed_share: float, stored_bytes: int, backtest: float
) -> dict[str, float]:
    """The metrics of one observed step: `relex/<figure>/<mean, p10 or min>` over the tensors, totals, and live signals.

    Args:
        figures: name -> one value a tensor, as `diagnostics.describe` gives them.
        changed_share: share of the weights whose bits changed.
        stored_bytes: size of the trajectory so far.
        backtest: from `half_backtest`; `relex/ready` is 1 when it says that extrapolating beats holding.
    """
    metrics = {"relex/stored_bytes": float(stored_bytes)}
    if math.isfinite(changed_share):  # a sketch does not keep the row before
        metrics["relex/changed_share"] = changed_share
    if math.isfinite(backtest):
        metrics |= {"relex/backtest/error_vs_hold": backtest, "relex/ready": float(backtest < 1.0)}
    if figures["drift"].isfinite().any():
        metrics["relex/drift"] = figures["drift"].nanmean().item()
    for name, values_L in figures.items():
        metrics |= {f"relex/{name}/{statistic}": value for statistic, value in summary(values_L).items()}
    return metrics


def fit_report(
    names: Sequence[str],
    shapes: Sequence[Sequence[int]],
    gram_LTT: torch.Tensor,
    steps: Sequence[int],
    rank: int,
    energy_L: torch.Tensor | None = None,
) -> dict[str, Any]:
    """The fits of a cut: a row for each tensor, their summary, and the random-walk null beside it.

    A tensor that never moved has null figures, not zeros; so has every tensor where only a sketch is known (`energy_L`).
    """
    figures = describe(gram_LTT, steps, rank, energy_L)
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


def strict(content: Any) -> Any:
    """The same as JSON knows it: numbers that are not finite become null, which JSON has no word for."""
    if isinstance(content, Mapping):
        return {str(key): strict(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [strict(value) for value in content]
    return _defined(content) if isinstance(content, float) else content


def log_to_wandb(
    wandb: Any, step: int, report: Mapping[str, Any], figures: Mapping[str, Path], folders: Sequence[Path]
) -> None:
    """Log a cut to the run that verl holds: an alert, summary fields, tables, pictures, artifacts.

    Args:
        wandb: verl's W&B backend, the module with an active run.
        step: the training step, so that everything joins the step's other metrics.
        report: as in report.json.
        figures: name -> PNG file.
        folders: the predicted checkpoints; the recommended one gets the alias "recommended".
    """
    advice = report["advice"]
    wandb.run.summary["relex/advice"] = advice["action"]
    if advice["target"] is not None:
        wandb.run.summary["relex/recommended_path"] = report["recommended_path"]
        wandb.run.summary["relex/steps_saved"] = report["steps_saved"]
    wandb.run.alert(title=f"RELEX: {advice['action'].replace('_', ' ')}", text=advice["reason"])
    rows = {
        "tensors": report["fits"]["tensors"],
        "candidates": [{k: v for k, v in row.items() if k != "metrics"} for row in report["validation_scores"]],
        "screened_out": [{"method": method, "reason": why} for method, why in report["screened_out"].items()],
    }
    logged = {f"relex/{name}": _wandb_table(wandb, found) for name, found in rows.items() if found}
    logged |= {f"relex/figures/{name}": wandb.Image(str(path)) for name, path in figures.items()}
    wandb.log(logged, step=step)
    for folder in folders:  # last: nothing else waits for the copying of checkpoints
        _log_artifact(wandb, folder, recommended=folder.name == advice["target"])


def _wandb_table(wandb: Any, rows: Sequence[Mapping[str, Any]]) -> Any:
    columns = list(rows[0])
    cells = [[str(row[key]) if isinstance(row[key], list) else row[key] for key in columns] for row in rows]
    return wandb.Table(columns=columns, data=cells)


def _log_artifact(wandb: Any, folder: Path, recommended: bool) -> None:
    metadata = json.loads((folder / "relex.json").read_text())
    artifact = wandb.Artifact(
        f"{folder.name}-{wandb.run.id}", type="model", metadata=metadata, description="RELEX prediction"
    )
    if sum(path.stat().st_size for path in folder.iterdir()) > WANDB_UPLOAD_LIMIT:
        # No checksum: the training would wait while many gigabytes are read again.
        artifact.add_reference(folder.as_uri(), checksum=False)
    else:
        artifact.add_dir(str(folder))
    wandb.run.log_artifact(artifact, aliases=["latest", "recommended"] if recommended else ["latest"])


def _defined(value: float) -> float | None:
    return value if math.isfinite(value) else None
