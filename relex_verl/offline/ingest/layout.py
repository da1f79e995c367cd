"""What the checkpoints of one run have in common with their base: names, shapes, types and tied tensors, from headers."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError

from relex_verl.offline.ingest.checkpoints import IngestError
from relex_verl.trajectory.hf_checkpoint import INDEX_NAME, BaseCheckpoint

__all__ = ["Checkpoint", "Layout", "check_same_origin", "check_tied"]

FLOATS = ("BF16", "F16", "F32", "F64")
TIED = "lm_head.weight"
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
# An RL run moves weights by 1e-4 to 1e-2 of their norm. What lies further away needs somebody who vouches for it.
FAR = 0.03
SAMPLE = 2**22  # elements of each of the SAMPLED largest tensors
SAMPLED = 8


class Checkpoint(BaseCheckpoint):
    """A checkpoint that is complete.

    Attributes:
        called: what messages call it: its folder may be a temporary one.
    """

    def __init__(self, folder: Path, called: str = "") -> None:
        """Read the headers only.

        Raises:
            IngestError: a file or tensor is missing, a file is truncated, or there is none.
        """
        self.called = called or str(folder)
        try:
            super().__init__(folder)
        except (SafetensorError, ValueError, KeyError, OSError) as error:
            said = str(error).replace(f"{folder}/", "")
            if isinstance(error, FileNotFoundError):
                raise IngestError(f"{self.called}: a file is missing: {said}") from error
            raise IngestError(
                f"{self.called} is truncated or damaged ({said}): copy it again, or leave it out"
            ) from error
        if (folder / INDEX_NAME).exists():
            listed = json.loads((folder / INDEX_NAME).read_text())["weight_map"]
            lost = sorted(set(listed) - set(self.entries))
            if lost:
                raise IngestError(f"{self.called}: {INDEX_NAME} lists {lost[0]}, which {listed[lost[0]]} does not hold")


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
    def of(cls, base: Checkpoint, first: Checkpoint) -> "Layout":
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

    def check(self, checkpoint: Checkpoint) -> None:
        """Compare another checkpoint with this layout.

        Raises:
            IngestError: a tensor is missing, or has another shape or type.
        """
        for name, shape in self.shapes.items():
            entry = checkpoint.entries.get(name)
            if entry is None:
                raise IngestError(f"{checkpoint.called} lacks {name}: it is incomplete, or of another model")
            if entry.shape != shape:
                raise IngestError(
                    f"{checkpoint.called}: {name} has shape {list(entry.shape)}, the base model {list(shape)}: "
                    "give the --base that this run started from"
                )
            if entry.dtype != self.dtypes[name]:
                raise IngestError(
                    f"{checkpoint.called}: {name} is {entry.dtype}, in the first checkpoint {self.dtypes[name]}: "
                    "checkpoints of one run must have one type; convert them, or leave some out with --steps"
                )


def _tied(base: BaseCheckpoint) -> dict[str, str]:
    config = base.folder / "config.json"
    try:
        content = json.loads(config.read_text()) if config.exists() else {}
    except ValueError as error:
        raise IngestError(f"{config} is damaged: {error}") from error
    # As in transformers the top level decides. Where it is silent its class does: a head that is not stored is tied, and one
    # that is stored can be followed by itself.
    if not content.get("tie_word_embeddings", bool(content) and TIED not in base.entries):
        return {}
    embeddings = [name for name in base.entries if name.endswith(EMBEDDINGS)]
    return {TIED: embeddings[0]} if len(embeddings) == 1 else {}


def check_tied(checkpoint: Checkpoint, aliases: Mapping[str, str]) -> None:
    """Tied names are recorded once: where a checkpoint stores both, they must be the same.

    Raises:
        IngestError: they differ.
    """
    for alias, name in aliases.items():
        if alias in checkpoint.entries and not torch.equal(checkpoint.read(alias), checkpoint.read(name)):
            raise IngestError(
                f"{checkpoint.called}: {alias} differs from {name}, although config.json of the base ties them: set "
                "tie_word_embeddings to false there if they are two tensors"
            )


def _check_names(wanted: set[str], there: set[str], base: Checkpoint, first: Checkpoint) -> None:
    missing, unknown = sorted(wanted - there), sorted(there - set(base.entries))
    if missing or unknown:
        said = [f"lacks {missing[0]} of the base"] if missing else []
        said += [f"holds {unknown[0]}, which the base does not"] if unknown else []
        raise IngestError(
            f"{first.called} {' and '.join(said)} ({len(missing) + len(unknown)} such tensors): "
            f"{base.folder} is not the model that this run started from"
        )


def check_same_origin(base: Checkpoint, checkpoint: Checkpoint, names: Sequence[str]) -> None:
    """Refuse a base of the same architecture that this run did not start from, by how far the weights lie apart.

    Args:
        names: of the tensors in both; the largest are sampled.

    Raises:
        IngestError: |theta - theta_0| > 0.03 |theta_0| over the sample.
    """
    largest = sorted(names, key=lambda name: -prod(base.entries[name].shape))[:SAMPLED]
    apart, norm = 0.0, 0.0
    for name in largest:
        origin = base.read(name).flatten()[:SAMPLE].double()
        apart += float((checkpoint.read(name).flatten()[:SAMPLE].double() - origin).square().sum())
        norm += float(origin.square().sum())
    if norm and apart > FAR**2 * norm:
        raise IngestError(
            f"{checkpoint.called} lies {(apart / norm) ** 0.5:.2g} |theta_0| away from {base.called}; reinforcement "
            "learning moves weights by 0.0001 to 0.01: give the --base that this run started from (or --any-base if it is)"
        )
