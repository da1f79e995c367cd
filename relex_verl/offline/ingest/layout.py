"""What the checkpoints of one run have in common with their base: names, shapes, types and tied tensors, from headers."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch

from relex_verl.offline.ingest.adapters import check_not_peft
from relex_verl.offline.ingest.errors import IngestError
from relex_verl.offline.ingest.names import Named, Source, names_in, tied_by_class
from relex_verl.trajectory.hf_checkpoint import FLOATS, INDEX_NAME, BaseCheckpoint
from relex_verl.trajectory.shards import Placement

__all__ = ["Checkpoint", "Layout", "check_same_origin", "check_tied"]

TIED = "lm_head.weight"
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
# An RL run moves weights by 1e-4 to 1e-2 of their norm. What lies further away needs somebody who vouches for it.
FAR = 0.03
SAMPLE = 2**22  # elements of each of the SAMPLED largest tensors
SAMPLED = 8
FEW = 0.25  # of all weights: so many may have another type than the others


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
        self._sources: dict[str, Source] = {}
        try:
            super().__init__(folder)
        except (ValueError, OSError) as error:
            said = str(error).replace(f"{folder}/", "").replace(str(folder), "it")
            missing = "a file is missing: " if isinstance(error, FileNotFoundError) else ""
            raise IngestError(f"{self.called}: {missing}{said}") from error
        self._theirs = self.entries
        if (folder / INDEX_NAME).exists():
            listed = json.loads((folder / INDEX_NAME).read_text())["weight_map"]
            lost = sorted(set(listed) - set(self.entries))
            if lost:
                raise IngestError(f"{self.called}: {INDEX_NAME} lists {lost[0]}, which {listed[lost[0]]} does not hold")

    def named(self, sources: Mapping[str, Source]) -> "Checkpoint":
        """The same under the names of its base, as `names.names_in` finds them."""
        self._sources = {name: source for name, source in sources.items() if source.parts != ((name, None),)}
        first = {name: self._theirs[source.parts[0][0]] for name, source in sources.items()}
        self.entries = {name: replace(first[name], shape=source.shape) for name, source in sources.items()}
        return self

    def read(self, name: str, placement: Placement | None = None) -> torch.Tensor:
        """See `BaseCheckpoint.read`."""
        if name not in self._sources:
            return super().read(name, placement)
        tensor = self._sources[name].read(lambda theirs: self._open[self._theirs[theirs].file].get_tensor(theirs))
        return tensor if placement is None else placement.cut_out_of(tensor)

    def reopened(self) -> "Checkpoint":
        """See `BaseCheckpoint.reopened`."""
        other = Checkpoint(self.folder, self.called)
        other._sources, other.entries = self._sources, self.entries
        return other


@dataclass(frozen=True)
class Layout:
    """The observed tensors of a run.

    Attributes:
        base: the base model.
        shapes: name -> shape, ascending names.
        dtypes: name -> type in the checkpoints, as safetensors spells it.
        aliases: tied name -> the observed name that it shares its elements with.
        still: names that are not followed, and must not move: whole numbers, quantised weights, and those of `without`.
        buffers: names that the checkpoints need not hold.
    """

    base: Checkpoint
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    aliases: dict[str, str]
    still: list[str]
    buffers: list[str]

    @classmethod
    def of(cls, base: Checkpoint, first: Checkpoint) -> "Layout":
        """From the base and the run's first checkpoint, which is given the base's names.

        Raises:
            IngestError: they do not hold the same tensors.
        """
        aliases = _tied(base)
        floats = {name for name, entry in base.entries.items() if entry.dtype in FLOATS and name not in aliases}
        still = [name for name, entry in base.entries.items() if entry.dtype not in FLOATS]
        named = _checked_names(base, floats, first, aliases)
        first.named(named.sources)
        shapes = {name: base.entries[name].shape for name in sorted(floats - set(named.untouched))}
        dtypes = {name: first.entries[name].dtype for name in shapes}
        return cls(base, shapes, dtypes, aliases, still, named.untouched)

    @property
    def wide(self) -> list[str]:
        """Names of tensors with more digits than bfloat16, where most have not: router biases, old buffers."""
        wide = [name for name, dtype in self.dtypes.items() if dtype != "BF16"]
        few = sum(prod(self.shapes[name]) for name in wide) <= FEW * self.elements
        return [name for name in wide if self.base.entries[name].dtype == self.dtypes[name]] if few else []

    def without(self, names: Collection[str]) -> "Layout":
        """The same, with some tensors that never move: copied from the base bit for bit, instead of followed."""
        shapes = {name: shape for name, shape in self.shapes.items() if name not in names}
        dtypes = {name: self.dtypes[name] for name in shapes}
        return replace(self, shapes=shapes, dtypes=dtypes, still=[*self.still, *names])

    def unmoved(self, names: Collection[str], checkpoint: Checkpoint) -> set[str]:
        """Those of the names that are the base's in a checkpoint, bit for bit."""
        return {name for name in names if same_bits(checkpoint.read(name), self.base.read(name))}

    def find_in(self, checkpoint: Checkpoint) -> Checkpoint:
        """The same checkpoint under the base's names.

        Raises:
            IngestError: a tensor is missing, or has another shape or type.
        """
        wanted = set(self.shapes)
        if not wanted <= set(checkpoint.entries):
            named = names_in(self.base, wanted, checkpoint, self.aliases)
            if named.missing:
                raise IngestError(
                    f"{checkpoint.called} lacks {named.missing[0]}: it is incomplete, or of another model"
                )
            checkpoint.named(named.sources)
        self.check(checkpoint)
        return checkpoint

    def exact_in_bf16(self, beside: Collection[str] = ()) -> bool:
        """Whether every weight of the checkpoints, beside those of some tensors, is a bfloat16 value."""
        return {dtype for name, dtype in self.dtypes.items() if name not in beside} <= {"BF16"}

    @property
    def elements(self) -> int:
        """Parameters of the observed tensors."""
        return sum(map(prod, self.shapes.values()))

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
                raise IngestError(f"{checkpoint.called}: {_other_shape(name, entry.shape, shape)}")
            if entry.dtype != self.dtypes[name]:
                raise IngestError(
                    f"{checkpoint.called}: {name} is {entry.dtype}, in the first checkpoint {self.dtypes[name]}: "
                    "checkpoints of one run must have one type; convert them, or leave some out with --steps"
                )
            if entry.dtype not in FLOATS:
                raise IngestError(
                    f"{checkpoint.called}: {name} is quantised ({entry.dtype}), and {self.base.entries[name].dtype} in the "
                    "base: give checkpoints that are not quantised"
                )
        for name in self.still:
            entry = checkpoint.entries.get(name)
            ours = self.base.entries[name]
            if entry is not None and (entry.dtype, entry.shape) != (ours.dtype, ours.shape):
                raise IngestError(
                    f"{checkpoint.called}: {name} is {entry.dtype} {list(entry.shape)}, in the base {ours.dtype} "
                    f"{list(ours.shape)}, which cannot be followed: give a --base that is not quantised"
                )

    def check_still(self, checkpoint: Checkpoint) -> None:
        """What cannot be followed must not have moved: it is copied from the base.

        Raises:
            IngestError: it has.
        """
        for name in self.still:
            if name in checkpoint.entries and not same_bits(checkpoint.read(name), self.base.read(name)):
                kind = self.base.entries[name].dtype
                if kind in FLOATS:
                    raise IngestError(
                        f"{checkpoint.called}: {name} is {kind}, and moves for the first time: it was not followed up to "
                        "here. Record the run again, into a new --out"
                    )
                raise IngestError(
                    f"{checkpoint.called}: {name} differs from the base's, and is {kind}: only floating-point weights of 16 "
                    "bits or more can be followed. Give checkpoints and a --base that are not quantised"
                )


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one type and shape are the same; of types, too, that torch cannot compare."""
    return torch.equal(*(tensor.contiguous().flatten().view(torch.uint8) for tensor in (one, other)))


def _other_shape(name: str, theirs: Sequence[int], ours: Sequence[int]) -> str:
    said = f"{name} has shape {list(theirs)}, the base model {list(ours)}"
    if name.endswith((*EMBEDDINGS, TIED)) and theirs[1:] == ours[1:]:
        return (
            f"{said}: the vocabulary was resized. Resize the base in the same way "
            f"(model.resize_token_embeddings({theirs[0]}), save_pretrained) and give that as --base"
        )
    return f"{said}: give the --base that this run started from"


def _tied(base: BaseCheckpoint) -> dict[str, str]:
    config = base.folder / "config.json"
    try:
        content = json.loads(config.read_text()) if config.exists() else {}
    except ValueError as error:
        raise IngestError(f"{config} is damaged: {error}") from error
    embeddings = [name for name in base.entries if name.endswith(EMBEDDINGS)]
    if len(embeddings) != 1:
        return {}
    ties = {TIED: embeddings[0]}
    if "tie_word_embeddings" in content:  # as in transformers the top level decides
        return ties if content["tie_word_embeddings"] else {}
    # Where it is silent its class does; and what is stored twice with different values is not tied.
    if not content or (TIED not in base.entries):
        return ties if content else {}
    return ties if tied_by_class(base.folder) and same_bits(base.read(TIED), base.read(embeddings[0])) else {}


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


def _checked_names(base: Checkpoint, wanted: set[str], first: Checkpoint, aliases: Mapping[str, str]) -> Named:
    try:
        check_not_peft(set(first.entries))
    except ValueError as error:
        raise IngestError(f"{first.called}: {error}") from error
    named = names_in(base, wanted, first, aliases)
    unknown = named.unknown
    if named.missing or unknown:
        said = [f"lacks {named.missing[0]} of the base"] if named.missing else []
        said += [f"holds {unknown[0]}, which the base does not"] if unknown else []
        raise IngestError(
            f"{first.called} {' and '.join(said)} ({len(named.missing) + len(unknown)} such tensors): "
            f"{base.folder} is not the model that this run started from"
        )
    return named


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
