"""Where checkpoints lie below a folder, by one rule for every framework: a number that counts, and weights somewhere inside.

No name is known: folders that differ only in a number are the steps of a run, and the first folder inside a step's that
holds weights of the policy is its checkpoint. It works on listings, so a Hub revision is looked through like a disk.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from relex_verl.offline.ingest.errors import IngestError

__all__ = ["SHARD_FILE", "Listing", "Place", "files_as_tree", "matching", "steps_below", "weights_in"]

# Path below the root ("" for the root) -> names of the folders and of the files in it.
Listing = Callable[[str], tuple[list[str], list[str]]]
SHARD_FILE = re.compile(r"model_world_size_(\d+)_rank_(\d+)\.pt")
DEPTH = 4  # levels below a step's folder: policy/weights/model/consolidated
OUTER = 2  # levels above the steps' folders: v0-20250722/checkpoint-10
# Folders inside a step's that belong to something else than the policy.
OTHERS = re.compile(r"critic|ref|reference|reward|value|optim\w*|tokenizer|dataset|data|rollout|scheduler|dataloader")
POLICY = ("actor", "policy")
# Of one folder whose name has several numbers: the one that such a word stands before.
COUNTS = re.compile(r"(?:step|iter|iteration|checkpoint|ckpt|epoch)s?[_-]?$", re.IGNORECASE)
# How each kind of weights is told by a file's name. The first that is found in a step's folder is used.
KINDS: dict[str, Callable[[str], bool]] = {
    "adapter": lambda file: file in ("adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"),
    "safetensors": lambda file: (
        file.endswith((".safetensors", ".safetensors.index.json")) and not file.startswith(("adapter", "optim"))
    ),
    "verl": lambda file: SHARD_FILE.fullmatch(file) is not None,
    "pickle": lambda file: re.fullmatch(r"pytorch_model.*\.bin(\.index\.json)?", file) is not None,
}
# What others write that is not read: how it is told, what it is, and who converts it.
FOREIGN: tuple[tuple[Callable[[str], bool], str], ...] = (
    (
        lambda file: re.fullmatch(r"(zero_pp_rank_.*|mp_rank_\d+)_.*states\.pt", file) is not None,
        "DeepSpeed ZeRO's own: convert it with `python zero_to_fp32.py FOLDER OUT --safe_serialization`, the script that "
        "DeepSpeed puts beside it",
    ),
    (
        lambda file: file in ("common.pt", "model_optim_rng.pt"),
        "Megatron's dist_ckpt: convert it with `python -m verl.model_merger merge --backend megatron --local_dir FOLDER "
        "--target_dir OUT`, or slime's tools/convert_torch_dist_to_hf.py",
    ),
    (
        lambda file: file == ".metadata" or file.endswith(".distcp"),
        "torch's distributed checkpoint (DCP): convert it with the framework that wrote it (NeMo-RL: "
        "examples/converters/convert_dcp_to_hf.py), or `python -m torch.distributed.checkpoint.format_utils dcp_to_torch "
        "FOLDER FILE`, and save it with save_pretrained",
    ),
    (lambda file: file.endswith(".gguf"), "GGUF, which is quantised: give the weights that it was made from"),
    (
        lambda file: file.endswith((".pth", ".ckpt", ".h5", ".msgpack", ".nemo")) or file.startswith("consolidated."),
        "of a format that transformers does not save: convert it with AutoModelForCausalLM ... .save_pretrained(...)",
    ),
)


@dataclass(frozen=True)
class Place:
    """Where something lies below the root.

    Attributes:
        kind: one of KINDS, or "none".
        path: of the folder, below the root.
        why: of "none": what is there instead, and what to do.
    """

    kind: str
    path: str
    why: str = ""


def steps_below(root: Listing, called: str) -> list[tuple[int, Place]]:
    """The steps of a run and where each one's weights are, ascending.

    Args:
        root: what lies there.
        called: what messages call it.

    Raises:
        IngestError: there are no steps, or folders of several kinds that may be meant.
    """
    below = [""]
    for _ in range(OUTER + 1):
        runs = [(path, steps) for path in below if (steps := _steps_in(root, path, called))]
        if len(runs) > 1:
            named = " and ".join(f"{path} ({len(steps)} steps)" for path, steps in runs[:4])
            raise IngestError(f"{called} holds several runs, {named}: give the folder of one of them")
        if runs:
            return runs[0][1]
        below = [_join(path, name) for path in below for name in _visible(root(path)[0])]
    itself = weights_in(root, "")
    if itself.kind != "none":
        raise IngestError(f"{called} is a checkpoint itself: give the folder that its steps' folders are in")
    raise IngestError(
        f"{called} holds no folders of steps, that is, folders with weights whose names differ in a number, like "
        "global_step_5 or checkpoint-5: say how they are named with --step-pattern, e.g. 'run/epoch_{N}/weights'"
        + (f" (what is there is {itself.why})" if itself.why else "")
    )


def matching(root: Listing, pattern: str, called: str) -> list[tuple[int, Place]]:
    """The steps whose folders are named so; see `steps_below`.

    Args:
        pattern: path below the root with {N} where the step number stands; * is any text within a name.

    Raises:
        IngestError: no {N}, or no folder is named so.
    """
    if "{N}" not in pattern:
        raise IngestError(f"--step-pattern {pattern}: write {{N}} where the step number stands, e.g. checkpoint-{{N}}")
    found, parts = [("", "")], pattern.strip("/").split("/")
    for part in parts:
        escaped = re.escape(part).replace(r"\*", ".*").replace(r"\{N\}", r"(\d+)")
        found = [
            (_join(path, name), number or "".join(match.groups()[:1]))
            for path, number in found
            for name in root(path)[0]
            if (match := re.fullmatch(escaped, name))
        ]
    steps = sorted((int(number), weights_in(root, path)) for path, number in found if number)
    if not steps:
        raise IngestError(f"{called} holds no folder named like --step-pattern {pattern}")
    _check_once([(step, place.path) for step, place in steps])
    return steps


def _steps_in(root: Listing, path: str, called: str) -> list[tuple[int, Place]]:
    """The steps whose folders are in this one; none where it has no such folders."""
    names = [name for name in _visible(root(path)[0]) if re.search(r"\d", name)]
    places = {name: weights_in(root, _join(path, name)) for name in names}
    holding = [name for name in names if places[name].kind != "none"]
    holding = holding or [name for name in names if places[name].why]  # what has to be converted first
    if not holding:
        return []
    groups = _groups(holding)
    if len(groups) > 1:
        _check_once(sorted((int(number), name) for group in groups.values() for name, number in group.items()))
        said = " and ".join(f"{key} ({', '.join(list(group.values())[:4])})" for key, group in groups.items())
        raise IngestError(
            f"{called} holds checkpoints named {said}: say which are the steps of the run, e.g. --step-pattern "
            f"'{_join(path, next(iter(groups)))}'"
        )
    [key] = groups
    numbers = {name: number for name in names if (number := _number(key, name)) is not None}
    steps = sorted((int(number), name) for name, number in numbers.items())
    _check_once(steps)
    return [(step, places[name]) for step, name in steps]


def _groups(names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Names that differ in one number only: name with {N} -> name -> number. Each name is in one of them."""
    keys = {name: list(_keys(name)) for name in names}
    held = Counter(key for of_name in keys.values() for key, _, _ in of_name)
    groups: dict[str, dict[str, str]] = {}
    for name, of_name in keys.items():
        # What most have in common; of one name alone, the number behind a word that counts, or the last one.
        key, number, _ = max(of_name, key=lambda one: (held[one[0]], one[2]))
        groups.setdefault(key, {})[name] = number
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


