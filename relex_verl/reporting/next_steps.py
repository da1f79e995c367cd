"""What to do after a cut: commands that can be pasted, with the paths of this run in them."""

import re
from dataclasses import dataclass
from pathlib import Path
from shlex import join, quote

from relex_verl.reporting.findings import CutReport, Predicted

__all__ = ["NextStep", "next_steps"]

VALIDATE = ["trainer.val_before_train=True", "trainer.val_only=True", "trainer.resume_mode=disable"]
GOES_ON = " \\\n  "


@dataclass(frozen=True)
class NextStep:
    """Something to do, in words, and the text that does it when it is pasted."""

    title: str
    note: str
    text: str


def next_steps(report: CutReport) -> list[NextStep]:
    """What helps after this verdict, the most useful first; empty where no checkpoint was written."""
    if report.recommended_path is not None:
        return _with_winner(report, report.recommended_path)
    if not report.predictions:
        return []
    nearest = min(report.predictions, key=lambda prediction: prediction.target or report.t_cut)
    observed = Path(nearest.trajectory).with_name(f"observed-step_{report.t_cut}")
    taken = [_checkout(nearest.trajectory, report.t_cut, observed)] if report.single_steps is not False else []
    return [
        *taken,
        _score(nearest.path, f"with {observed}" if taken else "with your own checkpoint of that step"),
        _more(report, nearest, "The shorter the horizon, the safer the prediction."),
        _diagnose(nearest.trajectory),
    ]


def _with_winner(report: CutReport, path: str) -> list[NextStep]:
    target = report.advice.target
    name = "relex" if target is None else target.folder_name
    won = [prediction for prediction in report.predictions if Path(prediction.path).name == name]
    new_run = Path(path).parent.with_name(f"from_{name}")
    overrides = [_weights(path), _override("trainer.default_local_dir", str(new_run))]
    load = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"path = {path!r}",
        "model = AutoModelForCausalLM.from_pretrained(path)",
        "tokenizer = AutoTokenizer.from_pretrained(path)",
    ]
    serve, with_what = ["vllm", "serve", path], "with transformers"
    if won and _is_adapter(path):
        base, with_what = won[0].base_model, "with transformers and peft"
        load[-1] = f"tokenizer = AutoTokenizer.from_pretrained({base!r})"
        serve = ["vllm", "serve", base, "--enable-lora", "--lora-modules", f"relex={path}"]
    return [
        NextStep("Load it", f"In Python, {with_what}.", "\n".join(load)),
        NextStep("Serve it", "An OpenAI-compatible server, with vLLM.", join(serve)),
        NextStep(
            "Push it to the Hub",
            "With a model card that says how it was made and how it scored. Put your own name in place of owner/name.",
            join(["relex-verl", "push", path, "owner/name"]),
        ),
        NextStep(
            "Train on from it",
            "Add to your verl command. A folder of its own keeps verl from resuming the old run.",
            _lines(overrides),
        ),
        *(
            _more(report, winner, "Steps between the winner and its neighbours. Score them before use.")
            for winner in won
        ),
        *(_diagnose(winner.trajectory) for winner in won),
    ]


def _checkout(trajectory: str, step: int, out: Path) -> NextStep:
    return NextStep(
        f"Take the weights of step {step}",
        "The last observed weights, as a Hugging Face checkpoint: what every prediction has to beat.",
        GOES_ON.join([join(["relex-verl", "checkout", trajectory]), join(["--step", str(step), "--out", str(out)])]),
    )


def _diagnose(trajectory: str) -> NextStep:
    command = ["relex-verl", "diagnose", trajectory, "--out", str(Path(trajectory).with_name("diagnosis"))]
    return NextStep("Look closer at the trajectory", "More pictures and figures than this page has.", join(command))


def _score(path: str, other: str) -> NextStep:
    return NextStep(
        "Score a prediction yourself",
        f"Add to your verl command, without +relex. Then once more {other}, and compare.",
        _lines([_weights(path), *VALIDATE]),
    )


def _more(report: CutReport, like: Predicted, note: str) -> NextStep:
    """Predictions that were not written yet, made as `like` was."""
    options = [] if like.method == "relex" else ["--method", like.method]
    options += [] if like.rank == 1 else ["--rank", str(like.rank)]
    options += [] if like.fit_from in (None, 0, 1) else ["--fit-from", str(like.fit_from)]
    targets = ",".join(str(step) for step in _between(report, like.target or 2 * report.t_cut, like.method))
    out = Path(like.trajectory).with_name("more")
    command = join(["relex-verl", "extrapolate", like.trajectory])
    how = join(["--t-cut", str(report.t_cut), "--target", targets, *options])
    return NextStep("Predict other steps", note, GOES_ON.join([command, how, join(["--out", str(out)])]))


def _is_adapter(path: str) -> bool:
    return (Path(path) / "adapter_config.json").exists()


def _weights(path: str) -> str:
    """What has verl begin with a checkpoint, or with an adapter of the same base."""
    return _override(f"actor_rollout_ref.model.{'lora_adapter_path' if _is_adapter(path) else 'path'}", path)


def _override(key: str, value: str) -> str:
    """A Hydra override; quoted where its grammar would read more into a path than a text."""
    if re.fullmatch(r"[\w./:-]+", value, re.ASCII):
        return f"{key}={value}"
    escaped = re.sub(r"\\+(?=')|\\+$", lambda slashes: 2 * slashes.group(), value).replace("'", r"\'")
    return f"{key}='{escaped}'"


def _lines(overrides: list[str]) -> str:
    """Overrides as the end of a command, one a line."""
    return "  " + GOES_ON.join(quote(override) for override in overrides)


def _between(report: CutReport, step: int, method: str) -> list[int]:
    """Steps halfway from this one to what was predicted, or observed, next to it; only the nearer one without a winner."""
    scored = {row.target for row in report.validation_scores if row.method == method}
    known = sorted({report.t_cut, step} | scored | {written.target for written in report.predictions if written.target})
    place = known.index(step)
    neighbours = known[max(0, place - 1) : place] + (known[place + 1 : place + 2] if report.recommended_path else [])
    halfway = [(step + neighbour) // 2 for neighbour in neighbours]
    return sorted(set(halfway) - set(known)) or [step + 1]
