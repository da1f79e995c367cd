"""Put a predicted checkpoint on the Hugging Face Hub, with a model card made from its `relex.json`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from relex_verl.trajectory import step_ranges

__all__ = ["ShareError", "model_card", "push"]

PAPER = "https://arxiv.org/abs/2605.21468"


class ShareError(ValueError):
    """A checkpoint that cannot be shared: which, why, and what to do."""


def push(checkpoint: Path, repo: str, private: bool = False, api: Any = None) -> str:
    """Upload a predicted checkpoint and its card.

    Args:
        checkpoint: folder with the weights and `relex.json`.
        repo: owner/name; made if it does not exist.
        private: for a repository that is made.
        api: a `huggingface_hub.HfApi`; one with the user's own login for None.

    Returns:
        Address of the repository.

    Raises:
        ShareError: no predicted checkpoint in the folder, or the Hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    provenance = _provenance(checkpoint)
    api = api or HfApi()
    card = model_card(checkpoint.name, provenance, _licence(provenance["base_model"], api), _scores(checkpoint))
    try:
        address = api.create_repo(repo, private=private, exist_ok=True, repo_type="model")
        message = (
            f"{provenance['method']}: step {provenance['target']}, predicted from steps up to {provenance['t_cut']}"
        )
        api.upload_folder(
            repo_id=repo, folder_path=str(checkpoint), commit_message=message, ignore_patterns=["README.md"]
        )
        api.upload_file(
            repo_id=repo, path_or_fileobj=card.encode(), path_in_repo="README.md", commit_message="Model card"
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ShareError(f"{repo}: {said} (log in with `hf auth login`, and check that you may write there)") from error
    return str(address)


def model_card(
    name: str, provenance: Mapping[str, Any], licence: str | None, scores: Mapping[str, float] | None = None
) -> str:
    """The README of a predicted checkpoint: what it is, what it was made from, and whether anyone scored it.

    Args:
        name: of the checkpoint.
        provenance: as in `relex.json`.
        licence: of the base model; None when it could not be found out.
        scores: candidate -> validation score, if it was scored.
    """
    from huggingface_hub import ModelCardData

    base = str(provenance["base_model"])
    local = Path(base).is_absolute()
    data = ModelCardData(
        license=licence, base_model=None if local else base, library_name="transformers", tags=["relex", "grpo"]
    )
    method, target, cut = provenance["method"], provenance["target"], provenance["t_cut"]
    if scores:
        scored = "Scores on the run's own validation set:\n\n| checkpoint | score |\n| --- | --- |\n"
        scored += "\n".join(f"| {who} | {score:.4g} |" for who, score in scores.items())
    else:
        scored = "Nobody scored it. Compare it with the checkpoint of the last observed step before you use it."
    rows = {
        "base model": Path(base).name if local else base,
        "method": f"{method}, rank {provenance.get('rank', '-')}",
        "fitted on steps": step_ranges(provenance.get("observed_steps", [])),
        "cut": cut,
        "predicted step": target,
        "versions": ", ".join(f"{package} {number}" for package, number in provenance.get("versions", {}).items()),
        "licence": licence or "see the base model",
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {name}\n\nThese weights were not trained: they were extrapolated to step {target} "
        f"of a GRPO run from its first {cut} steps, by [RELEX]({PAPER}) as relex-verl implements it.\n\n"
        f"| | |\n| --- | --- |\n{table}\n\n{scored}\n"
    )


def _provenance(checkpoint: Path) -> dict[str, Any]:
    try:
        provenance: dict[str, Any] = json.loads((checkpoint / "relex.json").read_text())
    except FileNotFoundError:
        raise ShareError(f"{checkpoint} has no relex.json: give a folder that `relex-verl extrapolate` wrote") from None
    except json.JSONDecodeError as error:
        raise ShareError(f"{checkpoint}/relex.json is damaged: {error}") from None
    missing = [key for key in ("base_model", "method", "t_cut", "target") if key not in provenance]
    if missing:
        raise ShareError(f"{checkpoint}/relex.json lacks {missing[0]}: this is no predicted checkpoint")
    if not any(checkpoint.glob("*.safetensors")):
        raise ShareError(f"{checkpoint} holds no safetensors file")
    return provenance


def _licence(base: str, api: Any) -> str | None:
    """As the base model's card says: from its folder, else from the Hub."""
    from huggingface_hub import ModelCard

    try:
        local = Path(base) / "README.md"
        found = ModelCard.load(local).data if local.exists() else api.model_info(base).card_data
        return found.license if found is not None else None
    except Exception:  # no card, no such model, no network: the card then points to the base
        return None


def _scores(checkpoint: Path) -> dict[str, float] | None:
    """From the report of the run that wrote it: output_dir/report.json beside output_dir/predicted/."""
    path = checkpoint.absolute().parent.parent / "report.json"
    if not path.exists():
        return None
    rows = json.loads(path.read_text()).get("validation_scores") or []
    return {row["name"]: row["score"] for row in rows if isinstance(row.get("score"), int | float)} or None
