"""Which main was started, and whether it leads to verl's v1 trainer. Under another one RELEX would never run.

Hydra composes `+relex=...` for any main. verl has several, recipes and users bring their own, and only who calls verl's
`TaskRunnerV1`, or asks `get_trainer_cls` for the trainer's class, comes to a trainer of RELEX. So the main's source is
read, and the sources of what it imports from its own project: none of it is executed.
"""

import ast
import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import FunctionType
from typing import Any

from relex_verl.run.config import ConfigError

__all__ = ["check_main"]

logger = logging.getLogger("relex_verl")

VERLS_MAIN = "verl.trainer.main_ppo"
# What a main of one's own names when it starts verl's v1 trainer.
V1 = {"TaskRunnerV1", "get_trainer_cls"}
INSTALLED = {"site-packages", "dist-packages"}


def check_main(task: Callable[..., Any]) -> None:
    """Refuse a main that does not start verl's v1 trainer. One whose source cannot be read is only warned of.

    Args:
        task: the function that `hydra.main` decorates.

    Raises:
        ConfigError: it starts another trainer.
    """
    task = inspect.unwrap(task)
    if not isinstance(task, FunctionType):
        logger.warning("RELEX: runs only if %r starts verl's v1 trainer, which cannot be seen from here", task)
        return
    file, name = Path(task.__code__.co_filename).resolve(), _name(task)
    spec = find_spec(VERLS_MAIN)
    if spec is not None and spec.origin is not None and file == Path(spec.origin).resolve():
        return
    try:
        starts = any(_starts_v1(tree) for tree in _project(file, name))
    except (OSError, SyntaxError, ValueError):
        logger.warning("RELEX: runs only if %s starts verl's v1 trainer, which cannot be seen from here", name)
        return
    if not starts:
        cure = (
            "it does not start verl's v1 trainer, and RELEX would never run: start python -m verl.trainer.main_ppo (with "
            "+relex=separate_async where the rollout has devices of its own), have your main call "
            "run_ppo(config, task_runner_class=TaskRunnerV1) of verl.trainer.main_ppo, or leave +relex out"
        )
        raise ConfigError("main", name, cure)


def _name(task: FunctionType) -> str:
    """Module of a main, also where it was started as `__main__`; the file of a script."""
    spec = task.__globals__.get("__spec__")
    if spec is not None:
        return str(spec.name)
    return task.__code__.co_filename if task.__module__ == "__main__" else task.__module__


def _project(file: Path, name: str) -> Iterator[ast.Module]:
    """The main's source, then that of every module of its project that these import, wherever they do."""
    ours = name.split(".")[0]
    roots = [Path(root or ".").resolve() for root in sys.path]
    modules, seen = [(file, name)], {file}
    while modules:
        path, module = modules.pop()
        tree = ast.parse(path.read_bytes())
        yield tree
        for imported in _imports(tree, module):
            top = imported.split(".")[0]
            if top in ("verl", "relex_verl") or top in sys.stdlib_module_names:
                continue
            for root in roots:
                found = _source(root, imported)
                # Of what is installed only the main's own package: others are libraries.
                if found and found not in seen and (top == ours or not INSTALLED & set(root.parts)):
                    seen.add(found)
                    modules.append((found, f"{imported}.__init__" if found.name == "__init__.py" else imported))


def _imports(tree: ast.Module, module: str) -> set[str]:
    """Dotted names that may be modules: what is imported, and each name that is imported from a package."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: -node.level] if node.level else []
            origin = ".".join([*parents, *([node.module] if node.module else [])])
            names |= {origin, *(f"{origin}.{alias.name}" for alias in node.names)} - {""}
    return names


def _source(root: Path, module: str) -> Path | None:
    stem = root.joinpath(*module.split("."))
    return next((path for path in (stem.with_suffix(".py"), stem / "__init__.py") if path.is_file()), None)


def _starts_v1(tree: ast.Module) -> bool:
    """Whether a source calls for verl's v1 trainer by name, or for verl's own main."""
    meant: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            meant |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            meant |= {alias.asname: alias.name for alias in node.names if alias.asname}
    replaced = {id(part) for node in ast.walk(tree) if _replaces_run(node) for part in _bases(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and id(node) not in replaced:
            first, dot, rest = ast.unparse(node).partition(".")
            name = meant.get(first, first) + dot + rest
            if name.split(".")[-1] in V1 or name == f"{VERLS_MAIN}.main":
                return True
    return False


def _bases(node: ast.AST) -> Iterator[ast.AST]:
    assert isinstance(node, ast.ClassDef)
    for base in node.bases:
        yield from ast.walk(base)


def _replaces_run(node: ast.AST) -> bool:
    """A class with a `run` of its own that does not call the one it replaces."""
    if not isinstance(node, ast.ClassDef):
        return False
    runs = [one for one in node.body if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef) and one.name == "run"]
    return bool(runs) and "super" not in {name.id for name in ast.walk(runs[0]) if isinstance(name, ast.Name)}
