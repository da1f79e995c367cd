"""A page in headless Chromium: what it looks like, and what its own script does."""

import shutil
import subprocess
from pathlib import Path

import pytest

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--virtual-time-budget=3000",
]  # fmt: skip


def chromium(page: Path, profile: Path, *options: str) -> str:
    """Open a page; what Chromium prints. Skips, by name, where there is no Chromium."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on this machine")
    command = [program, *FLAGS, f"--user-data-dir={profile}", *options, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def screenshot(page: Path, profile: Path, width: int) -> Path:
    """A PNG of the first 2,000 pixels, beside the page."""
    picture = page.with_name(f"{page.stem}_{width}.png")
    chromium(page, profile, f"--window-size={width},2000", f"--screenshot={picture}")
    return picture


def after(page: Path, profile: Path, script: str, width: int) -> str:
    """What a script writes into `said` once the page is there, at a width of the window as a phone's."""
    frame = page.with_name(f"{page.stem}_{width}_frame.html")
    watched = page.with_name(f"{page.stem}_watched.html")
    tail = f"<script>const say = text => parent.postMessage(String(text), '*');\n{script}</script>"
    watched.write_text(page.read_text() + tail)
    # Headless windows are no narrower than 500 pixels; a frame is.
    frame.write_text(
        f'<!doctype html><body data-said=""><iframe src="{watched.name}" style="width:{width}px;height:900px"></iframe>'
        "<script>onmessage = event => { document.body.dataset.said = event.data; }</script>"
    )
    dump = chromium(frame, profile, "--dump-dom", "--allow-file-access-from-files")
    return dump.split('data-said="', 1)[1].split('"', 1)[0]
