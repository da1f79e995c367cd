"""How figures look and where they go. matplotlib is imported when one is drawn, without pyplot: no global state or backend
of the calling process is touched."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec

from relex_verl.reporting.writing import temporary_for

__all__ = ["COLOURS", "DOTS", "LINE", "NULL", "label_figure", "new_figure", "save_figure", "styled"]

Arguments = ParamSpec("Arguments")
SUFFIXES = (".png", ".svg")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")  # Okabe, Ito
DOTS, LINE, NULL = COLOURS[0], COLOURS[1], COLOURS[7]
STYLE: dict[str, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "font.size": 9,
    "legend.frameon": False,
    "svg.hashsalt": "relex-verl",  # the same figure gives the same bytes
}


def styled(draw: Callable[Arguments, list[Path]]) -> Callable[Arguments, list[Path]]:
    """Draw with STYLE, and leave the caller's matplotlib settings as they are."""

    @functools.wraps(draw)
    def wrapper(*args: Arguments.args, **kwargs: Arguments.kwargs) -> list[Path]:
        import matplotlib

        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return wrapper


def new_figure(width: float, height: float) -> Any:
    """An empty one, in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def label_figure(figure: Any, xlabel: str, ylabel: str, title: str) -> None:
    """Texts for all its axes together; an empty one is left out."""
    for write, text, size in (
        (figure.supxlabel, xlabel, 9),
        (figure.supylabel, ylabel, 9),
        (figure.suptitle, title, 10),
    ):
        if text:
            write(text, fontsize=size)


def save_figure(figure: Any, stem: Path) -> list[Path]:
    """Write the PNG and the SVG; the same figure gives the same bytes."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(stem.name + suffix) for suffix in SUFFIXES]
    for path in paths:
        kept = {"Date": None} if path.suffix == ".svg" else None
        with temporary_for(path) as temporary:
            figure.savefig(temporary, dpi=150, metadata=kept, format=path.suffix[1:])
    return paths
