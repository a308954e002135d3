"""The commands of the pages, and the mark by which a test says that it runs one of them as it stands there."""

import ast
import re
import shlex
from functools import cache
from pathlib import Path
from typing import NamedTuple

from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]
DOCS = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "dev").glob("*.md"),
        ROOT / "demo" / "base" / "README.md",
    ]
)
OURS = ("colintern", "dvc", "make", "python", "cluster/torchrun.sh", "wandb sync")  # looked for in sentences too
# What a reader puts something else for; in a test's command anything may stand there.
PLACEHOLDER = re.compile(r"MODEL|FOLDER|STORE|NAME|COMMIT|[AB]|KEY=VALUE|STUDY-NNN|study-007|my-experiment|.*\.\.\.")


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
        for m in re.finditer(rf"(?<!`)`((?:{'|'.join(OURS)}) [^`]+)`", text)
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


# Programs that are not where the tests run; all others are the real ones.
STAND_INS = {
    "docker": "no engine: it says what it was asked; docker/prove.sh runs the image's lines",
    "apt-get": "no network: gives packages that are built on the spot, or says what it was asked",
    "id": "another user than the one who runs the tests",
}


def words(command: str) -> tuple[str, ...]:
    return tuple(shlex.split(command))


def documented(command: str, **instead: str) -> str:
    """`command`, which is one of a page, with something in the place of NAME; a test may append options.

    `run_by` finds the calls.
    """
    assert words(command) in {found.words for found in commands()}, f"{command} is in no page any more"
    for name, value in instead.items():
        command = command.replace(name, value)
    return command


def block(page: str, after: str) -> str:
    """The first shell block of a page after some words, as it stands; `run_by` finds the calls."""
    found = re.search(rf"{re.escape(after)}.*?^```bash\n(.*?)^```", (ROOT / "docs" / page).read_text(), re.M | re.S)
    assert found, f"{page} has no block after {after}"
    return found[1]


@cache
def run_by() -> dict[tuple[str, ...], str]:
    """Commands that a test runs, as it is given them -> the test's file."""
    found: dict[tuple[str, ...], str] = {}
    for file in sorted((ROOT / "tests").glob("test_*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            name = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
            if name == "documented":
                command = ast.literal_eval(node.args[0])
                for keyword in node.keywords:
                    command = command.replace(str(keyword.arg), ast.literal_eval(keyword.value))
                found[words(command)] = file.name
            elif name == "block":
                page, after = map(ast.literal_eval, node.args)
                lines = block(page, after).replace("\\\n", "").splitlines()
                found |= {one.words: file.name for line in lines for one in split(ROOT / page, 0, line)}
    stages = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"].values()
    return found | {words(stage["cmd"]): "dvc repro" for stage in stages}


def runner_of(command: Command) -> str:
    """The file of a test that runs the command, by itself or with more options; "" where none does."""
    for run, file in run_by().items():
        pairs = zip(command.words, run, strict=False)
        if len(command.words) <= len(run) and all(a == b or PLACEHOLDER.fullmatch(a) for a, b in pairs):
            return file
    return ""


def stand_in(folder: Path, program: str, script: str) -> None:
    """A program of STAND_INS in a folder, to be put on PATH."""
    assert program in STAND_INS
    folder.mkdir(exist_ok=True)
    (folder / program).write_text(f"#!/bin/sh\n{script}\n")
    (folder / program).chmod(0o755)
