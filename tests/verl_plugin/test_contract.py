"""What the plugin expects of verl, Ray, TransferQueue and Hydra, name by name, asked of the installed ones without a run.

A new override, import or call fails here until it has a line; a line that nothing uses any more fails, too. When verl's
version changes, read what fails, follow it in the plugin, and write the new signature down.
"""

import ast
import importlib
import inspect
from importlib.metadata import entry_points, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import contract
import pytest
import verl
from contract import ATTRIBUTE, Use, disagreements, misfit, overrides, resolve, signature_of, uses
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from verl.trainer.ppo.v1 import get_trainer_cls

import relex_verl.verl_plugin
from relex_verl.verl_plugin.registration import MADE_FOR
from relex_verl.verl_plugin.settings import MODES

PLUGIN = Path(relex_verl.verl_plugin.__file__).parent
SOURCES = {path.name: path.read_text() for path in sorted(PLUGIN.glob("*.py"))}
HOSTS = {"verl", "ray", "transfer_queue", "hydra"}
TRAINERS = "verl.trainer.ppo.v1"
BUFFER = f"{TRAINERS}.replay_buffer:ReplayBuffer"
MANAGER = "verl.checkpoint_engine:CheckpointEngineManager"
ENGINE = "verl.workers.engine.fsdp:FSDPEngine"
TRACKING = "verl.utils.tracking:Tracking"
SPEC = "verl.workers.engine.spec"
STORE = "hydra.core.config_store:ConfigStore"

# What an object is that the plugin's source has by a name of its own; imported names speak for themselves.
OBJECTS = {
    "trainer.py": {
        "self.checkpoint_manager": MANAGER,
        "self.standalone_checkpoint_manager": MANAGER,
        "self.logger": TRACKING,
    },
    "worker.py": {"self.actor": "verl.workers.engine_workers:TrainingWorker", "engine": ENGINE},
    "source.py": {
        "engine": ENGINE,
        "self.engine": ENGINE,
        "self._engine": ENGINE,
        "type(engine)": ENGINE,
        "spec": f"{SPEC}:ShardSpec",
        "place": f"{SPEC}:BlockPlacement",
    },
    "adapters.py": {"engine": ENGINE, "type(engine)": ENGINE, "self._engine": ENGINE, "spec": f"{SPEC}:ShardSpec"},
    "fsdp.py": {"place": f"{SPEC}:BlockPlacement", "spec": f"{SPEC}:ShardSpec"},
    "hub_layout.py": {"engine": ENGINE, "place": f"{SPEC}:BlockPlacement"},
    "leftovers.py": {"buffer": BUFFER},
    "probe.py": {"buffer": BUFFER},
    "sending.py": {"self._engine": ENGINE, "type(engine)": ENGINE},
    "samples.py": {"engine": ENGINE, "self._engine": ENGINE},
    "ties.py": {"engine": ENGINE},
    "registration.py": {
        "config_store": "hydra.core.config_store",
        "config_store.ConfigStore": STORE,
        "store": STORE,
    },
}
PYTHON = {"__name__", "__class__", "__dict__"}  # of every object

