"""params.yaml is read as YAML 1.2 and checked whole: every rule, every kind of broken file (fault D6)."""

import ast
import doctest
import errno
import os
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import get_args

import pytest
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from colintern.commands import print_coloured
from colintern.core import rules
from colintern.core.errors import UserError, exit_on_user_error
from colintern.core.recipes import render_recipe
from colintern.core.rules import parse_mixture
from colintern.params import TYPES, Params, describe_demo_base, load_params

ROOT = Path(__file__).resolve().parent.parent
DEMO = render_recipe(ROOT / "recipes" / "demo.yaml")
SHA = "0123456789abcdef0123456789abcdef01234567"  # pragma: allowlist secret


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the demo recipe is valid: `base` is a folder there."""
    (tmp_path / "demo" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def changed(**values: str) -> str:
    """The demo recipe with some keys' values replaced by other YAML text."""
    text = DEMO
    for key, value in values.items():
        text, count = re.subn(rf"(?m)^{key}:.*\n(- .*\n)*", lambda _, k=key, v=value: f"{k}: {v}\n", text)
        assert count == 1, key
    return text


def load_text(text: str | bytes) -> Params:
    Path("params.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_params()


def refusal(text: str | bytes) -> str:
    with pytest.raises(UserError) as caught:
        load_text(text)
    return str(caught.value)


def test_the_examples_of_the_rules() -> None:
    assert doctest.testmod(rules).failed == 0


def test_demo_loads_frozen_and_typed() -> None:
    params = load_text(DEMO)
    assert params.benchmarks == ("demo",) and params.baselines == ("bm25", "hybrid")
    assert load_text(re.sub(r"(?m)^baselines:.*\n- bm25\n- hybrid$", "baselines: []", DEMO)).baselines == ()
    assert len(params.lora_targets) == 8
    assert type(params.weight_decay) is float
    with pytest.raises(FrozenInstanceError):
        params.lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize("text", ["3e-05", "3.0e-05", "0.00003", "3e-5", "3E-5"])
def test_every_spelling_of_a_learning_rate_is_the_same_float(text: str) -> None:
    assert load_text(changed(lr=text)).lr == 0.00003


def test_whole_numbers_serve_as_floats() -> None:
    params = load_text(changed(lr="1", weight_decay="0", max_grad_norm="2"))
    assert [type(x) for x in (params.lr, params.weight_decay, params.max_grad_norm)] == [float] * 3


BAD_VALUES = [
    ("base", '""', "not empty"),
    ("base", "", "text"),
    ("base", "3", "text"),
    ("base", '"  "', "not empty"),
    ("base_revision", "main", "40 hex digits"),
    ("base_revision", SHA[:39], "40 hex digits"),
    ("base_revision", SHA.upper(), "40 hex digits"),
    ("train_data", "[]", "text"),
    ("train_data", "demo*0", "weights 1 to 999"),
    ("train_data", "demo*two", "weights 1 to 999"),
    ("train_data", '"demo + "', "weights 1 to 999"),
    ("train_data", "demo + demo*2", "several different ones"),
    ("train_revision", "v1.0", "40 hex digits"),
    ("train_corpus", "3", "text"),
    ("train_corpus_revision", "main", "40 hex digits"),
    ("negatives", "-1", "0 to 1000"),
    ("negatives", "1.5", "a whole number"),
    ("negatives_file", "0", "text"),
    ("max_bad_fraction", "1", "0 <= max_bad_fraction < 1"),
    ("max_bad_fraction", "-0.1", "0 <= max_bad_fraction < 1"),
    ("max_bad_fraction", ".nan", "a number"),
    ("split_by", "file", "page, document"),
    ("train_on_test_pages", "yes", "true or false"),
    ("benchmarks", "demo", "a list of one or more texts"),
    ("benchmarks", "[]", "a list of one or more texts"),
    ("baselines", "bm25", "a list of texts or []"),
    ("eval_untrained", "yes", "true or false"),
    ("eval_untrained", "1", "true or false"),
    ("max_visual_tokens", "0", "1 to 65536"),
    ("max_visual_tokens", "65537", "1 to 65536"),
    ("tiling", "exakt", "exact, stock"),
    ("max_query_tokens", "15", "16 to 4096"),
    ("max_query_tokens", "4097", "16 to 4096"),
    ("dtype", "float16", "float32, bfloat16"),
    ("attention", "flash", "auto, sdpa, eager, flash_attention_2"),
    ("attention", "kernels-community/flash-attn2", "OWNER/NAME@<40 hex digits>"),
    ("attention", "kernels-community/flash-attn2@main", "OWNER/NAME@<40 hex digits>"),
    ("attention", f"kernels-community/flash-attn2@{'A' * 40}", "OWNER/NAME@<40 hex digits>"),
    ("attention", f"flash-attn2@{'a' * 40}", "OWNER/NAME@<40 hex digits>"),
    ("gradient_checkpointing", "0", "true, false or a whole number, 1 to 1000 where it is a number of layers"),
    ("compile", "1", "true or false"),
    ("launch", "0", "a whole number or auto, 1 to 4096 where it is a number"),
    ("launch", "two", "a whole number or auto"),
    ("launch", "1.5", "a whole number or auto"),
    ("lora_rank", "0", "1 to 1024"),
    ("lora_rank", "1025", "1 to 1024"),
    ("lora_alpha", "0", "1 to 65536"),
    ("lora_dropout", "1", "0 <= lora_dropout < 1"),
    ("lora_dropout", "-0.1", "0 <= lora_dropout < 1"),
    ("lora_targets", "custom_text_proj", "a list of one or more texts"),
    ("epochs", "0", "1 to 100000"),
    ("epochs", "2.5", "a whole number"),
    ("epochs", "5.0", "a whole number"),
    ("epochs", "true", "a whole number"),
    ("epochs", "null", "a whole number"),
    ("epochs", "fünf", "a whole number"),
    ("lr", "0", "0 < lr <= 1"),
    ("lr", "1.1", "0 < lr <= 1"),
    ("lr", "-1e-5", "0 < lr <= 1"),
    ("lr", '"3e-5"', "a number"),
    ("lr", "true", "a number"),
    ("lr", "[3e-5]", "a number"),
    ("lr", "{a: 1}", "a number"),
    ("lr", ".nan", "a number"),
    ("lr", ".inf", "a number"),
    ("lr", "3e-5 5", "a number"),
    ("lr_scheduler", "cosin", "linear, cosine, constant_with_warmup"),
    ("warmup_steps", "-1", "0 to 100000000"),
    ("weight_decay", "-0.01", "at least 0"),
    ("weight_decay", ".inf", "a number"),
    ("max_grad_norm", "0", "above 0"),
    ("max_grad_norm", "1" + "0" * 400, "a number"),
    ("batch_size", "1", "2 to 65536"),
    ("micro_batch_size", "0", "1 to 100000000"),
    ("temperature", "0", "above 0"),
    ("temperature", ".nan", "a number"),
    ("symmetric_loss", "1", "true or false"),
    ("logging_steps", "0", "1 to 100000000"),
    ("dev_queries", "0", "1 to 100000000"),
    ("save_steps", "0", "1 to 100000000"),
    ("tracker", "wandbb", "none, wandb, tensorboard, trackio"),
    ("tracker", "null", "text"),
    ("eval_batch_size", "0", "1 to 65536"),
    ("pool_factor", "0", "1 to 64"),
    ("dim", "129", "1 to 128"),
    ("embedding_precision", "int4", "float32, float16, int8, binary"),
    ("rescore_top_k", "-1", "0 to 1000000"),
    ("feature_cache_gb", "-1.0", "0"),
    ("feature_cache_format", "bfloat16", "exact, fp8"),
    ("embedding_cache_gb", "-1.0", "0"),
    ("seed", "-1", "0 to 4294967295"),
    ("seed", "4294967296", "0 to 4294967295"),
    ("deterministic", "1", "true or false"),
    ("threads", "0", "1 to 1024"),
    ("workers", "-1", "0 to 1024"),
]


@pytest.mark.parametrize(("key", "value", "valid"), BAD_VALUES)
def test_a_bad_value_is_named_with_what_would_be_valid(key: str, value: str, valid: str) -> None:
    message = refusal(changed(**{key: value}))
    [line] = [line for line in message.splitlines() if line.startswith(f"  {key}: ")]
    assert valid in line.partition("it must be")[2]
    if value.isalnum() and value not in ("true", "null"):
        assert value[:30] in line


def test_every_key_has_a_tested_rule() -> None:
    assert {key for key, _, _ in BAD_VALUES} == {field.name for field in fields(Params)}


def test_a_bad_list_entry_is_named_by_its_place() -> None:
    message = refusal(changed(lora_targets='[custom_text_proj, "(", ""]', benchmarks="[demo, 3]"))
    for part in ("benchmarks[1]: 3 (int)", "lora_targets[1]: '('", "lora_targets[2]: ''"):
        assert part in message
    assert "lora_targets[0]" not in message


def test_a_micro_batch_larger_than_the_batch_is_refused() -> None:
    assert "micro_batch_size: 64 is not valid; it must be at most batch_size, 32" in refusal(
        changed(batch_size="32", micro_batch_size="64")
    )
    negatives = {"batch_size": "32", "negatives": "2"}
    assert load_text(changed(**negatives, micro_batch_size="96")).micro_batch_size == 96
    assert "it must be at most batch_size x (1 + negatives), 96" in refusal(changed(**negatives, micro_batch_size="97"))


@pytest.mark.parametrize(("name_key", "revision_key"), [("base", "base_revision"), ("train_data", "train_revision")])
def test_hub_ids_need_a_revision_and_folders_have_none(folder: Path, name_key: str, revision_key: str) -> None:
    (folder / "données" / "pages").mkdir(parents=True)
    assert load_text(changed(**{name_key: "org/name", revision_key: SHA}))
    assert load_text(changed(**{name_key: "données/pages"}))
    assert f"  {revision_key}: '' (str) is not valid" in refusal(changed(**{name_key: "org/name"}))
    for local in ("données/pages", str(folder)):
        message = refusal(changed(**{name_key: local, revision_key: SHA}))
        assert f"  {revision_key}: '{SHA}' (str) is not valid; it must be \"\"" in message


@pytest.mark.parametrize("name", ["./name", "../name", "-org/name", "org/na--me", "org/name.git", "org/" + "n" * 97])
def test_what_the_hub_takes_for_no_id_is_a_path(name: str) -> None:
    """huggingface_hub raises its own error of these; a folder of that name is asked for instead."""
    with pytest.raises(HFValidationError):
        validate_repo_id(name)
    assert f"base {name!r} is not a hub id" in refusal(changed(base=f'"{name}"', base_revision=SHA))
    assert "attention: " in refusal(changed(attention=f"{name}@{SHA}"))


def test_a_mixture_is_sets_with_whole_weights() -> None:
    assert parse_mixture("demo") == [("demo", 1)]
    assert parse_mixture("demo + data/own/c++ docs*3") == [("demo", 1), ("data/own/c++ docs", 3)]
    assert load_text(changed(train_data="demo*2 + org/name", train_revision=SHA)).train_data == "demo*2 + org/name"
    assert "names 2 hub ids" in refusal(changed(train_data="org/one + org/two", train_revision=SHA))


def test_the_demo_data_have_no_revision() -> None:
    assert "train_revision: " in refusal(changed(train_data="demo", train_revision=SHA))


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("epoch", "epochs"), ("learning_rate", "lr"), ("ëpochs", "epochs"), ("学習率", "lr"), ("1", "seed")],
)
def test_a_misspelt_key_is_answered_with_the_right_one(wrong: str, right: str) -> None:
    value = re.search(rf"(?m)^{right}: (.*)", DEMO)[1]  # type: ignore[index]
    message = refusal(changed().replace(f"\n{right}:", f"\n{wrong}:"))
    assert re.search(rf"(?m)^  {right}: missing; it must be \S+", message)
    assert re.search(rf"(?m)^  {wrong}: unknown key, value \S+ .*; nearest key: {right}, \S+", message)
    assert repr(float(value) if "." in value else int(value)) in message


