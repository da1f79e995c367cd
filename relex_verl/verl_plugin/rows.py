"""Which row of the validation set a prompt is: by what stands in the row, not by the text that comes back of it.

verl decodes a prompt's tokens, and what is no text (an image, a video) is lost on the way: six pictures under one question
come back as one text. The rows pass here on their way out of the dataloader, in the order in which verl counts them.
"""

import hashlib
import pickle
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

__all__ = ["WatchedRows"]

# What makes a row what it is; an index or the source file's name would tell true duplicates apart.
FIELDS = ("data_source", "raw_prompt", "reward_model")


class WatchedRows:
    """A dataloader that notes what passes, and may hold rows back.

    Attributes:
        digests: of each row of the loader, in order.
        places: in that order, of the rows that were let pass.
    """

    def __init__(self, loader: Iterable[Mapping[str, Any]], wanted: Collection[int] | None = None) -> None:
        """Nothing has passed yet.

        Args:
            loader: verl's.
            wanted: places of the rows to let pass; None for all.
        """
        self._loader, self._wanted = loader, wanted
        self._texts: list[str] = []
        self.digests: list[str] = []
        self.places: list[int] = []

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for batch in self._loader:
            fields, first = [name for name in FIELDS if name in batch], len(self.digests)
            for i in range(len(batch["raw_prompt"])):
                self.digests.append(_digest({name: batch[name][i] for name in fields}))
                self._texts.append(_digest(_text_only(batch["raw_prompt"][i])))
            chosen = [i for i in range(len(batch["raw_prompt"])) if self._wanted is None or first + i in self._wanted]
            self.places += [first + i for i in chosen]
            if len(chosen) == len(batch["raw_prompt"]):
                yield batch
            elif chosen:
                yield {name: _rows(column, chosen) for name, column in batch.items()}

    def marks(self) -> list[str]:
        """What to add to the text of each row that passed so that it names the row: nothing, as long as the text does.

        Rows of the same content get the same mark: a prompt may stand in the set twice. Rows that were held back take part:
        a row has the same name whichever others pass.
        """
        digests_of: dict[str, set[str]] = defaultdict(set)
        for text, digest in zip(self._texts, self.digests, strict=True):
            digests_of[text].add(digest)
        marks = [
            f" [row {digest[:16]}]" if len(digests_of[text]) > 1 else ""
            for text, digest in zip(self._texts, self.digests, strict=True)
        ]
        return [marks[place] for place in self.places]


def _rows(column: Any, chosen: Sequence[int]) -> Any:
    """Some rows of a column of verl's batch: a tensor, an array of objects, or a list."""
    return column[list(chosen)] if isinstance(column, (torch.Tensor, np.ndarray)) else [column[i] for i in chosen]


def _text_only(messages: Any) -> list[tuple[str, str]]:
    """Role and text of each message: what can be read in a decoded prompt."""
    spoken = []
    for message in messages if isinstance(messages, (list, tuple, np.ndarray)) else [{"content": messages}]:
        content = message.get("content")
        if isinstance(content, (list, tuple, np.ndarray)):
            content = "".join(str(part.get("text") or "") for part in content if isinstance(part, Mapping))
        spoken.append((str(message.get("role")), str(content)))
    return spoken


def _digest(value: Any) -> str:
    state = hashlib.sha256()
    _feed(state, value)
    return state.hexdigest()


def _feed(state: Any, value: Any) -> None:
    """Put a value into a hash, the same bytes whenever the content is the same."""
    if isinstance(value, np.ndarray) and value.dtype == object:
        value = value.tolist()
    if isinstance(value, Mapping):
        state.update(b"{%d" % len(value))
        for key in sorted(value, key=str):
            _feed(state, str(key))
            _feed(state, value[key])
    elif isinstance(value, (list, tuple)):
        state.update(b"[%d" % len(value))
        for one in value:
            _feed(state, one)
    elif isinstance(value, torch.Tensor):
        _feed(state, value.detach().cpu().float().numpy())
    elif isinstance(value, np.ndarray):
        _feed(state, [str(value.dtype), list(value.shape), value.tobytes()])
    elif hasattr(value, "tobytes") and hasattr(
        value, "mode"
    ):  # a PIL image; its other attributes say where it was read
        _feed(state, [value.mode, list(value.size), value.tobytes()])
    else:
        content = value if isinstance(value, bytes) else _scalar(value)
        state.update(b"%s %d " % (type(value).__name__.encode(), len(content)) + content)


def _scalar(value: Any) -> bytes:
    return repr(value).encode() if isinstance(value, (str, int, float, bool, type(None))) else pickle.dumps(value)
