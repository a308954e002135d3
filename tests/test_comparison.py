"""The statistics of `colintern compare`, on scores whose truth is known, and its report."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import ROOT

from bench import seeds
from colintern.__main__ import main
from colintern.analysis import significance
from colintern.analysis.comparison import (
    EvalComparison,
    compare_eval_runs,
    comparison_to_markdown,
    format_comparison,
)
from colintern.analysis.eval_runs import load_eval_group, load_eval_run
from colintern.analysis.significance import NUM_RESAMPLES, ScoreComparison, ScorePair, adjust_holm, compare_scores
from colintern.core.errors import UserError
from colintern.core.page_labels import count_columns, label_page
from colintern.evaluation.results import QueryResult, write_query_results
from colintern.scoring.metrics import METRIC_KEYS

pytestmark = pytest.mark.integration
GAINS = [1 / math.log2(rank + 1) if rank <= 5 else 0.0 for rank in range(1, 31)]


def ranks(rng: np.random.Generator, skill: np.ndarray) -> np.ndarray:
    """A rank of 1 to 30 for each query: the easier a query (skill), the better."""
    return np.minimum(rng.geometric(skill), 30)


def pairs(before, after, task: str = "Task", subset: str = "default", benchmark: str = "bench") -> list[ScorePair]:
    return [ScorePair(benchmark, task, subset, float(a), float(b)) for a, b in zip(before, after, strict=True)]


def scored(of: np.ndarray) -> np.ndarray:
    return np.array(GAINS)[of - 1]


def test_under_the_null_the_test_fires_as_often_as_it_says():
    rng = np.random.default_rng(5)
    fired = 0
    for number in range(200):
        skill = rng.uniform(0.2, 0.9, 150)  # some queries are easier than others, for both models alike
        [row] = compare_scores(pairs(scored(ranks(rng, skill)), scored(ranks(rng, skill)), f"Task{number}"))
        fired += row.p < 0.05
    assert 0.02 <= fired / 200 <= 0.08, fired


def test_intervals_hold_the_true_difference_as_often_as_they_say():
    rng = np.random.default_rng(6)
    held = 0
    for number in range(200):
        truth = rng.uniform(0.2, 0.8, 150)
        before = truth + rng.normal(0, 0.1, 150)
        [row] = compare_scores(pairs(before, truth + 0.03 + rng.normal(0, 0.1, 150), f"Task{number}"))
        held += row.low <= 0.03 <= row.high
    assert 0.91 <= held / 200 <= 0.99, held


@pytest.mark.parametrize("spread", [0.0, 0.2])
def test_groups_of_seeds_without_a_difference_fire_as_often_as_they_say(spread, monkeypatch):
    """Of a spread of 0 and of 3 points of NDCG@5 in a run; queries alone would find 29 % at 0.2."""
    monkeypatch.setattr(significance, "NUM_RESAMPLES", 500)
    monkeypatch.setattr(seeds, "QUERIES", 100)
    _, share = seeds.count_false(3, 3, spread, runs=200)
    assert 2 <= share["compare"] <= 8, share
    assert spread == 0 or share["queries"] > 12, "queries alone find too many"


def test_a_group_of_seeds_by_hand():
    """Queries and seeds without interaction: seeds alone decide, by Student's t with 4 degrees of freedom."""
    a = np.array([[0.1, 0.2, 0.3], [0.2, 0.3, 0.4], [0.0, 0.1, 0.2]])  # (queries, seeds)
    [row] = compare_scores(ScorePair("bench", "Task", "", *pair) for pair in zip(a, a + 0.1, strict=True))
    assert (row.spread_before, row.spread_after) == pytest.approx((0.1, 0.1))
    assert row.difference == pytest.approx(0.1) and (row.wins, row.losses, row.ties) == (3, 0, 0)
    assert row.high - row.difference == pytest.approx(2.776 * math.sqrt(0.01 * 2 / 3), rel=0.05)
    assert row.low == pytest.approx(0.2 - row.high) and row.p == pytest.approx(0.288, abs=0.02)


def test_identical_inputs_give_p_1_and_no_verdict():
    scores = scored(ranks(np.random.default_rng(1), np.full(100, 0.5)))
    [row] = compare_scores(pairs(scores, scores))
    assert (row.p, row.adjusted, row.low, row.high, row.verdict) == (1, 1, 0, 0, "")
    assert (row.wins, row.losses, row.ties) == (0, 0, 100)