def test_a_key_too_many_is_answered_with_the_nearest() -> None:
    assert "max_num_visual_tokens: unknown key, value 4 (int); nearest key: max_visual_tokens" in refusal(
        DEMO + "max_num_visual_tokens: 4\n"
    )


@pytest.mark.parametrize("key", [field.name for field in fields(Params)])
def test_a_missing_key_is_named_with_its_valid_values(key: str) -> None:
    text = re.sub(rf"(?m)^{key}:.*\n(- .*\n)*", "", DEMO)
    assert re.search(rf"1 problem\n  {key}: missing; it must be \S+", refusal(text))


def test_a_key_given_twice_is_named_with_both_values() -> None:
    message = refusal(changed(lr="0.006") + "lr: 3e-05\n")
    assert re.search(r'duplicate key "lr" with value "3e-05" \(original value: "0\.006"\), line \d+; keep one', message)


def test_all_problems_come_in_one_message() -> None:
    message = refusal(changed(lr="7", dtype="x", epochs='"5"', micro_batch_size="64").replace("\nseed:", "\nsead:"))
    for key in ("lr", "epochs", "micro_batch_size", "seed", "sead", "dtype"):
        assert f"\n  {key}: " in message


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# nothing\n",
        "just text",
        "- a\n- list\n",
        "42",
        "lr: [1",
        "a: b: c",
        "\tlr: 1\n",
        "lr: 1\n---\nlr: 2\n",
        "lr: !!python/object:os.system x\n",
        "lr: *nowhere\n",
        "lr: 2026-13-45\n",
        "[" * 600,
        b"\xff\xfe\xfa",
        b"\x00\x01\x02",
        b"lr: \xe9\n",
    ],
)
def test_what_is_not_a_yaml_mapping_is_refused_by_file_name(text: str | bytes) -> None:
    assert refusal(text).startswith("params.yaml: ")


