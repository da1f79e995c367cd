"""What lies beside the weights: the base's, but for configuration and tokenizer that the run has changed."""

import json

import pytest
from finished import run, write_run
from shell import call

from relex_verl.pipeline.prediction import write_checkpoint
from relex_verl.trajectory import replay


@pytest.mark.parametrize("inside", [".", "actor/huggingface"])
def test_a_configuration_that_the_run_has_changed_is_taken(tmp_path, inside):
    base, runs = write_run(tmp_path, inside=inside)
    (base / "tokenizer.json").write_text('{"added_tokens": []}')
    (base / "chat_template.jinja").write_text("old")
    (base / "modeling_own.py").write_text("code = 1")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates/tools.jinja").write_text("tools")
    before = json.loads((base / "config.json").read_text())
    for folder in (path / inside for path in runs.iterdir()):
        stored = {"dtype": "float32", "tie_word_embeddings": True, "use_cache": False, "transformers_version": "9"}
        (folder / "config.json").write_text(json.dumps({**before, **stored}))
        (folder / "tokenizer.json").write_text('{"added_tokens": [1]}')
        (folder / "chat_template.jinja").write_text("new")
        (folder / "trainer_state.json").write_text("{}")
    trajectory = run(tmp_path)
    assert sorted(path.name for path in trajectory.files.iterdir()) == ["chat_template.jinja", "tokenizer.json"]
    written = write_checkpoint(trajectory, replay.states(trajectory, 9), tmp_path / "checkout", {})
    assert (written / "chat_template.jinja").read_text() == "new"
    assert json.loads((written / "tokenizer.json").read_text()) == {"added_tokens": [1]}
    assert json.loads((written / "config.json").read_text()) == before
    assert (written / "modeling_own.py").read_text() == "code = 1"
    assert (written / "additional_chat_templates/tools.jinja").read_text() == "tools"
    write_checkpoint(trajectory, replay.states(trajectory, 5), tmp_path / "checkout", {})  # ours: replaced
    there = ("ingest", "--base", base, "--checkpoints", runs, "--out", tmp_path / "again")
    assert "the run's chat_template.jinja, tokenizer.json differ from the base's" in call(*there).stderr