def test_a_real_difference_is_found_and_its_sign_told():
    rng = np.random.default_rng(2)
    bad, good = scored(ranks(rng, np.full(200, 0.3))), scored(ranks(rng, np.full(200, 0.6)))
    [up], [down] = compare_scores(pairs(bad, good)), compare_scores(pairs(good, bad))
    assert up.p == down.p == 1 / (NUM_RESAMPLES + 1)
    assert (up.verdict, down.verdict) == ("better", "worse")
    assert up.low == pytest.approx(-down.high) and up.wins == down.losses


def test_the_p_value_is_that_of_all_sign_flips():
    """Ten queries have 1,024 ways to swap, which can be counted."""
    change = np.array([0.5, 0.3, -0.1, 0.2, 0.4, -0.2, 0.1, 0.6, -0.3, 0.25])
    signs = 1 - 2 * (np.arange(1024)[:, None] >> np.arange(10) & 1)
    exact = (np.abs((signs * change).mean(axis=1)) >= abs(change.mean()) - 1e-12).mean()
    [row] = compare_scores(pairs(np.zeros(10), change))
    assert row.p == pytest.approx(exact, abs=0.01) and 0.02 < exact < 0.2


def test_a_benchmark_is_the_mean_of_its_tasks_and_a_task_that_of_its_languages():
    rows = compare_scores(
        pairs([0.0] * 10, [1.0] * 10, "A", "english")
        + pairs([0.0] * 90, [0.5] * 90, "A", "french")
        + pairs([0.2] * 50, [0.2] * 50, "B")
    )
    assert [(row.name, row.benchmark) for row in rows] == [("bench", True), ("A", False), ("B", False)]
    assert [row.after - row.before for row in rows] == pytest.approx([0.375, 0.75, 0.0])
    assert (rows[0].wins, rows[0].losses, rows[0].ties) == (100, 0, 50)


def test_holm_by_hand():
    rows = [ScoreComparison(str(p), False, 0, 1, 0, 1, p, p, 1, 0, 0) for p in (0.01, 0.04, 0.03, 0.005)]
    assert [row.adjusted for row in adjust_holm(rows)] == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_twenty_tasks_without_a_difference_give_no_verdict():
    rng = np.random.default_rng(3)
    every = []
    for number in range(20):
        skill = rng.uniform(0.2, 0.9, 100)
        every += pairs(scored(ranks(rng, skill)), scored(ranks(rng, skill)), f"Task{number:02}")
    rows = compare_scores(every)
    assert min(row.p for row in rows) < 0.05, "else Holm has nothing to do here"
    assert not [row.name for row in rows if row.verdict]


def write(folder: Path, found: dict[tuple[str, str, str], list[int]], lr: float = 0.1, data: str = "d" * 40) -> str:
    """An evaluation whose queries found their page at these ranks."""
    results = [
        QueryResult(
            *key, f"query-test-{i}", dict.fromkeys(METRIC_KEYS, round(GAINS[rank - 1], 6)), rank, [f"page-{rank}"]
        )
        for key, places in found.items()
        for i, rank in enumerate(places)
    ]
    write_query_results(folder / "queries" / "trained.parquet", results)
    run = {"revision": "a" * 40, "params": {"lr": lr}, "data": dict.fromkeys({task for _, task, _ in found}, data)}
    (folder / "run.json").write_text(json.dumps(run))
    return str(folder)


def compare_folders(a: str, b: str) -> EvalComparison:
    return compare_eval_runs(load_eval_run(a), load_eval_run(b), "ndcg_at_5")


PLACES = {
    ("ViDoRe(v1)", "VidoreSyntheticDocQAGovernmentReportsRetrieval", "default"): [1, 2, 3, 4, 9] * 20,
    ("ViDoRe(v1)", "VidoreDocVQARetrieval", "default"): [1, 1, 1, 2, 30] * 20,
    ("ViDoRe(v2)", "Vidore2ESGReportsRetrieval", "english"): [1, 2, 1, 2, 12] * 20,
}
BETTER = {key: [1 if i % 2 else rank for i, rank in enumerate(places)] for key, places in PLACES.items()}


