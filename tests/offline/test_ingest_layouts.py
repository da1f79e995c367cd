"""Where frameworks put checkpoints: found by one rule, from names alone."""

import pytest

from relex_verl.offline.ingest import IngestError, find_checkpoints, select_steps
from relex_verl.offline.ingest.layouts import files_as_tree, matching, steps_below

STEPS = (5, 10, 100)


def found(*layouts, beside=(), steps=STEPS):
    """What is found where each step's files are named so."""
    tree = files_as_tree([layout.format(N=step) for step in steps for layout in layouts] + list(beside))
    return [(step, place.kind, place.path) for step, place in steps_below(tree, "there")]


@pytest.mark.parametrize(
    "layout",
    [
        "global_step_{N}/actor/huggingface", "global_step{N}_hf", "global_step_{N:05d}", "iter_{N:07d}_hf", "{N}",
        "step_{N}-hf", "step_{N}/policy/weights", "step_{N}/policy/weights/model/consolidated", "checkpoint-{N}-merged-fp16",
        "global_step_{N}/hf_model", "v0-20250722-143609/checkpoint-{N}", "outputs/run2/epoch_{N}", "Global_Step_{N}/policy",
        "Qwen2.5-7B-step-{N}-of-300", "ckpt_{N}_2025", "global_step_{N}/merged_hf_model",
    ],
)  # fmt: skip
@pytest.mark.parametrize("steps", [STEPS, STEPS[:1]])
def test_a_number_counts_and_weights_lie_somewhere_inside(layout, steps):
    others = ["logs/events.7", "final/model.safetensors", "tokenizer_1/vocab.txt"]
    expected = [(step, "safetensors", layout.format(N=step)) for step in steps]
    assert found(f"{layout}/model.safetensors", beside=others, steps=steps) == expected


@pytest.mark.parametrize(
    ("files", "kind", "inside"),
    [
        (["actor/model_world_size_2_rank_0.pt", "actor/huggingface/config.json"], "verl", "/actor"),
        (
            ["actor/model_world_size_2_rank_0.pt", "actor/huggingface/model.safetensors"],
            "safetensors",
            "/actor/huggingface",
        ),
        (["actor/huggingface/model.safetensors", "actor/lora_adapter/adapter_model.safetensors"], "adapter", None),
        (["pytorch_model-00001-of-00002.bin", "training_args.bin", "optimizer.pt"], "pickle", ""),
        (["critic/model.safetensors", "actor/model.safetensors", "ref/model.safetensors"], "safetensors", "/actor"),
        (["policy/model.safetensors", "judge/model.safetensors"], "safetensors", "/policy"),
    ],
)
def test_which_weights_of_a_step_count(files, kind, inside):
    inside = "/actor/lora_adapter" if inside is None else inside
    rows = found(*[f"global_step_{{N}}/{file}" for file in files])
    assert rows == [(step, kind, f"global_step_{step}{inside}") for step in STEPS]


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("policy/weights/__0_0.distcp", "convert_dcp_to_hf"),
        ("actor/dist_ckpt/common.pt", "verl.model_merger merge --backend megatron"),
        ("mp_rank_00/model_optim_rng.pt", "convert_torch_dist_to_hf"),
        ("zero_pp_rank_0_mp_rank_00_model_states.pt", "zero_to_fp32.py"),
        ("model-q4.gguf", "quantised"),
    ],
)
def test_what_has_to_be_converted_names_its_converter(tmp_path, file, says):
    for step in STEPS:
        path = tmp_path / f"step_{step}" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    with pytest.raises(IngestError, match=says):
        select_steps(find_checkpoints(tmp_path), None)


@pytest.mark.parametrize(
    ("layouts", "beside", "says"),
    [
        (["a-{N}/x.safetensors", "a-{N}-merged/x.safetensors"], [], "step 5 is there twice, as a-5 and a-5-merged"),
        (["a-{N}/x.safetensors"], ["b-7/x.safetensors"], r"named a-\{N\} .*--step-pattern 'a-\{N\}'"),
        (["one/a-{N}/x.safetensors", "two/a-{N}/x.safetensors"], [], "several runs, one .3 steps. and two"),
        (["a-{N}/x/x.safetensors", "a-{N}/y/x.safetensors"], [], "several checkpoints"),
        ([], ["model.safetensors"], "is a checkpoint itself"),
        ([], ["notes.txt", "a/b/c.txt"], r"no folders of steps.*--step-pattern"),
    ],
)
def test_what_may_mean_several_things_is_asked(layouts, beside, says):
    with pytest.raises(IngestError, match=says):
        found(*layouts, beside=beside)


def test_a_pattern_says_what_is_meant():
    files = [f"run_{i}/e{i}_step_{n}{end}/w/m.safetensors" for i in (1, 2) for n in STEPS for end in ("", "-merged")]
    tree = files_as_tree(files)
    rows = matching(tree, "run_2/*_step_{N}-merged", "there")
    assert [(step, place.path) for step, place in rows] == [(n, f"run_2/e2_step_{n}-merged/w") for n in STEPS]
    for pattern, says in (("run_2/step", "write {N}"), ("run_3/{N}", "no folder named like")):
        with pytest.raises(IngestError, match=says):
            matching(tree, pattern, "there")
