"""The measurements and other programs that pages name, with sizes cut by options that come after what the page says.

Those marked slow take minutes even then, and no part in `make test`: `make slow` runs them.
"""

import contextlib
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from pages import documented, stand_in, words
from pdf_writer import write_pdf
from test_dvc_commands import IDENTITY, STAGES, Repo, bare_environment, copy_working_tree, cut_down, ran, set_up

from bench.debian_pdfs import PDFS

pytestmark = pytest.mark.integration
SECONDS = (  # command, options after it, what the end says
    (
        documented("python -m bench.options --layers 4"),
        "--demo --batch 2 --micro 2 --rounds 1",
        r"RESULT plain=.*half=[\d.]+ same_gradient=True",
    ),
    (documented("python -m bench.seeds"), "--runs 2", r"RESULT compare=[\d.]+-[\d.]+ queries="),
    (documented("python -m bench.curves"), "", r"RESULT tuned_on_right=8 tuned_on=8 held_out_right=13"),
    (
        documented("python -m bench.parts --demo --batch 48 --micro 8 --rounds 7"),
        "--batch 6 --rounds 1",
        "RESULT speedup=",
    ),
)
THIN = "--language-layers 1 --vision-layers 1 --no-compile --rounds 1"
MINUTES = (
    (documented("python -m bench.loss"), "--batch 4 --query_tokens 8 --page_tokens 400 --rounds 1", "RESULT speedup="),
    (documented("python -m bench.memory"), "--only demo", r"RESULT demo_worst=0\.0"),
    (documented("python -m bench.full_size"), "--batch 2 --micro 1 --tokens 256 --scale 1", "RESULT peak_gib=.*=197 "),
    (documented("python -m bench.train_step --rounds 3"), f"--tiles 2 {THIN}", "RESULT speedup_2_tiles="),
    (documented("make soak"), "ARGS='--kills 2'", r"RESULT kills=2 .*identical=(\d+) of=\1 "),
)
AFTER_A_RUN = (
    (documented("python -m bench.data"), "--rows 300 --pages 100 --batches 5", "RESULT mb="),
    (documented("make sensitivity"), "ARGS='--seeds 0 --only good'", r"RESULT good=0\.\d+"),
    (documented("make study"), "ARGS='--trials 2 --workers 1 --study one'", "RESULT best="),
    (documented("python -m bench.study --trials 20 --workers 2"), "--trials 3 --study one", "RESULT best="),
    (documented("python -m bench.second --trials 10"), "--trials 1", "RESULT trials=1 ratio="),
    (
        documented("python -m bench.stores --pages 300 10000 30000 --queries 3"),
        "--pages 30 --queries 2 --tokens 216",
        r"RESULT lancedb_30_cpu_ms=.* lancedb_30_recall=1\.000 .* files_30_recall=",
    ),
)
# Within the ranges of bench/study.yaml, and one step long.
STUDIED = {"batch_size": 32, "micro_batch_size": 32, "warmup_steps": 10, "logging_steps": 1}


@pytest.mark.parametrize(("command", "options", "said"), SECONDS, ids=[c for c, *_ in SECONDS])
def test_a_measurement_of_seconds(command, options, said, monkeypatch, capfd):
    assert re.search(said, in_this_process(f"{command} {options}", monkeypatch, capfd))


def test_pretraining_and_going_on_from_it(tmp_path, monkeypatch, capfd):
    first = documented("python demo/pretrain.py --out first")
    then = documented("python demo/pretrain.py --out demo/base --start first --seed 1 --lr 2e-3 --drift 0")
    (tmp_path / "demo").mkdir()
    shutil.copy(ROOT / "demo" / "pretrain.py", tmp_path / "demo")
    monkeypatch.chdir(tmp_path)
    for command, folder in ((first, "first"), (then, "demo/base")):
        assert "RESULT read=" in in_this_process(f"{command} --steps 1 --batch 1", monkeypatch, capfd)
        assert (tmp_path / folder / "model.safetensors").is_file()


