"""Configuration and tokenizer of a run, where they differ from its base's: predictions of the run take the run's.

Training may add a token, or use another chat template. How weights are stored and used is none of it: that stays the base's.
"""

import json
from pathlib import Path
from typing import Any

from relex_verl.trajectory.files import copy_whole, write_json

__all__ = ["keep_differing"]

SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".bpe", ".spm", ".vocab")
# What is written by a framework for itself, or says how the base's weights are stored.
NOT_THEIRS = ("trainer_state.json", "adapter_config.json", "relex.json", "all_results.json", "train_results.json")
STORED = (
    "dtype", "torch_dtype", "transformers_version", "_name_or_path", "use_cache", "quantization_config",
    "tie_word_embeddings", "architectures", "auto_map",
)  # fmt: skip


def keep_differing(base: Path, checkpoint: Path, out: Path) -> list[str]:
    """Copy what differs; only files that the base has, too, since frameworks put much of their own there.

    Args:
        base: folder of the base model.
        checkpoint: folder of a checkpoint of the run.
        out: gets the files; not made where there are none.

    Returns:
        Their names.
    """
    kept = []
    for ours in sorted(base.iterdir()):
        theirs = checkpoint / ours.name
        listed = ours.name.endswith(SUFFIXES) and not ours.name.endswith(".index.json") and ours.name not in NOT_THEIRS
        if not listed or not theirs.is_file() or ours.read_bytes() == theirs.read_bytes():
            continue
        if ours.suffix != ".json":
            out.mkdir(exist_ok=True)
            copy_whole(theirs, out / ours.name)
        else:
            content = _differing(_json(ours), _json(theirs))
            if content is None:
                continue
            out.mkdir(exist_ok=True)
            write_json(out / ours.name, content)
        kept.append(ours.name)
    return kept


def _differing(ours: Any, theirs: Any) -> Any:
    """Their content with what is ours in any case; None where nothing else differs."""
    if not isinstance(ours, dict) or not isinstance(theirs, dict):
        return None if ours == theirs or theirs is None else theirs
    rest = {key: value for key, value in theirs.items() if key not in STORED}
    if rest == {key: value for key, value in ours.items() if key not in STORED}:
        return None
    return {**rest, **{key: ours[key] for key in STORED if key in ours}}


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError:
        return None
