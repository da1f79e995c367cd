"""Put a predicted checkpoint on the Hugging Face Hub, with a model card made from its `relex.json`."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any

from relex_verl.maths.extrapolators import METHODS
from relex_verl.offline.baselines import SOURCES
from relex_verl.reporting.findings import CutReport
from relex_verl.reporting.provenance import Provenance
from relex_verl.reporting.records import RecordError
from relex_verl.trajectory.index import step_ranges

__all__ = ["ShareError", "model_card", "push"]


class ShareError(ValueError):
    """A checkpoint that cannot be shared: which, why, and what to do."""


def push(checkpoint: Path, repo: str, private: bool = False, api: Any = None) -> str:
    """Upload a predicted checkpoint and its card, without the names of this machine's folders.

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
    library = "peft" if (checkpoint / "adapter_config.json").exists() else "transformers"
    licence, scores = _licence(provenance.base_model, api), _scores(checkpoint, provenance)
    beside = {
        "README.md": model_card(checkpoint.name, provenance, licence, scores, library),
        "relex.json": json.dumps(_without_places(provenance).to_json(), indent=1) + "\n",
    }
    try:
        address = api.create_repo(repo, private=private, exist_ok=True, repo_type="model")
        message = f"{provenance.method}, from steps up to {provenance.t_cut}"
        api.upload_folder(
            repo_id=repo, folder_path=str(checkpoint), commit_message=message, ignore_patterns=list(beside)
        )
        for name, content in beside.items():
            api.upload_file(repo_id=repo, path_or_fileobj=content.encode(), path_in_repo=name, commit_message=name)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ShareError(f"{repo}: {said} (log in with `hf auth login`, and check that you may write there)") from error
    return str(address)


def model_card(
    name: str,
    provenance: Provenance,
    licence: str | None,
    scores: Mapping[str, float] | None = None,
    library: str = "transformers",
) -> str:
    """The README of a predicted checkpoint: what it is, what it was made from, and whether anyone scored it.

    Args:
        name: of the checkpoint.
        provenance: what `relex.json` says.
        licence: of the base model; None when it could not be found out.
        scores: candidate -> validation score, if it was scored.
        library: that loads it; peft for an adapter.
    """
    from huggingface_hub import ModelCardData

    base, local = _base_name(provenance)
    data = ModelCardData(
        license=licence, base_model=None if local else base, library_name=library, tags=["relex", "grpo"]
    )
    if scores:
        scored = "Scores on the run's own validation set:\n\n| checkpoint | score |\n| --- | --- |\n"
        scored += "\n".join(f"| {who} | {score:.4g} |" for who, score in scores.items())
    else:
        scored = "Nobody scored it. Compare it with the checkpoint of the last observed step before you use it."
    target = provenance.target
    rows = {
        "base model": base,
        "method": f"{provenance.method}, rank {provenance.rank}",
        "fitted on steps": step_ranges(provenance.observed_steps),
        "cut": provenance.t_cut,
        "predicted step": "-" if target is None else target,
        "versions": ", ".join(f"{package} {number}" for package, number in provenance.versions.items()),
        "licence": licence or "see the base model",
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    title = name if target is None else f"{provenance.method}-step_{target}"
    return f"---\n{data.to_yaml()}\n---\n\n# {title}\n\n{_origin(provenance)}\n\n| | |\n| --- | --- |\n{table}\n\n{scored}\n"


def _origin(provenance: Provenance) -> str:
    """How the weights came to be, in a sentence that credits whose method it was."""
    method, target, cut = provenance.method, provenance.target, provenance.t_cut
    if method == "reconstruction":
        made = f"they are the rank-{provenance.rank} part of step {target} of a GRPO run, over its steps up to {cut}"
    elif target is None:
        wanted = (provenance.settings or {}).get("wanted", "another one")
        made = f"they were extrapolated from the first {cut} steps of a GRPO run to a score of {wanted}"
    else:
        made = f"they were extrapolated to step {target} of a GRPO run from its first {cut} steps"
    return f"These weights were not trained: {made}, by `{method}` ({_source(method)}) as relex-verl implements it."


def _source(method: str) -> str:
    """Where a method comes from, with a link to its paper."""
    known = {"reconstruction": "Wei et al. 2026, Algorithm 1, arXiv:2605.21468", **SOURCES}
    source = METHODS[method].source if method in METHODS else known.get(method, "unknown to this version")
    return re.sub(r"arXiv:([\d.]+\d)", r"[arXiv:\1](https://arxiv.org/abs/\1)", source)


def _base_name(provenance: Provenance) -> tuple[str, bool]:
    """What to call the base, and whether it is a folder of this machine."""
    base = provenance.base_model
    local = Path(base).is_absolute() or Path(base).is_dir()
    return (Path(base).name if local else base), local


def _without_places(provenance: Provenance) -> Provenance:
    """The same with names instead of paths."""
    return replace(provenance, base_model=_base_name(provenance)[0], trajectory=Path(provenance.trajectory).name)


def _provenance(checkpoint: Path) -> Provenance:
    try:
        provenance = Provenance.read(checkpoint / "relex.json")
    except FileNotFoundError:
        raise ShareError(f"{checkpoint} has no relex.json: give a folder that `relex-verl extrapolate` wrote") from None
    except RecordError as error:
        raise ShareError(f"{error}: {checkpoint} is no predicted checkpoint") from None
    if not any(checkpoint.glob("*.safetensors")):
        raise ShareError(f"{checkpoint} holds no safetensors file")
    return provenance


def _licence(base: str, api: Any) -> str | None:
    """As the base model's card says: from its folder, else from the Hub."""
    from huggingface_hub import ModelCard

    try:
        local = Path(base) / "README.md"
        card = ModelCard.load(local).data if local.exists() else api.model_info(base).card_data
        return card.license if card is not None else None
    except Exception:  # no card, no such model, no network: the card then points to the base
        return None


def _scores(checkpoint: Path, provenance: Provenance) -> dict[str, float] | None:
    """What the run's report says of the cut that this checkpoint is from; None unless it was scored itself.

    The checkpoint is output_dir/predicted/<name> or output_dir/recommended; the report of every cut is in
    output_dir/scores, the latest one in output_dir.
    """
    here = checkpoint.absolute()
    for out in (here.parent.parent, here.parent):
        for path in (out / "scores" / f"cut_{provenance.t_cut}" / "report.json", out / "report.json"):
            try:
                report = CutReport.read(path)
            except (OSError, RecordError):
                continue
            rows = [row for row in report.validation_scores if isfinite(row.score)]
            scored = any((row.method, row.target) == (provenance.method, provenance.target) for row in rows)
            if scored and report.t_cut == provenance.t_cut:
                return {row.name: row.score for row in rows}
    return None