def in_this_process(command: str, monkeypatch, capfd) -> str:
    """`python -m NAME` or `python FILE` without another start of torch; what it prints."""
    _, *rest = words(command)
    monkeypatch.setattr(sys, "argv", rest[rest[0] == "-m" :])
    with contextlib.suppress(KeyError):
        monkeypatch.delitem(sys.modules, rest[1])
    capfd.readouterr()
    runpy.run_module(rest[1], run_name="__main__") if rest[0] == "-m" else runpy.run_path(rest[0], run_name="__main__")
    return capfd.readouterr().out


def test_debians_manuals(tmp_path):
    """From packages that dpkg-deb has built, as apt-get would have brought them."""
    for name, path in PDFS.items():
        file = tmp_path / name / path.removesuffix(".gz")
        file.parent.mkdir(parents=True)
        write_pdf(file, [[name]])
        if path.endswith(".gz"):
            subprocess.run(["gzip", file], check=True)
        (tmp_path / name / "DEBIAN").mkdir()
        (tmp_path / name / "DEBIAN" / "control").write_text(
            f"Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: me <me@localhost>\nDescription: none\n"
        )
        (tmp_path / "debs").mkdir(exist_ok=True)
        subprocess.run(["dpkg-deb", "--build", tmp_path / name, tmp_path / "debs" / f"{name}.deb"], check=True)
    stand_in(tmp_path / "bin", "apt-get", f'[ "$1" = download ] && cp {tmp_path}/debs/"$2".deb .')
    env = os.environ | {"PATH": os.pathsep.join([str(tmp_path / "bin"), bare_environment(tmp_path)["PATH"]])}
    (tmp_path / "bench").symlink_to(ROOT / "bench")
    subprocess.run(documented("python bench/debian_pdfs.py"), shell=True, cwd=tmp_path, env=env, check=True)
    pdfs = list((tmp_path / "data" / "own" / "debian-docs").iterdir())
    assert len(pdfs) == len(PDFS) and all(file.read_bytes().startswith(b"%PDF") for file in pdfs)


def test_what_writes_dvc_yaml_has_nothing_to_write(tmp_path):
    repo = Repo(tmp_path / "repo", bare_environment(tmp_path))
    copy_working_tree(repo.path)
    before = (repo.path / "dvc.yaml").read_text()
    repo.output(documented("python tests/pipeline_facts.py"))
    assert (repo.path / "dvc.yaml").read_text() == before


def a_repo(top: Path) -> Repo:
    copy_working_tree(top / "repo")
    repo = set_up(Repo(top / "repo", bare_environment(top / "home") | IDENTITY))
    repo.output("git init -q -b main")
    return repo


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Repo:
    repo = a_repo(tmp_path_factory.mktemp("copy"))
    repo.commit()
    return repo


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Repo:
    """A copy whose demo is cut down, after its first run."""
    repo = a_repo(tmp_path_factory.mktemp("trained"))
    cut_down(repo.path)
    params = (repo.path / "params.yaml").read_text()
    for key, value in STUDIED.items():
        params, found = re.subn(rf"(?m)^{key}: \S+", f"{key}: {value}", params)
        assert found == 1, key
    (repo.path / "params.yaml").write_text(params)
    repo.commit()
    assert ran(repo.output("make repro")) == list(STAGES)
    repo.commit()
    return repo


@pytest.mark.slow
@pytest.mark.parametrize(("command", "options", "said"), MINUTES, ids=[c for c, *_ in MINUTES])
def test_a_measurement_of_minutes(copy, command, options, said):
    assert re.search(said, copy.output(f"{command} {options}"))


@pytest.mark.slow
@pytest.mark.parametrize(("command", "options", "said"), AFTER_A_RUN, ids=[c for c, *_ in AFTER_A_RUN])
def test_a_measurement_after_a_run(trained, command, options, said):
    assert re.search(said, trained.output(f"{command} {options}"))


@pytest.mark.slow
def test_heatmaps_of_a_bad_adapter_are_below_the_bound(trained):
    done = trained.run(documented("python -m bench.heatmap"))
    assert done.returncode == 1 and re.search(r"RESULT cases=0\.\d+ words=", done.stdout), done.stdout[-2000:]
