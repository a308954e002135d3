"""Compose params.yaml: the commented template of all keys, and a recipe of those whose values differ from it.

Both are edited as text, because the comments are half of what a user reads in params.yaml.
"""

import re
from pathlib import Path

from colintern.core.errors import UserError

RECIPES = Path("recipes")  # of the clone in which a command runs, wherever colintern is installed
TEMPLATE = "template"
# A key with the comment lines directly above it, its value, a comment beside it, and the items of a list.
ENTRY = re.compile(
    r"(?P<comment>(?:^#(?! ---).*\n)*)^(?P<key>\w+):(?P<value>(?: (?! *#)\S.*?)?)(?P<beside>(?: +#.*)?)\n"
    r"(?P<items>(?:^- .*\n)*)",
    re.MULTILINE,
)


def list_recipes(folder: Path = RECIPES) -> dict[str, Path]:
    """Return the recipes of a clone by name; raise UserError if the folder has none."""
    recipes = {path.stem: path for path in sorted(folder.glob("*.yaml")) if path.stem != TEMPLATE}
    if not recipes or not (folder / f"{TEMPLATE}.yaml").is_file():
        raise UserError(f"{folder.absolute()}: no recipes here; run this in the top folder of a clone")
    return recipes


def read_summary(recipe: Path) -> str:
    """Return the first line of a recipe, which describes it."""
    return recipe.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")


def render_recipe(recipe: Path) -> str:
    """Return the text of the params.yaml of a recipe: every key, each with its comment."""
    text, template = recipe.read_text(encoding="utf-8"), _read_template(recipe.parent)
    description, _, overrides = text.partition("\n\n")
    entries = {match["key"]: match for match in ENTRY.finditer(overrides)}
    keys = {match["key"] for match in ENTRY.finditer(template)}
    if unknown := sorted(entries.keys() - keys):
        raise UserError(f"{recipe}: {', '.join(unknown)}: no key of {recipe.parent / TEMPLATE}.yaml")
    missing = [key for key in _list_keys_without_value(template) if key not in entries]
    if missing:
        raise UserError(f"{recipe}: {', '.join(missing)}: missing; the template has no value for it")

    def fill(match: re.Match[str]) -> str:
        entry = entries.get(match["key"])
        if entry is None:
            return match[0]
        comment = match["comment"] + entry["comment"]
        return f"{comment}{match['key']}:{entry['value']}{match['beside']}\n{entry['items']}"

    return f"{description}\n#\n{ENTRY.sub(fill, template)}"


def add_missing_keys(text: str, folder: Path = RECIPES) -> tuple[str, list[str]]:
    """Add to a params.yaml the keys that it lacks, with the template's values, which turn each feature off.

    Returns the new text and the added entries (`key: value`); raises UserError for a missing key without such a value.
    """
    template = _read_template(folder)
    present = {match["key"] for match in ENTRY.finditer(text)}
    without_value = _list_keys_without_value(template)
    if needed := [key for key in without_value if key not in present]:
        raise UserError(
            f"params.yaml: {', '.join(needed)}: missing, and no value leaves a run as it was; add it, with a value of "
            f"one of {', '.join(f'recipes/{name}.yaml' for name in list_recipes(folder))}"
        )
    added, last = [], ""
    for entry in ENTRY.finditer(template):
        if entry["key"] not in present:
            added.append(f"{entry['key']}:{entry['value']}")
            text = _insert_after(text, last, entry[0])
        last = entry["key"]
    return text, added


def _insert_after(text: str, key: str, entry: str) -> str:
    matches = [match for match in ENTRY.finditer(text) if match["key"] == key]
    end = matches[0].end() if matches else 0
    return text[:end] + entry + text[end:]


def _list_keys_without_value(template: str) -> list[str]:
    return [match["key"] for match in ENTRY.finditer(template) if not match["value"] and not match["items"]]


def _read_template(folder: Path) -> str:
    return (folder / f"{TEMPLATE}.yaml").read_text(encoding="utf-8").partition("\n\n")[2]
