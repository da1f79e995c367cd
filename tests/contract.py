"""Reads from the plugin's source which names of other packages it leans on, and asks those packages for them."""

import ast
import importlib
import inspect
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

ATTRIBUTE = "an attribute"  # what a contract says of a name that is read and not called


@dataclass(frozen=True)
class Use:
    """One place of the plugin that uses a name.

    Attributes:
        owner: what the plugin's source calls the object, such as `self.checkpoint_manager`, or `super()`.
        name: of the attribute.
        positional, keywords: how it is called; None where it is only read, or called with `*args`.
        line: of the source.
    """

    owner: str
    name: str
    positional: int | None
    keywords: tuple[str, ...]
    line: int


def resolve(path: str) -> Any:
    """The object behind `module:Class` or `module`."""
    module, _, name = path.partition(":")
    found = importlib.import_module(module)
    return getattr(found, name) if name else found


def signature_of(function: Any) -> str:
    """Its parameters and their defaults, without annotations, which say nothing of how it can be called."""
    signature = inspect.signature(function)
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))


@cache
def assigned(cls: type) -> frozenset[str]:
    """Names that the methods of a class and of its bases assign on `self`."""
    names: set[str] = set()
    for base in cls.__mro__[:-1]:
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(base)))):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and ast.unparse(node.value) == "self"
            ):
                names.add(node.attr)
    return frozenset(names)


def has(owner: Any, name: str) -> bool:
    """Whether it has this name: of its own, as a field of its dataclass, or assigned by its methods."""
    if hasattr(owner, name):
        return True
    return inspect.isclass(owner) and (name in getattr(owner, "__annotations__", {}) or name in assigned(owner))


def disagreements(owner: Any, contract: Mapping[str, str]) -> list[str]:
    """Where a class or module is not what the contract says, in words.

    Args:
        owner: verl's.
        contract: name -> its signature without annotations, or ATTRIBUTE.
    """
    where, wrong = getattr(owner, "__name__", str(owner)), []
    for name, promised in contract.items():
        if not has(owner, name):
            wrong.append(f"{where} has no {name}")
        elif promised != ATTRIBUTE and (is_now := signature_of(getattr(owner, name))) != promised:
            wrong.append(f"{where}.{name}{promised} is {is_now} now")
    return wrong


def uses(source: str) -> list[Use]:
    """Every attribute that a file reads or calls, with what it is an attribute of, in the file's words."""
    tree, found = ast.parse(source), []
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            call = calls.get(id(node))
            found.append(_use(ast.unparse(node.value), node.attr, call, node.lineno))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
            owner, name = node.args[:2]
            if isinstance(name, ast.Constant):
                found.append(_use(ast.unparse(owner), name.value, None, node.lineno))
    return found


def _use(owner: str, name: str, call: ast.Call | None, line: int) -> Use:
    if call is None or any(isinstance(argument, ast.Starred) for argument in call.args):
        return Use(owner, name, None, (), line)
    keywords = tuple(keyword.arg for keyword in call.keywords if keyword.arg)
    return Use(owner, name, len(call.args), keywords, line)


def calls_of(source: str, names: set[str]) -> list[Use]:
    """Where a file calls one of these names by itself."""
    return [
        _use("", node.func.id, node, node.lineno)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names
    ]


def imports(source: str, packages: set[str]) -> dict[str, tuple[str, str]]:
    """Name in the file -> (module, name there or "") of what it imports from these packages, functions included."""
    names = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in packages:
                    names[alias.asname or alias.name] = (alias.name, "")
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in packages:
            names |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
    return names


def overrides(cls: type, package: str) -> dict[str, type]:
    """Method -> the class outside the package whose method it replaces, for all that a class of the package defines."""
    ours = [base for base in cls.__mro__ if base.__module__.split(".")[0] == package]
    theirs = [base for base in cls.__mro__[:-1] if base not in ours]
    defined = {name for base in ours for name, value in vars(base).items() if inspect.isfunction(value)}
    return {name: owner for name in defined for owner in theirs if hasattr(owner, name)}


def misfit(use: Use, function: Any, bound: bool) -> str | None:
    """Why a function cannot be called as the plugin does, or None.

    Args:
        use: the call.
        function: verl's.
        bound: a method that is called on an object: its first parameter is given already.
    """
    if use.positional is None:
        return None
    values = [None] * (use.positional + bound)
    try:
        inspect.signature(function).bind(*values, **dict.fromkeys(use.keywords))
    except TypeError as error:
        return f"line {use.line}: {use.owner}.{use.name}(...): {error}"
    return None
