"""Whether weights on disk are still those that they were: all names, shapes and types, and a sample of the bytes.

Reinforcement learning changes at least every thousandth bfloat16 weight, so a sample of a million finds other weights.
"""

import hashlib
from collections.abc import Iterator
from math import prod
from pathlib import Path

import torch

from relex_verl.trajectory.hf_checkpoint import ITEM_SIZE, BaseCheckpoint

__all__ = ["of_files", "of_tensors"]

PAGE = 4096  # bytes at a time
PAGES = 512  # spread evenly
WEIGHTS = (".safetensors", ".bin", ".pt", ".index.json")


def of_tensors(checkpoint: BaseCheckpoint) -> str:
    """Of a checkpoint's tensors, in whatever files they lie."""
    digest, entries = hashlib.sha256(), sorted(checkpoint.entries.items())
    sizes = [prod(entry.shape) * ITEM_SIZE.get(entry.dtype, 1) for _, entry in entries]
    for name, entry in entries:
        digest.update(f"{name} {entry.dtype} {entry.shape}\n".encode())
    for i, parts in _samples(sizes):
        content = checkpoint.read(entries[i][0]).contiguous().flatten().view(torch.uint8)
        for start, end in parts:
            digest.update(content[start:end].numpy().tobytes())
    return digest.hexdigest()[:32]


def of_files(folder: Path) -> str:
    """Of the files of weights in a folder, of whatever format."""
    digest = hashlib.sha256()
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name.endswith(WEIGHTS))
    sizes = [path.stat().st_size for path in files]
    for path, size in zip(files, sizes, strict=True):
        digest.update(f"{path.name} {size}\n".encode())
    for i, parts in _samples(sizes):
        with open(files[i], "rb") as stream:
            for start, end in parts:
                stream.seek(start)
                digest.update(stream.read(end - start))
    return digest.hexdigest()[:32]


def _samples(sizes: list[int]) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """Number of each thing that is looked into, and from where to where: pages of all of them end to end."""
    total = sum(sizes)
    stride, before = max(PAGE, total // PAGES), 0
    for i, size in enumerate(sizes):
        pages = range(before // stride * stride, before + size, stride)
        parts = [(max(0, page - before), min(size, page + PAGE - before)) for page in pages]
        parts = [(start, end) for start, end in parts if start < end]
        if parts:
            yield i, parts
        before += size
