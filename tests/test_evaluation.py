"""Evaluation through the real mteb, over a small folder in its layout, against a direct computation.

The model is a small module that keeps the contract of `ColIntern3_5`: a page is a row of coloured cells, a query
names colours, and each colour has a fixed embedding. Pages and queries differ in length, so padding is at work.
"""

import fcntl
import json
import math
import multiprocessing
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random

import datasets
import mteb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from colour_model import COLOURS, ColourModel, ColourProcessor, load_embedder
from conftest import EPS
from PIL import Image
from processes import kill
from safetensors.torch import save_file
from torch import nn

from colintern.analysis.score_tables import classify_ndcg, compare_with_target, format_score_table
from colintern.commands.recommend import BENCHMARK_PAGES
from colintern.core.errors import OutOfMemoryError, UserError
from colintern.data.benchmarks import resolve_benchmarks
from colintern.data.formats import CorpusPage, Qrel, Query, write_beir
from colintern.data.images import decode_image, encode_png
from colintern.encoding.embed import embed_pages, embed_queries
from colintern.encoding.loading import get_encoder_settings
from colintern.encoding.multi_process import EmbeddingPool
from colintern.encoding.page_features import PageFeatures
from colintern.evaluation import run as evaluation
from colintern.evaluation.models import EvalModel, make_eval_models
from colintern.evaluation.mteb_encoder import ColIntern3_5Encoder
from colintern.evaluation.results import (
    SIZE_KEYS,
    Scores,
    aggregate_scores,
    compute_page_size,
    list_benchmark_rows,
    list_task_rows,
    merge_means,
    read_page_names,
    summarize_scores,
)
from colintern.params import Params, load_recipe
from colintern.reporting.heatmaps import encode_picture
from colintern.scoring.maxsim import maxsim_scores
from colintern.scoring.metrics import METRIC_KEYS, ndcg_at_k
from colintern.storage.manifest import BEIR_SUFFIXES, get_arrow_name, hash_local_files

pytestmark = pytest.mark.integration
PAGES = 110
RECIPE = load_recipe(Path(__file__).parents[1] / "recipes" / "demo.yaml")
FOLDER = "eval/some-docs"


