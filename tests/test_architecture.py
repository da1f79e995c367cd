"""The folders are the floors: imports point downward only, file by file, functions included, and never in a circle."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import relex_verl

PACKAGE = Path(relex_verl.__file__).parent
# What a room may import: rooms on the floors below it, and itself. Rooms of one floor do not know each other.
FLOORS = [
    {"maths"},
    {"trajectory", "reporting"},
    {"pipeline"},
    {"run", "offline"},
    {"cli", "verl_plugin"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# The only files, or rooms, that may use a package.
ONLY_HERE = {
    "torch.distributed": {"pipeline/collectives.py", "verl_plugin/fsdp.py"},  # the latter: FSDP's own classes
    "verl": {"verl_plugin"},
    "ray": {"verl_plugin"},
    "hydra": {"verl_plugin"},
    "wandb": set(),
    "numba": {
        f"trajectory/kernels/{file}.py" for file in ("compile", "entries", "moments", "quantized_loops", "sparse_loops")
    },
}
PURE = {*sys.stdlib_module_names, "torch"}  # what mathematics may import
MOST_LINES = 300


def sources() -> dict[str, str]:
    """Path below the package -> text, of every file."""
    return {str(path.relative_to(PACKAGE)): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}


def mentioned(path: str, source: str) -> set[str]:
    """Dotted names that a file imports, wherever it does, and dotted names under torch that it uses."""
    package, names = ["relex_verl", *Path(path).parts[:-1]], set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            names |= {f"{origin}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch."):
            names.add(ast.unparse(node))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            names |= {one.value for one in node.args if isinstance(one, ast.Constant) and isinstance(one.value, str)}
    return names


def file_of(name: str, files: set[str]) -> str | None:
    """The file of this package that a dotted name stands in: that of the module, or the package's `__init__`."""
    parts = name.split(".")[1:]
    for length in range(len(parts), -1, -1):
        stem = "/".join(parts[:length])
        for candidate in (f"{stem}.py", f"{stem}/__init__.py".lstrip("/")):
            if candidate in files:
                return candidate
    return None


def uses(files: dict[str, str]) -> dict[str, set[str]]:
    """File -> the files of this package that it imports from."""
    known = set(files)
    return {
        path: {
            found
            for name in mentioned(path, source)
            if name.split(".")[0] == "relex_verl" and (found := file_of(name, known)) not in (None, path)
        }
        for path, source in files.items()
    }


def is_under(name: str, top: str) -> bool:
    return name == top or name.startswith(top + ".")


def violations(files: dict[str, str]) -> list[str]:
    """What files import although they must not, in words."""
    wrong = []
    for path, used in uses(files).items():
        room = Path(path).parts[0] if "/" in path else ""
        if room and room not in FLOOR_OF:
            wrong.append(f"{room}/ stands on no floor: decide which one and add it to FLOORS in {Path(__file__).name}")
            continue
        for other in sorted(used):
            below = Path(other).parts[0] if "/" in other else ""
            if below and below != room and FLOOR_OF.get(below, 99) >= FLOOR_OF.get(room, 99 if room == "" else -1):
                wrong.append(f"{path} imports {other}: imports point down")
        for name in sorted(mentioned(path, files[path])):
            for top, allowed in ONLY_HERE.items():
                if is_under(name, top) and not {path, room} & allowed:
                    wrong.append(f"{path} uses {name}, which only {sorted(allowed) or 'nobody'} may")
            if room == "maths" and not is_under(name, "relex_verl") and name.split(".")[0] not in PURE:
                wrong.append(f"{path} imports {name}: mathematics needs only torch")
    return wrong


def circle(files: dict[str, str]) -> list[str]:
    """A circle of files that import each other, in its order; [] where there is none."""
    try:
        TopologicalSorter(uses(files)).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_imports_point_downward() -> None:
    assert violations(sources()) == []


def test_no_file_imports_itself_by_way_of_others() -> None:
    assert circle(sources()) == []


def test_every_folder_is_a_room_on_a_floor() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name not in ("__pycache__", "docs")}
    assert folders == set(FLOOR_OF)


