"""Imports point downward only (module docstrings, README): read from the source, functions included."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import relex_verl

PACKAGE = Path(relex_verl.__file__).parent
FLOORS = [
    {"gram", "sketch", "extrapolators", "diagnostics", "advice", "search"},
    {
        "config",
        "shards",
        "encodings",
        "trajectory",
        "trajectory_index",
        "replay",
        "collectors",
        "budget",
        "hf_checkpoint",
        "parallel",
    },
    {"collectives", "tracking", "plots", "report"},
    {"observer", "assembly", "opening", "prediction", "ingest", "analysis", "sharing", "cli", "baselines"},
    {"verl_plugin"},
]
FLOOR_OF = {module: floor for floor, modules in enumerate(FLOORS) for module in modules}
ONLY_HERE = {"torch.distributed": {"collectives"}, "verl": {"verl_plugin"}, "ray": {"verl_plugin"}, "wandb": set()}
SOURCES = sorted(PACKAGE.rglob("*.py"))


def module_of(path):
    """The module or package right below relex_verl that a file belongs to; '' for relex_verl/__init__.py."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


def mentioned(source, package):
    """Dotted names that a source file imports, wherever it does, and dotted names under torch that it uses."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            names |= {f"{origin}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch."):
            names.add(ast.unparse(node))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            names |= {one.value for one in node.args if isinstance(one, ast.Constant) and isinstance(one.value, str)}
    return names


def is_under(name, top):
    return name == top or name.startswith(top + ".")


def violations(module, source, package="relex_verl"):
    """What a source file of a module imports although it must not, in words."""
    if module and module not in FLOOR_OF:
        return [
            f"relex_verl.{module} stands on no floor: decide which one and add it to FLOORS in {Path(__file__).name}"
        ]
    floor, wrong = FLOOR_OF.get(module, -1), []
    for name in sorted(mentioned(source, package)):
        for top, allowed in ONLY_HERE.items():
            if is_under(name, top) and module not in allowed:
                wrong.append(f"{module} uses {name}, which only {sorted(allowed) or 'nobody'} may")
        if is_under(name, "relex_verl"):
            other = name.partition(".")[2].partition(".")[0]
            if other in FLOOR_OF and FLOOR_OF[other] > floor:
                wrong.append(f"{module} (floor {floor}) imports {other} (floor {FLOOR_OF[other]}): imports point down")
            elif other not in FLOOR_OF and other != "__version__":
                wrong.append(f"{module} imports {name}, which stands on no floor")
        elif floor <= 0 and name.split(".")[0] not in {*sys.stdlib_module_names, *(["torch"] if floor == 0 else [])}:
            wrong.append(f"{module} (floor 0) imports {name}: only torch and the standard library are allowed there")
    return wrong


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downward(path):
    package = ".".join(["relex_verl", *path.parent.relative_to(PACKAGE).parts])
    assert violations(module_of(path), path.read_text(), package) == []


def test_modules_of_a_floor_do_not_import_each_other_in_a_circle():
    uses = {module: set() for module in FLOOR_OF}
    for path in SOURCES:
        package = ".".join(["relex_verl", *path.parent.relative_to(PACKAGE).parts])
        named = {name.split(".")[1] for name in mentioned(path.read_text(), package) if name.startswith("relex_verl.")}
        uses.setdefault(module_of(path), set()).update(named - {module_of(path)})
    while uses:
        leaves = {module for module, used in uses.items() if not used & set(uses)}
        assert leaves, f"a circle among {sorted(uses)}"
        uses = {module: used for module, used in uses.items() if module not in leaves}


@pytest.mark.parametrize(
    ("module", "source", "says"),
    [
        ("novel", "", "stands on no floor"),
        ("gram", "from relex_verl.shards import whole", "floor 0) imports shards (floor 1)"),
        ("gram", "def f():\n    from relex_verl import observer", "floor 0) imports observer (floor 3)"),
        ("gram", "from . import trajectory", "imports trajectory (floor 1)"),
        ("gram", "from .encodings import sparse", "imports encodings (floor 1)"),
        ("gram", "import relex_verl.verl_plugin.worker as w", "imports verl_plugin (floor 4)"),
        ("gram", "import numpy as np", "imports numpy"),
        ("", "import torch", "imports torch"),
        ("", "from relex_verl.gram import delta_gram", "imports gram (floor 0)"),
        ("config", "from relex_verl.novel import x", "stands on no floor"),
        ("observer", "import torch.distributed as dist", "uses torch.distributed"),
        ("observer", "from torch import distributed", "uses torch.distributed"),
        ("observer", "from torch.distributed.tensor import DTensor", "uses torch.distributed.tensor.DTensor"),
        ("observer", "import torch\ndef f():\n    return torch.distributed.get_rank()", "uses torch.distributed"),
        ("verl_plugin", "import torch.distributed", "uses torch.distributed"),
        ("tracking", "def f():\n    import wandb", "uses wandb"),
        ("verl_plugin", "import wandb", "uses wandb"),
        ("observer", "if True:\n    from verl.utils import x", "uses verl.utils.x"),
        ("cli", "import importlib\nimportlib.import_module('verl')", "uses verl"),
        ("collectives", "import ray", "uses ray"),
    ],
)
def test_this_test_sees_what_it_forbids(module, source, says):
    assert says in " ".join(violations(module, source))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("diagnostics", "import math\nimport torch\nfrom relex_verl.extrapolators import METHODS"),
        ("trajectory", "from relex_verl.hf_checkpoint import BaseCheckpoint\nimport verlib, rays"),
        ("collectives", "import torch.distributed as dist"),
        ("observer", "from relex_verl import __version__, collectives"),
        ("verl_plugin", "import ray\nfrom verl.trainer import x\nfrom relex_verl.observer import Observer"),
        ("", '__version__ = "0.1.0"'),
    ],
)
def test_this_test_allows_what_is_allowed(module, source):
    assert violations(module, source) == []


@pytest.mark.parametrize(
    ("imported", "must_not_load"),
    [
        ("relex_verl", ["torch", "numpy", "verl", "ray", "wandb"]),
        ("relex_verl.observer", ["verl", "ray", "wandb"]),
    ],
)
def test_importing_loads_no_more_than_it_should(imported, must_not_load):
    code = f"import sys, {imported}; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert imported in loaded
    assert [name for name in must_not_load if name in loaded] == []
