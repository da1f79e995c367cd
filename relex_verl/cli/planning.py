"""`relex-verl plan`: what following a run will cost, and whether it would be admitted, before a GPU is rented."""

from collections.abc import Sequence
from dataclasses import replace
from math import ceil
from typing import Annotated, Any

import typer

from relex_verl.cli.arguments import AsJson
from relex_verl.cli.screen import clear_errors, print_fact, print_json
from relex_verl.run.admission import RankFacts, estimate
from relex_verl.run.budget import (
    CAREFUL_CHANGE_RATE,
    TYPICAL_CHANGE_RATES,
    Workload,
    gib,
    predictions_to_write,
    traffic,
)
from relex_verl.run.config import RelexConfig
from relex_verl.run.plan import recording

__all__ = ["plan"]

GB = 10**9  # of a bandwidth, as vendors count
GIB = 2**30
BYTES = ("memory", "disk", "bytes_read", "bytes_written", "bytes_moved")
TYPICAL = "_typical"  # ends the keys of what is usual, beside what a run reckons with


def plan(
    params: Annotated[float, typer.Option(help="Parameters that are trained, e.g. 8e9.")],
    t_cut: Annotated[
        int | None, typer.Option(min=1, help="The step at which to fit; none for a run that is only recorded.")
    ] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Training ranks (GPUs), all nodes together.")] = 8,
    ranks_per_node: Annotated[int, typer.Option(min=1, help="Of these, how many on one node.")] = 8,
    tensors: Annotated[
        int,
        typer.Option(min=0, help="Weight tensors of the model; the default is that of an 8B model, 36 layers of 11."),
    ] = 400,
    trajectory: Annotated[str, typer.Option(help="fp32, bf16 or sketch, as relex.trajectory.")] = "fp32",
    quantization: Annotated[str, typer.Option(help="int8, int4 or none, as relex.quantization.")] = "int8",
    sketch_size: Annotated[int, typer.Option(help="As relex.sketch_size.")] = 4,
    observe_every: Annotated[str, typer.Option(help="auto or a number of steps, as relex.observe_every.")] = "auto",
    record: Annotated[str, typer.Option(help="window or run, as relex.record; run needs --steps.")] = "window",
    keep_best: Annotated[bool, typer.Option("--keep-best", help="As relex.keep_best=true.")] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="All steps of the run, for what is recorded of it.")] = None,
    change_rate: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="Share of the bf16 weights that change a step; RL: 0.005 to 0.03. A run is admitted at 0.03, whatever is "
            "given here.",
        ),
    ] = CAREFUL_CHANGE_RATE,
    targets: Annotated[
        int,
        typer.Option(min=0, help="Configured predictions (methods x targets); the search may add one, also counted."),
    ] = 1,
    on_cut: Annotated[
        str,
        typer.Option(
            help="advise, stop or jump, as relex.on_cut. With jump no checkpoint is written, and t_cut is a window."
        ),
    ] = "advise",
    max_candidates: Annotated[int, typer.Option(min=1, help="As relex.max_candidates.")] = 6,
    validation_samples: Annotated[
        int | None, typer.Option(min=1, help="Samples of one validation (prompts x val_kwargs.n): what do scores cost?")
    ] = None,
    samples_a_step: Annotated[
        int | None, typer.Option(min=1, help="Samples of a training step (train_batch_size x rollout.n).")
    ] = None,
    optimizer_offload: Annotated[
        bool, typer.Option("--optimizer-offload", help="The training keeps the optimizer's state on the host.")
    ] = False,
    memory_gib: Annotated[
        float | None,
        typer.Option(min=0, help="Host memory of a node that is free before the first step, GiB: would the run fit?"),
    ] = None,
    disk_gib: Annotated[
        float | None, typer.Option(min=0, help="Disk that is free at relex.output_dir, GiB: would the run fit?")
    ] = None,
    bandwidth_memory: Annotated[float, typer.Option(min=0.001, help="Host memory of a node, GB/s.")] = 200.0,
    bandwidth_disk: Annotated[float, typer.Option(min=0.001, help="Disk of a node, GB/s.")] = 1.0,
    overlap: Annotated[bool, typer.Option(help="As relex.overlap: a copy of the weights in host memory.")] = True,
    as_json: AsJson = False,
) -> None:
    """Memory, disk and time of following a run, from its size alone; with --memory-gib, whether it would be admitted.

    A run decides by the same rule, with the memory and disk that it finds. Times are bytes divided by the bandwidths that
    you give: a lower bound for host memory and disk. On GPUs the increments are computed on the device.
    """
    with clear_errors():
        if not params >= 1:
            raise ValueError(f"--params {params:g}: give the number of parameters, e.g. 8e9")
        config = RelexConfig.from_mapping(
            {
                "t_cut": t_cut,
                "trajectory": trajectory,
                "quantization": quantization,
                "sketch_size": sketch_size,
                "observe_every": int(observe_every) if observe_every.isdigit() else observe_every,
                "on_cut": on_cut,
                "overlap": overlap,
                "max_candidates": max_candidates,
                "record": record,
                "keep_best": keep_best,
            }
        )
        if config.record == "run" and steps is None:
            raise ValueError("--record run: give --steps, all steps of the run, too")
        workload = _workload(config, tensors, targets, steps)
        per_node = min(ranks, ranks_per_node)
        facts = _ranks(round(params), ranks, per_node, memory_gib, optimizer_offload)
    shown = replace(workload, change_rate=change_rate)
    bandwidths = bandwidth_memory * GB / per_node, bandwidth_disk * GB * ceil(ranks / per_node)
    facts_shown = {
        **_costs(shown, facts),
        **_typical(shown, facts),
        **_times(shown, facts, *bandwidths),
        **_scoring(config, validation_samples, samples_a_step),
        # By the run's own assumptions: a smaller --change-rate is no promise that it keeps.
        **_decision(workload, facts, disk_gib),
    }
    if as_json:
        print_json(facts_shown)
        return
    facts_shown["admitted"] = _answer(facts_shown.pop("admitted"), facts_shown.pop("refusal"), memory_gib, disk_gib)
    for key, value in facts_shown.items():
        print_fact(_title(key), _shown(key, value))


