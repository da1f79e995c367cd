"""The checkpoints of a finished run: those in a folder, or in a Hub repository, and which of them are wanted."""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from relex_verl.offline.ingest.checkpoints import Found, endpoint
from relex_verl.offline.ingest.errors import IngestError, first_line
from relex_verl.offline.ingest.layouts import Place, files_as_tree, matching, steps_below

__all__ = ["checkpoints_in", "find_checkpoints", "find_revisions", "select_steps", "within"]

MAIN = "main"


def find_checkpoints(folder: Path, pattern: str | None = None) -> list[Found]:
    """The checkpoints in the step folders (`global_step_5`, `checkpoint-5`, `5`, ...) of a folder, ascending.

    Step 0 is left out: it is the base model.

    Args:
        folder: where to look.
        pattern: how the steps' folders are named, with {N}; None: found out, see `layouts`.

    Raises:
        IngestError: no step folder, or several that may be meant.
    """
    called = f"--checkpoints {folder}"
    if not folder.is_dir():
        raise IngestError(f"{called}: {'this is a file' if folder.exists() else 'no such folder'}")

    def listing(path: str) -> tuple[list[str], list[str]]:
        try:
            with os.scandir(folder / path) as entries:
                inside = [(entry.is_dir(), entry.name) for entry in entries]
        except PermissionError as error:
            raise IngestError(f"{folder / path} may not be read by this user: {error.strerror}") from error
        return [name for is_dir, name in inside if is_dir], [name for is_dir, name in inside if not is_dir]

    steps = matching(listing, pattern, called) if pattern else steps_below(listing, called)
    return [_found(step, place, str(folder / place.path)) for step, place in steps if step > 0]


def _found(step: int, place: Place, where: str) -> Found:
    return Found(step, place.kind, where, place.why)


def find_revisions(repo: str, revisions: str, pattern: str | None = None) -> list[Found]:
    """The steps of a run in a Hub repository, ascending: its branches and tags, or the folders of one of them.

    Args:
        repo: owner/name.
        revisions: how its branches and tags are named, e.g. step_{N}; without {N} the one that has the steps' folders.
        pattern: how those folders are named, with {N}; None: found out.

    Raises:
        IngestError: none matches, a step twice, or the Hub cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi(endpoint=endpoint())
    revision = MAIN if "{N}" in revisions else revisions
    try:
        refs = api.list_repo_refs(repo)
        names = sorted({ref.name for ref in (*refs.branches, *refs.tags)})
        found = _revisions_like(repo, names, revisions) if "{N}" in revisions and pattern is None else []
        files = api.list_repo_files(repo, revision=revision) if revision in names and not found else []
    except IngestError:
        raise
    except Exception as error:
        raise IngestError(f"--hub {repo}: {first_line(error)}") from error
    if found:
        return found
    root, called = files_as_tree(files), f"--hub {repo}, revision {revision},"
    try:
        steps = matching(root, pattern, called) if pattern else steps_below(root, called)
    except IngestError as error:
        shown = ", ".join(names[:8]) or "none"
        raise IngestError(
            f"--hub {repo} has no revision named like {revisions} (write {{N}} where the step number stands, or name the "
            f"one that has the steps' folders); its revisions: {shown}. {error}"
        ) from error
    return [_found(step, _on_hub(place), f"{repo}@{revision}:{place.path}") for step, place in steps if step > 0]


def _on_hub(place: Place) -> Place:
    kinds = {"safetensors": "hub", "pickle": "hub-pickle"}
    if place.kind in kinds:
        return Place(kinds[place.kind], place.path)
    return Place("none", place.path, place.why or f"{place.kind} weights: download them, and give --checkpoints")


def _revisions_like(repo: str, names: Sequence[str], pattern: str) -> list[Found]:
    matches = re.compile(re.escape(pattern).replace(r"\{N\}", r"(\d+)")).fullmatch
    found = sorted((int(match.group(1)), name) for name in names if (match := matches(name)))
    twice = [step for i, (step, _) in enumerate(found) if i and found[i - 1][0] == step]
    if twice:
        both = " and ".join(f"{repo}@{name}" for step, name in found if step == twice[0])
        raise IngestError(f"step {twice[0]} is there twice, as {both}: say which are meant with --revisions")
    return [Found(step, "hub", f"{repo}@{name}") for step, name in found if step > 0]


def checkpoints_in(
    checkpoints: Path | None, hub: str | None, revisions: str, pattern: str | None = None
) -> tuple[list[Found], str]:
    """The checkpoints in a folder or a Hub repository, and what to call the place they are in.

    Raises:
        IngestError: both or none are given, or none is there.
    """
    if checkpoints is not None and hub is None:
        return find_checkpoints(checkpoints, pattern), str(checkpoints.resolve())
    if hub is not None and checkpoints is None:
        return find_revisions(hub, revisions, pattern), f"hub:{hub}"
    raise IngestError("give either --checkpoints FOLDER or --hub REPO")


def select_steps(found: Sequence[Found], steps: str | None) -> list[Found]:
    """Those within `steps`, e.g. "1-75,80" (None: all).

    Raises:
        IngestError: `steps` cannot be read, or asks for what is not there; a chosen step's folder holds no checkpoint.
    """
    chosen = [entry for entry in found if steps is None or within(steps)(entry.step)]
    if not chosen:
        raise IngestError(f"--steps {steps or 'all'} leaves no checkpoint; the steps found are {_shown(found)}")
    there = {entry.step for entry in found}
    for low, high in _ranges(steps) if steps is not None else ():
        if high > max(there) or not any(low <= step <= high for step in there):
            wanted = f"step {low}" if low == high else f"steps up to {high}" if high > max(there) else f"{low}-{high}"
            raise IngestError(
                f"--steps {steps}: {wanted} not found; the steps found are {_shown(found)}: give those that are there"
            )
    for entry in chosen:
        if entry.kind == "none":
            why = f"what is there is {entry.why}" if entry.why else "copy it again, or leave that step out with --steps"
            raise IngestError(
                f"{entry.place} holds no checkpoint that can be read (no *.safetensors, adapter_model.*, "
                f"model_world_size_*.pt or pytorch_model*.bin, also not further inside): {why}"
            )
    return chosen


def _shown(found: Sequence[Found]) -> str:
    steps = [str(entry.step) for entry in found]
    return ", ".join(steps if len(steps) <= 12 else [*steps[:6], "...", *steps[-5:]]) or "none"


def within(steps: str) -> Callable[[int], bool]:
    """Whether a step is among `steps`, e.g. "1-75,80".

    Raises:
        IngestError: `steps` cannot be read.
    """
    ranges = _ranges(steps)
    return lambda step: any(low <= step <= high for low, high in ranges)


def _ranges(steps: str) -> list[tuple[int, int]]:
    ranges = []
    for part in steps.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if match is None:
            raise IngestError(f"--steps {steps}: give steps and ranges separated by commas, e.g. 1-75 or 10,20,30")
        ranges.append((int(match.group(1)), int(match.group(2) or match.group(1))))
    return ranges
