"""`colintern recipe` and `colintern tiles`, run as programs; and what every recipe must look like."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from pages import documented, words

from colintern.core.recipes import TEMPLATE, render_recipe
from colintern.params import Params, load_params, load_recipe

ROOT = Path(__file__).resolve().parent.parent
RECIPES = [path for path in sorted((ROOT / "recipes").glob("*.yaml")) if path.stem != TEMPLATE]
KEYS = [field.name for field in fields(Params)]


def colintern(root: Path, *arguments: str, code: Path | None = None) -> "subprocess.CompletedProcess[str]":
    env = os.environ | {"PYTHONPATH": str(code or root)}
    return subprocess.run(
        [sys.executable, "-P", "-m", "colintern", *arguments],
        cwd=root,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )


def git(root: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *arguments], cwd=root, check=True, capture_output=True)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A checkout without git: the command, the recipes, and params.yaml as the demo recipe."""
    root = tmp_path / "checkout"
    (root / "demo" / "base").mkdir(parents=True)
    shutil.copytree(ROOT / "colintern", root / "colintern", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "recipes", root / "recipes")
    (root / "params.yaml").write_text(render_recipe(root / "recipes" / "demo.yaml"))
    return root


@pytest.fixture
def clone(copy: Path) -> Path:
    """The same as a git repository with everything committed."""
    git(copy, "init", "--quiet")
    git(copy, "add", "--all")
    git(copy, "commit", "--quiet", "--message", "all")
    return copy


def edit(root: Path) -> str:
    text = re.sub(r"(?m)^lr: .*", "lr: 0.0001", (root / "params.yaml").read_text())
    (root / "params.yaml").write_text(text)
    return text


def read_params_text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.name == "params.yaml" else render_recipe(path)