def _workload(config: RelexConfig, tensors: int, targets: int, steps: int | None) -> Workload:
    """What a run with this configuration keeps, by the assumptions that it is admitted with."""
    jump = config.on_cut == "jump"
    recorded = None if steps is None else recording(config, steps, config.kind)
    resolved = None if config.t_cut is None else config.plan(steps or int(config.t_cut) + 1)
    written = predictions_to_write(None if jump or resolved is None else targets, config.keep_best)
    rows, later = 0 if resolved is None else resolved.rows, 0 if recorded is None else recorded.rows_after(0)
    plan = resolved or recorded
    assert plan is not None  # without a cut it is recorded
    every, after = plan.observe_every, max(0, later - rows)
    return Workload(config.kind, tensors, rows, every, written, jump=jump, recorded=after, overlap=config.overlap)


def _ranks(params: int, ranks: int, per_node: int, memory_gib: float | None, on_host: bool) -> list[RankFacts]:
    """The parameters, shared out evenly."""
    available = None if memory_gib is None else int(memory_gib * GIB)
    each, left = divmod(params, ranks)
    return [RankFacts(str(i // per_node), each + (i < left), available, on_host) for i in range(ranks)]


def _costs(workload: Workload, ranks: Sequence[RankFacts]) -> dict[str, Any]:
    need = estimate(workload, ranks)
    memory = workload.memory(need.largest)
    return {
        "observed_steps": workload.rows,
        **({"steps_on_disk_alone": workload.recorded} if workload.recorded else {}),
        "observe_every": workload.observe_every,
        "memory_a_rank": memory,
        "memory_for_overlap_a_rank": workload.staging(need.largest),
        "memory_a_node": max(node.memory for node in need.nodes),
        "bytes_a_parameter": round(memory / need.largest, 2),
        "disk_trajectory": need.trajectory,
        "disk_predictions": need.predictions,
    }


def _typical(workload: Workload, ranks: Sequence[RankFacts]) -> dict[str, Any]:
    """What is usual, where the costs depend on how many weights change; nothing is decided by it."""
    if not workload.depends_on_change_rate:
        return {}
    usual = [_costs(replace(workload, change_rate=rate), ranks) for rate in TYPICAL_CHANGE_RATES]
    keys = ("memory_a_node", "bytes_a_parameter", "disk_trajectory")
    spans = {f"{key}{TYPICAL}": [costs[key] for costs in usual] for key in keys}
    return {"change_rate": workload.change_rate, f"change_rate{TYPICAL}": list(TYPICAL_CHANGE_RATES), **spans}


def _times(workload: Workload, ranks: Sequence[RankFacts], memory_rate: float, disk_rate: float) -> dict[str, Any]:
    """Bytes that move, and seconds.

    Args:
        workload: what is kept.
        ranks: all ranks.
        memory_rate: bytes a second of host memory that a rank has.
        disk_rate: of disk that all ranks have together.
    """
    moved = traffic(workload, max(rank.elements for rank in ranks))
    written, predicted = moved.append * len(ranks), 2 * sum(rank.elements for rank in ranks)
    return {
        "bytes_read_a_step_a_rank": moved.observe,
        "bytes_written_a_step": written,
        "bytes_moved_a_prediction_a_rank": moved.predict,
        "seconds_an_observed_step": moved.observe / memory_rate + written / disk_rate,
        "seconds_a_prediction": moved.predict / memory_rate + predicted / disk_rate,
    }


def _scoring(config: RelexConfig, samples: int | None, samples_a_step: int | None) -> dict[str, Any]:
    """What the scores of a cut take at most: the observed weights and every candidate on the whole validation set."""
    if samples is None:
        return {}
    most = samples * (1 + config.max_candidates)
    steps = {} if samples_a_step is None else {"samples_scored_a_cut_in_steps": most / samples_a_step}
    return {"samples_scored_a_cut": most, **steps}


def _decision(workload: Workload, ranks: Sequence[RankFacts], disk_gib: float | None) -> dict[str, Any]:
    decided = estimate(workload, ranks, None if disk_gib is None else int(disk_gib * GIB))
    return {"admitted": decided.admitted, "refusal": decided.refusal}


def _answer(admitted: bool | None, refusal: str | None, memory_gib: float | None, disk_gib: float | None) -> str:
    if not admitted:
        return "not checked, give --memory-gib and --disk-gib" if admitted is None else f"no, {refusal}"
    unchecked = [name for name, given in (("--memory-gib", memory_gib), ("--disk-gib", disk_gib)) if given is None]
    return f"yes, as far as is known without {unchecked[0]}" if unchecked else "yes"


def _title(key: str) -> str:
    return key.replace(TYPICAL, ", typical").replace("_", " ")


def _shown(key: str, value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(_shown(key, end) for end in value)
    if isinstance(value, str):
        return value
    if key.startswith("seconds"):
        return f"{value:.2f} s"
    return gib(value) if key.startswith(BYTES) else f"{value:g}"
