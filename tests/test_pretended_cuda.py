"""What only a GPU would run, on a CUDA device that is pretended (pretend_cuda.py): nothing is left on the CPU, and
results are the CPU's. The kernels themselves have not run on a GPU.
"""

import contextlib
import csv
import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, page_image
from forked_python import LIBRARIES, run_server
from processes import program
from small_run import STEPS, params

pytestmark = pytest.mark.integration
TRIED = """
import torch
x = torch.ones(2, 3, device="cuda", requires_grad=True)
(2 * x + torch.ones(3).cuda()).sum().backward()
print(x.device, x.grad.tolist(), x.detach().cpu().numpy().sum())
for refused in (
    lambda: x + torch.ones(3),
    lambda: torch.nn.Linear(3, 3).to("cuda")(torch.ones(3)),
    lambda: torch.cat([x, x.cpu()]),
    lambda: x.detach().numpy(),
    lambda: torch.ones(2)[x[:, 0] > 0],
):
    try:
        print("not refused:", refused())
    except (RuntimeError, TypeError) as error:
        print("refused:", error)
"""


# One thread: on a CPU, unlike on CUDA, index_put_ would add up in another order with each run.
ENV = os.environ | {"PYTHONPATH": f"{ROOT}", "OMP_NUM_THREADS": "1"}


def pretended(*command: str, folder=ROOT) -> subprocess.CompletedProcess:
    program = [sys.executable, str(ROOT / "tests" / "pretend_cuda.py"), *command]
    return subprocess.run(program, cwd=folder, env=ENV, capture_output=True, text=True, check=False)


def test_the_pretended_device_refuses_what_cuda_refuses(tmp_path):
    (tmp_path / "tried.py").write_text(TRIED)
    first, *refusals = pretended("tried", folder=tmp_path).stdout.splitlines()
    assert first == "cuda:0 [[2.0, 2.0, 2.0], [2.0, 2.0, 2.0]] 6.0"
    assert len(refusals) == 5 and all(line.startswith("refused: ") for line in refusals), refusals


def curve(folder) -> list[float]:
    with (folder / "plots" / "train.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def test_training_evaluation_and_search(fetched, whole, place):
    """In parts, with layers computed again, whose gradient is that of the whole batch: the curve of the CPU's run. Of
    two GPUs `launch: 1` uses one."""
    with contextlib.chdir(place.folder):
        params(lr="2e-3", micro_batch_size=3, gradient_checkpointing=1, workers=1, launch="1")
    (place.folder / "pages").mkdir()
    for word in ("Oslo", "Rome"):
        page_image(word).save(place.folder / "pages" / f"{word}.png")
    with run_server(f"pretend_cuda {LIBRARIES}", OMP_NUM_THREADS="1") as commands:
        for command in ("stages.train", "stages.evaluate", "colintern search pages Oslo"):
            argv = [commands / "python", "-m", *command.split()]
            done = subprocess.run(argv, cwd=place.folder, env=ENV, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
    assert "Rome.png" in done.stdout
    trained = json.loads((place.folder / "experiments" / "colintern" / "trainer_state.json").read_text())
    assert trained["global_step"] == STEPS
    assert curve(place.folder) == pytest.approx(curve(fetched), rel=1e-4)
    found = (place.folder / "metrics" / "eval.json").read_text()
    shutil.rmtree(place.folder / "data" / ".embeddings")
    with contextlib.chdir(place.folder):
        assert program("stages.evaluate").returncode == 0
    assert json.loads((place.folder / "metrics" / "eval.json").read_text()) == json.loads(found)


@pytest.mark.slow
def test_the_measurements_for_a_gpu():
    """Both checks and every row: bfloat16, dropout, parts, layers computed again."""
    done = pretended("bench.gpu", "--tiny")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Pretended, torch" in done.stdout and "RESULT seconds_2_tiles=" in done.stdout
