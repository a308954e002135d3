"""Names and types are the field's: few one-word names, no name twice, few `Any`; only commands and stages print."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator

from conftest import ROOT

TOPS = ("colintern", "stages", "demo")
MAX_ONE_WORD_SHARE = 0.1
MAX_ANY_PER_1000_LINES = 8
# One-word names of torch, transformers, PEFT, mteb, DVC, tqdm and the standard library for the same thing.
FIELD_WORDS = frozenset(
    "backward close collate encode flush forward get load main open pack pool read render run save score similarity "
    "step submit train unpack update write".split()
)
ENTRY_POINTS = {"main", "run", "add_arguments"}  # of stages and of commands, one each


def list_definitions() -> Iterator[tuple[str, ast.AST, bool]]:
    """Yield the module, the node and whether it is at the top level, of each class and function."""
    for top in TOPS:
        for file in (ROOT / top).rglob("*.py"):
            tree = ast.parse(file.read_text())
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                    yield file.relative_to(ROOT).as_posix(), node, node in tree.body


def test_few_functions_have_a_name_of_one_word():
    names = [
        (module, node.name.strip("_"))
        for module, node, _ in list_definitions()
        if not isinstance(node, ast.ClassDef) and not re.fullmatch(r"__\w+__", node.name)
    ]
    counted = [(module, name) for module, name in names if name not in FIELD_WORDS]
    one_word = [f"{module}: {name}" for module, name in counted if "_" not in name]
    share = len(one_word) / len(counted)
    assert share <= MAX_ONE_WORD_SHARE, f"{share:.0%} of {len(counted)}: " + ", ".join(one_word)


def test_no_class_or_public_function_has_the_name_of_another():
    modules = defaultdict(list)
    for module, node, is_top in list_definitions():
        if is_top and not node.name.startswith("_") and node.name not in ENTRY_POINTS:
            modules[node.name].append(module)
    assert not {name: found for name, found in modules.items() if len(found) > 1}


def test_only_commands_and_stages_print():
    """All else logs: a program that imports it decides what is shown, and ranks other than 0 are silent."""
    printing = {
        file.relative_to(ROOT).as_posix()
        for file in (ROOT / "colintern").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "tqdm.write")
    }
    assert {name for name in printing if not name.startswith("colintern/commands/")} == set()


def test_few_values_have_no_type():
    files = [file.read_text() for file in (ROOT / "colintern").rglob("*.py")]
    num_lines = sum(len(text.splitlines()) for text in files)
    nodes = (node for text in files for node in ast.walk(ast.parse(text)))
    num_any = sum(isinstance(node, ast.Name) and node.id == "Any" for node in nodes)
    assert num_any <= MAX_ANY_PER_1000_LINES * num_lines / 1000, f"{num_any} of Any in {num_lines} lines"


def test_metrics_are_named_in_one_table():
    """Docstrings and texts may name them; a key of a file or a row comes from colintern/scoring/metrics.py."""
    literals = {
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for file in (ROOT / "colintern").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and re.fullmatch(r"\w*(ndcg|recall)_at_\d+", str(node.value))
    }
    assert {place for place in literals if not place.startswith("colintern/scoring/metrics.py")} == set()