def test_what_cannot_be_read_is_refused_by_name(folder: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml: cannot be read: No such file.*go to the repository root"):
        load_params("nowhere.yaml")
    with pytest.raises(UserError, match="demo: cannot be read: Is a directory"):
        load_params(folder / "demo")


def test_a_program_exits_with_2_and_one_message(folder: Path) -> None:
    (folder / "params.yaml").write_text(changed(lr="7") + "größe: 3\n", encoding="utf-8")
    program = (
        "from colintern.core.errors import exit_on_user_error\nfrom colintern.params import load_params\n"
        "with exit_on_user_error():\n    load_params()\n"
    )
    # An ASCII terminal must get the message too, not a UnicodeEncodeError.
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii:backslashreplace"}
    run = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr.startswith("error: params.yaml: 2 problems\n")
    assert "lr: 7 (int)" in run.stderr
    assert "gr\\xf6\\xdfe: unknown key" in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_place_that_cannot_be_written_is_named_without_a_traceback(number: int, capsys) -> None:
    with pytest.raises(SystemExit) as ended, exit_on_user_error():
        raise OSError(number, os.strerror(number), "plots/train.csv")
    assert ended.value.code == 2 and capsys.readouterr().err == f"error: plots/train.csv: {os.strerror(number)}\n"
    with pytest.raises(OSError, match="a fault of the disk"), exit_on_user_error():
        raise OSError(errno.EIO, "a fault of the disk is none of the user's", "plots/train.csv")


def test_a_full_disk_that_names_no_file_is_one_sentence(tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as ended, exit_on_user_error():
        try:
            with open("/dev/full", "w") as full:
                full.write("x")
        except OSError as error:
            raise RuntimeError("a library's own words") from error
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert re.fullmatch(
        rf"error: No space left on device: \d+\.\d MB are free on the disk of {tmp_path}; make room\n", said
    )


def test_what_commands_a_terminal_is_escaped_whoever_prints_it(capsys) -> None:
    hostile, shown = "\x1b]0;title\x07\r\x9b\u202eé\t\n", "\\x1b]0;title\\x07\\r\\x9b\\u202eé\t\n"
    with pytest.raises(SystemExit), exit_on_user_error():
        print(hostile, end="")
        print_coloured("\033[32mpass\033[0m")
        raise UserError(hostile)
    told = capsys.readouterr()
    assert (told.out, told.err) == (f"{shown}\033[32mpass\033[0m\n", f"error: {shown}\n")
    print(hostile, end="")
    assert capsys.readouterr().out == hostile, "a program that calls the library keeps its own output"


def test_a_bug_after_an_error_that_was_handled_keeps_its_traceback() -> None:
    sizes: dict[str, int] = {}
    with pytest.raises(KeyError, match="a bug"), exit_on_user_error():
        try:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "a file that may be missing")
        except PermissionError:
            sizes["a bug"] += 1


def test_nothing_reads_params_with_pyyaml() -> None:
    """PyYAML (YAML 1.1) reads DVC's `lr: 3e-05` as text. Tests may read dvc.yaml and dvc.lock with it, by name."""
    sources = [
        path
        for top in ROOT.iterdir()
        if not top.name.startswith(".")
        for path in ([top] if top.suffix == ".py" else top.rglob("*.py") if top.is_dir() else [])
    ]
    assert ROOT / "colintern" / "params.py" in sources
    offences = []
    for path in sources:
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        imports = {ast.unparse(node) for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)}
        pyyaml = {line for line in imports if re.match(r"import (.*, )?yaml\b|from yaml\b", line)}
        allowed = {"import yaml"} if path.is_relative_to(ROOT / "tests") else {"from yaml import YAMLError"}
        calls = [ast.unparse(node) for node in nodes if isinstance(node, ast.Call) and pyyaml]
        loads = [call for call in calls if re.match(r"yaml\.\w*load\w*\(", call) and "dvc." not in call]
        offences += [f"{path.relative_to(ROOT)}: {code}" for code in [*(pyyaml - allowed), *loads]]
    assert not offences


