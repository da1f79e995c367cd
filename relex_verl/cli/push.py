"""`relex-verl push`: a predicted checkpoint to the Hugging Face Hub."""

from pathlib import Path
from typing import Annotated

import typer

from relex_verl.cli.arguments import AsJson
from relex_verl.cli.screen import clear_errors, console, print_json
from relex_verl.offline import hub

__all__ = ["push"]


def push(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A predicted checkpoint, with relex.json.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="owner/name on the Hub; made if it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="Make it private, if it is made.")] = False,
    as_json: AsJson = False,
) -> None:
    """Upload a predicted checkpoint, with a model card that says how it was made, from what, and how it scored.

    Uses your own login (`hf auth login`, or HF_TOKEN).
    """
    with clear_errors():
        address = hub.push(checkpoint, repo, private)
    if as_json:
        print_json({"repo": repo, "address": address})
        return
    console.print(f"{checkpoint.name}: {address}", highlight=False, soft_wrap=True)
