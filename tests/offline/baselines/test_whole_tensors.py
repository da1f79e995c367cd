import pytest
import torch
from recorded import SHAPES, by_name, random_weights, record, record_cut_up

from relex_verl.offline.baselines.whole_tensors import WholeTensors, is_attention_or_mlp_matrix
from relex_verl.trajectory.index import TrajectoryError
from relex_verl.trajectory.store import Trajectory

BASE = random_weights(scale=0.1)
STATES = {step: random_weights(seed=step, scale=0.1) for step in (3, 4, 9)}


@pytest.mark.parametrize("recorder", [record, record_cut_up])
@pytest.mark.parametrize("encoding", ["fp32-none", "bf16"])
def test_gives_back_every_observed_tensor_whole(tmp_path, recorder, encoding):
    dtype = torch.bfloat16 if encoding == "bf16" else torch.float32
    base, states = ({name: one.to(dtype) for name, one in weights.items()} for weights in (BASE, STATES[3]))
    all_states = {3: states, **{step: {n: x.to(dtype) for n, x in STATES[step].items()} for step in (4, 9)}}
    reader = WholeTensors(recorder(tmp_path, base, all_states, encoding))
    assert reader.steps == [3, 4, 9]
    for name, shape in SHAPES.items():
        found = dict(reader.states(name))
        assert list(found) == [0, 3, 4, 9]
        torch.testing.assert_close(found[0], base[name], rtol=0, atol=0)
        for step, weights in all_states.items():
            assert found[step].dtype == dtype
            assert found[step].shape == shape
            exact = {"rtol": 0, "atol": 0} if dtype == torch.bfloat16 else {"rtol": 1e-6, "atol": 1e-7}
            torch.testing.assert_close(found[step], weights[name], **exact)


def test_a_stored_origin_is_read_from_the_ranks(tmp_path):
    trajectory = record_cut_up(tmp_path, BASE, STATES, origin="stored")
    (tmp_path / "base" / "model.safetensors").unlink()
    (tmp_path / "base").rmdir()
    trajectory.base = lambda: None
    reader = WholeTensors(trajectory)
    for name in SHAPES:
        torch.testing.assert_close(reader.state(name, 0), BASE[name], rtol=0, atol=0)
        torch.testing.assert_close(reader.state(name, 9), STATES[9][name])


def test_sees_nothing_after_the_cut(tmp_path):
    trajectory = record(tmp_path, BASE, STATES)
    reader = WholeTensors(trajectory, cut=8)
    assert reader.steps == [3, 4]
    with pytest.raises(TrajectoryError, match="step 9 is not among"):
        reader.state("model.embed_tokens.weight", 9)
    with pytest.raises(TrajectoryError, match="no step up to 2"):
        WholeTensors(trajectory, cut=2)


def test_states_do_not_share_memory_and_leave_the_files_alone(tmp_path):
    trajectory = record_cut_up(tmp_path, BASE, STATES, origin="stored")
    for _, tensor in WholeTensors(trajectory).states("model.embed_tokens.weight"):
        tensor.zero_()
    again = WholeTensors(Trajectory(trajectory.folder))
    torch.testing.assert_close(again.state("model.embed_tokens.weight", 4), STATES[4]["model.embed_tokens.weight"])


def test_a_whole_tensor_as_a_shard(tmp_path):
    reader = WholeTensors(record(tmp_path, BASE, STATES))
    found = by_name(reader.shard(name, BASE[name]) for name in SHAPES)
    assert all(torch.equal(found[name], BASE[name]) for name in SHAPES)


@pytest.mark.parametrize(
    ("name", "shape", "answer"),
    [
        ("model.layers.3.self_attn.q_proj.weight", (4, 4), True),
        ("model.layers.3.mlp.experts.7.up_proj.weight", (4, 4), True),
        ("model.layers.3.self_attn.q_proj.bias", (4,), False),
        ("model.layers.3.self_attn.q_norm.weight", (4,), False),
        ("model.layers.3.post_attention_layernorm.weight", (4,), False),
        ("model.embed_tokens.weight", (9, 4), False),
        ("lm_head.weight", (9, 4), False),
    ],
)
def test_attention_and_mlp_matrices(name, shape, answer):
    assert is_attention_or_mlp_matrix(name, shape) is answer
