"""What RELEX cannot follow, as far as verl's configuration tells: one function a reason.

Each takes the composed configuration, with `relex` in it, and raises `ConfigError` with key, value and cure, or returns.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from omegaconf import DictConfig, OmegaConf

from relex_verl.run.config import ConfigError
from relex_verl.verl_plugin.lora import check_lora

__all__ = ["CHECKS", "MODES"]

logger = logging.getLogger("relex_verl")

# Hydra option -> verl's trainer mode. The RELEX trainer of a mode is registered as "relex_<mode>".
MODES = {"default": "sync", "colocate_async": "colocate_async", "separate_async": "separate_async"}
# Engines that hand out their weights shard by shard, and where their settings lie below the actor's.
ENGINES = {
    "fsdp": "fsdp_config",
    "fsdp2": "fsdp_config",
    "fsdp_turbo": "fsdp_config",
    "megatron": "megatron",
    "torchtitan": "torchtitan",
    "veomni": "veomni",
}
ACTOR = "actor_rollout_ref.actor"
MODEL = "actor_rollout_ref.model"
# Where nothing that one node writes is seen by another, and where most likely nothing is.
NODE_LOCAL_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")
NODE_LOCAL_SYSTEMS = {"tmpfs", "ramfs", "devtmpfs"}
LOCAL_DISKS = {"overlay", "aufs", "ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs"}


def check_trainer(config: DictConfig) -> None:
    """verl's v1 trainer, in the mode that the option chose."""
    if not config.trainer.use_v1:
        cure = "RELEX extends verl's v1 trainer: set trainer.use_v1=true"
        raise ConfigError("trainer.use_v1", config.trainer.use_v1, cure)
    mode = str(config.trainer.v1.trainer_mode)
    if mode in (f"relex_{one}" for one in MODES.values()):
        return
    option = next((option for option, one in MODES.items() if one == mode), None)
    if option is None:
        options = ", ".join(f"+relex={option} ({one})" for option, one in MODES.items())
        cure = (
            f"RELEX extends verl's own trainers and would not run in this one: leave it out, and give one of {options}"
        )
    else:
        cure = f"that trainer runs without RELEX: leave the key out, and choose the mode by +relex={option}"
    raise ConfigError("trainer.v1.trainer_mode", mode, cure)


def check_engine(config: DictConfig) -> None:
    """An engine that hands out its weights shard by shard."""
    strategy = config.actor_rollout_ref.actor.strategy
    if strategy not in ENGINES:
        cure = f"this engine does not hand out its weights shard by shard: train with one of {', '.join(ENGINES)}"
        raise ConfigError(f"{ACTOR}.strategy", strategy, cure)


def check_megatron(config: DictConfig) -> None:
    """Megatron-Bridge, by which verl names a shard's elements; nothing else says where they belong."""
    if config.actor_rollout_ref.actor.strategy != "megatron":
        return
    bridge = "RELEX finds Megatron's weights through Megatron-Bridge"
    if not _engine(config, "use_mbridge", True):
        _refuse_engine(config, "use_mbridge", f"{bridge}: set it to true")
    if _engine(config, "vanilla_mbridge", False):
        _refuse_engine(config, "vanilla_mbridge", f"{bridge}, not through the older mbridge: set it to false")
    if _engine(config, "use_megatron_fsdp", False):
        cure = (
            "verl's sharded exporter knows tensor, expert and pipeline parallelism, not Megatron-FSDP: set it to false"
        )
        _refuse_engine(config, "use_megatron_fsdp", cure)


def check_torchtitan(config: DictConfig) -> None:
    """No pipeline: verl's exporter of TorchTitan has none."""
    if config.actor_rollout_ref.actor.strategy == "torchtitan" and _engine(config, "pipeline_parallel_size", 1) > 1:
        cure = "verl's sharded exporter of TorchTitan has no pipeline parallelism: set it to 1, use tensor parallelism"
        _refuse_engine(config, "pipeline_parallel_size", cure)


def check_quantized_training(config: DictConfig) -> None:
    """Weights that are trained as they are stored: with quantization-aware training the rollout sees others."""
    cure = "with quantization-aware training the rollout sees other weights than those that are trained: switch it off"
    if _engine(config, "qat.enable", False):
        _refuse_engine(config, "qat.enable", f"{cure}, or train without +relex")
    if _engine(config, "qat_implementation", None) not in (None, "none"):
        _refuse_engine(config, "qat_implementation", f"{cure} (none), or train without +relex")


