"""What evaluate.sh has to score: one line a checkpoint, `name<TAB>path<TAB>facts as JSON`."""

import argparse
import json
import re
from pathlib import Path
from typing import Any


def one(model: str, label: str | None) -> tuple[str, str, dict[str, Any]]:
    """A Hub id or a folder; what relex-verl wrote says in its relex.json what it is."""
    folder = Path(model).expanduser()
    facts: dict[str, Any] = {"method": folder.name, "t_cut": None, "target": None}
    path = str(folder.absolute()) if folder.is_dir() else model
    if (folder / "relex.json").is_file():
        provenance = json.loads((folder / "relex.json").read_text())
        facts |= {key: provenance[key] for key in facts if key in provenance}
        if "method" not in provenance:  # `relex-verl checkout`: weights that were trained
            facts["method"] = f"observed step {provenance.get('step')}"
    return _name(label or folder.name), path, {**facts, "method": label or facts["method"], "model": path}


def of_manifest(manifest: Path) -> list[tuple[str, str, dict[str, Any]]]:
    """Every prediction of a `relex-verl sweep`; relative paths start at the manifest's folder.

    Raises:
        SystemExit: no predictions, a missing folder, or two predictions that cannot be told apart.
    """
    rows = []
    for prediction in json.loads(manifest.read_text())["predictions"]:
        path = (manifest.absolute().parent / Path(prediction["path"]).expanduser()).resolve()
        if not path.is_dir():
            raise SystemExit(f"{manifest}: {path} is not there")
        facts = {key: prediction.get(key) for key in ("method", "t_cut", "target")}
        name = _name(f"{facts['method']}-cut_{facts['t_cut']}-step_{facts['target']}")
        rows.append((name, str(path), {**facts, "model": str(path)}))
    names = [name for name, _, _ in rows]
    if not rows or len(set(names)) < len(names):
        raise SystemExit(f"{manifest}: {'two predictions of one method, cut and target' if rows else 'no predictions'}")
    return rows


def _name(text: str) -> str:
    return re.sub(r"[^\w.-]+", "_", text).strip("_.") or "checkpoint"


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model")
    which.add_argument("--manifest", type=Path)
    parser.add_argument("--label")
    options = parser.parse_args(arguments)
    rows = of_manifest(options.manifest) if options.manifest else [one(options.model, options.label)]
    for name, path, facts in rows:
        print(name, path, json.dumps(facts), sep="\t")


if __name__ == "__main__":
    main()
