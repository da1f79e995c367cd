"""How each checkpoint of a finished run becomes a folder of safetensors files, for as long as it is read.

A Hugging Face folder is used as it is. Pickled weights (`*.bin`) are rewritten, verl's FSDP shards go through verl's own
merger, LoRA adapters are merged into the base, and a revision of a Hub repository is downloaded, in a temporary folder
that is deleted after use.
"""

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import save_file

from relex_verl.offline.ingest.adapters import AdapterError, merge_adapter
from relex_verl.offline.ingest.errors import IngestError, first_line
from relex_verl.offline.ingest.layouts import SHARD_FILE
from relex_verl.offline.ingest.temporary import temporary_folder
from relex_verl.trajectory.files import is_full
from relex_verl.trajectory.fingerprint import of_files
from relex_verl.trajectory.hf_checkpoint import BaseCheckpoint
from relex_verl.trajectory.unreadable import why_unreadable

__all__ = ["Found", "endpoint"]

HUB_FILES = ["*.safetensors", "*.json"]
PICKLED = "pytorch_model*.bin"


@dataclass(frozen=True)
class Found:
    """A checkpoint that was found.

    Attributes:
        step: its training step.
        kind: "safetensors", "pickle", "verl", "adapter", "hub", "hub-pickle" or "none".
        place: its folder; for the Hub repository@revision, or repository@revision:folder.
        why: of "none": what is there instead.
    """

    step: int
    kind: str
    place: str
    why: str = ""

    @property
    def called(self) -> str:
        """What messages call it."""
        return f"step {self.step} ({self.place})"

    @property
    def fingerprint(self) -> str:
        """Of its files, to see whether they have changed; empty for the Hub, which keeps them."""
        return of_files(Path(self.place)) if Path(self.place).is_dir() else ""

    def check_allowed(self, allow_pickle: bool) -> None:
        """Refuse to unpickle unasked.

        Raises:
            IngestError: it needs pickle and that is not allowed.
        """
        pickled = self.kind in ("pickle", "verl", "hub-pickle")
        if self.kind == "adapter":
            pickled = not (Path(self.place) / "adapter_model.safetensors").exists()
        if pickled and not allow_pickle:
            raise IngestError(
                f"{self.called} is pickled, and unpickling can run code: add --allow-pickle if you trust these files "
                "(they are loaded with weights_only=True), or convert them to safetensors"
            )

    @contextmanager
    def opened(
        self, allow_pickle: bool = False, workspace: Path | None = None, base: BaseCheckpoint | None = None
    ) -> Iterator[Path]:
        """A folder of safetensors files with its weights, there until the block ends.

        Args:
            allow_pickle: use it even if it needs unpickling.
            workspace: where a temporary copy goes, if there has to be one; the system's temporary folder for None.
            base: the base model, into which adapters are merged; None to leave them as they are.

        Raises:
            IngestError: it needs pickle and that is not allowed, is incomplete, or cannot be merged or downloaded.
        """
        self.check_allowed(allow_pickle)
        if self.kind == "safetensors":
            yield Path(self.place)
            return
        with temporary_folder(workspace) as temporary:
            yield self._converted(temporary, base, allow_pickle)

    def _converted(self, temporary: Path, base: BaseCheckpoint | None, allow_pickle: bool) -> Path:
        ways: dict[str, Callable[[], Path]] = {
            "pickle": lambda: _unpickle(Path(self.place), temporary),
            "verl": lambda: _merge(self.place, temporary, base),
            "adapter": lambda: _merged(_adapter(Path(self.place), temporary), base, temporary),
            "hub": lambda: _download(self.place, temporary, allow_pickle),
            "hub-pickle": lambda: _download(self.place, temporary, allow_pickle),
        }
        try:
            return ways[self.kind]()
        except Exception as error:
            if is_full(error):
                cure = f"no space left for its temporary copy in {temporary.parent}: make room there"
                raise IngestError(f"{self.called}: {cure}") from error
            raise IngestError(f"{self.called}: {first_line(error)}") from error


def _unpickle(place: Path, temporary: Path, pattern: str = PICKLED) -> Path:
    """The same weights as safetensors files."""
    for path in sorted(place.glob(pattern)):
        unreadable = why_unreadable(path)
        if unreadable:
            raise IngestError(unreadable)
        try:
            # Files of before torch 1.6 are no zip archives, and cannot be mapped.
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except Exception as error:
            raise IngestError(f"{path.name} {_why_not_loaded(path, error)}") from error
        if not isinstance(state, Mapping):
            raise IngestError(f"{path.name} holds no named tensors but a {type(state).__name__}")
        for name, tensor in state.items():
            if not isinstance(tensor, torch.Tensor):
                raise IngestError(f"{path.name}: {name} is no tensor but a {type(tensor).__name__}")
        # Clones: safetensors refuses tensors that share memory.
        tensors = {name: tensor.clone().contiguous() for name, tensor in state.items()}
        save_file(tensors, temporary / f"{path.stem}.safetensors", {"format": "pt"})
    return temporary


