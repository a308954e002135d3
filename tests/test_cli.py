"""The command line itself: its help and version, and what it refuses before anything slow is imported."""

import contextlib
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest
from conftest import ROOT

from colintern.__main__ import ORDER, main
from colintern.core.errors import UserError
from colintern.core.recipes import render_recipe
from colintern.storage.paths import require_writable

pytestmark = pytest.mark.integration

# Runs `colintern` on each command line of its argument; of what takes long to import nothing can be imported.
WITHOUT_LIBRARIES = """
import json, sys
for name in ("torch", "transformers", "mteb", "datasets", "peft", "optuna", "dvc", "pyarrow"):
    sys.modules[name] = None
from colintern.__main__ import main
for words in json.loads(sys.argv[1]):
    try:
        main(words)
    except SystemExit as ended:
        print(f"exit {ended.code}", file=sys.stderr)
"""
REFUSED = {
    "report nowhere": "MODEL: nowhere: does not exist, or is no folder here",
    "report demo": "MODEL: demo: holds no adapter_model.safetensors, nor a merged model's config.json",
    "report adapter --results demo": "--results: demo holds no run.json",
    "report adapter --out demo": "--out: demo is a folder",
    "report adapter --out params.yaml/report.html": "--out: params.yaml is a file",
    "export demo/base --out new": "MODEL: demo/base: holds no adapter_model.safetensors; give",
    "export adapter --out params.yaml/new": "--out: params.yaml is a file",
    "search demo word --model nowhere": "--model: nowhere: does not exist",
    "search demo word --model params.yaml": "--model: params.yaml: is a file",
    "search demo word": "--model: experiments/colintern: holds no adapter_model.safetensors",
    "search nowhere word --model adapter": "SOURCE: 'nowhere' does not exist",
    "search demo word --model adapter --html demo": "--html: demo is a folder",
    "search demo word --model adapter --index params.yaml": "--index: params.yaml is a file",
    "search demo how is it removed": 'colintern search demo "how is it removed"',
    "search adapter demo is it removed": 'colintern search adapter "demo is it removed"',
    "search nowhere demo word": "given as 2 words, and one folder or PDF is searched for one query; put it in quotes: ",
    "search demo --model adapter": "the following arguments are required: QUERY",
    "search demo --model adapter word --rescore -1": "--rescore: -1 is not valid",
    "search demo word --model adapter --precision float32 --rescore 5": "--rescore: 5 has no effect with --precision",
    "search demo word --queries params.yaml": "QUERY: 'word' and --queries params.yaml exclude each other",
    "search demo --queries params.yaml --html new.html": "--html: new.html shows one query",
    "search demo --queries nowhere": "--queries: nowhere cannot be read: No such file or directory",
    "search demo --queries empty": "--queries: empty holds no query",
    "search demo --queries latin": "--queries: latin: line 2 is not UTF-8",
    "embed demo --out new --model demo": "--model: demo: holds no adapter_model.safetensors",
    "embed demo --out new --model adapter --shard 3/2": "--shard: '3/2' is not valid; it must be I/N",
    "embed demo --out params.yaml/new --model adapter": "params.yaml is a file, so params.yaml/new cannot be a folder",
    "embed demo --out lancedb://new --model adapter": "--out: a URL is not valid",
    "embed demo --to lancedb://new --model adapter --precision int8": "--precision: int8 is not valid with --to",
    "embed demo --out new --model adapter --dim 60 --precision binary": "--dim: 60 is not valid with binary",
    "embed demo --out new --model adapter --dim 129": "--dim: 129 is not valid; it must be 1 to 128",
    "evaluate demo": "MODEL: demo: holds no adapter_model.safetensors",
    "evaluate demo/bose": "MODEL: 'demo/bose' is no folder here, and a hub id needs its commit",
    "evaluate ../adapters/one": "MODEL: '../adapters/one' is no folder here",
    "evaluate adapter --out demo": "--out: demo exists and is no evaluation",
    "evaluate adapter --out params.yaml/new": "--out: params.yaml is a file",
    "evaluate adapter --benchmarks no/where": "benchmarks: 'no/where': no such folder",
    "evaluate adapter --benchmarks demo": "data/manifest.json: missing",
    "serve nowhere --model adapter": "SOURCE: 'nowhere' does not exist",
    "serve demo": "--model: experiments/colintern: holds no adapter_model.safetensors",
    "check-adapter nowhere": "FOLDER: nowhere: does not exist, or is no folder here",
    "check-adapter demo": "adapter_model.safetensors; give the folder of an adapter, or copy the whole folder again",
    "check-adapter experiments/colintern": "or run the stage that makes it: dvc repro train",
    "check-adapter adapter --base nowhere": "--base: nowhere is no folder here",
    "mine --adapter demo": "--adapter: demo: holds no adapter_model.safetensors; give",
    "mine --adapter adapter --out demo": "--out: demo is a folder",
    "mine --adapter adapter --out ../negatives.parquet": "--out: ../negatives.parquet is outside the repository; give",
    "verify --base nowhere/a/base": "nowhere/a/base/config.json cannot be used",
    "verify --base org/name": "needs its commit: write org/name@<40 hex digits>",
    "verify --params nowhere.yaml": "nowhere.yaml: cannot be read",
    "recommend --base nowhere": "base: 'nowhere': nowhere/config.json cannot be used",
    "tune --trials 1 --space nowhere.yaml": "nowhere.yaml: cannot be read",
}


