"""A full disk, through every command that writes: it says where and what to do, and nothing half-written stays."""

import gc
import resource
import shutil
import subprocess
from contextlib import contextmanager

import pytest
from shell import call, finished

from relex_verl.offline.verify import verify

__all__ = ["finished"]

PAGE = 4096
# What writes into `new`.
COMMANDS = {
    "ingest": "ingest --base {0}/base --checkpoints {0}/run --steps 1-2 --out {1}/new",
    "checkout": "checkout {0}/trajectory --step 3 --out {1}/new",
    "extrapolate": "extrapolate {0}/trajectory --t-cut 6 --target 8 --out {1}/new",
    "reconstruct": "reconstruct {0}/trajectory --step 3 --out {1}/new",
    "sweep": "sweep {0}/trajectory --t-cut 4,6 --target 8 --out {1}/new",
    "backtest": "backtest {0}/trajectory --out {1}/new",
    "baseline": "baseline weight-extrapolation {0}/trajectory --t-cut 6 --target 8 --out {1}/new",
}


class Disk:
    """A small one of its own, where this user may mount it; else an ordinary one with a limit on the size of a file."""

    def __init__(self, folder, mounted):
        self.folder, self.mounted = folder, mounted

    @contextmanager
    def with_room(self, size):
        """For so many bytes; for one file of so many bytes."""
        gc.collect()  # mapped files that were deleted hold their space
        if self.mounted:
            (self.folder / "taken").write_bytes(bytes(max(0, shutil.disk_usage(self.folder).free - size)))
            yield
            (self.folder / "taken").unlink()
            return
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    def content(self):
        """File -> bytes of all that commands have left."""
        files = [path for path in self.folder.rglob("*") if path.is_file() and path.name != "taken"]
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("disk")
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    mounted = shutil.which("mount") and not subprocess.run(mount, capture_output=True).returncode
    yield Disk(folder, mounted)
    gc.collect()
    if mounted:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk(finished, disk, name):
    arguments = COMMANDS[name].format(finished, disk.folder).split()
    assert call(*arguments).exit_code == 0
    whole = disk.content()
    shutil.rmtree(disk.folder / "new")
    # The disk is full half-way, and at the last write; a limit on files is felt in the largest.
    need = sum(-(-len(one) // PAGE) * PAGE for one in whole.values())
    largest = max(map(len, whole.values()))
    for size in (need // 2, need - PAGE) if disk.mounted else (largest // 2,):
        with disk.with_room(size):
            check_refused(call(*arguments), disk)
        left = disk.content()
        if name == "ingest" and left:
            said = verify(disk.folder / "new")
            assert (said.damaged, said.unexplained, said.whole_until) == ({}, [], {0: 1})
        for lists in ("new/index.json", "new/manifest.json"):  # of what is whole: less than in the end
            left.pop(lists, None)
        assert left == {path: whole[path] for path in left}
        shutil.rmtree(disk.folder / "new", ignore_errors=True)
    assert call(*arguments).exit_code == 0
    assert disk.content() == whole
    with disk.with_room(0 if disk.mounted else largest // 2):  # what is written anew stays as it was
        again = call(*arguments)
    if name not in ("ingest", "sweep"):  # they have nothing to do
        check_refused(again, disk)
    assert disk.content() == whole
    shutil.rmtree(disk.folder / "new")


def check_refused(result, disk):
    """One line on the error stream, with the place and what to do."""
    assert (result.exit_code, type(result.exception)) == (1, SystemExit), result.output
    assert result.stderr.count("\n") == 1
    assert f"{disk.folder}/" in result.stderr
    assert "make room" in result.stderr or "ulimit" in result.stderr