@pytest.fixture
def two(tmp_path) -> tuple[str, str]:
    return write(tmp_path / "a", PLACES), write(tmp_path / "b", BETTER, lr=0.2)


def test_the_report_fits_80_columns_and_is_the_same_twice(two, capsys):
    main(["compare", *two])
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines[2:]) <= 80, lines
    assert lines[-1] == "lr: 0.1 -> 0.2"
    assert "10 most changed queries" in "\n".join(lines)
    assert "0.0 100.0  30 -> 1" in "\n".join(lines)
    assert {"    task: DocVQA", "    b: page id page-1"} <= set(lines)
    assert sum(line.startswith("  query id query-test-") for line in lines) == 10
    for folder in two:  # as results of older versions are
        file = Path(folder, "queries", "trained.parquet")
        pq.write_table(pq.read_table(file).drop_columns(["query", "top_names"]), file)
    main(["compare", *two])
    assert capsys.readouterr().out.splitlines() == lines


HARD_NAMES = {  # of a page in its corpus -> how it is shown, and the end of its URL
    "manual.pdf#page=36": ("manual.pdf, page 36", "/manual.pdf#page=36"),
    "sub dir/50% Größe #2.PDF#page=1": (
        "sub dir/50% Größe #2.PDF, page 1",
        "/sub%20dir/50%25%20Gr%C3%B6%C3%9Fe%20%232.PDF#page=1",
    ),
    "\x1b]0;a\u202e|`b.png": ("\\x1b]0;a\\u202e|`b.png", "/%1B%5D0%3Ba%E2%80%AE%7C%60b.png"),
    "取扱説明書" * 12 + ".png": (
        "取扱説明書" * 12 + ".png",
        "/" + "%E5%8F%96%E6%89%B1%E8%AA%AC%E6%98%8E%E6%9B%B8" * 12 + ".png",
    ),
}


def test_pages_are_named_by_their_files_and_queries_by_their_words(tmp_path_factory, monkeypatch, capsys):
    """Within 80 columns, whatever the names and the words are; old results have ids only."""
    tmp_path = tmp_path_factory.mktemp("c").resolve()  # short, so that a link fits a line
    own = (tmp_path / "own").as_uri()
    monkeypatch.chdir(tmp_path)
    words = ["how is a | package *removed*?", "说明书在哪里" * 20, "two\nlines\x1b[2J", "long " * 99, "`@someone`"]
    places = {("docs", "DocsRetrieval", "default"): [1, 2, 3, 4, 9]}
    for side, ranks_ in (("a", [1, 2, 3, 4, 9]), ("b", [9, 9, 9, 9, 1])):
        write(tmp_path / side, {key: ranks_ for key in places})
        results = [
            result._replace(query=query, top_names=[name])
            for result, query, name in zip(load_eval_run(side).queries, words, [*HARD_NAMES, None], strict=True)
        ]
        write_query_results(Path(side, "queries", "trained.parquet"), results)
        run = json.loads(Path(side, "run.json").read_text())
        Path(side, "run.json").write_text(json.dumps(run | {"folders": {"DocsRetrieval": "own"}}))
    for name in HARD_NAMES:
        file = Path("own", name.partition("#page=")[0])
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    main(["compare", "a", "b"])
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert max(map(count_columns, lines)) <= 80 and "\x1b" not in out
    assert "  how is a | package *removed*?                       " in out and "long long..." in out
    shown = [text for text, _ in HARD_NAMES.values()][:3]
    assert all(f"    a: {text}" in lines for text in shown) and "    a: page id page-9" in lines
    assert "    a: ..." + ("取扱説明書" * 12)[-33:] + ".png" in lines
    links = [line.strip() for line in lines if "file://" in line]
    assert links == [url for name in HARD_NAMES if len(url := own + HARD_NAMES[name][1]) <= 74 for _ in "ab"]
    assert "links longer than a line, left out: " in out, "one of 1,080 characters"
    main(["compare", "a", "b", "--json"])
    [found] = json.loads(capsys.readouterr().out)
    urls = {name: own + end for name, (_, end) in HARD_NAMES.items()} | {None: ""}
    assert urls == {pair["name_before"]: pair["link_before"] for pair in found["changed"]}
    older = load_eval_run("b")  # an evaluation by a version that recorded no names, with the same first pages
    results = [
        result._replace(query=None, top_names=None, top_pages=named.top_pages)
        for result, named in zip(older.queries, load_eval_run("a").queries, strict=True)
    ]
    older = older._replace(queries=results, run={key: value for key, value in older.run.items() if key != "folders"})
    for pair in compare_eval_runs(load_eval_run("a"), older, "ndcg_at_5").changed:
        first, second = pair.pages
        assert (second.label, second.link) == (first.label, first.link)
        assert pair.before.query in words and second.link == urls[second.name]
    main(["compare", "a", "b", "--md"])
    rows = [line for line in capsys.readouterr().out.splitlines() if "->" in line and "<code>" in line]
    assert len(rows) == 5 and all(line.count("|") == 8 for line in rows)
    assert any("<code>how is a &#124; package &#42;removed&#42;?</code>" in line for line in rows)
    Path("own", "manual.pdf").unlink()
    assert label_page("1", "manual.pdf#page=36", "own") == ("manual.pdf, page 36", "")


