"""What made a result: versions of the packages, and the facts of a predicted checkpoint (`relex.json`)."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["provenance", "versions"]


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