def _why_not_loaded(path: Path, error: Exception) -> str:
    with open(path, "rb") as stream:
        is_archive = stream.read(2) == b"PK"
    if is_archive and not zipfile.is_zipfile(path):  # its list of contents stands at the end
        return "is cut off: copy it again"
    return f"cannot be loaded with weights_only=True: {first_line(error)}"


def _adapter(place: Path, temporary: Path) -> Path:
    """An adapter's folder, with its weights as safetensors."""
    if (place / "adapter_model.safetensors").exists():
        return place
    copy = temporary / "adapter"
    copy.mkdir()
    _unpickle(place, copy, "adapter_model.bin")
    if (place / "adapter_config.json").exists():
        (copy / "adapter_config.json").write_bytes((place / "adapter_config.json").read_bytes())
    return copy


def _merged(adapter: Path, base: BaseCheckpoint | None, temporary: Path) -> Path:
    return adapter if base is None else merge_adapter(adapter, base, temporary / "merged")


def _merge(place: str, temporary: Path, base: BaseCheckpoint | None) -> Path:
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
        unreadable = why_unreadable(path)
        if world == size and unreadable:
            raise IngestError(unreadable)
        if world == size and not zipfile.is_zipfile(path):  # verl's own error names no file
            raise IngestError(f"{path.name} is truncated or damaged: copy it again")
    command = [sys.executable, "-m", "verl.model_merger", "merge", "--backend", "fsdp"]
    command += ["--local_dir", place, "--target_dir", str(temporary), "--use_cpu_initialization"]
    # torch's own switch: overrules the weights_only=False in the merger.
    environment = {**os.environ, "TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    # Of LoRA the merger writes the adapters there, and beside them, if at all, the base that they were trained on.
    if (temporary / "lora_adapter" / "adapter_model.safetensors").exists():
        try:
            return _merged(temporary / "lora_adapter", base, temporary)
        except AdapterError as error:
            raise IngestError(f"its shards are of LoRA. {error}") from error
    if done.returncode or not any(temporary.glob("*.safetensors")):
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise IngestError(f"verl's model merger failed: {lines[-1].strip()}")
    return temporary


def _download(place: str, temporary: Path, allow_pickle: bool) -> Path:
    """A revision of a Hub repository, or a folder in one; not at all where it is in the cache."""
    from huggingface_hub import HfApi, snapshot_download

    repo, _, rest = place.partition("@")
    revision, _, folder = rest.partition(":")
    patterns = [f"{folder}/{pattern}" if folder else pattern for pattern in HUB_FILES]
    cached = _cached(repo, revision, patterns, folder)
    if cached is not None:
        return cached
    inside = f"{folder}/" if folder else ""
    files = HfApi(endpoint=endpoint()).list_repo_files(repo, revision=revision)
    here = [file.removeprefix(inside) for file in files if file.startswith(inside)]
    pickled = not any(file.endswith(".safetensors") and "/" not in file for file in here)
    if pickled and not any(Path(file).match(PICKLED) for file in here):
        raise IngestError("there are neither *.safetensors nor pytorch_model*.bin")
    if pickled and not allow_pickle:
        raise IngestError(
            "is pickled (*.bin), and unpickling can run code: add --allow-pickle if you trust these files"
        )
    patterns += [f"{inside}{PICKLED}"] if pickled else []
    snapshot_download(
        repo, revision=revision, allow_patterns=patterns, local_dir=temporary, endpoint=endpoint(), max_workers=2
    )
    got = temporary / folder
    return _unpickle(got, got) if pickled else got


def _cached(repo: str, revision: str, patterns: list[str], folder: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        there = snapshot_download(repo, revision=revision, allow_patterns=patterns, local_files_only=True)
        BaseCheckpoint(Path(there) / folder)  # somebody may have fetched its config alone
    except (LocalEntryNotFoundError, OSError, ValueError):
        return None
    return Path(there) / folder


def endpoint() -> str | None:
    """Of the Hub, where the environment names one."""
    return os.environ.get("HF_ENDPOINT")