def check_jump(config: DictConfig) -> None:
    """A jump sets the float32 weights of an FSDP engine, each rank its own, while nothing is generated."""
    if config.relex.on_cut != "jump":
        return
    cure, actor = "use another relex.on_cut", config.actor_rollout_ref.actor
    if config.trainer.v1.trainer_mode == "relex_separate_async":
        cure = f"it is made for sync and colocate_async: +relex=default or +relex=colocate_async, or {cure}"
        raise ConfigError("relex.on_cut", "jump", cure)
    if actor.strategy not in ("fsdp", "fsdp2"):
        raise ConfigError(
            f"{ACTOR}.strategy", actor.strategy, f"a jump sets the weights of fsdp and fsdp2 only: {cure}"
        )
    ranks = config.trainer.n_gpus_per_node * config.trainer.nnodes
    if actor.strategy == "fsdp" and actor.fsdp_config.fsdp_size == 1 < ranks:
        alone = f"torch's FSDP1 trains each of the {ranks} copies by itself then: give 2 or more, -1 or strategy=fsdp2"
        raise ConfigError(f"{ACTOR}.fsdp_config.fsdp_size", 1, f"{alone}, or {cure}")


def check_weight_transfer(config: DictConfig) -> None:
    """A way to send other weights than the engine's to the rollout; only `separate_async` has others than verl's first."""
    backend = config.actor_rollout_ref.rollout.checkpoint_engine.backend
    separate = config.trainer.v1.trainer_mode == "relex_separate_async"
    if backend == "delta_sharded" and separate and config.relex.validate_targets:
        key = "actor_rollout_ref.rollout.checkpoint_engine.backend"
        cure = (
            "it sends what a step changed, and no prediction: use nccl or another, or set relex.validate_targets=false"
        )
        raise ConfigError(key, backend, cure)


def check_base_model(config: DictConfig) -> None:
    """A base model in a folder or on the Hub: RELEX reads its files on every rank, and again when the run is over."""
    path = str(config.actor_rollout_ref.model.path)
    if "://" in path:
        cure = (
            "RELEX reads the base model's files where they lie: copy it to a folder that all nodes see, and give that"
        )
        raise ConfigError(f"{MODEL}.path", path, cure)


def check_output_folder(config: DictConfig) -> None:
    """A folder that all nodes see. Where that is only likely not so, it is said."""
    trainer, output = config.trainer, str(config.relex.output_dir)
    if not trainer.default_local_dir and output == f"{trainer.default_local_dir}/relex":
        cure = "relex.output_dir lies in it: give a folder, or set relex.output_dir"
        raise ConfigError("trainer.default_local_dir", trainer.default_local_dir, cure)
    if "://" in output:
        cure = "RELEX writes to folders only: set relex.output_dir to one that all nodes see"
        raise ConfigError("relex.output_dir", output, cure)
    if trainer.nnodes == 1:
        return
    folder = Path(output).expanduser()
    system = _file_system(folder)
    # A relative folder is not taken at its word: the trainer may start in another one than this process.
    if folder.is_absolute() and (system in NODE_LOCAL_SYSTEMS or (system in LOCAL_DISKS and _in_scratch(folder))):
        cure = (
            f"each of the {trainer.nnodes} nodes has its own there: give a folder on a file system that all nodes share"
        )
        raise ConfigError("relex.output_dir", output, cure)
    if system in NODE_LOCAL_SYSTEMS | LOCAL_DISKS:
        logger.warning(
            "RELEX: relex.output_dir=%s is on a disk of this machine (%s), and the run has %s nodes: all of them must see "
            "the folder, or the run is refused when it has started", output, system, trainer.nnodes,
        )  # fmt: skip


def _in_scratch(folder: Path) -> bool:
    return any(folder.is_relative_to(one) for one in NODE_LOCAL_FOLDERS)


def _engine(config: DictConfig, key: str, default: Any) -> Any:
    """A setting of the actor's engine; another engine's settings have no such key."""
    actor = config.actor_rollout_ref.actor
    return OmegaConf.select(actor, f"{ENGINES[actor.strategy]}.{key}", default=default)


def _refuse_engine(config: DictConfig, key: str, cure: str) -> None:
    strategy = config.actor_rollout_ref.actor.strategy
    raise ConfigError(f"{ACTOR}.{ENGINES[strategy]}.{key}", _engine(config, key, None), cure)


def _file_system(folder: Path) -> str:
    """Type of the file system that a folder, which need not exist, is on; "" where nobody knows."""
    try:
        place = folder.resolve()
        mounts = {Path(one.mountpoint): one.fstype for one in psutil.disk_partitions(all=True)}
    except (OSError, RuntimeError):
        return ""
    above = [one for one in mounts if place.is_relative_to(one)]
    return mounts[max(above, key=lambda one: len(one.parts))] if above else ""


CHECKS: list[Callable[[DictConfig], None]] = [
    check_trainer,
    check_engine,
    check_megatron,
    check_torchtitan,
    check_quantized_training,
    check_lora,
    check_jump,
    check_weight_transfer,
    check_base_model,
    check_output_folder,
]