@pytest.mark.parametrize("path", [*RECIPES, ROOT / "params.yaml"], ids=lambda path: path.name)
def test_every_file_has_exactly_the_keys_in_order_and_a_comment_on_each(path: Path) -> None:
    lines = read_params_text(path).splitlines()
    assert [line.partition(":")[0] for line in lines if line[:1].isalpha()] == KEYS
    for key in KEYS:
        above = next(i for i, line in enumerate(lines) if line.startswith(f"{key}:"))
        comment = lines[above].partition("  # ")[2]
        while above and lines[above - 1].startswith("# "):
            above -= 1
            comment = lines[above] + comment
        assert "Guide:" in comment, key
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_opens_with_its_description(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "demo" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(render_recipe(path))
    load_params()
    assert re.match(r"# \w.{20,}", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_dvc_changes_one_line_of_a_recipe(path: Path, tmp_path: Path) -> None:
    """What `dvc exp run -S lr=3e-5` does to params.yaml: it drops comments after lists, and rewrites quotes."""
    from dvc.utils.hydra import apply_overrides  # here: DVC takes a second to import

    target = tmp_path / "params.yaml"
    target.write_text(render_recipe(path))
    apply_overrides(target, ["lr=3e-5"])
    assert target.read_text() == re.sub(r"(?m)^lr: .*", "lr: 3e-05", render_recipe(path))


def test_the_guides_optimal_settings_with_our_micro_batch() -> None:
    params = load_recipe(ROOT / "recipes" / "internvl3_5-1b.yaml")
    assert (params.epochs, params.lr, params.warmup_steps, params.lora_dropout) == (5, 5e-5, 100, 0.1)
    assert (params.lora_rank, params.lora_alpha, params.batch_size, params.micro_batch_size) == (32, 32, 64, 64)
    assert params.benchmarks == ("ViDoRe(v1)", "ViDoRe(v2)", "ViDoRe(v3)")
    # The guide writes the same modules with `*`, for 28 layers.
    names = [
        f"language_model.layers.{layer}.{part}_proj"
        for layer in range(28)
        for part in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
    ]
    frozen = ["vision_tower.encoder.layer.0.attention.q_proj", "multi_modal_projector.linear_1"]
    found = [
        name
        for name in [*names, "custom_text_proj", *frozen]
        if any(re.fullmatch(target, name) for target in params.lora_targets)
    ]
    assert found == [*names, "custom_text_proj"]


def test_recipes_are_listed_with_their_descriptions(copy: Path) -> None:
    listed = colintern(copy, "recipe").stdout.splitlines()
    assert [line.split()[0] for line in listed] == [path.stem for path in RECIPES]
    for line, path in zip(listed, RECIPES, strict=True):
        assert line.endswith(path.read_text().splitlines()[0].removeprefix("# "))
        assert len(line) <= 80 and line.endswith("."), line


def test_a_recipe_is_written_with_its_comments(clone: Path) -> None:
    run = colintern(clone, "recipe", "internvl3_5-1b")
    assert run.returncode == 0, run.stderr
    assert (clone / "params.yaml").read_text() == render_recipe(clone / "recipes" / "internvl3_5-1b.yaml")
    # Uncommitted, but a recipe word for word: nothing is lost by going back.
    assert colintern(clone, "recipe", "demo").returncode == 0


def test_uncommitted_edits_are_kept_unless_forced(clone: Path) -> None:
    edited = edit(clone)
    for _ in ("unstaged", "staged"):
        run = colintern(clone, "recipe", "demo")
        assert run.returncode == 2
        assert "params.yaml" in run.stderr and "--force" in run.stderr
        assert (clone / "params.yaml").read_text() == edited
        git(clone, "add", "params.yaml")
    assert colintern(clone, "recipe", "demo", "--force").returncode == 0
    assert (clone / "params.yaml").read_text() == render_recipe(clone / "recipes" / "demo.yaml")


def test_committed_edits_may_be_overwritten(clone: Path) -> None:
    edit(clone)
    git(clone, "commit", "--quiet", "--all", "--message", "edit")
    assert colintern(clone, "recipe", "internvl3_5-1b").returncode == 0


def test_an_untracked_file_counts_as_uncommitted(clone: Path) -> None:
    git(clone, "rm", "--quiet", "--cached", "params.yaml")
    git(clone, "commit", "--quiet", "--message", "untrack")
    assert colintern(clone, "recipe", "internvl3_5-1b").returncode == 0
    edited = edit(clone)
    assert colintern(clone, "recipe", "demo").returncode == 2
    assert (clone / "params.yaml").read_text() == edited


def test_without_git_only_a_recipe_is_overwritten(copy: Path) -> None:
    assert colintern(copy, "recipe", "internvl3_5-1b").returncode == 0
    edit(copy)
    assert colintern(copy, "recipe", "demo").returncode == 2
    (copy / "params.yaml").unlink()
    assert colintern(copy, "recipe", "demo").returncode == 0


@pytest.mark.parametrize("name", ["dmo", "../params", "démo", ""])
def test_an_unknown_recipe_is_answered_with_the_nearest(copy: Path, name: str) -> None:
    run = colintern(copy, "recipe", name)
    assert run.returncode == 2
    assert "unknown" in run.stderr and "demo" in run.stderr


def test_tiles_of_an_explicit_base(copy: Path) -> None:
    tiles = ("tiles", "1240", "1754", "--tile", "448", "--tokens-per-tile", "256", "--max-visual-tokens")
    assert "2 x 3 of 448 px\n" in colintern(copy, *tiles, "1536").stdout
    assert "2 x 3 of 448 px + thumbnail\ntokens  7 x 256 = 1792 " in colintern(copy, *tiles, "1792").stdout
    assert (
        "1 x 2 of 448 px + thumbnail\ntokens  3 x 256 = 768 "
        in colintern(copy, *tiles, "1536", "--tiling", "stock").stdout
    )
    run = colintern(copy, *tiles, "511", "--tiling", "stock")
    assert run.returncode == 2 and "max_visual_tokens: 511" in run.stderr and "at least 512" in run.stderr
    run = colintern(copy, *tiles, "255")
    assert run.returncode == 2
    assert "max_visual_tokens: 255" in run.stderr and "at least 256" in run.stderr


def test_tiles_of_the_base_in_params(copy: Path) -> None:
    sizes = {"image_size": [112, 112], "patch_size": [14, 14]}
    (copy / "demo" / "base" / "config.json").write_text(json.dumps({"vision_config": sizes}))
    run = colintern(copy, "tiles", "224", "336", "--max-visual-tokens", "96")
    assert "2 x 3 of 112 px\ntokens  6 x 16 = 96 visual tokens, at most 96\n" in run.stdout
    (copy / "params.yaml").write_text(render_recipe(copy / "recipes" / "internvl3_5-1b.yaml"))
    assert "2 x 3 of 448 px\ntokens  6 x 256 = 1536 " in colintern(copy, "tiles", "1240", "1754").stdout


@pytest.mark.parametrize(
    "arguments",
    [("0", "100"), ("100", "-1"), ("a", "100"), ("100",), ("9" * 5000, "1"), ("100", "100", "--tile", "448")],
)
def test_tiles_refuses_nonsense(copy: Path, arguments: tuple[str, ...]) -> None:
    run = colintern(copy, "tiles", *arguments)
    assert run.returncode == 2
    assert "error: " in run.stderr and "Traceback" not in run.stderr


def test_a_base_without_a_usable_config_is_named(copy: Path) -> None:
    for config in (None, "{", "{}", '{"vision_config": {"image_size": [], "patch_size": 14}}'):
        if config is not None:
            (copy / "demo" / "base" / "config.json").write_text(config)
        run = colintern(copy, "tiles", "100", "100")
        assert run.returncode == 2
        assert "demo/base/config.json" in run.stderr and "Traceback" not in run.stderr


def test_every_help_has_an_example(copy: Path) -> None:
    overview = colintern(copy, "--help").stdout
    commands = re.findall(r"(?m)^    ([\w-]+)(?:  +\w.*|\n {17}\w.*)$", overview.partition("Examples:")[0])
    assert {"check-adapter", "doctor", "recipe", "tiles", "verify"} <= set(commands)
    for command in commands:
        said = colintern(copy, command, "--help").stdout
        assert re.search(rf"Example:\n    colintern {command}\b", said)
        assert max(map(len, said.partition("Example:")[0].splitlines())) <= 80, said


def test_a_recipe_is_written_into_the_clone_it_is_run_in_not_the_one_that_is_installed(clone: Path, tmp_path: Path):
    other = shutil.copytree(clone, tmp_path / "other", ignore=shutil.ignore_patterns("colintern"))
    (other / "recipes" / "mine.yaml").write_text((other / "recipes" / "own-pdfs.yaml").read_text())
    before = (clone / "params.yaml").read_text()
    done = colintern(other, "recipe", "mine", code=clone)
    assert done.returncode == 0, done.stderr
    assert (other / "params.yaml").read_text() == render_recipe(other / "recipes" / "mine.yaml")
    assert (clone / "params.yaml").read_text() == before
    refused = colintern(tmp_path, "recipe", "demo", code=clone)
    assert refused.returncode == 2 and f"{tmp_path / 'recipes'}: no recipes here" in refused.stderr
    assert not (tmp_path / "params.yaml").exists()


def test_a_recipe_holds_only_what_differs_from_the_template() -> None:
    from ruamel.yaml import YAML

    read = YAML(typ="safe").load
    template = read(ROOT / "recipes" / f"{TEMPLATE}.yaml")
    for path in RECIPES:
        recipe = read(path)
        assert recipe.keys() >= {key for key, value in template.items() if value is None}
        assert not [key for key, value in recipe.items() if template[key] == value]


def test_keys_that_params_lack_are_added_with_values_that_change_nothing(clone: Path) -> None:
    before = (clone / "params.yaml").read_text()
    cut = before
    for key in ("pool_factor", "symmetric_loss"):
        cut = re.sub(rf"(?m)(?:^#.*\n)+^{key}: .*\n", "", cut)
    assert cut.count("\n") < before.count("\n") - 3
    edited = re.sub(r"(?m)^lr: .*", "lr: 0.002  # mine", cut)
    (clone / "params.yaml").write_text(edited)
    run = colintern(clone, *words(documented("colintern recipe --update"))[1:])
    assert run.returncode == 0, run.stderr
    assert run.stdout == "params.yaml: 2 keys added\n  symmetric_loss: false\n  pool_factor: 1\n"
    assert (clone / "params.yaml").read_text() == re.sub(r"(?m)^lr: .*", "lr: 0.002  # mine", before)
    assert colintern(clone, "recipe", "--update").stdout == "params.yaml: 0 keys added\n"


def test_an_update_refuses_what_it_cannot_know(clone: Path) -> None:
    text = (clone / "params.yaml").read_text()
    for edited, expected in (
        (re.sub(r"(?m)^lr: .*\n", "", text), ("lr: missing", "recipes/demo.yaml")),
        (text.replace("\nlr: ", "\nlearning_rate: "), ("lr: missing",)),
        (text + "nope: 1\n", ("nope: unknown key",)),
        ("lr: [", ("is not valid YAML",)),
    ):
        (clone / "params.yaml").write_text(edited)
        run = colintern(clone, "recipe", "--update")
        assert run.returncode == 2 and "Traceback" not in run.stderr
        assert all(word in run.stderr for word in expected), run.stderr
        assert (clone / "params.yaml").read_text() == edited
    for options in (("demo", "--update"), ("--update", "--force")):
        assert "takes no recipe and no --force" in colintern(clone, "recipe", *options).stderr


def test_a_recipe_with_a_wrong_key_is_refused(clone: Path) -> None:
    path = clone / "recipes" / "mine.yaml"
    text = (clone / "recipes" / "demo.yaml").read_text()
    path.write_text(text + "nope: 1\n")
    assert "mine.yaml: nope: no key of" in colintern(clone, "recipe", "mine").stderr
    path.write_text(re.sub(r"(?m)^lr: .*\n", "", text))
    assert "mine.yaml: lr: missing" in colintern(clone, "recipe", "mine").stderr
