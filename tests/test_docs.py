"""The documentation held against the code: commands, their options, links, files, tests and messages it names.

Every command of every page is run by a test, which marks it with `documented` (pages.py), or is in `CANNOT`, with the
reason. Here are those that need no run of the pipeline, as they stand, in a copy of the tracked files.
"""

import argparse
import ast
import contextlib
import io
import os
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT
from pages import DOCS, Command, commands, documented, runner_of, words
from test_dvc_commands import copy_working_tree

from colintern.__main__ import _build_parser, main

RUN = (  # as they stand, in a copy where nothing was run yet
    documented("colintern recipe"),
    documented("colintern tiles 1240 1754"),
    documented("colintern recipe internvl3_5-1b"),
    documented("colintern tiles 1240 1754"),
    documented("colintern verify --base internvl3_5-1b"),
    documented("colintern recipe own-pdfs"),
)
AFTER_FETCH = (  # after fetch-data on a small set
    documented("colintern data"),
    documented("colintern verify"),
    documented("colintern recommend --probe"),
)
CANNOT = {  # how a command begins, and why no test runs it
    "make test": "the suite itself; .github/workflows/tests.yml runs it, and `make test-slow`",
    "make test-unit": "a part of the suite",
    "make test-slow": "a part of the suite",
    "make check": "is the first step of `make test`",
    "dvc queue kill NAME": "it is SIGINT to one of the queue's runs, which test_survival.py sends",
    "python -m pytest": "files of the suite",
    "pip install ray[client,data]": "test_ray.py installs Ray beside the packages of the locks, which it needs",
    "git clone URL-OF-THIS-REPOSITORY": "the address is that of the clone's origin",
    "cd colintern": "the folder of that clone",
}
VALUES = r"\.\.\.|\d+|\blearning_rate|\blr\b|\bloss is nan\b"  # of a message, as the page gives them
OTHERS = {  # git's, DVC's
    "Could not override 'learning_rate'. To append to your config use +learning_rate=1",
    "Unable to acquire lock",
    "Unable to read RWLock-file '.dvc/tmp/rwlock'. JSON structure is corrupted",
    "'./dvc.lock' validation failed.",
    "'./dvc.lock' is invalid (possible merge conflicts).",
    "dubious ownership",
    "'ascii' codec can't encode character",
    "Git user name and email must be configured",
}


def begins_with(command: Command, begin: str) -> bool:
    return command.words[: len(words(begin))] == words(begin)


def why_not(command: Command) -> str:
    return next((why for begin, why in CANNOT.items() if begins_with(command, begin)), "")


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


def test_every_command_is_run_by_a_test_or_cannot_be():
    neither = {str(c): c for c in commands() if not runner_of(c) and not why_not(c)}
    assert not neither, "run it in a test, marked with documented(), or say in CANNOT why not:\n" + "\n".join(neither)


def test_what_cannot_be_run_is_in_a_page_and_in_no_test():
    for begin in CANNOT:
        assert (found := [c for c in commands() if begins_with(c, begin)]), f"{begin}: in no page"
        assert not any(map(runner_of, found)), f"{begin}: {found[0]} is run by now"


def test_colintern_takes_every_command():
    parser = _build_parser()
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


def test_make_alone_lists_what_it_can_do_within_80_columns():
    command = documented("make help").split()
    # An outer make, as that of `make test`, would have this one name the folder that it enters.
    env = {key: value for key, value in os.environ.items() if not key.startswith("MAKE") and key != "MFLAGS"}

    def list_targets(*words: str) -> str:
        return subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout

    listed = list_targets(*command)
    assert list_targets(command[0]) == listed
    names = {word for command in of("make") for word in command.words[1:] if "=" not in word}
    described = dict(re.fullmatch(r"  make (\S+) +(\S.+)", line).groups() for line in listed.splitlines())
    assert names <= set(described) and max(map(len, listed.splitlines())) <= 80


def test_python_runs_modules_and_options_that_are_there():
    faults = []
    for command in of("python"):
        words = command.words[1:]
        if words[0] == "-c":
            assert "..." in words[1] or ast.parse(words[1])
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
    text = (ROOT / "dev" / "reproducibility-tests.md").read_text()
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


@pytest.mark.integration
def test_cheap_commands_run_as_they_stand(tmp_path, capsys):
    copy_working_tree(tmp_path)
    with contextlib.chdir(tmp_path):
        for command in RUN:
            overwrite = ["--force"] if command.startswith("colintern recipe ") else []
            assert main([*words(command)[1:], *overwrite]) == 0
    said = capsys.readouterr().out
    for line in ("2 x 3 of 448 px", "197 modules get LoRA: 20,221,952 trainable parameters", "recipe own-pdfs"):
        assert line in said


@pytest.mark.integration
def test_commands_on_fetched_data_run_as_they_stand(fetched, capsys):
    said = {}
    for command in AFTER_FETCH:
        with contextlib.chdir(fetched):
            assert main(command.split()[1:]) == 0
        said[command] = capsys.readouterr().out
    assert "40 rows, 40 pages" in said["colintern data"]
    assert "15 modules get LoRA: 163,840 trainable parameters" in said["colintern verify"]
    sizes = re.findall(r"(?m)^batch_size (\d), micro_batch_size \d: .* s, peak", said["colintern recommend --probe"])
    assert sizes == ["2", "8"]
