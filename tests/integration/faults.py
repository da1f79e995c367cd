"""Stand-ins for bad luck: loaded into every process of a run by VERL_USE_EXTERNAL_MODULES.

- FAULT=module:name raises from what it names.
- FAULT_SCORING changes what happens while RELEX validates, and only then, after the first FAULT_AFTER validations: "hang"
  keeps every answer back, those to every second prompt before they are generated, "raise" fails in every reward,
  "flatter" gives every answer of a prediction the full reward, whatever the model said, "nan" makes every predicted
  weight one, "kill" kills vLLM's engine as the first prompt comes, "kill-asleep" before it is to fall asleep, "kill-sending"
  while a prediction is sent to it. FAULT_MARKER is the file by which the driver tells the
  other processes that it is so far.
- FAULT_UNRESTORED=step leaves the rollout with the weights that were scored last after the cut at that step.
"""

import asyncio
import contextlib
import functools
import os
from pathlib import Path
from typing import Any

import psutil
import wrapt

MARKER = Path(os.environ.get("FAULT_MARKER", "/nonexistent"))
SCORING = os.environ.get("FAULT_SCORING", "")


def _break(module: Any) -> None:
    owner, _, name = os.environ["FAULT"].partition(":")[2].rpartition(".")
    target = getattr(module, owner) if owner else module
    getattr(target, name)  # a fault that hits nothing would prove nothing

    def broken(*_: object, **__: object) -> None:
        raise OSError("injected: the disk is on fire")

    setattr(target, name, broken)


def _mark_validations(trainer: Any) -> None:
    """In the driver: the marker is there while RELEX validates."""
    validate, begun = trainer._RelexTrainerMixin.relex_validate, []

    @functools.wraps(validate)
    def marked(self: Any, weights: Any, *args: Any) -> Any:
        begun.append(weights)
        if len(begun) > int(os.environ.get("FAULT_AFTER", "0")) and not (
            SCORING in ("flatter", "nan") and weights == "observed"
        ):
            MARKER.touch()
            if SCORING == "kill-asleep":
                _kill_engines()
        try:
            return validate(self, weights, *args)
        finally:
            MARKER.unlink(missing_ok=True)

    trainer._RelexTrainerMixin.relex_validate = marked


def _kill_engines() -> None:
    """Of this run: Ray starts all of its processes from one that is this one's parent, too."""
    for process in psutil.Process().parent().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.name().startswith("VLLM"):
                process.kill()


def _leave_unrestored(trainer: Any) -> None:
    """In the driver."""
    restore = trainer._RelexTrainerMixin.relex_restore

    def unrestored(self: Any) -> None:
        if self.global_steps == int(os.environ["FAULT_UNRESTORED"]):
            self.relex.substitute(None)
        else:
            restore(self)

    trainer._RelexTrainerMixin.relex_restore = unrestored


def _spoil_predictions(rank: Any) -> None:
    """On the ranks: what is sent to the rollout while the marker is there."""
    export = rank.RelexRank.export

    def spoiled(self: Any, weights: Any, device: Any) -> Any:
        spoil = MARKER.exists()
        for sent, (name, tensor) in enumerate(export(self, weights, device)):
            if spoil and SCORING == "kill-sending" and sent == 4:
                _kill_engines()
            yield name, tensor * float("nan") if spoil and SCORING == "nan" else tensor

    rank.RelexRank.export = spoiled


def _disturb_answers(agent_loop: Any) -> None:
    """In the agent loop's process: what each sample meets while the marker is there."""
    loop = agent_loop.SeededSingleTurnAgentLoop
    run, score = loop.run, loop._score

    async def held_back() -> None:
        while SCORING == "hang" and MARKER.exists():
            await asyncio.sleep(0.05)

    async def late(self: Any, *args: Any, **kwargs: Any) -> Any:
        if SCORING == "kill" and MARKER.exists():
            _kill_engines()
        if int(kwargs["index"]) % 2:
            await held_back()
        answer = await run(self, *args, **kwargs)
        await held_back()
        return answer

    def judged(self: Any, *args: Any) -> float:
        if SCORING == "raise" and MARKER.exists():
            raise OSError("injected: no reward today")
        return 1.0 if SCORING == "flatter" and MARKER.exists() else score(self, *args)

    loop.run, loop._score = late, judged


if "FAULT" in os.environ:
    wrapt.register_post_import_hook(_break, os.environ["FAULT"].partition(":")[0])
if SCORING:
    wrapt.register_post_import_hook(_mark_validations, "relex_verl.verl_plugin.trainer")
    wrapt.register_post_import_hook(_disturb_answers, "verl_cpu.agent_loop")
if SCORING in ("nan", "kill-sending"):
    wrapt.register_post_import_hook(_spoil_predictions, "relex_verl.run.rank")
if "FAULT_UNRESTORED" in os.environ:
    wrapt.register_post_import_hook(_leave_unrestored, "relex_verl.verl_plugin.trainer")