# Names that every mode's trainer has: overridden, called or read.
TRAINER = {
    "__init__": "(self, config)",
    "_compute_metrics": "(self, batch, metrics, timing_raw, global_steps, epoch)",
    "_dump_generations": "(self, inputs, outputs, gts, scores, reward_extra_infos_dict, dump_path)",
    "_init_dataloader": "(self)",
    "_init_resource_pool_mgr": "(self)",
    "_load_checkpoint": "(self)",
    "_maybe_log_val_generations": "(self, inputs, outputs, scores)",
    "_save_checkpoint": "(self)",
    "_val_metrics_update": (
        "(self, data_sources, sample_uids, reward_extra_infos_dict, sample_turns, expected_acc_counts=None)"
    ),
    "_validate": "(self)",
    "fit": "(self, agent_loop_manager)",
    "on_step_end": "(self)",
    "on_train_begin": "(self)",
    "on_validate_begin": "(self)",
    "on_validate_end": "(self)",
    "step": "(self, metrics, timing_raw)",
    "_pending_sync_metrics": ATTRIBUTE,
    "actor_rollout_wg": ATTRIBUTE,
    "checkpoint_manager": ATTRIBUTE,
    "config": ATTRIBUTE,
    "global_steps": ATTRIBUTE,
    "logger": ATTRIBUTE,
    "replay_buffer": ATTRIBUTE,
    "steps_per_epoch": ATTRIBUTE,
    "role_worker_mapping": ATTRIBUTE,
    "timing_raw": ATTRIBUTE,
    "total_training_steps": ATTRIBUTE,
    "val_dataloader": ATTRIBUTE,
    "val_dataset": ATTRIBUTE,
}
SEPARATE = {
    "switch_to_rollout": "(self, *, already_registered=False)",
    "switch_to_trainer": "(self)",
    "current_mode": ATTRIBUTE,
    "standalone_checkpoint_manager": ATTRIBUTE,
}
WORKER = {"actor": ATTRIBUTE}
CONTRACT: dict[str, dict[str, str]] = {
    # The trainers and what they are made of.
    f"{TRAINERS}:PPOTrainerSync": TRAINER,
    f"{TRAINERS}:PPOTrainerColocateAsync": TRAINER,
    f"{TRAINERS}:PPOTrainerSeparateAsync": TRAINER | SEPARATE,
    TRAINERS: {
        "PPOTrainerColocateAsync": ATTRIBUTE,
        "PPOTrainerSeparateAsync": ATTRIBUTE,
        "PPOTrainerSync": ATTRIBUTE,
        "register_trainer": "(name)",
    },
    f"{TRAINERS}.trainer_separate_async": {"HybridEngineMode": ATTRIBUTE},
    f"{TRAINERS}.trainer_separate_async:HybridEngineMode": {"ROLLOUT": ATTRIBUTE},
    BUFFER: {
        "_sync_metadata_from_transfer_queue": "(self)",
        "_wait_for_next_poll": "(self, partition_id, last_debug_time)",
        "failure_keys": ATTRIBUTE,
        "finished_keys": ATTRIBUTE,
        "pending_keys": ATTRIBUTE,
        "running_keys": ATTRIBUTE,
    },
    "verl.trainer.ppo.utils": {"Role": ATTRIBUTE},
    "verl.trainer.ppo.utils:Role": {"Actor": ATTRIBUTE, "ActorRollout": ATTRIBUTE, "ActorRolloutRef": ATTRIBUTE},
    MANAGER: {
        "abort_replicas": "(self, reject_request=False)",
        "resume_generation_replicas": "(self)",
        "sleep_replicas": "(self)",
        "update_weights": "(self, global_steps=None)",
    },
    TRACKING: {"log": "(self, data, step, backend=None)", "logger": ATTRIBUTE},
    "verl.utils.debug": {"marked_timer": "(name, timing_raw, color=None, domain=None, category=None)"},
    "transfer_queue": {"kv_clear": "(keys, partition_id)", "kv_list": "(partition_id=None)"},
    "ray": {"remote": "(*args, **kwargs)"},
    # The workers and their engines.
    "verl.workers.engine_workers": {"ActorRolloutRefWorker": ATTRIBUTE},
    "verl.workers.engine_workers:ActorRolloutRefWorker": WORKER,
    "verl.workers.engine_workers:TrainingWorker": {"engine": ATTRIBUTE},
    "verl.experimental.separation.engine_workers": {"DetachActorWorker": ATTRIBUTE},
    "verl.experimental.separation.engine_workers:DetachActorWorker": WORKER,
    "verl.single_controller.base.decorator": {
        "Dispatch": ATTRIBUTE,
        "register": (
            "(dispatch_mode=<Dispatch.ALL_TO_ALL: 2>, execute_mode=<Execute.ALL: 0>, blocking=True, "
            "materialize_futures=True)"
        ),
    },
    "verl.single_controller.base.decorator:Dispatch": {"ONE_TO_ALL": ATTRIBUTE},
    "verl.workers.engine.fsdp": {"FSDPEngine": ATTRIBUTE},
    ENGINE: {
        "_hf_delta_entry": "(self, name, spec, place, lidx, lval)",
        "get_per_tensor_param": "(self, layered_summon=False, base_sync_done=False, **kwargs)",
        "get_per_tensor_param_shard": "(self, **kwargs)",
        "eval_mode": "(self, **kwargs)",
        "infer_batch": "(self, data, loss_function=None)",
        "is_optimizer_offload_enabled": ATTRIBUTE,
        "model_config": ATTRIBUTE,
        "module": ATTRIBUTE,
        "train_batch": "(self, data, loss_function)",
    },
    "verl.workers.utils.padding": {"response_from_nested": "(tensor, response_mask)"},
    SPEC: {"BlockPlacement": ATTRIBUTE, "ShardSpec": ATTRIBUTE, "derive_dtensor_placement": "(spec)"},
    f"{SPEC}:ShardSpec": {
        "from_param": "(param)",
        "full_shape": ATTRIBUTE,
        "hf_slots": ATTRIBUTE,
        "place": ATTRIBUTE,
        "to_hf_chunk": ATTRIBUTE,
    },
    f"{SPEC}:BlockPlacement": {"global_offset": ATTRIBUTE, "local_shape": ATTRIBUTE},
    "verl.utils.device": {"get_device_id": "()", "get_torch_device": "()"},
    "verl.utils.fsdp_utils": {
        "fsdp_version": "(model)",
    },
    "verl.utils.model": {"convert_weight_keys": "(state_dict, model)", "get_hf_auto_model_class": "(hf_config)"},
    "verl.workers.engine.fsdp.utils": {"unfuse_moe_params": "(weights, model_type=None)"},
    # The options of `+relex=...` and their early check.
    "hydra.core.config_store": {"ConfigStore": ATTRIBUTE},
    STORE: {
        "instance": "(*args, **kwargs)",
        "store": "(self, name, node, group=None, package=None, provider=None)",
    },
    "hydra.experimental.callback": {"Callback": ATTRIBUTE},
    "hydra.experimental.callback:Callback": {
        "on_job_start": "(self, config, *, task_function, **kwargs)",
        "on_multirun_start": "(self, config, **kwargs)",
        "on_run_start": "(self, config, **kwargs)",
    },
}
# Uses outside the plugin's folder, which know nothing of verl: W&B's run is verl's logger["wandb"].
ELSEWHERE = [(TRACKING, Use("loggers", "logger", None, (), 0), True)]
# verl's configuration keys that the plugin asks for by a string, of the engines and of all.
ENGINE_KEYS = {
    "fsdp_config.qat.enable",
    "megatron.qat.enable",
    "megatron.use_mbridge",
    "megatron.vanilla_mbridge",
    "megatron.use_megatron_fsdp",
    "torchtitan.pipeline_parallel_size",
    "veomni.qat_implementation",
}
KEYS = {f"actor_rollout_ref.actor.{key}" for key in ENGINE_KEYS} | {
    "actor_rollout_ref.model.hf_config_path",
    "actor_rollout_ref.model.lora.merge",
    "actor_rollout_ref.model.lora.type",
    "actor_rollout_ref.model.lora_rank",
    "actor_rollout_ref.model.lora.rank",
    "actor_rollout_ref.model.lora.adapter_path",
    "actor_rollout_ref.model.lora_adapter_path",
}
# What a file calls verl's configuration, and the node that it is.
ACTOR = "actor_rollout_ref.actor."
ROOTS = {
    "base_files.py": {"config": "", "model": "actor_rollout_ref.model.", "actor": ACTOR},
    "early_check.py": {"config": ""},
    "lora.py": {"config": ""},
    "refusals.py": {"config": "", "trainer": "trainer.", "actor": ACTOR},
    "run_length.py": {"config": "", "data": "data."},
    "settings.py": {"config": "", "trainer": "trainer."},
    "trainer.py": {"config": ""},
}


