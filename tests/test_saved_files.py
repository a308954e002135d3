"""Files that version 0.1.0 of November 2026 wrote are read by the present code."""

import json
import shutil

import pytest
import torch
from conftest import ROOT
from PIL import Image, ImageDraw

from colintern.__main__ import main
from colintern.params import load_params
from colintern.scoring.metrics import METRIC_KEYS

SAVED = ROOT / "tests" / "saved_2026_11"
SCORE = 10.567514  # of QUERY and the page below, by the code that saved the adapter
QUERY = "find the bill sent to Oslo"


def test_params_are_valid_after_an_update(tmp_path, monkeypatch, capsys):
    shutil.copy(SAVED / "params.yaml", tmp_path)
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    (tmp_path / "demo" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert main(["recipe", "--update"]) == 0
    params = load_params("params.yaml")
    assert (params.lr, params.batch_size, params.temperature, params.seed) == (0.006, 32, 0.015, 0)
    assert "keys added" in capsys.readouterr().out


def test_an_adapter_gives_the_score_it_gave():
    from colintern import ColIntern3_5, ColIntern3_5Processor

    page = Image.new("RGB", (224, 336), "white")
    ImageDraw.Draw(page).rectangle((28, 28, 140, 56), fill="black")
    model = ColIntern3_5.from_pretrained(SAVED / "adapter").eval()
    processor = ColIntern3_5Processor.from_pretrained(SAVED / "adapter")
    with torch.no_grad():
        queries = model(**processor.process_queries([QUERY]))
        pages = model(**processor.process_images([page]))
    assert processor.score_multi_vector(queries, pages).item() == pytest.approx(SCORE, abs=1e-3)


def test_metrics_keep_their_names():
    saved = {name: json.loads((SAVED / "metrics" / f"{name}.json").read_text()) for name in ("verify", "train", "eval")}
    now = {name: json.loads((ROOT / "metrics" / f"{name}.json").read_text()) for name in saved}
    for name, values in saved.items():
        assert values.keys() <= now[name].keys()
    assert now["eval"].keys() - saved["eval"].keys() == {"bm25_ndcg_at_5", "hybrid_ndcg_at_5"}
    assert {*METRIC_KEYS} <= {*saved["eval"]} and {*METRIC_KEYS} <= {*saved["eval"]["tasks"][0]}
