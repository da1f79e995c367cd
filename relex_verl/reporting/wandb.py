"""A cut in Weights & Biases, through the run that the host holds: this module imports no wandb."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from relex_verl.reporting.findings import CutReport
from relex_verl.reporting.provenance import Provenance
from relex_verl.reporting.timeline import timeline_rows

__all__ = ["UPLOAD_LIMIT", "log_cut"]

UPLOAD_LIMIT = 10**9  # bytes; larger checkpoints are logged by reference


def log_cut(wandb: Any, report: CutReport, figures: Mapping[str, Path]) -> None:
    """Log a cut to the run that verl holds: an alert, summary fields, tables, pictures, artifacts.

    Args:
        wandb: verl's W&B backend, the module with an active run.
        report: of the cut; logged at its step, so that everything joins the step's other metrics. The recommended one of
            its checkpoints gets the alias "recommended".
        figures: name -> PNG file.
    """
    advice = report.advice
    wandb.run.summary["relex/advice"] = advice.action
    if report.scoring is not None:
        wandb.run.summary["relex/scoring"] = vars(report.scoring)
    if report.recommended_path is not None:
        wandb.run.summary["relex/recommended_path"] = report.recommended_path
        wandb.run.summary["relex/steps_saved"] = report.steps_saved
    wandb.run.alert(title=f"RELEX: {advice.action.replace('_', ' ')}", text=advice.reason)
    tables = {
        "tensors": report.fits.tensors,
        "candidates": [{k: v for k, v in vars(row).items() if k != "metrics"} for row in report.validation_scores],
        "cuts": timeline_rows(report),
        "screened_out": [{"method": method, "reason": why} for method, why in report.screened_out.items()],
    }
    logged = {f"relex/{name}": _wandb_table(wandb, rows) for name, rows in tables.items() if rows}
    logged |= {f"relex/figures/{name}": wandb.Image(str(path)) for name, path in figures.items()}
    wandb.log(logged, step=report.t_cut)
    recommended = None if advice.target is None else advice.target.folder_name
    for prediction in report.predictions:  # last: nothing else waits for the copying of checkpoints
        folder = Path(prediction.path)
        _log_artifact(wandb, folder, recommended=folder.name == recommended)


def _wandb_table(wandb: Any, rows: Sequence[Mapping[str, Any]]) -> Any:
    columns = list(rows[0])
    cells = [[str(row[key]) if isinstance(row[key], list) else row[key] for key in columns] for row in rows]
    return wandb.Table(columns=columns, data=cells)


def _log_artifact(wandb: Any, folder: Path, recommended: bool) -> None:
    metadata = Provenance.read(folder / "relex.json").to_json()
    artifact = wandb.Artifact(
        f"{folder.name}-{wandb.run.id}", type="model", metadata=metadata, description="RELEX prediction"
    )
    if sum(path.stat().st_size for path in folder.iterdir()) > UPLOAD_LIMIT:
        # No checksum: the training would wait while many gigabytes are read again.
        artifact.add_reference(folder.as_uri(), checksum=False)
    else:
        artifact.add_dir(str(folder))
    wandb.run.log_artifact(artifact, aliases=["latest", "recommended"] if recommended else ["latest"])
