"""Read and write Hugging Face safetensors checkpoints, a rank's runs at a time, whole or not at all.

A predicted checkpoint is laid out like its base: the same files, the same tensors. Every rank writes the elements it holds
straight to their byte offsets, so no rank ever holds the whole model and nothing is gathered. The files are made in a
temporary folder beside the destination, which gets its name when all of them are complete.
Format: https://huggingface.co/docs/safetensors
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from relex_verl.trajectory.files import header_bytes, reserve, write_json
from relex_verl.trajectory.shards import Placement, TensorShard

__all__ = ["FLOATS", "BaseCheckpoint", "CheckpointWriter", "resolve_model"]

INDEX_NAME = "model.safetensors.index.json"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")
ITEM_SIZE = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8, "BOOL": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1,
}  # fmt: skip
# What a trained weight can be stored in; everything else is quantised, or no weight.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def resolve_model(model: str | os.PathLike[str]) -> Path:
    """The folder of a model: itself when it is one, else the Hub snapshot of that id (from the cache if it is there).

    Raises:
        FileNotFoundError: no such folder, or no such model on the Hub (or no way to it).
    """
    folder = Path(os.path.expanduser(model))
    if folder.is_dir():
        return folder
    if "://" in str(model):
        raise FileNotFoundError(f"{model} is an address: copy the model to a folder that this machine sees")
    if str(model).startswith(("/", ".", "~")):
        raise FileNotFoundError(f"{model} is no folder: it was moved, or the name is mistyped")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]
    try:
        return Path(snapshot_download(str(model), allow_patterns=patterns))
    except Exception as error:  # of several libraries, and of several lines
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise FileNotFoundError(f"{model} is neither a folder nor a model that the Hub gives us: {said}") from error


@dataclass(frozen=True)
class _Entry:
    file: str
    shape: tuple[int, ...]
    dtype: str  # as safetensors spells it: BF16, F32, ...


class BaseCheckpoint:
    """A Hugging Face checkpoint on disk, read lazily (memory-mapped).

    Attributes:
        folder: where it lies.
        entries: name -> file, shape and dtype of every tensor, in file order.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Read the headers only.

        Raises:
            FileNotFoundError: no safetensors file in the folder; pickled weights are not read.
            ValueError: a tensor stands in two files.
        """
        self.folder = Path(folder)
        files = sorted(self.folder.glob("*.safetensors"))
        if (self.folder / INDEX_NAME).exists():
            named = set(json.loads((self.folder / INDEX_NAME).read_text())["weight_map"].values())
            files = [self.folder / name for name in sorted(named)]
        if not files:
            raise FileNotFoundError(
                f"{self.folder} holds no safetensors checkpoint; RELEX reads and writes that format only. "
                "Convert the model once: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
            )
        self.entries: dict[str, _Entry] = {}
        self._open = {file.name: safe_open(file, framework="pt") for file in files}
        for file, handle in self._open.items():
            for name in handle.offset_keys():
                if name in self.entries:
                    raise ValueError(f"{name} stands in both {self.entries[name].file} and {file}")
                part = handle.get_slice(name)
                self.entries[name] = _Entry(file, tuple(part.get_shape()), part.get_dtype())

    def read(self, name: str, placement: Placement | None = None) -> torch.Tensor:
        """A tensor as stored, or the elements of it that a placement names (flat).

        Raises:
            KeyError: no such tensor.
        """
        tensor = self._open[self.entries[name].file].get_tensor(name)
        if placement is None:
            return tensor
        flat = tensor.flatten()
        return torch.cat([flat[start : start + length] for _, start, length in placement.runs()] or [flat[:0]])

    def dtype(self, name: str) -> torch.dtype:
        """The type in which a trained tensor is stored.

        Raises:
            KeyError: no such tensor, or none that is stored as floating-point numbers.
        """
        return FLOATS[self.entries[name].dtype]

    def in_own_type(self, shard: TensorShard, followed: torch.dtype) -> TensorShard:
        """A shard in the type in which this checkpoint stores its tensor.

        Where that type has digits which were not followed (a float32 router bias in a bfloat16 trajectory), a weight that
        is still what this checkpoint's rounds to is this checkpoint's, bit by bit: what never moved is not rounded.

        Args:
            shard: in its own type already, or in the one that was followed.
            followed: the type of the trajectory's states.
        """
        dtype = self.dtype(shard.name)
        data = shard.data.to(dtype)
        if torch.promote_types(dtype, followed) != followed:
            stored = self.read(shard.name, shard.placement).to(data.device)
            data = torch.where(data == stored.to(followed).to(dtype), stored, data)
        return TensorShard(shard.name, shard.shape, shard.placement, data)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(prod(entry.shape) * ITEM_SIZE[entry.dtype] for entry in self.entries.values())


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
    ) -> None:
        """Plan the files.

        Args:
            base: whose layout to take.
            folder: the destination; replaced as a whole if it holds a checkpoint that was written here before.
            observed: names of the tensors that `write` will fill.
            aliases: tied name -> the observed name that it shares its elements with.
            dtype: of all observed tensors; None for each one's own.
            followed: the type of the trajectory's states, see `BaseCheckpoint.in_own_type`.
        """
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
            FileExistsError: the destination holds something else than a checkpoint that was written here.
            OSError: no space left.
        """
        self._check_destination()
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        for file, header in self._header.items():
            with open(self.partial / file, "wb") as stream:
                stream.write(header)
                stream.flush()
                reserve(stream, len(header) + self._size[file])
        for name in self.base.entries:
            if name not in self._filled:
                tensor = self.base.read(name).contiguous().flatten()
                self._put(name, [(0, tensor.view(torch.uint8).numpy())])
        for source in self.base.folder.iterdir():
            if source.is_file() and not source.name.endswith(WEIGHT_SUFFIXES) and source.name != "relex.json":
                shutil.copy(source, self.partial / source.name)
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
        for path in self.partial.iterdir():
            with open(path, "rb") as stream:
                os.fsync(stream.fileno())
        replaced = self.folder.with_name(f".{self.folder.name}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        if self.folder.exists():
            os.replace(self.folder, replaced)
        os.replace(self.partial, self.folder)
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
        inside = list(self.folder.iterdir())
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
        with open(self.partial / file, "r+b", buffering=0) as stream:
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