def _page(colours: list[int]) -> Image.Image:
    image = Image.new("RGB", (len(colours), 1))
    for x, colour in enumerate(colours):
        image.putpixel((x, 0), (colour // 64 * 32, colour // 8 % 8 * 32, colour % 8 * 32))
    return image


def _world() -> tuple[list[list[int]], list[list[int]]]:
    """Colours of each page and of its query: two of the page's own, in every fourth query none, and some others."""
    rng = Random(7)
    pages = [[rng.randrange(COLOURS) for _ in range(rng.randrange(10, 40))] for _ in range(PAGES)]
    others = [[rng.randrange(COLOURS) for _ in range(rng.randrange(2, 5))] for _ in pages]
    queries = [(rng.sample(page, 2) if i % 4 else []) + others[i] for i, page in enumerate(pages)]
    return pages, queries


def write_world(folder: Path) -> None:
    pages, queries = _world()
    write_beir(
        folder,
        [CorpusPage(i, encode_png(_page(page)), f"{i}.png") for i, page in enumerate(pages)],
        [Query(i, " ".join(map(str, query))) for i, query in enumerate(queries)],
        [Qrel(i, i) for i in range(PAGES)],
    )


def write_manifest(*benchmarks: str) -> Params:
    """What fetch-data does for local folders."""
    entries = {name: hash_local_files(name, BEIR_SUFFIXES)._asdict() for name in benchmarks if Path(name).is_dir()}
    Path("data").mkdir(exist_ok=True)
    Path("data/manifest.json").write_text(json.dumps({"evaluation": entries}))
    return replace(RECIPE, benchmarks=benchmarks, eval_batch_size=16)


@pytest.fixture
def workspace(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")
    return tmp_path


@pytest.fixture
def params(workspace) -> Params:
    write_world(Path(FOLDER))
    return write_manifest(FOLDER)


def subject(model: nn.Module, processor: object, identity: str = "", features=None, pool=None) -> EvalModel:
    """A model as `evaluate` takes it; another `identity` takes no results of this one's."""

    def encoder() -> ColIntern3_5Encoder:
        return ColIntern3_5Encoder(model, processor, "colintern/stub", "a" * 40, features, pool=pool)

    return EvalModel("colintern/stub", "a" * 40, {"model": identity, "params": {"threads": 1}}, {"lr": 0.1}, encoder)


def evaluate(one: EvalModel, params: Params, out: str) -> Scores:
    return evaluation.evaluate_models({"trained": one}, params, Path(out))["trained"]


def files_of(folder: str) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def test_equals_a_direct_computation_and_leaves_the_same_bytes_twice(params, workspace):
    model, processor = ColourModel(), ColourProcessor()
    first = evaluate(subject(model, processor, "one"), params, "out/one")
    second = evaluate(subject(model, processor, "two"), params, "out/two")

    pages, queries = _world()
    found = maxsim_scores(
        embed_queries(model, processor, [" ".join(map(str, query)) for query in queries], 7),
        embed_pages(model, processor, [_page(page) for page in pages], 5),
    )
    relevant = [[i] for i in range(PAGES)]
    ranks = (found >= found.diagonal()[:, None]).sum(dim=1)
    scores = first["some-docs"]
    assert scores["ndcg_at_5"] == pytest.approx(ndcg_at_k(found, relevant, 5), abs=1e-5)
    assert scores["ndcg_at_10"] == pytest.approx(ndcg_at_k(found, relevant, 10), abs=1e-5)
    assert scores["recall_at_100"] == pytest.approx((ranks <= 100).float().mean().item(), abs=1e-5)
    assert 0.2 < scores["ndcg_at_5"] < 0.95 and scores["recall_at_100"] < 1, "neither trivial nor hopeless"
    assert scores["tasks"] == {"SomeDocsRetrieval": {key: scores[key] for key in (*METRIC_KEYS, *SIZE_KEYS)}}

    assert first == second
    one = files_of("out/one")
    assert one == files_of("out/two")
    name = f"results/colintern__stub/{'a' * 40}/SomeDocsRetrieval.json"
    assert name in one
    assert not [path for path, content in one.items() if str(workspace).encode() in content]

    loaded = mteb.TaskResult.from_disk(Path("out/one", name))
    assert loaded.get_score() == pytest.approx(scores["ndcg_at_5"], abs=1e-6)
    assert loaded.evaluation_time is None and loaded.date is None
    timing = json.loads(Path("logs/eval-timing.json").read_text())
    kept = timing[f"colintern__stub/{'a' * 40}/SomeDocsRetrieval"]
    assert kept["evaluation_time"] > 0 and kept["date"] > 0 and kept["evaluation_phases"]


def test_two_processes_and_halved_batches_change_no_byte(params, caplog):
    model, processor = ColourModel(), ColourProcessor()
    evaluate(subject(model, processor, "plain"), params, "out/plain")
    expected = files_of("out/plain")
    for num_workers in (1, 2):
        pool = EmbeddingPool(partial(load_embedder, 3), num_workers)
        evaluate(subject(model, processor, str(num_workers), pool=pool), params, f"out/{num_workers}")
        assert files_of(f"out/{num_workers}") == expected
        assert pool.executor is None and not multiprocessing.active_children()
    assert "a batch of 16 pages does not fit; batches have 8 from here on" in caplog.text


def test_a_killed_process_ends_the_evaluation_and_is_named(params):
    pool = EmbeddingPool(kill, 2)
    with pytest.raises(OutOfMemoryError, match=r"was killed \(SIGKILL\)"):
        evaluate(subject(ColourModel(), ColourProcessor(), pool=pool), params, "out")
    assert not Path("out").exists() and not multiprocessing.active_children()


def git(*command: str) -> str:
    return subprocess.run(["git", *command], check=True, capture_output=True, text=True).stdout


def test_results_can_be_submitted_to_mteb_as_they_are(params, monkeypatch):
    """By mteb's own `submit_results`, into a clone of the results repository in which nothing is yet."""
    evaluate(subject(ColourModel(), ColourProcessor()), params, "out")
    task = resolve_benchmarks(params.benchmarks)[0][1]
    cache = mteb.ResultCache("out")
    found = cache.load_results(tasks=[task], include_remote=False, validate_and_filter=True)
    [model] = found.model_results
    assert (model.model_name, model.model_revision) == ("colintern/stub", "a" * 40)
    [result] = model.task_results
    assert result.mteb_version == mteb.__version__ and result.dataset_revision == task.metadata.dataset["revision"]
    assert set(result.scores) == {"test"} and result.scores["test"][0]["languages"] == ["eng-Latn"]
    meta = model.model_meta
    assert (meta.name, meta.revision, meta.framework) == ("colintern/stub", "a" * 40, ["PyTorch"])
    assert (meta.similarity_fn_name, meta.model_type) == ("MaxSim", ["late-interaction"])
    assert meta.n_parameters == COLOURS * 128 and meta.modalities == ["text", "image"] and meta.open_weights

    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "someone")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "someone@example.com")
    git("init", "-q", "-b", "main", "theirs")
    Path("theirs/results").mkdir()
    Path("theirs/results/README.md").touch()
    git("-C", "theirs", "add", "--all")
    git("-C", "theirs", "commit", "-q", "-m", "empty")
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")  # git takes that folder for the address mteb clones
    monkeypatch.setenv("GIT_CONFIG_KEY_0", f"url.{Path('theirs').absolute()}.insteadOf")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", "https://github.com/embeddings-benchmark/results")
    submitted = cache.submit_results()
    assert submitted["status"] == "ready_for_submission" and submitted["result_count"] == 1
    folder = f"results/colintern__stub/{'a' * 40}"
    listed = git("-C", "out/remote", "ls-files").split()
    assert {f"{folder}/SomeDocsRetrieval.json", f"{folder}/model_meta.json"} <= set(listed), listed
    for file in set(listed) - {"results/README.md"}:
        assert Path("out/remote", file).read_bytes() == Path("out", file).read_bytes()


def test_other_data_is_another_revision(params):
    before = resolve_benchmarks(params.benchmarks)[0][1].metadata.dataset["revision"]
    corpus = next(Path(FOLDER).glob("corpus/*.parquet"))
    pq.write_table(pq.read_table(corpus).slice(0, PAGES - 1), corpus)
    with pytest.raises(UserError, match="changed after it was fetched"):
        resolve_benchmarks(params.benchmarks)
    assert resolve_benchmarks(write_manifest(FOLDER).benchmarks)[0][1].metadata.dataset["revision"] != before


def test_pages_that_pyarrow_wrote_without_the_metadata_of_datasets_are_images(params):
    expected = evaluate(subject(ColourModel(), ColourProcessor()), params, "out")["some-docs"]
    for path in Path(FOLDER).glob("*/*.parquet"):
        table = pq.read_table(path).replace_schema_metadata(None)
        if "image" in table.column_names:
            images = [{"path": image["path"], "bytes": image["bytes"]} for image in table["image"].to_pylist()]
            table = table.set_column(table.column_names.index("image"), "image", pa.array(images))
        pq.write_table(table, path)
    found = evaluate(subject(ColourModel(), ColourProcessor()), write_manifest(FOLDER), "plain")["some-docs"]
    assert found == expected


def test_a_folder_is_read_as_it_is_now(params, monkeypatch):
    arrow = Path("data/.arrow")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", arrow.absolute())

    def pages() -> int:
        [(_, task)] = resolve_benchmarks(write_manifest(FOLDER).benchmarks)
        task.load_data()
        return len(task.corpus["test"])

    assert pages() == PAGES
    corpus = next(Path(FOLDER).glob("corpus/*.parquet"))
    pq.write_table(pq.read_table(corpus).slice(0, PAGES - 1), corpus)
    assert pages() == PAGES - 1, "the card is the same"

    def folders_after(**env: str) -> set[str]:
        program = "from colintern.storage.manifest import set_arrow_cache; set_arrow_cache()"
        env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])} | env
        subprocess.run([sys.executable, "-c", program], env=env, check=True)
        return {path.name for path in arrow.iterdir() if path.is_dir()}

    named = get_arrow_name(json.loads(Path("data/manifest.json").read_text())["evaluation"][FOLDER])
    (arrow / "mine").mkdir()
    for name in (named, "0" * 40):  # as `datasets` names the locks of data from the hub
        (arrow / f"_data_.arrow_{name}_corpus_0.0.0.lock").touch()
    (arrow / ".lock").touch()
    with (arrow / ".lock").open() as reader:
        fcntl.flock(reader, fcntl.LOCK_SH)
        assert len(folders_after()) == 3, "another process may be reading what the manifest does not name"
    assert folders_after() == {named, "mine"}
    assert {path.name for path in arrow.glob("*.lock")} == {".lock", f"_data_.arrow_{named}_corpus_0.0.0.lock"}
    assert pages() == PAGES - 1


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (None, "page corpus-test-3 of the evaluation corpus has no image"),
        ({"bytes": EPS, "path": "page.png"}, r"page 'page\.png': not an image: .*%!PS"),
    ],
    ids=["none", "PostScript"],
)
def test_a_page_that_is_no_image_is_named_and_starts_no_program(params, fake_gs, image, message):
    corpus = next(Path(FOLDER).glob("corpus/*.parquet"))
    table = pq.read_table(corpus)
    images = table["image"].to_pylist()
    images[3] = image
    index = table.schema.get_field_index("image")
    pq.write_table(table.set_column(index, table.field("image"), pa.array(images, table.field("image").type)), corpus)
    with pytest.raises(UserError, match=message):
        evaluate(subject(ColourModel(), ColourProcessor()), write_manifest(FOLDER), "out")
    assert not fake_gs.exists()