def sites() -> list[tuple[str, Use, bool]]:
    """Object or class of another package, how the plugin uses it, and whether on an object rather than a class."""
    found = []
    for file, source in SOURCES.items():
        imported = {name: ":".join(filter(None, origin)) for name, origin in contract.imports(source, HOSTS).items()}
        known = imported | OBJECTS.get(file, {})
        for use in uses(source):
            if use.owner in known and use.name not in PYTHON:
                found.append((known[use.owner], use, use.owner not in imported))
        for use in contract.calls_of(source, set(imported)):
            module, _, name = imported[use.name].partition(":")
            found.append((module, Use(module, name, use.positional, use.keywords, use.line), False))
        for path in imported.values():
            if ":" in path:
                module, _, name = path.partition(":")
                found.append((module, Use(module, name, None, (), 0), False))
    for cls, host in hosted():
        path = f"{TRAINERS if host.__module__.startswith(TRAINERS) else host.__module__}:{host.__name__}"
        for name in overrides(cls, "relex_verl"):
            found.append((path, Use("super()", name, None, (), 0), True))
        found += [(path, use, True) for use in on_self(cls)]
    return found + ELSEWHERE


def hosted() -> list[tuple[type, type]]:
    """The plugin's classes that extend one of another package, each with that one."""
    found = []
    for file in SOURCES:
        module = importlib.import_module(f"{relex_verl.verl_plugin.__name__}.{file.removesuffix('.py')}")
        for cls in vars(module).values():
            if inspect.isclass(cls) and cls.__module__ == module.__name__:
                found += [(cls, base) for base in cls.__mro__ if base.__module__.split(".")[0] in HOSTS][:1]
    return found


