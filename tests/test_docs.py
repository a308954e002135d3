"""The documentation held against the code: commands, their options, links, files, tests and messages it names.

Cheap commands are run, as they stand, in a copy of the tracked files, and test_tutorial.py runs the tutorial's; every
other one must at least be one that its program would take. A command outside both is in `NOT_RUN`, with the reason.
"""

import argparse
import ast
import contextlib
import io
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ROOT
from test_dvc_commands import bare_environment, copy_working_tree

from colintern.cli import _parser, main

DOCS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "demo" / "base" / "README.md"])
# Programs that are no part of this project and are not looked into; what they are given stands in the page.
FOREIGN = {"git", "docker", "mkdir", "source", "export", "cd", "pip", "aws", "sky", "sbatch"}
RUN = (  # as they stand, in a copy where nothing was run yet
    "colintern recipe",
    "colintern tiles 1240 1754",
    "colintern recipe internvl3_5-1b",
    "colintern tiles 1240 1754",
    "colintern verify --base internvl3_5-1b",
    "colintern recipe own-pdfs",
)
AFTER_FETCH = ("colintern data", "colintern verify")  # after fetch-data on a small set
NOT_RUN = {  # program of all others, and why they are parsed only
    "make": "sets up an environment over the network, or takes minutes",
    "dvc": "trains; tests/test_dvc_commands.py runs them on a smaller demo",
    "python": "a measurement, or a download: minutes",
    "colintern": "needs a run, a GPU or the hub; tests/test_tutorial.py has the tutorial's, the others their own tests",
    "wandb": "needs W&B",
    "hf": "needs the hub",
    "nvidia-smi": "needs a GPU",
    "cluster/torchrun.sh": "needs two machines; bench/nodes.py and tests/test_cluster.py run it",
}
VALUES = r"\.\.\.|\d+|\blearning_rate|\blr\b|\bloss is nan\b"  # of a message, as the page gives them
OTHERS = {  # git's, DVC's
    "Unable to acquire lock",
    "Unable to read RWLock-file '.dvc/tmp/rwlock'. JSON structure is corrupted",
    "'./dvc.lock' validation failed.",
    "dubious ownership",
    "Git user name and email must be configured",
}


class Command(NamedTuple):
    """A command of a page, with the line it begins on."""

    page: Path
    line: int
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line} {' '.join(self.words)}"


def fenced(page: Path) -> list[tuple[int, str]]:
    """The lines of a page's shell blocks with their numbers; continued lines are one."""
    text = page.read_text()
    found = []
    for block in re.finditer(r"^```(?:bash|sh|console)\n(.*?)^```", text, re.M | re.S):
        line = text[: block.start(1)].count("\n") + 1
        whole, first = "", line
        for part in block[1].splitlines():
            first = first if whole else line
            whole, line = whole + part.removesuffix("\\"), line + 1
            if not part.endswith("\\"):
                found.append((first, whole))
                whole = ""
    return found


def inline(page: Path) -> list[tuple[int, str]]:
    """What stands between backticks outside blocks and begins like a command of ours."""
    text = re.sub(r"^```.*?^```", lambda m: "\n" * m[0].count("\n"), page.read_text(), flags=re.M | re.S)
    return [
        (text[: m.start()].count("\n") + 1, " ".join(m[1].split()))
        for m in re.finditer(r"(?<!`)`((?:colintern|dvc|make|python -m) [^`]+)`", text)
    ]


def split(page: Path, line: int, text: str) -> list[Command]:
    """The commands of a line: `a; b`, `a && b`; without comments, redirections and variables before them."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars=True)
    lexer.whitespace_split, lexer.commenters = True, "#"
    found: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set(";&|"):
            found.append([])
        else:
            found[-1].append(word)
    for words in found:
        while words and re.match(r"[A-Z_]+=", words[0]):
            words.pop(0)
    return [Command(page, line, tuple(words)) for words in found if words]


@cache
def commands() -> list[Command]:
    return [
        command
        for page in DOCS
        for number, text in [*fenced(page), *(() if page.name == "lab-notes.md" else inline(page))]
        for command in split(page, number, text)
    ]


def of(program: str) -> list[Command]:
    return [command for command in commands() if command.words[0] == program]


def refused(parser: argparse.ArgumentParser, words: tuple[str, ...]) -> str:
    """What argparse says against `words`, "" for nothing."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            parser.parse_args(words)
    except SystemExit as stop:
        return said.getvalue() if stop.code else ""
    return ""


def test_pages_and_commands_are_found():
    assert {"README.md", "tutorial.md", "troubleshooting.md", "CONTRIBUTING.md"} <= {page.name for page in DOCS}
    assert len(of("colintern")) > 60 and len(of("dvc")) > 30 and len(of("make")) > 10


def test_every_program_is_known():
    unknown = [str(c) for c in commands() if c.words[0] not in FOREIGN | NOT_RUN.keys()]
    assert not unknown, "run it, or say in NOT_RUN why not"


def test_colintern_takes_every_command():
    parser = _parser()
    prose = ("NAME", "...")  # `colintern NAME`, `colintern recipe ...`: words for any
    faults = [
        f"{command}: {said.splitlines()[-1]}"
        for command in of("colintern")
        if not set(command.words[1:]) & set(prose)
        and (said := refused(parser, command.words[1:]))
        # A command named without what it works on, in the middle of a sentence.
        and not (len(command.words) == 2 and "the following arguments are required" in said)
    ]
    assert not faults, "\n".join(faults)


