"""`colintern recommend`: the rules, what it prints, what it writes, what it refuses."""

import dataclasses
import difflib
import doctest
import json
import math
import re
import shutil

import pytest
import torch
from conftest import BASE, ROOT
from pages import documented, words

from colintern.__main__ import main
from colintern.commands.recommend import RECIPE_BENCHMARKS, Head, _format_head, _format_table
from colintern.core.errors import UserError
from colintern.core.recipes import render_recipe
from colintern.modeling.base_config import load_base_config
from colintern.monitoring import guide as guide_rules
from colintern.monitoring.guide import DEMO, MIN_EPOCHS, get_optimal_lr, get_optimal_rank, get_recommended_bounds
from colintern.params import load_params, load_recipe
from colintern.planning import costs as costs_module
from colintern.planning import recommend as rules
from colintern.planning.costs import CostModel
from colintern.planning.gpus import GPUS, find_gpu
from colintern.planning.probe import probe_steps
from colintern.planning.recommend import choose_warmup_steps, count_steps

COUNTED: dict[tuple[str, ...], CostModel] = {}
RECIPE = render_recipe(ROOT / "recipes" / "internvl3_5-1b.yaml")


@pytest.fixture(autouse=True)
def counted_once(monkeypatch):
    """A card changes nothing in what a step is made of: what one test has counted, the others take."""

    def costs(config, params):
        key = config.to_json_string(), repr(params)
        if key not in COUNTED:
            COUNTED[key] = CostModel(config, params)
        return COUNTED[key]

    monkeypatch.setattr(costs_module, "CostModel", costs)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """params.yaml for a folder that holds InternVL3.5-1B's config and for ColPali's pages."""
    (tmp_path / "base").mkdir()
    shutil.copy(ROOT / "tests" / "internvl3_5-1b.json", tmp_path / "base" / "config.json")
    text = re.sub(r"(?m)^base: .*", "base: base", RECIPE)
    (tmp_path / "params.yaml").write_text(re.sub(r"(?m)^base_revision: .*", "base_revision: ''", text))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def demo(tmp_path, monkeypatch):
    shutil.copytree(BASE, tmp_path / "demo" / "base")
    (tmp_path / "params.yaml").write_text(render_recipe(ROOT / "recipes" / "demo.yaml"))
    (tmp_path / "data").mkdir()
    own = {"demo (train)": {"rows": 3600, "pages": 1800}, "demo (dev)": {"rows": 100, "pages": 100}}
    own |= {"demo (test)": {"rows": 200, "pages": 200}}
    (tmp_path / "data" / "survey.json").write_text(json.dumps(own))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def guide(gpu_memory_gb):
    """The guide's get_optimal_batch_size."""
    return min(32, 2 ** int(math.log2(int(gpu_memory_gb * 1024 * 0.7 / 150))))


def test_the_rules():
    assert doctest.testmod(guide_rules).failed == 0
    sizes = [int(billions * 1e9) for billions in (0.3, 0.905, 2.4, 4.7, 7.9)]
    assert [get_optimal_lr(size) for size in sizes] == [7e-5, 5e-5, 5e-5, 3e-5, 3e-5]
    assert [get_optimal_rank(size) for size in sizes] == [16, 32, 32, 64, 64]
    for rule in (get_optimal_lr, get_optimal_rank):
        with pytest.raises(ValueError, match=r"1B parameters and up, and do not reach 1\.0 M"):
            rule(1_028_224)
    assert count_steps(118_195, load_recipe(ROOT / "recipes" / "internvl3_5-1b.yaml")) == 1846 * MIN_EPOCHS == 9230
    assert [choose_warmup_steps(steps) for steps in (9230, 448, 9)] == [100, 44, 0]


@pytest.mark.parametrize("billions", [0.2, 0.4, 0.9, 1.2, 2.4, 4.7, 7.9])
def test_what_is_recommended_passes_the_doctor(billions):
    size = int(billions * 1e9)
    bounds = get_recommended_bounds(size)
    assert bounds.lr[0] < get_optimal_lr(size) < bounds.lr[1]
    assert (bounds.epochs, bounds.batch) == (MIN_EPOCHS, guide_rules.MIN_BATCH_SIZE) and bounds.name != DEMO
    assert get_recommended_bounds(guide_rules.MIN_GUIDE_PARAMETERS - 1).name == DEMO


