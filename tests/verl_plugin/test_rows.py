"""Rows of verl's own validation set, with pictures, out of its own dataloader."""

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from omegaconf import OmegaConf
from PIL import Image
from torchdata.stateful_dataloader import StatefulDataLoader
from verl.utils.dataset.rl_dataset import RLHFDataset, collate_fn

from relex_verl.verl_plugin.rows import WatchedRows


def picture(shade: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def row(text: str, shade: int | None = None, truth: str = "1", index: int = 0) -> dict[str, Any]:
    """One of geo3k's make; without a picture one of gsm8k's."""
    content = text if shade is None else f"<image>{text}"
    return {
        "data_source": "geo3k",
        "prompt": [{"role": "user", "content": content}],
        "images": [] if shade is None else [{"bytes": picture(shade), "path": None}],
        "reward_model": {"style": "rule", "ground_truth": truth},
        "extra_info": {"index": index, "split": "test"},
    }


def loader(folder: Path, rows: list[dict[str, Any]], **options: Any) -> StatefulDataLoader:
    """verl's loader over a file of these rows; no chat template is applied, so any processor will do."""
    file = folder / "val.parquet"
    datasets.Dataset.from_list(rows).to_parquet(file)
    config = OmegaConf.create(
        {"filter_overlong_prompts": False, "cache_dir": str(folder / "cache"), "return_raw_chat": True}
    )
    dataset = RLHFDataset(str(file), tokenizer=SimpleNamespace(), config=config, processor=SimpleNamespace())
    return StatefulDataLoader(dataset, batch_size=2, collate_fn=collate_fn, **options)


def test_six_pictures_under_one_question_are_six_rows(tmp_path: Path) -> None:
    rows = [row("How long is AB?", shade, index=shade) for shade in range(6)]
    watched = WatchedRows(loader(tmp_path, [*rows, rows[2]]))
    assert [len(batch["raw_prompt"]) for batch in watched] == [2, 2, 2, 1]
    marks = watched.marks()
    assert len(set(marks)) == 6
    assert marks[2] == marks[6]  # a true duplicate


def test_texts_that_name_their_row_need_no_mark(tmp_path: Path) -> None:
    rows = [row("1+1="), row("2+2=", truth="4"), row("1+1=", index=7), row("What is it?", 3)]
    watched = WatchedRows(loader(tmp_path, rows))
    list(watched)
    assert watched.marks() == ["", "", "", ""]
    assert watched.digests[0] == watched.digests[2] != watched.digests[1]


def test_one_question_with_two_answers_is_two_rows(tmp_path: Path) -> None:
    watched = WatchedRows(loader(tmp_path, [row("Name a prime.", truth="2"), row("Name a prime.", truth="3")]))
    list(watched)
    assert len(set(watched.marks())) == 2


@pytest.mark.parametrize("workers", [0, 1])
def test_a_row_keeps_its_mark_however_the_set_is_shuffled(tmp_path: Path, workers: int) -> None:
    shuffled = loader(tmp_path, [row("What is it?", shade) for shade in range(9)], shuffle=True, num_workers=workers)
    seen = []
    for _ in range(2):
        watched = WatchedRows(shuffled)
        order = [
            str(batch["raw_prompt"][i][0]["content"][0]["bytes"])
            for batch in watched
            for i in range(len(batch["index"]))
        ]
        seen.append((order, dict(zip(order, watched.marks(), strict=True))))
    assert seen[0][0] != seen[1][0]
    assert seen[0][1] == seen[1][1]


def test_some_rows_can_be_asked_for_by_their_places(tmp_path: Path) -> None:
    """And have the names that they have among all."""
    rows = [row("How long is AB?", 1), row("1+1="), row("How long is AB?", 2), row("2+2="), row("3+3=")]
    everything, some = WatchedRows(loader(tmp_path, rows)), WatchedRows(loader(tmp_path, rows), {2, 4})
    whole = list(everything)
    assert everything.places == [0, 1, 2, 3, 4]
    first, second = some
    assert (first.keys(), second.keys()) == (whole[1].keys(), whole[2].keys())
    assert [batch["raw_prompt"][0] for batch in (first, second)] == [whole[i]["raw_prompt"][0] for i in (1, 2)]
    assert len(first["raw_prompt"]) == len(first["data_source"]) == 1
    assert some.places == [2, 4]
    assert some.marks() == [everything.marks()[place] for place in (2, 4)]
    assert some.marks()[0] != ""
