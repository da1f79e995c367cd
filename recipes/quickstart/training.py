"""The training run: verl's own entry point, its overrides, and its metrics as they come."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from data import DATA_SOURCE
from schedule import Schedule

RECIPE = Path(__file__).resolve().parent
PROMPTS_PER_STEP = 16
SAMPLES_PER_PROMPT = 8
LEARNING_RATE = 6e-7
SCORE_METRIC = f"val-core/{DATA_SOURCE}/acc/mean@1"
REWARD_METRIC = "critic/score/mean"


ROLLOUTS = ("cpu", "vllm")


def environment(out: Path, rollout: str = "cpu") -> dict[str, str]:
    """The environment of all subprocesses, which lets verl run on a CPU; what the user has set already stays."""
    env = dict(os.environ)
    paths, modules = [RECIPE], ["verl_cpu"]
    if rollout == "vllm":
        paths.append(RECIPE / "verl_cpu_vllm" / "metadata")
        modules.append("verl_cpu_vllm")
        env.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # the trainer computes on the same cores
        env.setdefault("VLLM_NO_USAGE_STATS", "1")
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [*map(str, paths), env.get("PYTHONPATH", "")]))
    env["VERL_USE_EXTERNAL_MODULES"] = ",".join(modules)
    env["VERL_PLATFORM"] = "cpu"
    env["VERL_FILE_LOGGER_PATH"] = str(metrics_file(out))
    env.pop("CUDA_VISIBLE_DEVICES", None)  # if empty, Ray would refuse the logical GPUs that the ranks take
    # TransferQueue warns at every single transfer if it gets fewer threads than it asks for.
    for name in ("TQ_NUM_THREADS", "TQ_CLIENT_ZMQ_IO_THREADS"):
        env.setdefault(name, "1")
    env.setdefault(
        "OMP_WAIT_POLICY", "PASSIVE"
    )  # on a busy machine, threads that spin while they wait cost a factor of five
    env.setdefault("WANDB_MODE", "offline")
    env.setdefault("WANDB_DIR", str(out))  # W&B makes its folder `wandb` there
    env.setdefault("WANDB_SILENT", "true")
    env.setdefault("HYDRA_FULL_ERROR", "1")
    env.setdefault("RAY_DEDUP_LOGS", "0")
    env.setdefault("TOKENIZERS_PARALLELISM", "false")
    return env


def metrics_file(out: Path) -> Path:
    """Where verl's file logger writes one JSON object a step."""
    return out / "metrics.jsonl"


def overrides(
    schedule: Schedule,
    model: Path,
    data: tuple[Path, Path],
    out: Path,
    ranks: int,
    strategy: str,
    rollout: str = "cpu",
) -> list[str]:
    """A GRPO run like any user's, the CPU's needs, and RELEX."""
    return [
        *_grpo(model, data, out, schedule, strategy),
        *_cpu(out, ranks),
        *(_vllm() if rollout == "vllm" else ()),
        "+relex=default",
        f"relex.output_dir={out / 'relex'}",
        f"relex.t_cut={schedule.cut}",
        "relex.max_overhead=null",  # steps of a second: which rows are taken is not to depend on what else the machine does
        "relex.on_cut=jump" if schedule.jump else f"relex.targets=[{','.join(map(str, schedule.targets))}]",
    ]