def test_a_floor_is_where_the_imports_put_it() -> None:
    """The lowest that it can be, so that the drawing above cannot drift away from the code."""
    below: dict[str, set[str]] = {room: set() for room in FLOOR_OF}
    for path, used in uses(sources()).items():
        if "/" in path:
            room = Path(path).parts[0]
            below[room] |= {Path(other).parts[0] for other in used if "/" in other} - {room}
    lowest = {}
    for room in TopologicalSorter(below).static_order():
        lowest[room] = max((lowest[one] + 1 for one in below[room]), default=0)
    assert lowest == FLOOR_OF


def test_files_are_short() -> None:
    assert {path: text.count("\n") for path, text in sources().items() if text.count("\n") > MOST_LINES} == {}


A, B = "maths/a.py", "maths/b.py"


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"novel/a.py": ""}, "stands on no floor"),
        ({A: "from relex_verl.trajectory.b import x", "trajectory/b.py": ""}, "imports point down"),
        ({A: "def f():\n    from relex_verl.run import b", "run/b.py": ""}, "imports point down"),
        ({A: "from ..trajectory import b", "trajectory/b.py": ""}, "imports point down"),
        ({"cli/a.py": "import relex_verl.verl_plugin.b", "verl_plugin/b.py": ""}, "imports point down"),
        ({"reporting/a.py": "from relex_verl.trajectory.b import x", "trajectory/b.py": ""}, "imports point down"),
        ({A: "import numpy as np"}, "mathematics needs only torch"),
        ({"pipeline/a.py": "import torch.distributed as dist"}, "uses torch.distributed"),
        ({"pipeline/a.py": "from torch import distributed"}, "uses torch.distributed"),
        ({"run/a.py": "import torch\ndef f():\n    return torch.distributed.get_rank()"}, "uses torch.distributed"),
        ({"reporting/wandb.py": "def f():\n    import wandb"}, "uses wandb"),
        ({"run/a.py": "if True:\n    from verl.utils import x"}, "uses verl.utils.x"),
        ({"cli/a.py": "import importlib\nimportlib.import_module('verl')"}, "uses verl"),
        ({"run/a.py": "import ray"}, "uses ray"),
    ],
)
def test_this_test_sees_what_it_forbids(files: dict[str, str], says: str) -> None:
    assert says in " ".join(violations(files))


@pytest.mark.parametrize(
    "files",
    [
        {A: "from relex_verl.maths import b", B: "from relex_verl.maths.a import x"},
        {A: "from relex_verl.maths.b import x", B: "def f():\n    from . import a"},
        {"run/__init__.py": "from relex_verl.run.a import x", "run/a.py": "from relex_verl.run import y"},
    ],
)
def test_this_test_sees_a_circle(files: dict[str, str]) -> None:
    assert circle(files)


@pytest.mark.parametrize(
    "files",
    [
        {A: "import math\nimport torch\nfrom relex_verl.maths.b import x", B: ""},
        {"pipeline/collectives.py": "import torch.distributed as dist"},
        {"run/a.py": "from relex_verl import __version__\nimport verlib, rays", "__init__.py": ""},
        {"verl_plugin/a.py": "import ray\nfrom verl.trainer import x\nfrom relex_verl.maths.a import y", A: ""},
    ],
)
def test_this_test_allows_what_is_allowed(files: dict[str, str]) -> None:
    assert violations(files) == []
    assert circle(files) == []


@pytest.mark.parametrize(
    ("imported", "must_not_load"),
    [
        ("relex_verl", ["torch", "numpy", "numba", "verl", "ray", "wandb"]),
        ("relex_verl.run.callback", ["verl", "ray", "wandb", "hydra", "matplotlib", "numba"]),
        ("relex_verl.run.rank", ["verl", "ray", "wandb", "hydra", "matplotlib", "numba"]),
    ],
)
def test_importing_loads_no_more_than_it_should(imported: str, must_not_load: list[str]) -> None:
    code = f"import sys, {imported}; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert imported in loaded
    assert [name for name in must_not_load if name in loaded] == []
