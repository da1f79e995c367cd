"""`relex-verl plan`: what following a run will cost, before a GPU is rented."""

from math import ceil
from typing import Annotated, Any

import typer

from relex_verl.cli.arguments import AsJson
from relex_verl.cli.screen import clear_errors, console, print_json
from relex_verl.run.budget import budget, change_between_rows, traffic
from relex_verl.run.config import RelexConfig

__all__ = ["plan"]

GB = 10**9


def plan(
    params: Annotated[float, typer.Option(help="Parameters of the model, e.g. 8e9.")],
    t_cut: Annotated[int, typer.Option(min=1, help="The step at which to fit.")],
    ranks: Annotated[int, typer.Option(min=1, help="Training ranks (GPUs), all nodes together.")] = 8,
    ranks_per_node: Annotated[int, typer.Option(min=1, help="Of these, how many on one node.")] = 8,
    trajectory: Annotated[str, typer.Option(help="fp32, bf16 or sketch, as relex.trajectory.")] = "fp32",
    quantization: Annotated[str, typer.Option(help="int8, int4 or none, as relex.quantization.")] = "int8",
    sketch_size: Annotated[int, typer.Option(help="As relex.sketch_size.")] = 4,
    observe_every: Annotated[str, typer.Option(help="auto or a number of steps, as relex.observe_every.")] = "auto",
    change_rate: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the bf16 weights that change a step; RL: 0.005 to 0.03.")
    ] = 0.01,
    targets: Annotated[int, typer.Option(min=0, help="Predicted checkpoints to write.")] = 1,
    bandwidth_memory: Annotated[float, typer.Option(min=0.001, help="Host memory of a node, GB/s.")] = 200.0,
    bandwidth_disk: Annotated[float, typer.Option(min=0.001, help="Disk of a node, GB/s.")] = 1.0,
    as_json: AsJson = False,
) -> None:
    """Memory, disk and time of following a run, from its size alone.

    Times are bytes divided by the bandwidths that you give: a lower bound for host memory and disk. On GPUs the increments
    are computed on the device.
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
            }
        )
        per_node = min(ranks, ranks_per_node)
        facts = _estimate(round(params), ranks, per_node, config, change_rate, targets)
    nodes = ceil(ranks / per_node)
    memory_bandwidth, disk_bandwidth = bandwidth_memory * GB / per_node, bandwidth_disk * GB * nodes
    seconds = {
        "seconds_an_observed_step": facts["bytes_read_a_step_a_rank"] / memory_bandwidth
        + facts["bytes_written_a_step"] / disk_bandwidth,
        "seconds_a_prediction": facts["bytes_moved_a_prediction_a_rank"] / memory_bandwidth
        + 2 * params / disk_bandwidth,
    }
    if as_json:
        print_json({**facts, **seconds})
        return
    for key, value in {**facts, **seconds}.items():
        console.print(f"[bold]{key.replace('_', ' ')}[/]: {_shown(key, value)}", highlight=False)


def _estimate(
    params: int, ranks: int, per_node: int, config: RelexConfig, change_rate: float, targets: int
) -> dict[str, Any]:
    resolved = config.plan(int(config.t_cut) + 1)
    mine = ceil(params / ranks)
    rate = change_between_rows(change_rate, resolved.observe_every)
    need = budget(config.kind, mine, params, resolved.rows, targets, rate)
    moved = traffic(config.kind, mine, resolved.rows, rate)
    return {
        "observed_steps": resolved.rows,
        "observe_every": resolved.observe_every,
        "memory_a_rank": need.memory,
        "memory_a_node": need.memory * per_node,
        "bytes_a_parameter": round(need.memory / mine, 2),
        "disk_trajectory": need.trajectory,
        "disk_predictions": need.predictions,
        "bytes_read_a_step_a_rank": moved.observe,
        "bytes_written_a_step": moved.append * ranks,
        "bytes_moved_a_prediction_a_rank": moved.predict,
    }


def _shown(key: str, value: float) -> str:
    if key.startswith("seconds"):
        return f"{value:.2f} s"
    if key.startswith(("memory", "disk", "bytes_read", "bytes_written", "bytes_moved")):
        return f"{value / GB:.2f} GB"
    return f"{value:g}"