BOUNDED = [key for key, hint in TYPES.items() if (get_args(hint) or (hint,))[0] in (int, int | str, bool | int)]


@pytest.mark.parametrize("digits", [11, 400])
def test_no_whole_number_is_without_an_upper_bound(digits: int) -> None:
    assert len(BOUNDED) > 15
    said = refusal(changed(**dict.fromkeys(BOUNDED, "1" + "0" * (digits - 1))))
    assert all(re.search(rf"\n  {key}: 1000\S* \(int\) is not valid; it must be ", said) for key in BOUNDED), said
    assert len(said) < 5000


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (changed(seed="1" * 5000), "is not valid YAML: Exceeds the limit (4300 digits)"),
        (DEMO + "#" * 100_000, "larger than 100,000 bytes"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n" + DEMO, "b: unknown key, value [['x', 'x'], ['x', 'x']] (list)"),
        (changed(feature_cache_gb="1e300"), "feature_cache_gb: 1e+300 (float) is not valid; it must be a number, 0 to"),
        (changed(train_data="demo*1000000"), "weights 1 to 999"),
    ],
)
def test_what_could_take_for_ever_is_refused_at_once(text: str, words: str) -> None:
    assert words in refusal(text)


def test_the_demo_base_reads_the_demo_alone():
    assert (
        describe_demo_base("demo/base", ["demo"]) == "" == describe_demo_base("OpenGVLab/InternVL3_5-1B-HF", ["docs"])
    )
    assert "cannot read data/own/docs, data/own/more; expect scores near chance" in describe_demo_base(
        "demo/base", ["demo", "data/own/more", "data/own/docs"]
    )
