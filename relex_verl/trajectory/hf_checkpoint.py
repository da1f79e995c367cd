"""Read Hugging Face safetensors checkpoints, a rank's runs at a time. Format: https://huggingface.co/docs/safetensors"""

import json
import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from relex_verl.trajectory.shards import Placement, TensorShard
from relex_verl.trajectory.unreadable import why_unreadable

__all__ = ["FLOATS", "INDEX_NAME", "ITEM_SIZE", "BaseCheckpoint", "resolve_model"]

INDEX_NAME = "model.safetensors.index.json"
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

    # Weights, and whatever configurations, tokenizers and models with code of their own are made of.
    suffixes = ("json", "safetensors", "txt", "jinja", "model", "py", "tiktoken", "bpe", "spm", "vocab")
    patterns = [f"*.{suffix}" for suffix in suffixes]
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
            ValueError: a tensor stands in two files, or a file is damaged; it says why.
        """
        self.folder = Path(folder)
        files = sorted(self.folder.glob("*.safetensors"))
        if (self.folder / INDEX_NAME).exists():
            files = [self.folder / name for name in sorted(set(_weight_map(self.folder / INDEX_NAME).values()))]
        if not files:
            raise FileNotFoundError(
                f"{self.folder} holds no safetensors checkpoint; RELEX reads and writes that format only. "
                "Convert the model once: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
            )
        self.entries: dict[str, _Entry] = {}
        self._open = {file.name: _opened(file) for file in files}
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
        return tensor if placement is None else placement.cut_out_of(tensor)

    def reopened(self) -> "BaseCheckpoint":
        """The same, mapped anew: the pages that have been read are let go of."""
        return BaseCheckpoint(self.folder)

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


def _weight_map(index: Path) -> dict[str, str]:
    try:
        listed = json.loads(index.read_text())["weight_map"]
        return {name: str(file) for name, file in listed.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        said = why_unreadable(index) or error
        raise ValueError(f"{index.name} is truncated or damaged ({said}): copy it again") from error


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except Exception as error:  # its own type, the system's, and others by version
        said = why_unreadable(file) or f"{file.name} is truncated or damaged ({error}): copy it again"
        raise (ValueError if file.exists() else FileNotFoundError)(said) from error
