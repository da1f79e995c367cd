"""Files that somebody made: what does not fit the shard is refused before anything goes by its addresses."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded import moved, random_weights, rank_one_directions, record
from safetensors.torch import load_file, save

from relex_verl.maths.extrapolators import Prediction
from relex_verl.pipeline.prediction import predicted_tensors
from relex_verl.trajectory import kernels, replay
from relex_verl.trajectory.encodings.fitting import check_fits
from relex_verl.trajectory.encodings.moments import Moment
from relex_verl.trajectory.index import TrajectoryError
from relex_verl.trajectory.store import Trajectory

KINDS = ("bf16", "fp32-int8", "fp32-int4", "fp32-none")
STEPS = range(1, 7)
LAST = "window_000/rank_00000/step_000006.safetensors"


@pytest.fixture(scope="module", autouse=True)
def compiled() -> Iterator[None]:
    """With the kernels, whatever the size: torch refuses by itself what does not fit."""
    before = dict(kernels._state)
    assert kernels.load()
    yield
    kernels._state.update(before)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base, along = random_weights(), rank_one_directions()
    root, states = tmp_path_factory.mktemp("recorded"), {step: moved(base, along, 0.05 * step) for step in STEPS}
    for kind in KINDS:
        record(root / kind, base, states, kind)
    return {kind: root / kind / "trajectory" for kind in KINDS}


def predict(folder: Path) -> list[torch.Tensor]:
    opened = Trajectory(folder)
    window, prediction = replay.window(opened), Prediction("relex", 12)
    return [shard.data for shard in predicted_tensors(replay.histories(opened), opened.kind, window, prediction)]


def with_file(folder: Path, name: str, content: bytes) -> Callable[[], None]:
    """Another file in the place of one; what brings the old one back."""
    before = (folder / name).read_bytes()
    (folder / name).write_bytes(content)
    return lambda: (folder / name).write_bytes(before) and None


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_what_does_not_fit_is_refused_or_does_no_harm(
    recordings: dict[str, Path], kind: str, data: st.DataObject
) -> None:
    """Arrays longer or shorter, sizes that say something else, any values: a sentence, or weights of the right shapes."""
    folder = recordings[kind]
    arrays = {name: array.clone() for name, array in load_file(folder / LAST).items()}
    for name in data.draw(st.lists(st.sampled_from(sorted(arrays)), min_size=1, max_size=3, unique=True)):
        flat = arrays[name].flatten()
        if data.draw(st.booleans()) and flat.numel():
            values = data.draw(st.lists(st.integers(-(2**15), 2**15 - 1), min_size=1, max_size=5))
            where = data.draw(st.integers(0, flat.numel() - 1))
            flat[where : where + len(values)] = torch.tensor(values[: flat.numel() - where]).to(flat.dtype)
            arrays[name] = flat.view(arrays[name].shape)
        elif arrays[name].ndim == 1:
            length = data.draw(st.integers(0, 2 * flat.numel()))
            arrays[name] = torch.cat([flat, flat, flat.new_zeros(1)])[:length].clone()
    undo = with_file(folder, LAST, save(arrays))
    try:
        predicted = predict(folder)
    except (TrajectoryError, ValueError):
        return
    finally:
        undo()
    assert [len(one) for one in predicted] == [len(one) for one in predict(folder)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_step_of_another_shard_is_refused_by_its_tensor(recordings: dict[str, Path], kind: str) -> None:
    folder = recordings[kind]
    arrays = {name: array.clone() for name, array in load_file(folder / LAST).items()}
    arrays["sizes"] = arrays["sizes"].flip(0)
    undo = with_file(folder, LAST, save(arrays))
    try:
        with pytest.raises(TrajectoryError, match=r"rank_00000 is damaged: model\.embed_tokens\.weight: what is kept"):
            predict(folder)
    finally:
        undo()


def test_moments_of_another_shard_are_refused() -> None:
    check_fits(Moment(torch.zeros(5)), 5, Moment)
    for value in (torch.zeros(4), torch.zeros(5, dtype=torch.float64)):
        with pytest.raises(ValueError, match="is not of 5 elements"):
            check_fits(Moment(value), 5, Moment)