def test_dvc_takes_every_command():
    from dvc.cli import DvcParserError
    from dvc.cli.parser import get_main_parser

    faults = []
    for command in of("dvc"):
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            try:
                get_main_parser().parse_args(command.words[1:])
            except (DvcParserError, SystemExit):
                faults.append(f"{command}: {said.getvalue().splitlines()[:1]}")
    assert not faults, "\n".join(faults)


def test_make_has_every_target():
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.M))
    asked = {word: str(command) for command in of("make") for word in command.words[1:] if "=" not in word}
    assert not {word: where for word, where in asked.items() if word not in targets}


def test_python_runs_modules_and_options_that_are_there():
    faults = []
    for command in of("python"):
        words = command.words[1:]
        if words[0] == "-c":
            ast.parse(words[1])
            continue
        name = words[1] if words[0] == "-m" else words[0]
        if name == "pytest":
            faults += [f"{command}: no {w}" for w in words[2:] if w.endswith(".py") and not (ROOT / w).is_file()]
            continue
        file = ROOT / (name.replace(".", "/") + ".py" if words[0] == "-m" else name)
        if not file.is_file():
            faults.append(f"{command}: no {file.name}")
            continue
        source = file.read_text()
        options = [word for word in words if word.startswith("--")]
        known = set(re.findall(r"""["'](?:--)?([a-z-]+)["']""", source))
        faults += [f"{command}: no option {option}" for option in options if option[2:] not in known]
    assert not faults, "\n".join(faults)


def anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_links_and_files_are_there(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target:
            name, _, anchor = target.partition("#")
            there = (page.parent / name).resolve() if name else page
            assert there.exists(), target
            assert not anchor or anchor in anchors(there), target
    if page.name == "lab-notes.md":  # dated: it may name what was there then
        return
    tops = "cluster|colintern|stages|bench|tests|docs|recipes|demo|docker"
    guide = page.name == "guide-to-commands.md"
    for name in re.findall(rf"`((?:{tops})/[\w./*-]+)`", text):
        assert list(ROOT.glob(name.rstrip("/"))) or (guide and name.startswith("scripts/")), name
    for name in re.findall(r"`(\w+\.(?:md|yaml|toml))`", text):
        assert (ROOT / name).exists() or (page.parent / name).exists() or (ROOT / "docs" / name).exists(), name


def test_tests_that_are_named_exist():
    text = (ROOT / "docs" / "reproducibility.md").read_text()
    named = re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", text)
    assert len(named) > 20
    for file, test in named:
        assert f"\ndef {test}" in "\n" + (ROOT / "tests" / file).read_text(), f"{file}::{test}"


@cache
def said() -> str:
    """All texts of the code, those of f-strings cut where a value stands."""
    texts = []
    for folder in ("colintern", "stages"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(node.value)
                elif isinstance(node, ast.JoinedStr):
                    texts.append(" ".join(str(p.value) for p in node.values if isinstance(p, ast.Constant)))
    return "\n".join(texts)


def test_messages_are_the_programs_own():
    rows = re.findall(r"^\| (.+?) \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.M)
    quoted = [quote for row in rows for quote in re.findall(r"`([^`]+)`", row)]
    assert len(quoted) > 40
    missing = [
        part
        for quote in quoted
        if quote not in OTHERS and not quote.startswith("dvc ")
        for part in map(str.strip, re.split(VALUES, quote))
        if len(part) > 8 and part not in said()
    ]
    assert not missing, missing


def test_cheap_commands_run_as_they_stand(tmp_path):
    for command in RUN:
        assert any(" ".join(c.words) == command for c in commands()), f"{command} is in no page any more"
    repo = tmp_path / "repo"
    copy_working_tree(repo)
    env = bare_environment(tmp_path / "home") | {"PYTHONPATH": str(repo), "HF_HUB_OFFLINE": "1"}
    script = " && ".join([*(f"{c} --force" if c.startswith("colintern recipe ") else c for c in RUN)])
    shim = tmp_path / "bin" / "colintern"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m colintern.cli "$@"\n')
    shim.chmod(0o755)
    env["PATH"] = f"{shim.parent}:{env['PATH']}"
    done = subprocess.run(script, shell=True, cwd=repo, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    outputs = done.stdout
    for line in ("2 x 3 of 448 px", "197 modules get LoRA: 20,221,952 trainable parameters", "recipe own-pdfs"):
        assert line in outputs
    assert shutil.which("colintern", path=env["PATH"]) == str(shim)


def test_commands_on_fetched_data_run_as_they_stand(fetched, capsys):
    said = {}
    for command in AFTER_FETCH:
        assert any(" ".join(c.words) == command for c in commands()), f"{command} is in no page any more"
        with contextlib.chdir(fetched):
            assert main(command.split()[1:]) == 0
        said[command] = capsys.readouterr().out
    assert "40 rows, 40 pages" in said["colintern data"]
    assert "15 modules get LoRA: 163,840 trainable parameters" in said["colintern verify"]