def on_self(cls: type) -> list[Use]:
    """What a class of the plugin uses of itself without having it: names that its host has to bring."""
    ours = [base for base in cls.__mro__ if base.__module__.startswith("relex_verl")]
    own = {name for base in ours for name in vars(base)} - set(overrides(cls, "relex_verl"))
    return [
        use
        for base in ours
        for use in uses(inspect.getsource(base))
        if use.owner in ("self", "super()") and use.name not in own and not use.name.startswith(("relex", "_relex"))
    ]


def configuration_keys() -> set[str]:
    """Keys of verl's configuration that the plugin reads, dotted from the top."""
    keys = set(KEYS)
    for file, roots in ROOTS.items():
        for use in uses(SOURCES[file]):
            for root, prefix in roots.items():
                if (use.owner == root or use.owner.startswith(f"{root}.")) and use.positional is None:
                    keys.add(prefix + f"{use.owner}.{use.name}"[len(root) + 1 :])
    return {key for key in keys if key.split(".")[0] not in ("relex", "hydra")}


SITES = sites()


@pytest.mark.parametrize("path", CONTRACT)
def test_the_installed_packages_keep_the_contract(path: str) -> None:
    assert disagreements(resolve(path), CONTRACT[path]) == []


def test_every_name_that_the_plugin_uses_has_a_line_and_no_line_is_stale() -> None:
    used = {(path, use.name) for path, use, _ in SITES}
    written = {(path, name) for path, lines in CONTRACT.items() for name in lines}
    assert [f"CONTRACT has no line for {name} of {path}" for path, name in sorted(used - written)] == []
    assert [f"the plugin uses no {name} of {path}" for path, name in sorted(written - used)] == []