def _grpo(model: Path, data: tuple[Path, Path], out: Path, schedule: Schedule, strategy: str) -> list[str]:
    validate_every = max(1, schedule.steps // 20) if schedule.full else schedule.cut
    return [
        "algorithm.adv_estimator=grpo",
        f"data.train_files={data[0]}",
        f"data.val_files={data[1]}",
        f"data.train_batch_size={PROMPTS_PER_STEP}",
        "data.max_prompt_length=8",
        "data.max_response_length=4",
        "data.seed=1",
        f"actor_rollout_ref.model.path={model}",
        "actor_rollout_ref.actor.use_kl_loss=False",
        f"actor_rollout_ref.actor.strategy={strategy}",
        f"actor_rollout_ref.actor.optim.lr={LEARNING_RATE}",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={PROMPTS_PER_STEP}",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=64",
        "actor_rollout_ref.actor.checkpoint.save_contents=[model,optimizer,extra,hf_model]",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=64",
        f"actor_rollout_ref.rollout.n={SAMPLES_PER_PROMPT}",
        f"reward.custom_reward_function.path={RECIPE / 'reward.py'}",
        f"trainer.total_training_steps={schedule.trained}",
        "trainer.total_epochs=1000",
        f"trainer.test_freq={validate_every}",
        f"trainer.save_freq={schedule.trained if schedule.full else -1}",
        "trainer.resume_mode=disable",
        "trainer.logger=[console,file,wandb]",
        "trainer.project_name=relex-quickstart",
        f"trainer.experiment_name={out.name}",
        f"trainer.default_local_dir={out / 'checkpoints'}",
    ]


def _cpu(out: Path, ranks: int) -> list[str]:
    """What a run needs because there is no accelerator, and to be the same every time."""
    rollout = "actor_rollout_ref.rollout"
    return [
        "trainer.device=cpu",
        "trainer.nnodes=1",
        f"trainer.n_gpus_per_node={ranks}",
        "trainer.balance_batch=False",
        # Ray's books only: neither the CPUs nor the GPUs have to exist.
        "ray_kwargs.ray_init.num_cpus=32",
        f"+ray_kwargs.ray_init.num_gpus={ranks}",
        "+ray_kwargs.ray_init.include_dashboard=False",
        "actor_rollout_ref.model.use_remove_padding=False",
        "actor_rollout_ref.model.enable_gradient_checkpointing=False",
        "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
        "actor_rollout_ref.actor.fsdp_config.use_torch_compile=False",
        "actor_rollout_ref.ref.fsdp_config.use_torch_compile=False",
        f"{rollout}.name=cpu",
        f"{rollout}.tensor_model_parallel_size={ranks}",  # one server for all ranks
        f"{rollout}.agent.num_workers=1",
        f"{rollout}.agent.agent_loop_config_path={RECIPE / 'verl_cpu' / 'agent_loop.yaml'}",
        f"{rollout}.agent.default_agent_loop=seeded_single_turn_agent",
        "trainer.v1.sampler.custom_sampler.path=pkg://verl_cpu.sampler",
        "trainer.v1.sampler.custom_sampler.name=OrderedReplayBuffer",
        "reward.num_workers=1",
        "data.dataloader_num_workers=0",
        "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
        f"hydra.run.dir={out / 'hydra'}",
    ]


def _vllm() -> list[str]:
    """What verl's own vLLM rollout needs on a CPU, for a model of a few megabytes, in place of the small one."""
    rollout = "actor_rollout_ref.rollout"
    return [
        f"{rollout}.name=vllm",
        f"{rollout}.enforce_eager=True",
        f"+{rollout}.enable_sleep_mode=False",  # vLLM's allocator is CUDA's; verl_cpu_vllm puts it to sleep
        f"{rollout}.max_num_seqs=128",
        f"{rollout}.calculate_log_probs=True",  # verl compares them with the trainer's: rollout_probs_diff_mean
        f"{rollout}.checkpoint_engine.update_weights_bucket_megabytes=16",
        f"+{rollout}.engine_kwargs.vllm.kv_cache_memory_bytes={2**26}",
    ]


def read_metrics(out: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """(step, metrics) of every step logged so far; step 0 is the validation before training."""
    path = metrics_file(out)
    if not path.exists():
        return
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:  # the last line, half written
            return
        yield entry["step"], entry["data"]


def scores(out: Path) -> dict[int, float]:
    """The run's own validation accuracy by step."""
    return {step: metrics[SCORE_METRIC] for step, metrics in read_metrics(out) if SCORE_METRIC in metrics}
