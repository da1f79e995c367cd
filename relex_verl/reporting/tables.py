"""Tables of the page: text in, HTML out, everything escaped."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import isfinite

__all__ = ["Cell", "cell", "count", "duration", "short", "table"]


@dataclass(frozen=True)
class Cell:
    """What stands in a cell.

    Attributes:
        text: as it is read; escaped here.
        markup: HTML of our own behind it.
        value: to sort by, where the text does not say it all.
        words: whether it is prose, which may be broken into lines.
    """

    text: str
    markup: str = ""
    value: float | None = None
    words: bool = False


def cell(value: object, digits: int | None = None) -> Cell:
    """The cell of a value of a report; "-" where there is none.

    Args:
        value: a number or anything that is shown as text.
        digits: behind the point, so that they stand below each other in a column; None for four digits in all.
    """
    if isinstance(value, float) and isfinite(value):
        return Cell(short(value) if digits is None else f"{value:.{digits}f}", value=value)
    return Cell(short(value))


def short(value: object) -> str:
    """A value in few characters: four significant digits, "-" for what is not known."""
    if isinstance(value, float):
        return f"{value:.4g}" if isfinite(value) else "-"
    return "-" if value is None else str(value)


def count(number: int, what: str) -> str:
    """A number of things, in words."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, as few digits as say it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def table(
    label: str,
    columns: Mapping[str, bool],
    rows: Sequence[Sequence[Cell]],
    highlighted: Collection[int] = (),
    sortable: bool = False,
) -> str:
    """A table that scrolls inside itself where the screen is narrow.

    Args:
        label: what it is called by a screen reader.
        columns: title -> whether numbers stand below it.
        rows: as many cells as there are columns.
        highlighted: rows to stand out.
        sortable: whether page.js lets its columns be sorted.
    """
    numbers = list(columns.values())
    head = "".join(
        f'<th scope="col"{_class("number" * number)}>{escape(title)}</th>' for title, number in columns.items()
    )
    body = "".join(  # text between the rows would make sorting 20,000 of them take seconds
        f"<tr{_class('winner' * (i in highlighted))}>"
        + "".join(_td(cell, number) for cell, number in zip(row, numbers, strict=True))
        + "</tr>"
        for i, row in enumerate(rows)
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}"><table{_class("sortable" * sortable)}>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _td(content: Cell, number: bool) -> str:
    value = "" if content.value is None else f' data-value="{escape(repr(content.value))}"'
    return (
        f"<td{_class('number' * number or 'words' * content.words)}{value}>{escape(content.text)}{content.markup}</td>"
    )


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""