@pytest.mark.parametrize("base", ["internvl3_5-1b", "OpenGVLab/InternVL3_5-1B-HF", "OpenGVLab/x@" + "0" * 40])
def test_every_title_fits_a_terminal(base):
    head = Head(base, 8 * 10**9, 8 * 10**7, "RTX-4090", 24.0, "vidore/colpali_train_set", 118_195, 69_447, 3)
    lines = [*_format_table(base, []), *_format_head(head)]
    assert base in "".join(line.strip() for line in lines)
    assert max(map(len, lines)) <= 80


def test_hard_negatives_are_pages_of_a_step(demo, capsys):
    found = []
    for wrong in (0, 2):
        text = re.sub(r"(?m)^negatives: .*", f"negatives: {wrong}", (demo / "params.yaml").read_text())
        (demo / "params.yaml").write_text(text)
        main(["recommend", "--gpu", "h200", "--json"])
        out = json.loads(capsys.readouterr().out)
        micro = next(value["value"] for value in out["values"] if value["key"] == "micro_batch_size")
        found.append((out["negatives"], micro, out["predicted"]["operations"], out["predicted"]["seconds_per_step"]))
    (_, none, operations, seconds), (said, some, *more) = found
    assert (said, none, some) == (2, 32, 96), "the whole batch at once"
    assert 2.2 < more[0] / operations < 3 and 1.3 < more[1] / seconds < 3, "queries cost the same"


def test_the_guides_batch_formula_is_32_for_every_card_of_its_table():
    assert {guide(memory) for memory in (16, 24, 32, 40, 80)} == {32}


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("rtx5090", "RTX-5090"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("l4", "L4"),
        ("NVIDIA L40S", "L40S"),
    ],
)
def test_cards_are_found_by_the_names_they_go_by(name, card):
    assert find_gpu(name) == card


@pytest.mark.parametrize("name", ["a100", "rtx", "tpu", ""])
def test_an_unknown_card_is_answered_with_those_there_are(name):
    with pytest.raises(UserError, match=r"--gpu: .*(A100-80GB|RTX-4090)"):
        find_gpu(name)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (documented("colintern recommend --base internvl3_5-1b --gpu l40s"), r"time of a step +9\.6\d s on L40S"),
        (documented("colintern recommend --base internvl3_5-1b --gpu a100-80gb"), r"time of a step +4\.7\d s on A100"),
        (documented("colintern recommend --base internvl3_5-1b --gpu h200"), r"all 9,230 steps +4\.3 h"),
    ],
)
def test_what_the_pages_quote_is_what_it_says(checkout, capsys, command, said):
    main(words(command)[1:])
    assert re.search(said, capsys.readouterr().out)


def test_what_is_written_changes_values_only_and_is_what_was_printed(checkout, capsys):
    before = RECIPE
    (checkout / "params.yaml").write_text(RECIPE)  # internvl3_5-1b is its base
    main([*words(documented("colintern recommend --base internvl3_5-1b --gpu rtx-5090"))[1:], "--write", "--json"])
    printed = capsys.readouterr()
    told = json.loads(printed.out)
    assert printed.err == "recommend: counting memory and operations of a training step of internvl3_5-1b\n"
    values = {value["key"]: value["value"] for value in told["values"]}
    params = load_params("params.yaml")
    assert {key: getattr(params, key) for key in values} == values
    assert (params.lr, params.batch_size, params.micro_batch_size, params.epochs) == (5e-5, 64, 64, 5)
    assert (params.lora_rank, params.gradient_checkpointing, params.warmup_steps) == (32, True, 100)
    after = (checkout / "params.yaml").read_text()
    changed = [line for line in difflib.ndiff(before.splitlines(), after.splitlines()) if line[0] in "+-"]
    room = f"+ feature_cache_gb: {values['feature_cache_gb']}"
    assert changed == ["- feature_cache_gb: 230.0", room], "the recipe is what is recommended for its card"
    assert told["predicted"]["peak_bytes"] == sum(told["predicted"]["memory"].values()) < 0.85 * 32 * 2**30
    assert told["predicted"]["steps"] == 9230