def test_a_task_is_the_same_by_its_own_name_and_in_a_benchmark(tmp_path):
    alone = {("VidoreDocVQARetrieval", task, subset): places for (_, task, subset), places in BETTER.items()}
    key = "ViDoRe(v1)", "VidoreDocVQARetrieval", "default"
    for one, other in ((PLACES, alone), (alone, PLACES), ({key: PLACES[key]}, BETTER)):
        found = compare_folders(write(tmp_path / "a", one), write(tmp_path / "b", other))
        tasks = {row.name for row in found.rows if not row.benchmark}
        assert "VidoreDocVQARetrieval" in tasks and len(tasks) + len(found.left_out) == 3
        assert {name.partition(",")[0] for name in found.left_out} <= {name for name, *_ in PLACES}


def test_identical_evaluations_differ_in_nothing(tmp_path, capsys):
    same = write(tmp_path / "a", PLACES), write(tmp_path / "b", PLACES)
    main(["compare", *same])
    out = capsys.readouterr().out
    assert "b is better in 0, worse in 0 of 4 rows" in out and "no setting differs" in out
    assert "most changed" not in out
    main(["compare", *same, "--json"])
    [found] = json.loads(capsys.readouterr().out)
    assert {row["p"] for row in found["rows"]} == {1.0} and {row["verdict"] for row in found["rows"]} == {""}


def test_markdown_has_whole_tables(two):
    found = comparison_to_markdown(compare_folders(two[0], two[1]))
    tables = [block.splitlines() for block in found.split("\n\n") if block.startswith("|")]
    assert len(tables) == 3
    for lines in tables:
        assert len({line.count("|") for line in lines}) == 1 and set(lines[1]) <= set("|-:")


def test_several_are_each_compared_with_the_first(two, tmp_path, capsys):
    third = write(tmp_path / "c", PLACES)
    main(["compare", *two, third, "--json"])
    assert [(found["a"], found["b"]) for found in json.loads(capsys.readouterr().out)] == [
        (two[0], two[1]),
        (two[0], third),
    ]


def test_what_cannot_be_compared_is_told(two, tmp_path):
    fewer = {key: places for key, places in PLACES.items() if key[0] == "ViDoRe(v1)"}
    found = compare_folders(two[0], write(tmp_path / "c", fewer))
    assert found.left_out == {"ViDoRe(v2), Vidore2ESGReports": f"only in {two[0]}"}
    assert f"not compared: ViDoRe(v2), Vidore2ESGReports: only in {two[0]}" in format_comparison(found)
    with pytest.raises(UserError, match=r"cannot be compared: .*other data: d{40} and e{40}"):
        compare_folders(two[0], write(tmp_path / "d", PLACES, data="e" * 40))
    with pytest.raises(UserError, match=r"holds no run.json, .*dvc repro -f eval"):
        load_eval_run(str(tmp_path))
    with pytest.raises(SystemExit):
        main(["compare", two[0], two[0]])