def _keys(name: str) -> Iterator[tuple[str, str, tuple[bool, int]]]:
    for match in re.finditer(r"\d+", name):
        before, after = name[: match.start()], name[match.end() :]
        yield f"{before}{{N}}{after}", match.group(), (COUNTS.search(before) is not None, match.start())


def _number(key: str, name: str) -> str | None:
    match = re.fullmatch(re.escape(key).replace(r"\{N\}", r"(\d+)"), name)
    return match.group(1) if match else None


def _check_once(places: Sequence[tuple[int, str]]) -> None:
    for (step, place), (next_step, next_place) in pairwise(places):
        if step == next_step:
            raise IngestError(
                f"step {step} is there twice, as {place} and {next_place}: remove one of them, or say which is meant with "
                "--step-pattern"
            )


def weights_in(root: Listing, path: str) -> Place:
    """The weights of the policy in a step's folder: the first of KINDS, not below another number.

    Raises:
        IngestError: there are several, and none is the policy's by its name.
    """
    level, found, foreign = [path], list[tuple[int, int, Place]](), ""
    for depth in range(DEPTH + 1):
        below = []
        for folder in level:
            folders, files = root(folder)
            kind = next((kind for kind, is_one in KINDS.items() if any(map(is_one, files))), None)
            if kind is not None:
                found.append((list(KINDS).index(kind), depth, Place(kind, folder)))
            foreign = foreign or next((said for is_one, said in FOREIGN if any(map(is_one, files))), "")
            below += [_join(folder, name) for name in _visible(folders) if _may_hold_weights(name)]
        level = below
    if not found:
        return Place("none", path, foreign)
    best = min((kind, depth) for kind, depth, _ in found)
    chosen = [place for kind, depth, place in found if (kind, depth) == best]
    chosen = [one for one in chosen if any(part in one.path.split("/") for part in POLICY)] or chosen
    if len(chosen) > 1:
        named = " and ".join(one.path for one in chosen[:3])
        raise IngestError(f"{path} holds several checkpoints, {named}: say which with --step-pattern")
    return chosen[0]


def _may_hold_weights(name: str) -> bool:
    counted = re.search(r"\d+$", name)
    is_step = counted is not None and (counted.group() == name or COUNTS.search(name[: counted.start()]) is not None)
    return OTHERS.fullmatch(name.lower()) is None and not (is_step and int(counted.group() if counted else 0))


def _visible(names: Sequence[str]) -> list[str]:
    return sorted(name for name in names if not name.startswith("."))


def _join(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name


def files_as_tree(files: Sequence[str]) -> Listing:
    """The listing of files that are named by their whole paths, as a Hub does."""
    folders: dict[str, tuple[dict[str, None], list[str]]] = {}
    for file in files:
        *parents, name = file.split("/")
        for i, parent in enumerate(parents):
            folders.setdefault("/".join(parents[:i]), ({}, []))[0][parent] = None
        folders.setdefault("/".join(parents), ({}, []))[1].append(name)

    def listing(path: str) -> tuple[list[str], list[str]]:
        below, here = folders.get(path, ({}, []))
        return list(below), here

    return listing