def test_every_line_fits_a_terminal_and_says_where_it_comes_from(checkout, capsys):
    main(["recommend", "--gpu-memory", "16", "--rows", "640", "--pages", "100"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    rows = {line.split()[0]: line.split() for line in lines if re.match(r"[a-z]\w*_?\w* +\S+ +(guide|computed) ", line)}
    assert rows["warmup_steps"][1] == "5"  # a tenth of 640 / 64 x 5 steps
    assert rows["micro_batch_size"][1:3] == ["2", "computed"]  # a second forward pass is cheaper than a third
    assert rows["gradient_checkpointing"][1:3] == ["false", "computed"]
    assert "predicted, not measured:" in lines
    assert any("no times: name a card with --gpu" in line for line in lines)


def test_stock_tiling_takes_the_memory_of_the_budget_and_the_time_of_an_a4_page(checkout, capsys):
    """6 tiles fit the budget, and an A4 page gets 3 of them; below 512 tokens there are no two tiles to recommend."""
    plans = {}
    for tiling in ("exact", "stock"):
        text = (checkout / "params.yaml").read_text()
        (checkout / "params.yaml").write_text(re.sub(r"(?m)^tiling: .*", f"tiling: {tiling}", text))
        main(["recommend", "--gpu", "h200", "--rows", "6400", "--pages", "1000", "--json"])
        report = json.loads(capsys.readouterr().out)
        plans[tiling] = report["predicted"] | {value["key"]: value for value in report["values"]}
    exact, stock = plans["exact"], plans["stock"]
    assert exact["max_visual_tokens"]["reason"] == "6 tiles, 2 x 3 of A4"
    assert stock["max_visual_tokens"]["reason"] == "6 tiles, 1 x 2 + thumbnail of A4"
    assert stock["peak_bytes"] == exact["peak_bytes"]
    assert (exact["feature_cache_gb"]["value"], stock["feature_cache_gb"]["value"]) == (3.2, 1.6)
    assert stock["feature_hours"] == pytest.approx(exact["feature_hours"] / 2)
    assert 0.4 < stock["seconds_per_step"] / exact["seconds_per_step"] < 0.6
    params, tried = load_params("params.yaml"), []
    costs = CostModel(load_base_config("internvl3_5-1b", params), params)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="too little for any step"):
        patch.setattr(rules, "optimal_micro_batch_size", lambda memory, costs, step: tried.append(step.tiles) or 0)
        rules.plan_step(costs, 141, GPUS["H200"])
    assert sorted(set(tried)) == [2, 3, 4, 6]


def test_pages_follow_the_benchmarks_and_what_is_not_counted_is_named(checkout, capsys):
    assert load_recipe(ROOT / "recipes" / "internvl3_5-1b.yaml").benchmarks == RECIPE_BENCHMARKS
    text = re.sub(r"(?m)^- ViDoRe\(v3\)$", "- Vidore3HrRetrieval", (checkout / "params.yaml").read_text())
    (checkout / "params.yaml").write_text(text)
    for base, said in (
        ([], "50,453 pages (vidore/colpali_train_set, without Vidore3HrRetrieval)"),
        (["--base", "internvl3_5-1b"], "69,447 pages (vidore/colpali_train_set)"),
    ):
        main(["recommend", "--gpu", "h200", *base])
        assert f"118,195 pairs, {said}" in " ".join(capsys.readouterr().out.split())


def test_the_guides_table_beside_the_computed_one(checkout, capsys):
    main(words(documented("colintern recommend --base internvl3_5-1b --table"))[1:])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    rows = [re.findall(r"[\d.-]+", line) for line in out.splitlines() if " GB " in line]
    assert [row[:2] for row in rows] == [["16", "8"], ["24", "12"], ["32", "16"], ["40", "24-32"], ["80", "24-32"]]
    for row in rows:
        assert int(row[2]) < int(row[4])  # checkpointing fits more
        assert all(float(peak) < 0.85 * int(row[0]) for peak in (row[3], row[5]))


def test_where_none_fits_its_json_says_null(checkout, capsys, monkeypatch):
    monkeypatch.setattr(rules, "optimal_micro_batch_size", lambda *arguments: 0)
    main(["recommend", "--base", "internvl3_5-1b", "--table", "--json"])
    told = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert [row for _, _, row in told["table"]] == [[[0, None], [0, None]]] * 5


def test_the_demo_gets_no_rule_of_the_guides(demo, capsys):
    main(["recommend", "--write"])
    out = capsys.readouterr().out
    assert "do not reach" in out and "How the demo answers to its settings" in " ".join(out.split())
    assert re.search(r"(?m)^micro_batch_size +32 ", out) and not re.search(r"(?m)^lr ", out)
    assert "3,600 pairs, 2,100 pages (data/survey.json)" in out
    assert load_params("params.yaml").lr == 0.006


def test_a_probe_runs_steps_with_the_params_and_without_data(demo):
    params = dataclasses.replace(load_params("params.yaml"), batch_size=8, micro_batch_size=4, negatives=1)
    warm_up, step = probe_steps(params, "demo/base")
    assert (warm_up.settings.num_pages, step.settings.num_pages, step.settings.num_chunks) == (4, 16, 4)
    assert (step.settings.tiles, step.predicted_seconds) == (params.max_visual_tokens // 16, None)
    assert step.seconds > 0 and step.peak_bytes > step.predicted.memory["base weights"]
    assert step.predicted.peak_bytes > warm_up.predicted.peak_bytes
    assert sorted(path.name for path in demo.iterdir()) == ["data", "demo", "params.yaml"], "nothing is saved"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu", "tpu"], ["--gpu", "'tpu'", "A100-80GB"]),
        (["--gpu-memory", "much"], ["--gpu-memory", "'much'", "1 to 1024"]),
        (["--gpu-memory", "0"], ["--gpu-memory", "'0'"]),
        (["--gpu-memory", "nan"], ["--gpu-memory", "'nan'"]),
        pytest.param(
            ["--gpu-memory", "auto"],
            ["--gpu-memory", "there is none here"],
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        (["--gpu-memory", "2"], ["--gpu-memory: 2 GB", "2.0 GiB", "85%"]),
        (["--rows", "0"], ["--rows", "'0'", "whole number"]),
        (["--base", "nowhere"], ["base", "'nowhere'", "internvl3_5-1b"]),
        (["--base", "internvl3_5-2b", "--write"], ["--write", "internvl3_5-2b", "params.yaml"]),
        (["--table", "--write"], ["--write", "--table"]),
        (["--base", "internvl3_5-2b", "--probe"], ["--probe", "internvl3_5-2b", "params.yaml"]),
    ],
)
def test_bad_input_is_named(checkout, capsys, arguments, words):
    before = (checkout / "params.yaml").read_text()
    with pytest.raises(SystemExit) as stop:
        main(["recommend", *arguments])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert all(word in error for word in words), error
    assert (checkout / "params.yaml").read_text() == before


def test_own_data_without_numbers_asks_for_them(checkout, capsys):
    text = (checkout / "params.yaml").read_text()
    text = re.sub(r"(?m)^train_data: .*", "train_data: data/own/docs", text)
    (checkout / "params.yaml").write_text(re.sub(r"(?m)^train_revision: .*", "train_revision: ''", text))
    (checkout / "data" / "own" / "docs").mkdir(parents=True)
    with pytest.raises(SystemExit) as stop:
        main(["recommend"])
    assert stop.value.code == 2
    assert "data/survey.json does not know data/own/docs" in capsys.readouterr().err


def test_every_card_has_its_source():
    for name, gpu in GPUS.items():
        assert "sheet" in gpu.source or "white paper" in gpu.source, name
        assert gpu.bf16 > gpu.fp32 > 0 < gpu.bandwidth
