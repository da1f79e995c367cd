"""What would be silently wrong is refused by name, or right: moved integers, jumps, adapters, other bases and steps."""

import json
import shutil

import oracle
import pytest
import torch
from finished import NORM, STEPS, change, predicted, read, run, write_run
from safetensors.torch import load_file, save_file

from relex_verl.offline.ingest import IngestError, Options, find_checkpoints, ingest
from relex_verl.offline.verify import verify
from relex_verl.pipeline.prediction import write_checkpoint
from relex_verl.reporting.provenance import Checkout
from relex_verl.trajectory import replay
from relex_verl.trajectory.index import TrajectoryError
from relex_verl.trajectory.store import Trajectory

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def finished(tmp_path):
    write_run(tmp_path)
    return tmp_path


def in_base(root, tensors):
    """Tensors that the base and every checkpoint hold."""
    for folder in (root / "base", *(root / "run").iterdir()):
        path = folder / "model.safetensors"
        save_file({**load_file(path), **tensors}, path, {"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.float8_e4m3fn, torch.bool])
def test_what_cannot_be_followed_must_not_move(finished, dtype):
    in_base(finished, {"model.qweight": torch.ones(8).to(dtype)})
    trajectory = run(finished, "still")
    folder = write_checkpoint(trajectory, replay.states(trajectory, 9), finished / "checkout")
    assert torch.equal(read(folder)["model.qweight"].float(), torch.ones(8))
    change(finished, 5, lambda t: t.update({"model.qweight": torch.tensor([0.0] + [1.0] * 7).to(dtype)}))
    with pytest.raises(IngestError, match=r"step 5 .*model\.qweight differs from the base's.*1-2 are kept"):
        run(finished)
    change(finished, 2, lambda t: t.update({"model.qweight": torch.ones(7).to(dtype)}))
    with pytest.raises(IngestError, match=r"step 2 .*model\.qweight is .*\[7\], in the base .*\[8\]"):
        run(finished, "other")


@pytest.mark.parametrize("where", ["base", "checkpoints"])
def test_a_weight_that_is_quantised_on_one_side(finished, where):
    folders = [finished / "base"] if where == "base" else list((finished / "run").iterdir())
    for folder in folders:
        tensors = load_file(folder / "model.safetensors")
        save_file({**tensors, UP: tensors[UP].to(torch.float8_e4m3fn)}, folder / "model.safetensors")
    with pytest.raises(IngestError, match=f"{UP} is .*F8_E4M3.*not quantised"):
        run(finished)


def zeros_behind(tensors):
    names = sorted(tensors)
    for name in names[len(names) // 2 :]:
        tensors[name].zero_()


def half_of_one(tensors):
    tensors[UP].view(-1)[tensors[UP].numel() // 2 :] = 0


def of_another(tensors):
    for tensor in tensors.values():
        tensor.copy_(tensor[torch.randperm(len(tensor))])


def trained_on(tensors):
    for tensor in tensors.values():
        tensor.add_(torch.randn_like(tensor) * 0.01)


@pytest.mark.parametrize("spoil", [zeros_behind, half_of_one, of_another, trained_on])
@pytest.mark.parametrize("step", [1, 5])
def test_a_step_that_no_training_makes_is_refused(finished, spoil, step):
    torch.manual_seed(0)
    change(finished, step, spoil)
    says = UP if spoil is half_of_one and step == 5 else r"away from"
    with pytest.raises(IngestError, match=rf"step {step} .*{says}") as caught:
        run(finished)
    assert (finished / "trajectory").exists() == (step == 5)
    if step == 5:
        assert "--accept-jump" in str(caught.value)
        assert not list(finished.rglob("step_000005*"))
        assert Trajectory(finished / "trajectory").steps == [1, 2]
        assert run(finished, options=Options(accept_jump=True)).steps == [1, 2, 5, 9]


def test_a_run_in_which_nothing_moved_is_a_question(finished):
    for folder in (finished / "run").iterdir():
        shutil.copy(finished / "base/model.safetensors", folder)
    with pytest.raises(IngestError, match=r"all 4 checkpoints are the base.*LoRA.*\?"):
        run(finished)
    assert not (finished / "trajectory").exists()


def test_a_step_that_was_overwritten_since_is_not_kept(finished):
    run(finished)
    change(finished, 2, lambda t: t[UP].add_(1e-3))
    with pytest.raises(IngestError, match=r"step 2 .*was overwritten since it was recorded"):
        run(finished)


def test_steps_that_are_not_there_are_not_left_out(finished):
    for steps, says in (("1,3", "step 3 not found"), ("1-20", "steps up to 20 not found"), ("1,6-8", "6-8 not found")):
        with pytest.raises(IngestError, match=f"{says}; the steps found are 1, 2, 5, 9"):
            run(finished, steps=steps)


def test_the_base_is_known_again(finished):
    trajectory = run(finished)
    shutil.copytree(finished / "base", finished / "moved")
    change_base(finished / "base", lambda t: t[UP].view(-1)[:100].add_(1.0))
    for use in (lambda t: write_checkpoint(t, replay.states(t, 9), finished / "c"), lambda t: t.base()):
        with pytest.raises(
            TrajectoryError, match=r"is not the base model of .* any more: its weights are others.*--base"
        ):
            use(Trajectory(finished / "trajectory"))
    with pytest.raises(IngestError, match="has changed since"):
        run(finished)
    change_base(finished / "base", lambda t: t.update({NORM: torch.ones(3)}))
    with pytest.raises(TrajectoryError, match=rf"{NORM} was \[128\], and is \[3\]"):
        Trajectory(finished / "trajectory").base()
    shutil.rmtree(finished / "base")
    with pytest.raises(TrajectoryError, match=r"cannot be read.*--base"):
        Trajectory(finished / "trajectory").base()
    opened = Trajectory(finished / "trajectory", base=finished / "moved")
    folder = write_checkpoint(opened, replay.states(opened, 9), finished / "c")
    assert all(torch.equal(one, read(finished / "run/global_step_9")[name]) for name, one in read(folder).items())
    again = ingest(str(finished / "moved"), find_checkpoints(finished / "run"), "the run", finished / "trajectory")
    assert again.index.base_model == str(finished / "moved")
    assert trajectory.steps == again.steps


def change_base(folder, how):
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    how(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


# ---------------------------------------------------------------- LoRA


def adapters(root, step, base, config=True, name="adapter_model.safetensors", infix="", **more):
    folder = root / "run" / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    up, down = torch.randn(192, 4) * 1e-4 * step, torch.randn(4, 128, generator=torch.Generator().manual_seed(1))
    stem = f"base_model.model.{UP.removesuffix('.weight')}"
    tensors = {f"{stem}.lora_A{infix}.weight": down, f"{stem}.lora_B{infix}.weight": up, **more}
    save_file(tensors, folder / name) if name.endswith("safetensors") else torch.save(tensors, folder / name)
    if config:
        said = {"peft_type": "LORA", "r": 4, "lora_alpha": 8} | (config if isinstance(config, dict) else {})
        (folder / "adapter_config.json").write_text(json.dumps(said))
    return base[UP].float() + 2 * (up @ down)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
def test_adapters_are_followed_merged_into_the_base(finished, name):
    shutil.rmtree(finished / "run")
    base = read(finished / "base")
    true = {step: adapters(finished, step, base, name=name, infix=".default") for step in (1, 2, 5)}
    if name.endswith("bin"):
        with pytest.raises(IngestError, match="is pickled"):
            run(finished)
    trajectory = run(finished, options=Options(quantization="none", allow_pickle=name.endswith("bin")))
    for step, weight in true.items():
        for shard in replay.states(trajectory, step):
            wanted = weight if shard.name == UP else base[shard.name].float()
            assert torch.allclose(shard.data.float(), wanted.flatten(), atol=1e-7), (step, shard.name)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"config": False}, "without adapter_config.json"),
        ({"config": {"lora_alpha": 0}}, "lora_alpha=0"),
        ({"config": {"use_dora": True}}, "use_dora"),
        ({"base_model.model.lm_head.weight": torch.ones(2)}, "holds base_model.model.lm_head.weight besides"),
        ({"base_model.model.x.lora_A.weight": torch.ones(4, 2)}, r"has no x\.weight"),
    ],
)
def test_adapters_that_cannot_be_followed(finished, more, says):
    shutil.rmtree(finished / "run")
    adapters(finished, 1, read(finished / "base"), **more)
    with pytest.raises(IngestError, match=rf"step 1 .*{says}"):
        run(finished)
    assert [path.name for path in finished.iterdir() if path.name.startswith(".")] == []


def test_a_model_with_adapters_inside_is_told_from_another_model(finished):
    change(finished, 1, lambda t: t.update({"base_model.model.x.lora_A.default.weight": torch.ones(2)}))
    with pytest.raises(IngestError, match=r"LoRA adapters inside the model .*merge_and_unload"):
        run(finished)


# ---------------------------------------------------------------- types


BIAS = "model.layers.0.mlp.gate.e_score_correction_bias"


@pytest.mark.parametrize("moves", [None, 5])
@pytest.mark.parametrize("quantization", ["auto", "int8"])
def test_a_float32_tensor_among_bfloat16_ones(finished, moves, quantization):
    """The others are followed bit for bit; it is the base's where it never moves, else it is followed in float32."""
    bias = 6.817 + 0.246 * torch.rand(256)
    in_base(finished, {BIAS: bias})
    for step, size in ((moves, 1e-3), (9, 4e-3)) if moves else ():
        change(finished, step, lambda t, size=size: t.update({BIAS: bias + size * torch.linspace(-1, 1, 256)}))
    options = Options(quantization=quantization)
    trajectory = run(finished, options=options, steps="1-5")
    assert trajectory.index.encoding == "bf16"
    own = {BIAS: "fp32-none" if quantization == "auto" else "fp32-int8"} if moves else {}
    said = json.loads((trajectory.folder / "index.json").read_text())
    assert (said.get("encodings", {}), said["schema_version"]) == (own, 4 if moves else 2)
    trajectory = run(finished, options=options)  # goes on with what it began
    assert verify(trajectory.folder).damaged == {}
    for step in (2, 9):
        folder, bound = finished / f"checkout_{step}", replay.error_bound(trajectory, step)
        write_checkpoint(trajectory, replay.states(trajectory, step), folder)
        true, there = read(finished / f"run/global_step_{step}"), read(folder)
        assert {name: one.dtype for name, one in there.items()} == {name: one.dtype for name, one in true.items()}
        assert (
            float((there.pop(BIAS) - true.pop(BIAS)).abs().max()) <= bound < (1e-8 if quantization == "auto" else 1e-4)
        )
        assert all(torch.equal(one, true[name]) for name, one in there.items())
        assert (bound > 0) == (bool(moves) and step == 9)
    deltas = torch.stack([read(finished / f"run/global_step_{step}")[BIAS].double() - bias.double() for step in STEPS])
    hat = predicted(trajectory).get(BIAS)
    if moves:
        dense = bias.double() + torch.from_numpy(oracle.relex(deltas.numpy(), list(STEPS), 40, 1))
        assert hat.dtype == torch.float32
        assert float((hat - dense).abs().max()) < (1e-6 if quantization == "auto" else 1e-3)
    else:
        assert hat is None


def test_checkouts_of_a_mixed_run_give_the_same_trajectory(finished):
    """The first of them says that it is exact: that tensor had not moved yet."""
    bias = torch.rand(64)
    in_base(finished, {BIAS: bias})
    change(finished, 9, lambda t: t.update({BIAS: bias + 1e-3 * torch.rand(64)}))
    one = run(finished, "one")
    for step in STEPS:
        facts = Checkout.of(step, replay.error_bound(one, step), "base", one.folder, encodings=one.index.encodings)
        shutil.rmtree(finished / f"run/global_step_{step}")
        write_checkpoint(one, replay.states(one, step), finished / f"run/global_step_{step}", facts.to_json())
    other = run(finished, "other")
    assert other.index.encodings == one.index.encodings
    assert torch.equal(replay.increment_gram(one), replay.increment_gram(other))
    assert torch.equal(predicted(one)[BIAS], predicted(other)[BIAS])


def test_tensors_in_kinds_that_no_run_writes(finished):
    """Files that somebody else made: nothing is read as what it is not."""
    bias = torch.rand(70_000)
    in_base(finished, {BIAS: bias})
    change(finished, 9, lambda t: t.update({BIAS: bias + 1e-3}))
    folder = run(finished).folder
    said = json.loads((folder / "index.json").read_text())
    for spoilt in ({BIAS: "sketch-2"}, {BIAS: 3}, {"another": "bf16"}, [BIAS]):
        (folder / "index.json").write_text(json.dumps({**said, "encodings": spoilt}))
        with pytest.raises(TrajectoryError, match=r"index\.json is damaged"):
            Trajectory(folder)
    (folder / "index.json").write_text(json.dumps(said))
    path = Trajectory(folder).step_file(0, 9)
    arrays = load_file(path)
    for name, spoilt in {
        "fp32-none/tensors": torch.tensor([0]),
        "bf16/tensors": arrays["bf16/tensors"][1:],
        "fp32-none/sizes": arrays["fp32-none/sizes"] - 1,
        "bf16/index": arrays["bf16/index"][1:],
    }.items():
        save_file({**arrays, name: spoilt.clone()}, path)
        with pytest.raises(TrajectoryError, match=r"step_000009\.safetensors cannot be read"):
            predicted(Trajectory(folder))
    there = {"bf16/tensors": arrays["fp32-none/tensors"], "fp32-none/tensors": arrays["bf16/tensors"]}
    save_file({**arrays, **{name: one.clone() for name, one in there.items()}}, path)
    with pytest.raises(TrajectoryError):
        predicted(Trajectory(folder))


def test_one_that_moves_only_after_the_run_was_begun(finished):
    bias = torch.rand(8)
    in_base(finished, {BIAS: bias})
    change(finished, 9, lambda t: t.update({BIAS: bias + 1e-3}))
    shutil.move(finished / "run/global_step_9", finished / "later_9")
    assert run(finished).index.encoding == "bf16"
    shutil.move(finished / "later_9", finished / "run/global_step_9")
    with pytest.raises(IngestError, match=rf"step 9 .*{BIAS} is F32.*a new --out"):
        run(finished)
    assert run(finished, "again").index.encodings == {BIAS: "fp32-none"}