def test_every_call_of_the_plugin_fits() -> None:
    wrong = []
    for path, use, bound in SITES:
        function = getattr(resolve(path), use.name, None)
        if inspect.isroutine(function) and (misfits := misfit(use, function, bound)):
            wrong.append(f"{path}: {misfits}")
    assert wrong == []


@pytest.mark.parametrize(("cls", "host"), hosted(), ids=lambda cls: cls.__name__)
def test_every_override_can_be_called_as_verl_calls_it(cls: type, host: type) -> None:
    """verl's calls within its own class, by position and by keyword."""
    ours, wrong = overrides(cls, "relex_verl"), []
    for base in host.__mro__[:-1]:
        for use in uses(inspect.getsource(base)):
            if use.owner == "self" and use.name in ours:
                wrong += filter(None, [misfit(use, getattr(cls, use.name), True)])
    assert wrong == []


@pytest.mark.parametrize(("cls", "host"), hosted(), ids=lambda cls: cls.__name__)
def test_what_the_plugin_adds_replaces_nothing_of_verl(cls: type, host: type) -> None:
    added = {name for base in cls.__mro__ if base.__module__.startswith("relex_verl") for name in vars(base)}
    mine = {name for name in added if name.startswith(("relex", "_relex"))}
    assert [name for name in sorted(mine) if contract.has(host, name)] == []


def test_every_object_of_verl_that_is_asked_further_is_known() -> None:
    """`self.X.Y` where X is verl's: OBJECTS says of what class X is, or Y would go unchecked."""
    theirs = {name for lines in (TRAINER, SEPARATE, WORKER) for name in lines} - {"config"}
    unknown = {
        f"{file}: {use.owner}"
        for file in ("trainer.py", "worker.py")
        for use in uses(SOURCES[file])
        if use.owner.removeprefix("self.") in theirs and use.owner not in OBJECTS[file]
    }
    assert unknown == set()


def test_verl_has_the_configuration_keys() -> None:
    """Each in the configuration of one engine at least."""
    with initialize_config_dir(str(Path(verl.__file__).parent / "trainer" / "config"), version_base=None):
        configs = [
            compose("ppo_trainer", [f"model_engine={name}"]) for name in ("dp", "megatron", "torchtitan", "veomni")
        ]
    keys = configuration_keys()
    assert {"trainer.v1.trainer_mode", "actor_rollout_ref.rollout.checkpoint_engine.backend"} <= keys

    def there(key: str, config: Any) -> bool:
        above, _, name = key.rpartition(".")
        return name in ((OmegaConf.select(config, above) if above else config) or ())

    assert [key for key in sorted(keys) if not any(there(key, config) for config in configs)] == []


def test_verl_has_the_modes() -> None:
    for mode in MODES.values():
        assert issubclass(get_trainer_cls(f"relex_{mode}"), get_trainer_cls(mode))


