"""What a checkpoint calls the tensors of its base: the same, with a uniform prefix, or as transformers' own table has them.

Wrappers leave prefixes (`module.`, `_orig_mod.`, `base_model.model.`), other versions rename parts (`language_model.`), and
experts are stored fused or one by one. A renaming counts only if it is the same for all names.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from relex_verl.trajectory.hf_checkpoint import FLOATS, BaseCheckpoint
from relex_verl.trajectory.saved_as import saved_as

__all__ = ["Named", "Source", "names_in", "tied_by_class"]

# Of other versions, saved without being trained: transformers computes them.
BUFFERS = ("inv_freq", "masked_bias", "position_ids", "cos_cached", "sin_cached")
HEADS = ("v_head", "value_head")  # a critic on the policy's trunk: no part of what the base predicts
ROUNDS = 3  # prefixes one upon another
View = tuple[tuple[int, ...], tuple[int, ...], int]


@dataclass(frozen=True)
class Source:
    """Where the elements of one of the base's tensors are in a checkpoint.

    Attributes:
        parts: name there, and size, stride and offset of the view that belongs to the other: of theirs, which holds ours
            and more; of ours, where `fused`. None: all of it.
        fused: ours is put together of several of theirs.
        shape: of ours.
    """

    parts: tuple[tuple[str, View | None], ...]
    shape: tuple[int, ...]
    fused: bool = False

    def read(self, theirs: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """Our tensor, from those that are there."""
        if not self.fused:
            [(name, view)] = self.parts
            return theirs(name) if view is None else theirs(name).contiguous().as_strided(*view)
        tensors = [theirs(name) for name, _ in self.parts]
        whole = torch.empty(self.shape, dtype=tensors[0].dtype)
        for tensor, (_, view) in zip(tensors, self.parts, strict=True):
            whole.as_strided(*(view or (whole.shape, whole.stride(), 0))).copy_(tensor)
        return whole


@dataclass(frozen=True)
class Named:
    """The base's names for what a checkpoint holds.

    Attributes:
        sources: our name -> where it is.
        missing: of the wanted names, those that are not there and matter.
        unknown: what is there, is no tensor of the base and matters, as the checkpoint calls it.
        untouched: of the wanted names, those that are not there and need not be: buffers.
    """

    sources: Mapping[str, Source]
    missing: list[str]
    unknown: list[str]
    untouched: list[str]


def names_in(base: BaseCheckpoint, wanted: set[str], there: BaseCheckpoint, tied: Collection[str] = ()) -> Named:
    """Find the base's tensors in a checkpoint.

    Args:
        base: whose names count.
        wanted: those of its tensors that can move.
        there: the checkpoint, under its own names.
        tied: names that the base need not have, and the checkpoint may.
    """
    known = {*base.entries, *tied}
    renamed = {name: name for name in there.entries}
    for _ in range(ROUNDS):
        renamed = _better(renamed, base, wanted, there)
    sources = {
        name: Source(((theirs, None),), there.entries[theirs].shape)
        for name, theirs in renamed.items()
        if name in known
    }
    missing, extra = wanted - set(sources), {name: theirs for name, theirs in renamed.items() if name not in known}
    heads = [name for name in extra if name.split(".")[0] in HEADS]
    extra = {name: theirs for name, theirs in extra.items() if name not in heads and not _is_buffer(name)}
    model: Any = None
    if missing or any(there.entries[theirs].dtype in FLOATS for theirs in extra.values()):
        model = _model_of(base.folder)
    if model is not None:
        converted = _converted(model, base, missing, extra, there)
        sources |= converted
        used = {theirs for source in converted.values() for theirs, _ in source.parts}
        buffers = {name for name, _ in model.named_buffers()}
        extra = {name: theirs for name, theirs in extra.items() if theirs not in used and name not in buffers}
        missing -= set(converted)
    untouched = sorted(name for name in missing if _is_buffer(name))
    unknown = sorted(theirs for theirs in extra.values() if there.entries[theirs].dtype in FLOATS)
    return Named(sources, sorted(missing - set(untouched)), unknown, untouched)


def _is_buffer(name: str) -> bool:
    return name.rsplit(".", 1)[-1] in BUFFERS


# ---------------------------------------------------------------- one renaming for all


def _better(named: dict[str, str], base: BaseCheckpoint, wanted: set[str], there: BaseCheckpoint) -> dict[str, str]:
    """The names after the uniform change that finds most of the wanted ones; as they are where none finds more."""
    lacking = sorted(wanted - set(named), key=lambda name: (-len(name), name))
    best, found = named, len(wanted & set(named))
    for name in (*lacking[:1], *lacking[-1:]):
        for change in _changes(name, named, base, there):
            changed = {change(one): theirs for one, theirs in named.items()}
            if len(changed) == len(named) and len(wanted & set(changed)) > found:
                best, found = changed, len(wanted & set(changed))
    return best


def _changes(
    name: str, named: Mapping[str, str], base: BaseCheckpoint, there: BaseCheckpoint
) -> Iterator[Callable[[str], str]]:
    """Changes of one run of segments that make `name` of a tensor that is there."""
    last, shape, seen = name.rsplit(".", 2)[-1], base.entries[name].shape, set()
    for other, theirs in named.items():
        if other in base.entries or not other.endswith(last) or there.entries[theirs].shape != shape:
            continue
        longer, shorter = (other, name) if len(other) > len(name) else (name, other)
        run = _inserted(shorter.split("."), longer.split("."))
        if run is None or (run, longer is other) in seen:
            continue
        seen.add((run, longer is other))
        if longer is other:
            yield partial(_without, *run)
            yield partial(_without_any, run[1])
        else:
            yield partial(_with, *run, base.entries)


def _without(before: str, run: str, name: str) -> str:
    return before + name[len(before + run) :] if name.startswith(before + run) else name


def _without_any(run: str, name: str) -> str:
    return name.replace(run, "")


def _with(before: str, run: str, known: Collection[str], name: str) -> str:
    return before + run + name[len(before) :] if name.startswith(before) and name not in known else name


def _inserted(shorter: list[str], longer: list[str]) -> tuple[str, str] | None:
    """The run of segments that one name has more than another, and what stands before it."""
    more = len(longer) - len(shorter)
    if more <= 0:
        return None
    for i in range(len(shorter) + 1):
        if longer[:i] == shorter[:i] and longer[i + more :] == shorter[i:]:
            return "".join(f"{one}." for one in longer[:i]), "".join(f"{one}." for one in longer[i : i + more])
    return None


# ---------------------------------------------------------------- as transformers converts them


def _converted(
    model: Any, base: BaseCheckpoint, missing: set[str], extra: Mapping[str, str], there: BaseCheckpoint
) -> dict[str, Source]:
    """Sources of missing tensors: parts of what is there more, or put together of it."""
    sources: dict[str, Source] = {}
    for name, theirs in extra.items():
        for ours, view in _saved(model, base, name, there.entries[theirs].shape).items():
            if ours in missing and tuple(view.shape) == base.entries[ours].shape:
                sources[ours] = Source(((theirs, _view(view)),), tuple(view.shape))
    for ours in sorted(missing - set(sources)):
        shape = base.entries[ours].shape
        parts = _saved(model, base, ours, shape)
        if parts and all(
            name in extra and there.entries[extra[name]].shape == tuple(view.shape) for name, view in parts.items()
        ):
            named = tuple((extra[name], _view(view)) for name, view in parts.items())
            sources[ours] = Source(named, shape, fused=True)
    return sources


def _saved(model: Any, base: BaseCheckpoint, name: str, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """What is saved for a parameter, of views of it alone; nothing where that cannot be followed."""
    parameter = torch.empty(shape, dtype=torch.uint8, device="meta")
    try:
        saved = saved_as(model, base, name, parameter)
    except Exception:  # of several kinds: it is no parameter of this model, or needs others
        return {}
    storage = parameter.untyped_storage()._cdata
    return saved if all(one.untyped_storage()._cdata == storage for one in saved.values()) else {}


def _view(tensor: torch.Tensor) -> View:
    return tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset())


def _model_of(folder: Path) -> Any:
    """The base's model without elements; None where transformers is not there or does not know it."""
    try:
        import transformers

        config = transformers.AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            return getattr(transformers, config.architectures[0])(config)
    except Exception:  # a model with code of its own, a damaged configuration
        return None


def tied_by_class(folder: Path) -> bool | None:
    """Whether a model's class ties the head to the embeddings where config.json is silent; None where nobody knows."""
    try:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(folder)
        return bool(
            getattr(config, "tie_word_embeddings", getattr(config.get_text_config(), "tie_word_embeddings", None))
        )
    except Exception:
        return None
