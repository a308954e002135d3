"""A repository of 40 small pages, in which the real train stage takes ten steps; runs in it are forked processes."""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import Place, program

from colintern.core.recipes import render_recipe

ROOT = Path(__file__).parents[1]
STEPS = 10  # 40 rows in batches of 8, twice; checkpoints after 3, 6, 9 and 10
OUT = Path("experiments/colintern")


def work() -> None:
    """The train stage, from the files that fetch-data and verify have left."""
    from stages import train

    train.main()


def at_step(step: int, do: Callable[[], None]) -> None:
    """Do something in the middle of a step: its gradient is there, its weights are not."""
    from colintern.training.trainer import ContrastiveTrainer

    whole = ContrastiveTrainer.training_step

    def training_step(self, *args, **kwargs):
        loss = whole(self, *args, **kwargs)
        if self.state.global_step + 1 == step:
            do()
        return loss

    ContrastiveTrainer.training_step = training_step


@pytest.fixture(scope="session")
def fetched(tmp_path_factory):
    """A repository whose fetch-data and verify have run, on 40 small pages."""
    from test_survey import SET, row, write_eval, write_rows

    folder = tmp_path_factory.mktemp("small")
    with contextlib.chdir(folder):
        shutil.copytree(ROOT / "demo", "demo")
        for name in ("colintern", "stages", "dvc.yaml", "versions.yaml"):
            Path(name).symlink_to(ROOT / name)
        write_rows("train", [row(number) for number in range(40)], SET)
        write_rows("test", [row(number) for number in range(40, 45)], SET)
        write_eval(range(45, 50))
        params(lr="2e-3")
        for stage in ("fetch_data", "verify"):
            done = program(f"stages.{stage}")
            assert done.returncode == 0, done.stderr
    return folder


def params(**changes: object) -> None:
    """Write params.yaml; keys that are not named stay as a small run needs them."""
    from test_survey import BEIR, SET

    small = {
        "train_data": SET, "max_visual_tokens": 16, "batch_size": 8, "micro_batch_size": 8, "epochs": 2,
        "warmup_steps": 2, "logging_steps": 2, "save_steps": 3, "workers": 0, "lora_dropout": 0.1,
        "feature_cache_gb": 0.1,
    }  # fmt: skip
    lines = render_recipe(ROOT / "recipes" / "demo.yaml").replace("- demo\n", f"- {BEIR}\n").splitlines()
    values = small | changes
    names = [line.partition(":")[0] for line in lines]
    assert values.keys() <= set(names)
    lines = [f"{name}: {values[name]}" if name in values else line for name, line in zip(names, lines, strict=True)]
    Path("params.yaml").write_text("\n".join(lines) + "\n")


class Run(Place):
    """A copy of the repository, in which the train stage's work is started."""

    @property
    def scratch(self) -> Path:
        [found] = [path for path in (self.folder / ".scratch").iterdir() if path.is_dir()]
        return found

    def result(self) -> dict[str, str]:
        """Hashes of what a run leaves: adapter, state, curves, and the metrics with the judgement of its health."""
        files = [
            *(self.folder / OUT).iterdir(),
            *(self.folder / "plots").glob("*.csv"),
            self.folder / "metrics" / "train.json",
        ]
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def place(fetched, tmp_path):
    shutil.copytree(fetched, tmp_path / "repo", symlinks=True, ignore=shutil.ignore_patterns(".scratch", "experiments"))
    return Run(tmp_path / "repo", work)


@pytest.fixture(scope="session")
def whole(fetched):
    """What the undisturbed run leaves."""
    undisturbed = Run(fetched, work)
    assert undisturbed.run() == 0, undisturbed.log
    assert json.loads((fetched / OUT / "trainer_state.json").read_text())["global_step"] == STEPS
    assert not [path for path in (fetched / ".scratch").iterdir() if path.is_dir()]
    return undisturbed.result()
