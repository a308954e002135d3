"""Checkpoints are where the guide and PEFT's users look for them, and are adapters that can be loaded and scored."""

import contextlib
import json
import signal
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from processes import kill
from small_run import at_step

from colintern.encoding.loading import get_encoder_settings, load_page_encoder
from colintern.modeling.loading import require_adapter, require_same_base
from colintern.modeling.retriever import ColIntern3_5
from colintern.params import load_params
from colintern.storage.manifest import ensure_base
from colintern.training.checkpoints import link_checkpoints

pytestmark = pytest.mark.integration
PEFT = ("adapter_config.json", "adapter_model.safetensors")


def test_an_interrupted_runs_checkpoints_stand_in_experiments_and_leave_when_it_is_done(place):
    assert place.run(at_step, 8, kill) == -signal.SIGKILL
    [run] = (place.folder / "experiments").glob("train-*")
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]
    for step in (3, 6):
        assert all((run / f"checkpoint-{step}" / name).is_file() for name in (*PEFT, "optimizer.pt"))
        state = json.loads((run / f"checkpoint-{step}" / "trainer_state.json").read_text())
        assert state["global_step"] == step
        assert [row["step"] for row in state["log_history"] if "loss" in row] == [2, 4, 6][: step // 2]
    # The guide's `tail -f experiments/*/trainer_state.json`
    assert json.loads((run / "trainer_state.json").read_text()) == state
    assert place.run() == 0, place.log
    assert [path.name for path in (place.folder / "experiments").iterdir()] == ["colintern"]
    done = place.folder / "experiments" / "colintern"
    assert all((done / name).is_file() for name in (*PEFT, "trainer_state.json"))


def test_a_checkpoint_is_an_adapter_like_the_final_one(place):
    assert place.run(at_step, 10, kill) == -signal.SIGKILL
    [run] = (place.folder / "experiments").glob("train-*")
    with contextlib.chdir(place.folder):
        params, newest = load_params(), run / "checkpoint-9"
        require_adapter(newest)
        require_same_base(newest, params.base, params.base_revision)
        model = load_page_encoder(
            get_encoder_settings(params), newest, ensure_base(params.base, params.base_revision)
        ).model
        bare = ColIntern3_5.from_pretrained(
            ensure_base(params.base, params.base_revision), seed=params.seed + 1, dtype=torch.float32
        )
        theirs = PeftModel.from_pretrained(bare, str(newest)).base_model.model
        ours, same = dict(model.named_parameters()), dict(theirs.named_parameters())
        assert ours.keys() == same.keys() and all(torch.equal(ours[name], same[name]) for name in ours)
        assert any("lora_B" in name and value.any() for name, value in ours.items())
        assert "# ColIntern3.5 adapter" in (newest / "README.md").read_text()


def test_a_run_that_keeps_nothing_leaves_no_link(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path(".scratch/train-0123")
    with pytest.raises(ValueError), link_checkpoints(folder):
        assert Path("experiments/train-0123").resolve() == folder.resolve()
        raise ValueError
    assert not folder.exists() and not list(Path("experiments").iterdir())
    with link_checkpoints(folder):
        (folder / "checkpoint-1").mkdir()
    assert Path("experiments/train-0123/checkpoint-1").is_dir()
    (folder / "checkpoint-1").rmdir()
    folder.rmdir()
    with link_checkpoints(Path(".scratch/train-4567")):
        pass
    assert not list(Path("experiments").iterdir()), "the link of a run that was deleted by hand"