def test_every_engine_with_shards_is_asked_in_the_same_words() -> None:
    """Also of engines whose own libraries are not installed, hence from their source."""
    parameters: dict[str, dict[str, list[str]]] = {}
    for path in (Path(verl.__file__).parent / "workers" / "engine").glob("*/transformer_impl.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name in ("_hf_delta_entry", "get_per_tensor_param_shard"):
                parameters.setdefault(node.name, {})[path.parent.name] = [argument.arg for argument in node.args.args]
    assert {"fsdp", "megatron", "torchtitan", "veomni"} <= set(parameters["get_per_tensor_param_shard"])
    assert all(names == ["self"] for names in parameters["get_per_tensor_param_shard"].values())
    for engine, names in parameters["_hf_delta_entry"].items():
        assert names == ["self", "name", "spec", "place", "lidx", "lval"], engine


def test_verl_loads_the_entry_point_and_the_hooked_modules_are_there() -> None:
    assert [point.value for point in entry_points(group="verl.plugins", name="relex")] == ["relex_verl.verl_plugin"]
    constants = {
        node.value for node in ast.walk(ast.parse(Path(verl.__file__).read_text())) if isinstance(node, ast.Constant)
    }
    assert "verl.plugins" in constants
    hooked = [
        node.args[1].value
        for node in ast.walk(ast.parse(SOURCES["registration.py"]))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "wrapt.register_post_import_hook"
        if isinstance(node.args[1], ast.Constant)
    ]
    assert hooked == ["hydra.core.config_store", "verl.trainer.ppo.v1"]
    assert all(find_spec(name) for name in hooked)


def test_the_contract_is_of_the_version_that_the_plugin_says() -> None:
    assert version("verl") == MADE_FOR
    assert f'"verl=={MADE_FOR}"' in (Path(__file__).parents[2] / "pyproject.toml").read_text()


# That this file sees what it is for.


class Promised:
    def step(self, metrics: dict, timing_raw: dict) -> None:
        self.batch = timing_raw

    def fit(self, agent_loop_manager: Any = None) -> None: ...


class WithoutStep:
    def fit(self, agent_loop_manager: Any = None) -> None: ...


class Renamed(Promised):
    def step(self, metrics: dict, timings: dict) -> None: ...  # type: ignore[override]


class NewDefault(Promised):
    def fit(self, agent_loop_manager: Any = 0) -> None: ...


PROMISE = {"step": "(self, metrics, timing_raw)", "fit": "(self, agent_loop_manager=None)", "batch": ATTRIBUTE}


@pytest.mark.parametrize(
    ("owner", "says"),
    [
        (WithoutStep, ["WithoutStep has no step", "WithoutStep has no batch"]),
        (Renamed, ["Renamed.step(self, metrics, timing_raw) is (self, metrics, timings) now"]),
        (NewDefault, ["NewDefault.fit(self, agent_loop_manager=None) is (self, agent_loop_manager=0) now"]),
        (Promised, []),
    ],
)
def test_a_missing_name_or_another_signature_is_seen(owner: type, says: list[str]) -> None:
    assert disagreements(owner, PROMISE) == says


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("engine.shards_of(1, two=2)", "shards_of"),
        ("def f():\n    return getattr(engine, 'hidden', None)", "hidden"),
        ("engine.replaced = 1", "replaced"),
        ("if True:\n    hasattr(engine, 'maybe')", "maybe"),
    ],
)
def test_a_new_use_is_seen(source: str, name: str) -> None:
    assert [use.name for use in uses(source) if use.owner == "engine"] == [name]


def test_a_new_import_is_seen_wherever_it_stands() -> None:
    source = "import verl.utils as u, relex_verl.a\ndef f():\n    from verl.x import y as z"
    assert contract.imports(source, {"verl"}) == {"u": ("verl.utils", ""), "z": ("verl.x", "y")}


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ("trainer.step({}, {})", None),
        ("trainer.step(*both)", None),
        ("trainer.step({}, timing_raw={})", None),
        ("trainer.step({})", "missing a required argument: 'timing_raw'"),
        ("trainer.step({}, timings={})", "missing a required argument: 'timing_raw'"),
        ("trainer.step({}, {}, {})", "too many positional arguments"),
        ("trainer.fit(manager=1)", "unexpected keyword argument 'manager'"),
    ],
)
def test_a_call_that_does_not_fit_is_seen(call: str, says: str | None) -> None:
    use = next(use for use in uses(call) if use.owner == "trainer")
    misfits = misfit(use, getattr(Promised, use.name), True)
    assert misfits is None if says is None else says in str(misfits)


def test_a_new_override_is_seen() -> None:
    class Ours(Promised):
        def fit(self, agent_loop_manager: Any = None) -> None: ...

        def own(self) -> None: ...

    Ours.__module__ = "ours.trainer"
    assert overrides(Ours, "ours") == {"fit": Promised}
    assert signature_of(Ours.fit) == PROMISE["fit"]
