"""Phases with progress on the terminal, and subprocesses whose noise goes to log files."""

import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

POLL_SECONDS = 0.5
PLAIN_SECONDS = 10.0
TAIL_LINES = 25
NOISE = re.compile(r"UserWarning|FutureWarning|warnings\.warn\(|WARNING|INFO")


class PhaseFailed(Exception):
    """A subprocess ended with an error; its log tells more."""

    def __init__(self, command: list[str], code: int, log: Path) -> None:
        super().__init__(f"{Path(command[0]).name} ended with exit code {code}")
        self.log = log

    def tail(self) -> str:
        """The last lines of the log, without what is no error."""
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join([line for line in lines if not NOISE.search(line)][-TAIL_LINES:])


class Phase:
    """One phase's line: a bar on a terminal, a plain line now and then elsewhere."""

    def __init__(self, console: Console, title: str) -> None:
        self.console = console
        self.title = title
        self.detail = ""
        self._printed_at = time.monotonic()
        self._began_at = self._printed_at
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TimeElapsedColumn(),
                TextColumn("{task.fields[detail]}"),
            )
            self._bar = Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task(title, total=None, detail="")
            self._bar.start()
        else:
            console.print(f"{title} ...", highlight=False)

    def show(self, detail: str, done: float | None = None, total: float | None = None) -> None:
        """Tell how far the phase is."""
        changed = detail != self.detail
        self.detail = detail
        if self._bar is not None:
            self._bar.update(self._task, detail=detail, completed=done or 0, total=total)
        elif changed and time.monotonic() - self._printed_at >= PLAIN_SECONDS:
            self._printed_at = time.monotonic()
            self.console.print(f"  {detail}", highlight=False)

    def close(self, mark: str) -> None:
        """Replace the bar with one line that stays."""
        if self._bar is not None:
            self._bar.stop()
        seconds = time.monotonic() - self._began_at
        self.console.print(f"{mark} {self.title} ({seconds:.0f} s) {self.detail}", highlight=False)


@contextmanager
def phase(console: Console, title: str) -> Iterator[Phase]:
    """A phase of the run; its closing line says whether it went well."""
    current = Phase(console, title)
    try:
        yield current
    except BaseException:
        current.close("[red]✗[/red]")
        raise
    current.close("[green]✓[/green]")


def run_logged(command: list[str], log: Path, env: dict[str, str], on_poll: Callable[[], None] = lambda: None) -> None:
    """Run a command with all its output in `log`, calling `on_poll` while it runs and once after.

    Raises:
        PhaseFailed: the command ended with an error.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, env=env)
        try:
            while process.poll() is None:
                time.sleep(POLL_SECONDS)
                on_poll()
        finally:
            if process.poll() is None:  # we were interrupted
                process.terminate()
                process.wait()
    on_poll()
    if process.returncode != 0:
        raise PhaseFailed(command, process.returncode, log)
