import os
import subprocess
import sys
from itertools import combinations

import pytest
import torch
from conftest import ROOT
from PIL import ImageFont
from safetensors.torch import load_file

from demo.corpus import GOODS, KINDS, generate_corpus, get_split
from demo.pages import FONTS, load_font

pytestmark = pytest.mark.integration
SPLITS = {"train": (400, 2), "dev": (40, 1), "test": (80, 1)}


@pytest.fixture(scope="module")
def splits():
    return {name: generate_corpus(name, pages, queries, seed=0) for name, (pages, queries) in SPLITS.items()}


def test_the_same_seed_draws_the_same_pages_and_another_does_not(splits):
    again, other = generate_corpus("test", 5, 1, seed=0), generate_corpus("test", 5, 1, seed=1)
    assert [p.image.tobytes() for p in again] == [p.image.tobytes() for p in splits["test"][:5]]
    assert [p.queries for p in again] == [p.queries for p in splits["test"][:5]]
    assert [p.queries for p in again] != [p.queries for p in other]


def test_no_library_of_the_system_has_a_say_in_how_wide_a_word_is():
    """Pillow takes raqm where FriBidi is installed, and other pages, other queries, another score came of it."""
    assert {load_font(name, 10).layout_engine for name in FONTS} == {ImageFont.Layout.BASIC}


def test_splits_share_no_page_no_query_and_no_asked_pair(splits):
    def values(page, query):
        words = set(query.split())
        return frozenset(v for v in page.facts.values() if v in words or GOODS.get(v) in words)

    images = {n: {p.image.tobytes() for p in pages} for n, pages in splits.items()}
    queries = {n: {q for p in pages for q in p.queries} for n, pages in splits.items()}
    asked = {n: {values(p, q) for p in pages for q in p.queries} for n, pages in splits.items()}
    for a, b in combinations(splits, 2):
        assert not images[a] & images[b]
        assert not queries[a] & queries[b]
        assert not asked[a] & asked[b]
    for name, pairs in asked.items():
        assert all(len(pair) == 2 and get_split(tuple(pair)) == name for pair in pairs)


def test_one_page_answers_a_query(splits):
    for pages in splits.values():
        for page in pages:
            for query in page.queries:
                words = set(query.split())
                pair = {v for v in page.facts.values() if v in words or GOODS.get(v) in words}
                [kind] = [kind for kind, spoken in KINDS.items() if words & set(spoken)]
                assert [p.name for p in pages if p.kind == kind and pair <= set(p.facts.values())] == [page.name], query


def test_all_kinds_of_document_occur(splits):
    assert {p.kind for p in splits["test"]} == {"invoice", "report", "table", "chart", "letter"}


def test_some_queries_say_it_in_other_words(splits):
    words = {w for p in splits["train"] for q in p.queries for w in q.split()}
    assert words & set(GOODS.values())


@pytest.mark.slow
def test_the_base_is_made_alike_twice_and_goes_on_from_a_checkpoint(tmp_path):
    def make(*arguments: str) -> subprocess.Popen:
        script = [sys.executable, "demo/pretrain.py", "--steps", "2", "--batch", "2", *arguments]
        return subprocess.Popen(script, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})

    one, two, more = tmp_path / "one", tmp_path / "two", tmp_path / "more"
    for run in (make("--out", str(one)), make("--out", str(two))):
        assert run.wait() == 0
    files = [path.name for path in sorted(one.iterdir())]
    assert "model.safetensors" in files
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in files)
    assert make("--out", str(more), "--start", str(one), "--drift", "0").wait() == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (one, more))
    assert before.keys() == after.keys() and any(not torch.equal(before[key], after[key]) for key in before)
    # Two steps change a weight a little; weights drawn anew would have nothing in common.
    key = next(k for k in before if k.endswith("embed_tokens.weight"))
    assert torch.allclose(before[key].float(), after[key].float(), atol=0.05)
