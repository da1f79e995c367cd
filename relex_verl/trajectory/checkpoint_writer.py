"""Write Hugging Face safetensors checkpoints, a rank's runs at a time, whole or not at all.

A predicted checkpoint is laid out like its base: the same files, the same tensors. Every rank writes the elements it holds
straight to their byte offsets, so no rank ever holds the whole model and nothing is gathered. The files are made in a
temporary folder beside the destination, which gets its name when all of them are complete.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from relex_verl.trajectory.alone import hold, is_held
from relex_verl.trajectory.files import copy_whole, header_bytes, into, reserve, write_json
from relex_verl.trajectory.hf_checkpoint import FLOATS, INDEX_NAME, ITEM_SIZE, BaseCheckpoint
from relex_verl.trajectory.shards import TensorShard

__all__ = ["CheckpointWriter"]

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")
FOLDERS = ("additional_chat_templates",)  # of a model, besides its files


class CheckpointWriter:
    """Writes one checkpoint laid out like `base`, in three steps: `begin` (one process), `write` (any number of
    processes, each its own shards), `commit` (one process, after all have written).

    Tensors that are observed are stored in the type in which the base stores them, or all in `dtype`; `write` fills them.
    The others are copied from the base.
    """

    def __init__(
        self,
        base: BaseCheckpoint,
        folder: Path,
        observed: set[str],
        aliases: Mapping[str, str],
        dtype: torch.dtype | None = None,
        followed: torch.dtype = torch.float32,
        beside: Path | None = None,
    ) -> None:
        """Plan the files.

        Args:
            base: whose layout to take.
            folder: the destination; replaced as a whole if it holds a checkpoint that was written here before.
            observed: names of the tensors that `write` will fill.
            aliases: tied name -> the observed name that it shares its elements with.
            dtype: of all observed tensors; None for each one's own.
            followed: the type of the trajectory's states, see `BaseCheckpoint.in_own_type`.
            beside: folder of files that take the place of the base's: configuration and tokenizer of the run.
        """
        self._beside = beside
        self.dtype, self.followed = dtype, followed
        stored_as = next((name for name, known in FLOATS.items() if known == dtype), None)
        self.base, self.folder = base, folder.resolve()  # "." has no name, and a link is not what to replace
        self.partial = self.folder.with_name(f".{self.folder.name}.partial")
        self._targets: dict[str, list[str]] = {name: [name] for name in observed}
        for alias, name in aliases.items():
            self._targets[name].append(alias)
        filled = observed | set(aliases)
        headers: dict[str, dict[str, Any]] = {}
        self._size: dict[str, int] = {}  # file -> bytes of its tensors
        for name, entry in base.entries.items():
            kind = stored_as if stored_as is not None and name in filled else entry.dtype
            start = self._size.get(entry.file, 0)
            end = start + prod(entry.shape) * ITEM_SIZE[kind]
            offsets = {"dtype": kind, "shape": list(entry.shape), "data_offsets": [start, end]}
            headers.setdefault(entry.file, {})[name] = offsets
            self._size[entry.file] = end
        self._header = {file: header_bytes(header) for file, header in headers.items()}
        self._range = {
            name: tuple(value["data_offsets"]) for header in headers.values() for name, value in header.items()
        }
        self._filled = filled

    def begin(self) -> None:
        """Make the temporary folder with the files at their full size, headers and untouched tensors in place.

        Raises:
            FileExistsError: the destination holds something else than a checkpoint that was written here, or is being
                written.
            OSError: no space left.
        """
        self._check_destination()
        busy = FileExistsError(
            f"{self.folder} is being written by another command: wait for it, or give another folder"
        )
        if self.partial.is_dir() and is_held(self.partial):
            raise busy
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.partial.mkdir()
        except FileExistsError:
            raise busy from None
        hold(self.partial, self)
        for file, header in self._header.items():
            with into(self.partial / file), open(self.partial / file, "wb") as stream:
                stream.write(header)
                stream.flush()
                reserve(stream, len(header) + self._size[file])
        for name in self.base.entries:
            if name not in self._filled:
                tensor = self.base.read(name).contiguous().flatten()
                self._put(name, [(0, tensor.view(torch.uint8).numpy())])
        for source in self.base.folder.iterdir():
            if source.is_file() and not source.name.endswith(WEIGHT_SUFFIXES) and source.name != "relex.json":
                copy_whole(source, self.partial / source.name)
            elif source.is_dir() and source.name in FOLDERS:
                with into(self.partial / source.name):
                    shutil.copytree(source, self.partial / source.name, copy_function=shutil.copyfile)
        for source in self._beside.iterdir() if self._beside is not None and self._beside.is_dir() else ():
            copy_whole(source, self.partial / source.name)
        if self.dtype is not None:
            _declare_dtype(self.partial / "config.json", self.dtype)
        self._write_index()

    def write(self, shard: TensorShard) -> None:
        """Put a shard's elements into their places; tied names get theirs too."""
        data = shard.data.to("cpu")
        shard = TensorShard(shard.name, shard.shape, shard.placement, data)
        data = data.to(self.dtype) if self.dtype is not None else self.base.in_own_type(shard, self.followed).data
        content, item = data.contiguous().view(torch.uint8).numpy(), data.dtype.itemsize
        pieces = [
            (item * full, content[item * local : item * (local + length)])
            for local, full, length in shard.placement.runs()
        ]
        for name in self._targets[shard.name]:
            if name in self.base.entries:
                self._put(name, pieces)

    def commit(self, provenance: Mapping[str, Any] | None = None) -> Path:
        """Add `relex.json`, flush, and give the folder its name.

        Returns:
            The destination folder.
        """
        if provenance is not None:
            write_json(self.partial / "relex.json", dict(provenance))
        for path in self.partial.rglob("*"):
            if path.is_file():
                with into(path), open(path, "rb") as stream:
                    os.fsync(stream.fileno())
        replaced = self.folder.with_name(f".{self.folder.name}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        if self.folder.exists():
            os.replace(self.folder, replaced)
        try:
            os.replace(self.partial, self.folder)
        except OSError:
            if replaced.exists():
                os.replace(replaced, self.folder)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
        return self.folder

    def _check_destination(self) -> None:
        """Only what we wrote may be replaced: never the base, never a folder with somebody's work in it or below it."""
        if self.folder.exists() and self.folder.samefile(self.base.folder):
            raise FileExistsError(f"{self.folder} is the base model itself: give another folder")
        if not self.folder.is_dir():
            if self.folder.exists():
                raise FileExistsError(f"{self.folder} is a file: give a folder")
            return
        inside = [path for path in self.folder.iterdir() if path.name not in FOLDERS]
        if inside and (not (self.folder / "relex.json").is_file() or any(path.is_dir() for path in inside)):
            raise FileExistsError(
                f"{self.folder} exists and is no checkpoint that relex-verl wrote: give a new or an empty folder"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of the weights once written."""
        return sum(self._size.values())

    def _put(self, name: str, pieces: Sequence[tuple[int, np.ndarray]]) -> None:
        """Write (byte offset in the tensor, bytes). By pwrite, not through a map: another rank's bytes on the same page
        of a shared file system must not be written back with ours."""
        file = self.base.entries[name].file
        start = len(self._header[file]) + self._range[name][0]
        with into(self.partial / file), open(self.partial / file, "r+b", buffering=0) as stream:
            for offset, content in pieces:
                view = memoryview(content.data)
                while len(view):
                    written = os.pwrite(stream.fileno(), view, start + offset)
                    view, offset = view[written:], offset + written

    def _write_index(self) -> None:
        # Any other layout is found through its index only, but for PEFT's, which has none.
        if list(self._header) not in (["model.safetensors"], ["adapter_model.safetensors"]):
            weight_map = {name: entry.file for name, entry in self.base.entries.items()}
            write_json(self.partial / INDEX_NAME, {"metadata": {"total_size": self.nbytes}, "weight_map": weight_map})


def _declare_dtype(config: Path, dtype: torch.dtype) -> None:
    """Name the weights' type in config.json where the base named its own, so that loading does not convert."""
    if not config.exists():
        return
    content = json.loads(config.read_text())
    for part in (content, *(value for value in content.values() if isinstance(value, dict))):
        for key in ("dtype", "torch_dtype"):
            if isinstance(part.get(key), str):
                part[key] = str(dtype).removeprefix("torch.")
    write_json(config, content)