NEED_PARAMS = (
    "report adapter",
    "export adapter --out new",
    "search adapter word --model adapter",
    "mine --adapter adapter",
)


def collect_refusals(folder: Path, lines: Iterable[str]) -> list[tuple[str, str]]:
    """Run command lines in a folder, without slow libraries; return the message and the exit code of each."""
    words = json.dumps([line.split() for line in lines])
    done = subprocess.run([sys.executable, "-c", WITHOUT_LIBRARIES, words], cwd=folder, capture_output=True, text=True)
    assert "Traceback" not in done.stderr, done.stderr
    return re.findall(r"(?ms)(.*?)^exit (.*?)\n", done.stderr)


@pytest.fixture
def adapter(tmp_path) -> Path:
    (tmp_path / "adapter").mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / "adapter" / name).touch()
    return tmp_path / "adapter"


def test_wrong_paths_are_refused_before_anything_slow_is_imported(adapter, tmp_path):
    shutil.copytree(ROOT / "demo" / "base", tmp_path / "demo" / "base")
    (tmp_path / "params.yaml").write_text(render_recipe(ROOT / "recipes" / "demo.yaml"))
    (tmp_path / "experiments" / "colintern").mkdir(parents=True)
    (tmp_path / "empty").write_text("\n \n")
    (tmp_path / "latin").write_bytes("Oslo\ncaf\xe9\n".encode("latin-1"))
    for (line, words), (message, code) in zip(REFUSED.items(), collect_refusals(tmp_path, REFUSED), strict=True):
        assert words in message and code == "2", (line, message)
    assert not (tmp_path / "new").exists()


def test_a_missing_params_file_is_reported_before_anything_slow_is_imported(adapter, tmp_path):
    for line, (message, code) in zip(NEED_PARAMS, collect_refusals(tmp_path, NEED_PARAMS), strict=True):
        assert "params.yaml: cannot be read" in message and code == "2", (line, message)


def test_a_folder_that_may_not_be_written_is_refused(tmp_path, monkeypatch):
    require_writable("--out", tmp_path / "new" / "newer")
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(UserError, match=f"--out: {tmp_path} may not be written"):
        require_writable("--out", tmp_path / "new" / "newer")


def test_evaluations_are_looked_for_before_they_are_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "mteb", None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as ended:
        main(["compare", "empty", "."])
    assert ended.value.code == 2 and "empty: holds no run.json" in capsys.readouterr().err


def test_help_is_in_the_order_of_the_work_and_fits_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with contextlib.suppress(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    listed = re.findall(r"(?m)^    ([a-z][\w-]+)(?:  |$)", text.partition("Examples:")[0])
    assert [name.replace("-", "_") for name in listed] == ORDER
    modules = {path.stem for path in (ROOT / "colintern" / "commands").glob("*.py")} - {"__init__"}
    assert modules == set(ORDER), "a new command has a place in the order"
    whole = re.sub(r" \\\n +", " ", text)
    assert 'colintern search ~/manuals "how is a package removed" --html found.html\n' in whole


def test_ctrl_c_ends_a_command_without_a_traceback(monkeypatch):
    def interrupt(args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("colintern.commands.recipe.run", interrupt)
    assert main(["recipe"]) == 130


def test_the_version_is_that_of_the_project(capsys):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"colintern {project['version']}\n"


@pytest.mark.parametrize(
    "name",
    ["exported/model.safetensors", "found.html", "data/mined/negatives.parquet", "vectors/parquet/manifest.json"],
)
def test_git_ignores_what_the_pages_tell_people_to_write(name):
    assert subprocess.run(["git", "check-ignore", "--quiet", name], cwd=ROOT).returncode == 0
