"""Where the checkpoints of a finished run lie, and how each becomes a folder of safetensors files for as long as it is read.

Four kinds: a Hugging Face folder (used as it is), pickled Hugging Face weights (`*.bin`, rewritten as safetensors in a
temporary folder), verl's FSDP shards (`model_world_size_*_rank_*.pt`, through verl's own merger), and a revision of a Hub
repository (downloaded, and deleted after use if it was not in the cache before).
"""

import errno
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from relex_verl.trajectory.hf_checkpoint import BaseCheckpoint

__all__ = [
    "Found",
    "IngestError",
    "checkpoints_in",
    "find_checkpoints",
    "find_revisions",
    "is_full",
    "select_steps",
    "within",
]

STEP_FOLDER = re.compile(r"(?:global_step|step|checkpoint|iter)[_-]?(\d+)")
SHARD_FILE = re.compile(r"model_world_size_(\d+)_rank_(\d+)\.pt")
# Inside a step's folder, verl puts the actor's Hugging Face files and its shards here.
PLACES = (".", "actor/huggingface", "huggingface", "actor")
HUB_FILES = ["*.safetensors", "*.json"]


class IngestError(RuntimeError):
    """A checkpoint that cannot be used, in one line: which, why, and what to do."""


@dataclass(frozen=True)
class Found:
    """A checkpoint that was found.

    Attributes:
        step: its training step.
        kind: "safetensors", "pickle", "verl" or "hub".
        place: its folder; for the Hub repository@revision.
    """

    step: int
    kind: str
    place: str

    @property
    def called(self) -> str:
        """What messages call it."""
        return f"step {self.step} ({self.place})"

    def check_allowed(self, allow_pickle: bool) -> None:
        """Refuse to unpickle unasked.

        Raises:
            IngestError: it needs pickle and that is not allowed.
        """
        if self.kind in ("pickle", "verl") and not allow_pickle:
            raise IngestError(
                f"{self.called} is pickled, and unpickling can run code: add --allow-pickle if you trust these files "
                "(they are loaded with weights_only=True), or convert them to safetensors"
            )

    @contextmanager
    def opened(self, allow_pickle: bool = False, workspace: Path | None = None) -> Iterator[Path]:
        """A folder of safetensors files with its weights, there until the block ends.

        Args:
            allow_pickle: use it even if it needs unpickling.
            workspace: where a temporary copy goes, if there has to be one; the system's temporary folder for None.

        Raises:
            IngestError: it needs pickle and that is not allowed, is incomplete, or cannot be merged or downloaded.
        """
        self.check_allowed(allow_pickle)
        if self.kind == "safetensors":
            yield Path(self.place)
            return
        with tempfile.TemporaryDirectory(prefix=".relex-ingest-", dir=workspace) as temporary:
            yield self._converted(Path(temporary))

    def _converted(self, temporary: Path) -> Path:
        try:
            return {"pickle": _unpickle, "verl": _merge, "hub": _download}[self.kind](self.place, temporary)
        except Exception as error:
            if is_full(error):
                cure = f"no space left for its temporary copy in {temporary.parent}: make room there"
                raise IngestError(f"{self.called}: {cure}") from error
            raise IngestError(f"{self.called}: {_first_line(error)}") from error


def find_checkpoints(folder: Path) -> list[Found]:
    """The checkpoints in the step folders (`global_step_5`, `step_5`, `checkpoint-5`) of a folder, ascending.

    Step 0 is left out: it is the base model.

    Raises:
        IngestError: no step folder, a step twice, or a step folder without a checkpoint.
    """
    if not folder.is_dir():
        raise IngestError(f"--checkpoints {folder}: no such folder")
    numbered = [
        (int(match.group(1)), child)
        for child in folder.iterdir()
        if child.is_dir() and (match := STEP_FOLDER.fullmatch(child.name))
    ]
    if not numbered:
        raise IngestError(f"--checkpoints {folder} holds no folder named like global_step_5, step_5 or checkpoint-5")
    places = [(step, str(child)) for step, child in sorted(numbered) if step > 0]
    _check_once(places)
    return [_look_into(step, Path(child)) for step, child in places]


def _look_into(step: int, folder: Path) -> Found:
    for place in PLACES:
        inside = folder / place
        if any(inside.glob("*.safetensors")) or (inside / "model.safetensors.index.json").exists():
            return Found(step, "safetensors", str(inside))
    for place in PLACES:
        if any(SHARD_FILE.fullmatch(path.name) for path in (folder / place).glob("model_world_size_*.pt")):
            return Found(step, "verl", str(folder / place))
    for place in PLACES:
        if any((folder / place).glob("pytorch_model*.bin")):
            return Found(step, "pickle", str(folder / place))
    return Found(step, "none", str(folder))


def find_revisions(repo: str, pattern: str) -> list[Found]:
    """The branches and tags of a Hub repository that are named like `pattern`, e.g. step_{N}, ascending.

    Raises:
        IngestError: no {N} in the pattern, none matches, a step twice, or the Hub cannot be reached.
    """
    from huggingface_hub import HfApi

    if "{N}" not in pattern:
        raise IngestError(f"--revisions {pattern}: write {{N}} where the step number stands, e.g. step_{{N}}")
    matches = re.compile(re.escape(pattern).replace(r"\{N\}", r"(\d+)")).fullmatch
    try:
        refs = HfApi(endpoint=_endpoint()).list_repo_refs(repo)
    except Exception as error:
        raise IngestError(f"--hub {repo}: {_first_line(error)}") from error
    names = sorted({ref.name for ref in (*refs.branches, *refs.tags)})
    found = sorted((int(match.group(1)), f"{repo}@{name}") for name in names if (match := matches(name)))
    if not found:
        shown = ", ".join(names[:8]) or "none"
        raise IngestError(f"--hub {repo} has no revision named like {pattern}; its revisions: {shown}")
    _check_once(found)
    return [Found(step, "hub", place) for step, place in found if step > 0]