def test_seeds_are_merged_and_what_differs_is_listed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for number in range(6):
        places = {key: [max(1, rank - number % 3) for rank in ranks_] for key, ranks_ in PLACES.items()}
        write(tmp_path / f"run-{number}", places)
        run = json.loads((tmp_path / f"run-{number}" / "run.json").read_text())
        params = {"seed": number % 3, "lr": 0.2 if number == 5 else 0.1, "batch": 2 if number > 2 else 1}
        (tmp_path / f"run-{number}" / "run.json").write_text(
            json.dumps(run | {"revision": f"{number}", "params": params})
        )
    main(["compare", "run-0,run-1,run-2", "run-3,run-4,run-5"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "a: run-0,run-1,run-2 (3 seeds: run-0, run-1, run-2)"
    assert max(map(len, lines[2:])) <= 80 and "batch: 1 -> 2" in lines and "seed:" not in "".join(lines)
    assert {
        "seeds: 3 of a, 3 of b; intervals and p cover queries and seeds",
        "b: its runs also differ in lr (0.1, 0.2)",
    } <= set(lines)
    assert any(re.fullmatch(r" +spread over seeds +10\.7 +10\.7", line) for line in lines), lines
    main(["compare", "run-0", "run-3,run-4,run-5", "--md"])
    out = capsys.readouterr().out
    assert "the side with one seed is assumed to have the spread of the other" in out and "| spread a | b |" in out
    main(["compare", "run-0", "run-3"])
    assert "one seed each: intervals and p cover queries, not the spread over seeds" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["compare", "run-0", "run-0,run-1"])
    assert "run-0: an evaluation is named twice" in capsys.readouterr().err
    write(tmp_path / "other", {key: ranks_[1:] for key, ranks_ in PLACES.items()})
    with pytest.raises(UserError, match="run-0,other: its runs were evaluated on other queries"):
        load_eval_group("run-0,other")


@pytest.fixture
def repository(request, tmp_path, monkeypatch):
    """Three commits, an evaluation at the last two, kept by DVC; in git's folder, or one below it."""
    below = getattr(request, "param", "")
    (tmp_path / below).mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / below)
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")

    def sh(command: str) -> None:
        env_path = Path(sys.executable).parent
        subprocess.run(f"PATH={env_path}:$PATH; {command}", shell=True, check=True, capture_output=True)

    sh(f"git init -q -b main {tmp_path} && git config user.name T && git config user.email t@localhost")
    sh(f"dvc init -q {'--subdir' if below else ''}")
    sh("git add -A && git commit -qm none && git tag none")
    for number, found in enumerate((PLACES, BETTER)):
        write(Path("results/mteb_evaluation"), found, lr=0.1 + number)
        sh("dvc add -q results/mteb_evaluation && git add -A")
        sh(f"git commit -qm {number} && git tag run-{number}")
    return sh


@pytest.mark.parametrize("repository", ["", "project"], indirect=True)
def test_git_revisions_are_read_from_dvcs_cache(repository, capsys):
    repository("git checkout -q none && rm -rf results")
    main(["compare", "run-0", "run-1"])
    out = capsys.readouterr().out
    assert "a: run-0" in out and "lr: 0.1 -> 1.1" in out and "100.0  30 -> 1" in out


def test_a_revision_that_is_not_there_or_not_in_the_cache_is_told(repository):
    with pytest.raises(UserError, match=r"'nonsense' is no folder here, and no git revision or DVC experiment"):
        load_eval_run("nonsense")
    with pytest.raises(UserError, match=r"'workspace' is no folder here.* the workspace is `\.`"):
        load_eval_run("workspace")
    with pytest.raises(UserError, match="none: has no results/mteb_evaluation"):
        load_eval_run("none")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    for name in ("slower-2", "slower-10", "slower-1"):
        repository(f"git update-ref refs/exps/{commit[:2]}/{commit[2:]}/{name} HEAD")
    with pytest.raises(UserError, match=r"slower-\*: slower-1 and slower-2 are the same model; name it once"):
        load_eval_group("slower-*")
    assert load_eval_group("slower-?0").name == "slower-10"
    with pytest.raises(
        UserError, match=r"'slowre-\*' matches no DVC experiment of this commit; the nearest are slower"
    ):
        load_eval_group("slowre-*")
    repository("git checkout -qf run-0")
    with pytest.raises(UserError, match="of this commit; it has none; name those of other commits"):
        load_eval_group("slower-*")
    repository("rm -rf .dvc/cache results")
    with pytest.raises(UserError, match=r"run-0: results/mteb_evaluation.* is not in DVC's cache here"):
        load_eval_run("run-0")


def test_help_names_it():
    done = subprocess.run([sys.executable, "-m", "colintern", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert "compare" in done.stdout and "evaluate" in done.stdout