def test_a_broken_model_is_an_error(params):
    model = ColourModel()
    with torch.no_grad():
        model.table[_world()[0][0][0]] = float("nan")
    with pytest.raises(ValueError, match="embeddings are broken"):
        evaluate(subject(model, ColourProcessor()), params, "out")


@pytest.mark.parametrize(
    ("entry", "near"),
    [
        ("VidoreDocVQARetreival", "VidoreDocVQARetrieval"),
        ("ViDoRe(v9)", "ViDoRe(v"),
        ("dmeo", "demo"),
        ("eval/none", "nearest"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(workspace, entry, near):
    with pytest.raises(UserError) as refused:
        resolve_benchmarks(write_manifest(entry).benchmarks)
    assert repr(entry) in str(refused.value) and near in str(refused.value)


def test_benchmark_and_task_names(workspace, capsys):
    pairs = resolve_benchmarks(write_manifest("ViDoRe(v1)", "VidoreDocVQARetrieval", "ViDoRe(v3)").benchmarks)
    labels = [label for label, _ in pairs]
    assert [labels.count(name) for name in dict(pairs)] == [10, 1, 8]
    assert "ViDoRe(v3): left out, because their data is not public: Vidore3TelecomRetrieval" in capsys.readouterr().out


@pytest.mark.parametrize("name", BENCHMARK_PAGES)
def test_predictions_count_the_pages_of_mtebs_statistics(name):
    total = 0  # of the first language: each has all pages
    for task in (task for task in mteb.get_benchmark(name).tasks if task.metadata.is_public):
        stats = task.metadata.descriptive_stats["test"]
        [first, *_] = stats.get("hf_subset_descriptive_stats", {"default": stats}).values()
        total += first["documents_image_statistics"]["unique_images"]
    assert total == BENCHMARK_PAGES[name]


def test_what_cannot_be_evaluated_is_refused(params):
    with pytest.raises(UserError, match="NFCorpus is Retrieval, category t2t"):
        resolve_benchmarks(write_manifest("NFCorpus").benchmarks)
    with pytest.raises(UserError, match="label 'some-docs', which an entry before it already has"):
        write_world(Path("other/some-docs"))
        resolve_benchmarks(write_manifest(FOLDER, "other/some-docs").benchmarks)
    with pytest.raises(UserError, match="both be the task SomeDocsRetrieval"):
        write_world(Path("other/some_docs"))
        resolve_benchmarks(write_manifest(FOLDER, "other/some_docs").benchmarks)
    for file in Path(FOLDER).glob("qrels/*"):
        file.unlink()
    with pytest.raises(UserError, match=r"not an evaluation set.*no parquet file in qrels"):
        resolve_benchmarks(write_manifest(FOLDER).benchmarks)


def test_cached_features_change_no_byte_of_the_results(workspace, model, processor, pages):
    texts = ["from Oslo", "Rome", "sent to Halde", "milk"]
    write_beir(
        Path(FOLDER),
        [CorpusPage(i, encode_png(page), f"{i}.png") for i, page in enumerate(pages)],
        [Query(i, text) for i, text in enumerate(texts)],
        [Qrel(i, i) for i in range(len(pages))],
    )
    params = write_manifest(FOLDER)
    plain = evaluate(subject(model, processor, "plain"), params, "out/plain")
    for state in ("cold", "warm"):
        features = PageFeatures(model, processor, workspace / "features", 1.0, "exact")
        assert len(features.cache.shard_of_key) == (4 if state == "warm" else 0)
        found = evaluate(subject(model, processor, state, features), params, f"out/{state}")
        assert found == plain and files_of(f"out/{state}") == files_of("out/plain")


def test_a_page_is_the_same_page_in_an_evaluation_as_in_training(workspace, model, processor, pages):
    """mteb hands on what Pillow opens: transparent pixels are black in it, and 16-bit grey above 255 is white."""
    clear = pages[0].convert("RGBA")
    clear.putalpha(pages[0].convert("L").point(lambda value: 255 * (value < 128)))
    clear.paste((0, 0, 0, 0), mask=clear.getchannel("A").point(lambda value: 255 - value))
    deep = Image.fromarray(np.asarray(pages[3].convert("L")).astype(np.uint16) * 128)
    files = []
    for image in (clear, deep):
        image.save(workspace / "page.png")
        files.append((workspace / "page.png").read_bytes())
    write_beir(
        Path(FOLDER),
        [CorpusPage(i, data, f"{i}.png") for i, data in enumerate(files)],
        [Query(0, "from Oslo")],
        [Qrel(0, 0)],
    )
    [(_, task)] = resolve_benchmarks(write_manifest(FOLDER).benchmarks)
    task.load_data()
    seen = list(task.corpus["test"]["image"])
    assert [image.mode for image in seen] == ["RGBA", "I;16"]
    trained_on = embed_pages(model, processor, [decode_image(data) for data in files], 2)
    for features in (None, PageFeatures(model, processor, workspace / "features", 1.0, "exact")):
        found = ColIntern3_5Encoder(model, processor, "colintern/real", "a" * 40, features).embed_images(seen)
        for one, other in zip(found, trained_on, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    assert encode_picture(clear) == encode_picture(decode_image(files[0])), "nor does a report show another one"


def test_each_query_is_kept_with_what_mteb_scored_it_with(params):
    model, processor = ColourModel(), ColourProcessor()
    scores = evaluate(subject(model, processor), params, "out")["some-docs"]
    rows = pq.read_table("out/queries/trained.parquet").to_pylist()
    assert [row["query_id"] for row in rows] == sorted(f"query-test-{i}" for i in range(PAGES))
    assert {(row["benchmark"], row["task"], row["subset"]) for row in rows} == {
        ("some-docs", "SomeDocsRetrieval", "default")
    }
    for metric in METRIC_KEYS:
        assert sum(row[metric] for row in rows) / PAGES == pytest.approx(scores[metric], abs=1e-5)

    pages, asked = _world()
    found = maxsim_scores(
        embed_queries(model, processor, [" ".join(map(str, query)) for query in asked], 7),
        embed_pages(model, processor, [_page(page) for page in pages], 5),
    )
    for row in rows:
        i = int(row["query_id"].rpartition("-")[2])
        assert row["rank"] == (found[i] >= found[i, i]).sum().item()
        top = [int(page.rpartition("-")[2]) for page in row["top_pages"]]
        torch.testing.assert_close(found[i, top], found[i].topk(5).values)
        assert len(set(top)) == 5
        wrong = max(score for page, score in enumerate(found[i].tolist()) if page != i)
        assert row["query"] == " ".join(map(str, asked[i])) and row["top_names"] == [f"{page}.png" for page in top]
        assert (row["right_score"], row["wrong_score"]) == pytest.approx((found[i, i].item(), wrong), abs=1e-4)
        assert row["ndcg_at_5"] == (round(1 / math.log2(row["rank"] + 1), 6) if row["rank"] <= 5 else 0)
    run = json.loads(Path("out/run.json").read_text())
    assert run["params"] == {"benchmarks": [FOLDER], "lr": 0.1, "threads": 1}
    assert list(run["data"]) == ["SomeDocsRetrieval"]


def test_names_are_of_one_page_and_read_through_a_filter():
    pages = [{"bytes": b"1", "path": name} for name in ("a.png", "b.png", "b.png", None, "", "c.png")]
    corpus = datasets.Dataset.from_dict({"id": list("123456"), "image": pages}).cast_column("image", datasets.Image())
    assert read_page_names(corpus) == {"1": "a.png", "6": "c.png"}
    assert read_page_names(corpus.select([5, 1])) == {"6": "c.png", "2": "b.png"}
    assert read_page_names(corpus.remove_columns("image")) == {}


def unloadable() -> ColIntern3_5Encoder:
    raise AssertionError("the model was loaded")


def test_a_task_more_runs_that_task_and_a_task_less_leaves_nothing(params, capsys):
    one = subject(ColourModel(), ColourProcessor())
    write_world(Path("other/more-docs"))
    alone = evaluate(one, write_manifest(FOLDER), "out")
    before = files_of("out")
    both = evaluate(one, write_manifest(FOLDER, "other/more-docs"), "out")
    assert "SomeDocsRetrieval: finished before" in capsys.readouterr().out
    assert both["some-docs"] == alone["some-docs"] and "MoreDocsRetrieval" in "".join(files_of("out"))
    again = evaluate(one._replace(load_encoder=unloadable), write_manifest(FOLDER), "out")
    assert again == alone and files_of("out") == before


def test_results_of_another_model_or_other_data_are_never_taken(params):
    one = subject(ColourModel(), ColourProcessor())
    evaluate(one, params, "out")
    with pytest.raises(AssertionError, match="was loaded"):
        evaluate(one._replace(identity=one.identity | {"model": "other"}, load_encoder=unloadable), params, "out")
    qrels = next(Path(FOLDER).glob("qrels/*.parquet"))
    pq.write_table(pq.read_table(qrels).slice(0, PAGES - 1), qrels)
    with pytest.raises(AssertionError, match="was loaded"):
        evaluate(one._replace(load_encoder=unloadable), write_manifest(FOLDER), "out")


@pytest.mark.parametrize("name", ["queries.parquet", "SomeDocsRetrieval.json"])
def test_a_torn_result_is_named_and_made_again(params, capsys, name):
    one = subject(ColourModel(), ColourProcessor())
    evaluate(one, params, "out")
    before = files_of("out")
    [file] = Path(".scratch").rglob(name)
    file.write_bytes(file.read_bytes()[:100])
    evaluate(one, params, "out")
    assert "warning: .scratch/eval-" in capsys.readouterr().err
    assert files_of("out") == before


def test_only_the_models_evaluated_last_are_kept(params, monkeypatch):
    monkeypatch.setattr(evaluation, "MAX_STORED_MODELS", 2)
    for identity in ("one", "two", "three"):
        evaluate(subject(ColourModel(), ColourProcessor(), identity), params, "out")
    assert len(list(Path(".scratch").glob("eval-*/"))) == 2
    evaluate(subject(ColourModel(), ColourProcessor(), "three")._replace(load_encoder=unloadable), params, "out")


def test_a_folder_that_is_no_adapter_is_named(params, workspace):
    adapter = Path("adapter")
    with pytest.raises(UserError, match=r"adapter: does not exist"):
        make_eval_models(get_encoder_settings(params), adapter)
    adapter.mkdir()
    (adapter / "config.json").write_text("{}")
    save_file({"language_model.norm.weight": torch.ones(2)}, adapter / "model.safetensors")
    with pytest.raises(UserError, match=r"adapter: its weights have no custom_text_proj.weight"):
        make_eval_models(get_encoder_settings(params), adapter)


def several_languages() -> tuple[list, dict, dict]:
    """ViDoRe v2 with a score of 0.1 for every language and task but those of English, 0.5 and 0.9."""
    pairs = resolve_benchmarks(replace(RECIPE, benchmarks=("ViDoRe(v2)",)).benchmarks)
    results = {}
    for _, task in pairs:
        name = task.metadata.name
        english = 0.9 if name == "Vidore2ESGReportsHLRetrieval" else 0.5
        found = {
            subset: dict.fromkeys((*METRIC_KEYS, "main_score"), english if subset in ("english", "default") else 0.1)
            for subset in task.hf_subsets
        }
        results[name] = mteb.TaskResult.from_task_results(task, {"test": found}, evaluation_time=0)
    return pairs, results, {name: compute_page_size(1000, 10, 256) for name in results}


def test_english_and_all_languages_of_vidore_v2_are_averaged_apart():
    scores = aggregate_scores(*several_languages())["ViDoRe(v2)"]
    assert scores["ndcg_at_5"] == pytest.approx((3 * (0.5 + 3 * 0.1) / 4 + 0.9) / 4)
    assert scores["languages"]["eng"]["ndcg_at_5"] == pytest.approx((3 * 0.5 + 0.9) / 4)
    assert {language: found["ndcg_at_5"] for language, found in scores["languages"].items() if language != "eng"} == {
        "deu": 0.1, "fra": 0.1, "spa": 0.1
    }  # fmt: skip
    assert scores["tasks"]["Vidore2ESGReportsRetrieval"]["languages"]["eng"]["ndcg_at_5"] == 0.5
    assert "languages" not in scores["tasks"]["Vidore2ESGReportsHLRetrieval"]
    assert scores["bytes_per_page"] == 100 * 256
    assert scores["tasks"]["Vidore2ESGReportsRetrieval"]["vectors_per_page"] == 100
    lines = format_score_table({"trained": {"ViDoRe(v2)": scores}}).splitlines()
    assert max(map(len, lines)) <= 80
    assert next(line for line in lines if line.startswith("ViDoRe(v2), English")).endswith("good")
    assert lines[-1].split() == ["this", "run", "37.5", "60.0"]
    assert "Argus-Colqwen3.5-9b (best)" in lines[-2]


@pytest.mark.parametrize(
    ("all_languages", "english", "said"),
    [
        (0.7, 0.7, "place 1 of 17 over all languages, 1 in English"),
        (0.565, 0.5, "place 8 of 17 over all languages, 13 in English"),  # a tie counts for the run
        (0.1, 0.39, "place 17 of 17 over all languages, 16 in English"),
    ],
)
def test_a_run_on_vidore_v3_has_a_place_among_the_published(all_languages, english, said):
    def make_means(value: float) -> dict:
        return dict.fromkeys(METRIC_KEYS, 0.9) | {"ndcg_at_10": value}

    names = [task.metadata.name for task in mteb.get_benchmark("ViDoRe(v3)").tasks if task.metadata.is_public]
    tasks = {name: make_means(all_languages) for name in names}
    scores = make_means(all_languages) | {"languages": {"eng": make_means(english)}, "tasks": tasks}
    lines = format_score_table({"trained": {"ViDoRe(v3)": scores}}).splitlines()
    assert max(map(len, lines)) <= 80 and lines[-1] == f"this run has {said}"
    table = lines[lines.index("") + 2 : -1]
    run = f"this run {100 * all_languages:.1f} {100 * english:.1f}"
    assert [" ".join(line.split()) for line in table].index(run) == int(said.split()[1]) - 1
    assert [float(line.split()[-2]) for line in table] == sorted(float(line.split()[-2]) for line in table)[::-1]
    del tasks[names[0]]
    assert "this run" not in format_score_table({"trained": {"ViDoRe(v3)": scores}})


def test_the_guides_words_have_no_gaps():
    words = [
        (value, classify_ndcg("ViDoRe(v1)", value))
        for value in (0, 0.0999, 0.1, 0.29, 0.3, 0.49, 0.5, 0.69, 0.7, 0.85, 0.93, 1)
    ]
    assert [word for _, word in words] == [
        "broken", "broken", "poor", "poor", "fair", "fair", "good", "good", "excellent", "excellent", "excellent",
        "excellent",
    ]  # fmt: skip
    assert [compare_with_target("VidoreDocVQARetrieval", value) for value in (0.64, 0.65, 0.81)] == [
        "below 65-80", "within 65-80", "above 65-80"
    ]  # fmt: skip
    assert compare_with_target("Other", 0.5) == ""


@pytest.mark.parametrize(
    ("benchmark", "expected"),
    [
        ("ViDoRe(v2)", "good"), ("ViDoRe(v1&v2)", "good"), ("VidoreDocVQARetrieval", "good"),
        ("Vidore2ESGReportsHLRetrieval", "good"), ("ViDoRe(v3)", "no band"), ("ViDoRe(v3.1)", "no band"),
        ("Vidore3HrRetrieval", "no band"), ("Vidore3HrRetrieval.v2", "no band"), ("demo", ""),
        ("KoViDoRe(v2)", ""),
        ("vidore-of-mine", ""),
    ],
)  # fmt: skip
def test_the_guides_bands_are_for_vidore_v1_and_v2_only(benchmark, expected):
    assert classify_ndcg(benchmark, 0.6) == expected
    values = dict.fromkeys(METRIC_KEYS, 0.6)
    [_, _, line, *_] = format_score_table({"trained": {benchmark: values | {"tasks": {"Task": values}}}}).splitlines()
    assert len(line) <= 80 and line.endswith(f" 60.0    60.0 {expected}".rstrip()), line


def test_report_rows_and_table():
    def scores(value: float) -> Scores:
        metrics = dict.fromkeys(METRIC_KEYS, value) | compute_page_size(1000, 10, 512)
        return {"ViDoRe(v1)": metrics | {"tasks": {"VidoreSyntheticDocQAGovernmentReportsRetrieval": metrics}}}

    after, before = scores(0.8), scores(0.1)
    assert merge_means({"trained": after}) == after
    metrics = merge_means({"trained": after, "untrained": before})["ViDoRe(v1)"]
    assert metrics["untrained"] == dict.fromkeys(METRIC_KEYS, 0.1) and metrics["ndcg_at_5"] == 0.8
    [row] = list_task_rows(after)
    assert row == {"task": "SyntheticDocQAGovernmentReports"} | dict.fromkeys(METRIC_KEYS, 0.8) | compute_page_size(
        1000, 10, 512
    )
    rows = list_benchmark_rows({"trained": after, "untrained": before})
    assert [(row["mean"], row["ndcg_at_5"]) for row in rows] == [
        ("ViDoRe(v1), trained", 0.8), ("ViDoRe(v1), untrained", 0.1)
    ]  # fmt: skip
    lines = format_score_table({"trained": after, "untrained": before}).splitlines()
    assert lines.index("") == 5 and max(map(len, lines)) <= 80
    assert lines[2].endswith("excellent") and lines[-1].split() == ["this", "run", "80.0"]
    assert "GovernmentReports" in lines[1] and "80.0" in lines[1] and "10.0" in lines[4]


def test_summary_counts_each_task_once_and_adds_no_key_for_a_task():
    def scores(**tasks: float) -> dict:
        rows = {name: dict.fromkeys(METRIC_KEYS, value) for name, value in tasks.items()}
        return dict.fromkeys(METRIC_KEYS, sum(tasks.values()) / len(tasks)) | {"tasks": rows}

    summary = summarize_scores({"trained": {"one": scores(A=0.2, B=0.4), "two": scores(B=0.4, C=0.9)}})
    assert {key: summary[key] for key in METRIC_KEYS} == dict.fromkeys(METRIC_KEYS, 0.5)
    assert summary.keys() == {*METRIC_KEYS, "tasks"} and isinstance(summary["tasks"], list)
    assert [(row["task"], row["benchmark"]) for row in summary["tasks"]] == [("A", "one"), ("B", "two"), ("C", "two")]


def test_embedding_leaves_the_training_mode_as_it_was():
    model = ColourModel().train()
    rows = embed_queries(model, ColourProcessor(), ["1 2 3", "4"], 2)
    assert [len(row) for row in rows] == [3, 1] and not rows[0].requires_grad
    assert model.training
