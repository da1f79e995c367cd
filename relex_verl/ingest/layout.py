"""What the checkpoints of one run have in common with their base: names, shapes, types and tied tensors, from headers."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from safetensors import SafetensorError

from relex_verl.hf_checkpoint import INDEX_NAME, BaseCheckpoint
from relex_verl.ingest.checkpoints import IngestError
from relex_verl.shards import TensorShard, whole

__all__ = ["CheckpointSource", "Layout", "check_same_origin", "open_checkpoint"]

FLOATS = ("BF16", "F16", "F32", "F64")
TIED = "lm_head.weight"
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
# Bytes read before the files are mapped anew, so that their pages do not pile up in this process's memory.
RELEASE = 128 * 2**20
# An RL run moves weights by 1e-4 to 1e-2 of their norm; two models of one architecture differ by about 1.
FAR = 0.3
SAMPLE = 2**22  # elements of each of the SAMPLED largest tensors
SAMPLED = 8


def open_checkpoint(folder: Path) -> BaseCheckpoint:
    """Open a checkpoint and check that it is complete.

    Raises:
        IngestError: a file or tensor is missing, a file is truncated, or there is none.
    """
    try:
        checkpoint = BaseCheckpoint(folder)
    except FileNotFoundError as error:
        raise IngestError(f"{folder}: a file is missing: {error}") from error
    except (SafetensorError, ValueError, OSError) as error:
        raise IngestError(f"{folder} is truncated or damaged ({error}): copy it again, or leave it out") from error
    if (folder / INDEX_NAME).exists():
        listed = json.loads((folder / INDEX_NAME).read_text())["weight_map"]
        lost = sorted(set(listed) - set(checkpoint.entries))
        if lost:
            raise IngestError(f"{folder}: {INDEX_NAME} lists {lost[0]}, which {listed[lost[0]]} does not hold")
    return checkpoint


@dataclass(frozen=True)
class Layout:
    """The observed tensors of a run.

    Attributes:
        shapes: name -> shape, ascending names.
        dtypes: name -> type in the checkpoints, as safetensors spells it.
        aliases: tied name -> the observed name that it shares its elements with.
    """

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    aliases: dict[str, str]

    @classmethod
    def of(cls, base: BaseCheckpoint, first: BaseCheckpoint) -> "Layout":
        """From the base and the run's first checkpoint.

        Raises:
            IngestError: they do not hold the same tensors.
        """
        aliases = _tied(base)
        floats = [name for name, entry in base.entries.items() if entry.dtype in FLOATS and name not in aliases]
        _check_names(set(floats), {name for name in first.entries if name not in aliases}, base, first)
        shapes = {name: base.entries[name].shape for name in sorted(floats)}
        return cls(shapes, {name: first.entries[name].dtype for name in shapes}, aliases)

    @property
    def exact_in_bf16(self) -> bool:
        """Whether every weight of the checkpoints is a bfloat16 value."""
        return set(self.dtypes.values()) <= {"BF16"}

    @property
    def elements(self) -> int:
        """Parameters of the observed tensors."""
        return sum(prod(shape) for shape in self.shapes.values())

    def check(self, checkpoint: BaseCheckpoint) -> None:
        """Compare another checkpoint with this layout.

        Raises:
            IngestError: a tensor is missing, or has another shape or type.
        """
        for name, shape in self.shapes.items():
            entry = checkpoint.entries.get(name)
            if entry is None:
                raise IngestError(f"{checkpoint.folder} lacks {name}: it is incomplete, or of another model")
            if entry.shape != shape:
                raise IngestError(
                    f"{checkpoint.folder}: {name} has shape {list(entry.shape)}, the base model {list(shape)}: "
                    "give the --base that this run started from"
                )
            if entry.dtype != self.dtypes[name]:
                raise IngestError(
                    f"{checkpoint.folder}: {name} is {entry.dtype}, in the first checkpoint {self.dtypes[name]}: "
                    "checkpoints of one run must have one type; convert them, or leave some out with --steps"
                )


def _tied(base: BaseCheckpoint) -> dict[str, str]:
    config = base.folder / "config.json"
    content = json.loads(config.read_text()) if config.exists() else {}
    if not content.get("tie_word_embeddings", content.get("text_config", {}).get("tie_word_embeddings", False)):
        return {}
    embeddings = [name for name in base.entries if name.endswith(EMBEDDINGS)]
    return {TIED: embeddings[0]} if len(embeddings) == 1 else {}


def _check_names(wanted: set[str], there: set[str], base: BaseCheckpoint, first: BaseCheckpoint) -> None:
    missing, unknown = sorted(wanted - there), sorted(there - set(base.entries))
    if missing or unknown:
        said = [f"lacks {missing[0]} of the base"] if missing else []
        said += [f"holds {unknown[0]}, which the base does not"] if unknown else []
        raise IngestError(
            f"{first.folder} {' and '.join(said)} ({len(missing) + len(unknown)} such tensors): "
            f"{base.folder} is not the model that this run started from"
        )


class CheckpointSource:
    """One checkpoint as a `ShardSource`: whole tensors, one at a time, memory-mapped."""

    def __init__(self, folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.folder, self.shapes = folder, shapes

    def __iter__(self) -> Iterator[TensorShard]:
        checkpoint, mapped = open_checkpoint(self.folder), 0
        for name, shape in self.shapes.items():
            data = checkpoint.read(name).flatten()
            mapped += data.nbytes
            yield TensorShard(name, shape, whole(shape), data)
            if mapped > RELEASE:
                checkpoint, mapped = open_checkpoint(self.folder), 0


def check_same_origin(base: BaseCheckpoint, checkpoint: BaseCheckpoint, names: Sequence[str]) -> None:
    """Refuse a base of the same architecture that this run did not start from, by how far the weights lie apart.

    Args:
        names: of the tensors in both; the largest are sampled.

    Raises:
        IngestError: |theta - theta_0| > 0.3 |theta_0| over the sample.
    """
    largest = sorted(names, key=lambda name: -prod(base.entries[name].shape))[:SAMPLED]
    apart, norm = 0.0, 0.0
    for name in largest:
        origin = base.read(name).flatten()[:SAMPLE].double()
        apart += float((checkpoint.read(name).flatten()[:SAMPLE].double() - origin).square().sum())
        norm += float(origin.square().sum())
    if norm and apart > FAR**2 * norm:
        raise IngestError(
            f"{checkpoint.folder} lies {(apart / norm) ** 0.5:.2f} |theta_0| away from {base.folder}; "
            "reinforcement learning moves weights by 0.0001 to 0.01: give the --base that this run started from "
            "(or --any-base if it is)"
        )