def checkpoints_in(checkpoints: Path | None, hub: str | None, revisions: str) -> tuple[list[Found], str]:
    """The checkpoints in a folder or a Hub repository, and what to call the place they are in.

    Raises:
        IngestError: both or none are given, or none is there.
    """
    if checkpoints is not None and hub is None:
        return find_checkpoints(checkpoints), str(checkpoints.resolve())
    if hub is not None and checkpoints is None:
        return find_revisions(hub, revisions), f"hub:{hub}"
    raise IngestError("give either --checkpoints FOLDER or --hub REPO")


def select_steps(found: Sequence[Found], steps: str | None) -> list[Found]:
    """Those within `steps`, e.g. "1-75,80" (None: all).

    Raises:
        IngestError: `steps` cannot be read, nothing is left, or a chosen step folder holds no checkpoint.
    """
    chosen = [entry for entry in found if steps is None or within(steps)(entry.step)]
    if not chosen:
        there = ", ".join(str(entry.step) for entry in found[:12]) or "none"
        raise IngestError(f"--steps {steps or 'all'} leaves no checkpoint; the steps found are {there}")
    for entry in chosen:
        if entry.kind == "none":
            raise IngestError(
                f"{entry.place} holds no checkpoint (no *.safetensors, no model_world_size_*.pt, no pytorch_model*.bin, "
                "also not in actor/huggingface): leave that step out with --steps"
            )
    return chosen


def within(steps: str) -> Callable[[int], bool]:
    """Whether a step is among `steps`, e.g. "1-75,80".

    Raises:
        IngestError: `steps` cannot be read.
    """
    ranges = []
    for part in steps.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if match is None:
            raise IngestError(f"--steps {steps}: give steps and ranges separated by commas, e.g. 1-75 or 10,20,30")
        ranges.append((int(match.group(1)), int(match.group(2) or match.group(1))))
    return lambda step: any(low <= step <= high for low, high in ranges)


def _check_once(places: Sequence[tuple[int, str]]) -> None:
    for (step, place), (next_step, next_place) in pairwise(places):
        if step == next_step:
            raise IngestError(f"step {step} is there twice, as {place} and {next_place}: remove or rename one of them")


def _unpickle(place: str, temporary: Path) -> Path:
    for path in sorted(Path(place).glob("pytorch_model*.bin")):
        try:
            # Files of before torch 1.6 are no zip archives, and cannot be mapped.
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except Exception as error:
            raise IngestError(f"{path.name} cannot be loaded with weights_only=True: {_first_line(error)}") from error
        if not isinstance(state, Mapping):
            raise IngestError(f"{path.name} holds no named tensors but a {type(state).__name__}")
        for name, tensor in state.items():
            if not isinstance(tensor, torch.Tensor):
                raise IngestError(f"{path.name}: {name} is no tensor but a {type(tensor).__name__}")
        # Clones: safetensors refuses tensors that share memory.
        tensors = {name: tensor.clone().contiguous() for name, tensor in state.items()}
        save_file(tensors, temporary / f"{path.stem}.safetensors", {"format": "pt"})
    return temporary


def _merge(place: str, temporary: Path) -> Path:
    """verl's merger writes bfloat16, whatever the shards hold; it does not say so, hence the command does."""
    if find_spec("verl") is None:
        raise IngestError("these are verl's shards, which verl merges: pip install 'relex-verl[verl]'")
    shards = {
        (int(match.group(1)), int(match.group(2))): path
        for path in Path(place).iterdir()
        if (match := SHARD_FILE.fullmatch(path.name))
    }
    size = max(world for world, _ in shards)
    missing = [rank for rank in range(size) if (size, rank) not in shards]
    if missing:
        raise IngestError(
            f"shards of ranks {missing} of {size} are missing; copy them there, or use --steps to leave it out"
        )
    for (world, _), path in shards.items():
        if world == size and not zipfile.is_zipfile(path):  # verl's own error names no file
            raise IngestError(f"{path.name} is truncated or damaged: copy it again, or leave the step out")
    command = [sys.executable, "-m", "verl.model_merger", "merge", "--backend", "fsdp"]
    command += ["--local_dir", place, "--target_dir", str(temporary), "--use_cpu_initialization"]
    # torch's own switch: overrules the weights_only=False in the merger.
    environment = {**os.environ, "TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode or not any(temporary.glob("*.safetensors")):
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise IngestError(f"verl's model merger failed: {lines[-1].strip()}")
    return temporary


def _download(place: str, temporary: Path) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    repo, revision = place.rsplit("@", 1)
    try:
        cached = Path(snapshot_download(repo, revision=revision, allow_patterns=HUB_FILES, local_files_only=True))
        BaseCheckpoint(cached)  # somebody may have fetched its config alone
        return cached
    except (LocalEntryNotFoundError, FileNotFoundError, SafetensorError):
        pass
    snapshot_download(
        repo, revision=revision, allow_patterns=HUB_FILES, local_dir=temporary, endpoint=_endpoint(), max_workers=2
    )
    return temporary


def is_full(error: BaseException) -> bool:
    """Whether an error says that a disk is full; libraries and subprocesses wrap the system's error in their own."""
    return (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)) or (
        "No space left on device" in str(error)
    )


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT")


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
