"""The 1B recipe from the hub to its metrics: `dvc repro` over a hub on loopback that has, small, all the recipe names.

Of the recipe only sizes differ. The base is the demo's, under the real id; the training set has the true columns; each
task of ViDoRe v1 and v2 has a few pages, at the commit mteb pins, in the layout mteb reads there.
"""

import json
import re
from pathlib import Path

import colpali
import mteb
import pytest
from conftest import BASE, ROOT
from datasets import Dataset, Features, Image, Value
from forked_python import DVC, UNHUBBED, run_server
from hub import running, sha256
from mteb.models import ModelMeta, MultiVectorWrapper
from mteb.models.model_implementations.colpali_models import COLPALI_TRAINING_DATA
from pages import documented
from test_dvc_commands import IDENTITY, STAGES, Repo, bare_environment, copy_working_tree, ran, set_up, skipped

from colintern.core.recipes import render_recipe
from colintern.data import benchmarks
from colintern.data.benchmarks import use_fetched_data
from colintern.data.formats import TrainingRow, write_training_split
from colintern.data.images import encode_png
from colintern.params import load_recipe
from demo.corpus import generate_corpus

pytestmark = pytest.mark.integration
RECIPE = ROOT / "recipes" / "internvl3_5-1b.yaml"
SIZES = {
    "max_visual_tokens": "32",
    "dtype": "float32",
    "epochs": "1",
    "warmup_steps": "1",
    "batch_size": "8",
    "micro_batch_size": "4",
    "logging_steps": "1",
    "dev_queries": "4",
    "eval_batch_size": "4",
    "feature_cache_gb": "0.1",
    "threads": "1",
    "workers": "1",
}
ROWS = 16  # two steps
LANGUAGES = ("english", "french", "german", "spanish")
V3, V3_1 = "Vidore3HrRetrieval", "Vidore3HrRetrieval.v2"  # in place of ViDoRe v3; the second has the pages' text too
TASKS = [task.metadata for name in ("ViDoRe(v1)", "ViDoRe(v2)") for task in mteb.get_benchmark(name).tasks]
TASKS += [mteb.get_task(name).metadata for name in (V3, V3_1)]


def write_task(folder: Path, number: int) -> None:
    """A data set as ViDoRe has it on the hub, all in one split. v1 and v2: three configurations; v2's queries say their
    language. v3: three configurations a language, ids that are text, judgements of two grades; v3.1 has pages' text."""
    pages = generate_corpus("test", 4, 1, seed=number)
    ids = list(range(len(pages)))
    images = [{"bytes": encode_png(page.image), "path": page.name} for page in pages]
    queries = [page.queries[0] for page in pages]
    if folder.name in (V3, V3_1):
        names = list(map(str, ids))
        text = {"text": [f"text of {page.name}" for page in pages]} if folder.name == V3_1 else {}
        tables = {
            f"{language}-{table}": columns
            for language in mteb.get_task(V3).hf_subsets
            for table, columns in {
                "corpus": {"id": names, "image": images} | text,
                "queries": {"id": names, "text": [f"{query} {language}" for query in queries]},
                "qrels": {"query-id": [*names, "0"], "corpus-id": [*names, "1"], "score": [2, 2, 2, 2, 1]},
            }.items()
        }
    else:
        tables = {
            "corpus": {"corpus-id": ids, "image": images},
            "queries": {"query-id": ids, "query": queries, "language": LANGUAGES},
            "qrels": {"query-id": ids, "corpus-id": ids, "score": [1] * len(ids)},
        }
    card = ["---", "configs:"]
    for name, columns in tables.items():
        kinds = {key: Value("string" if isinstance(values[0], str) else "int64") for key, values in columns.items()}
        kinds |= {"image": Image()} if "image" in columns else {}
        path = f"{name}/test-00000-of-00001.parquet"
        (folder / name).mkdir(parents=True)
        Dataset.from_dict({k: list(v) for k, v in columns.items()}, features=Features(kinds)).to_parquet(folder / path)
        card += [f"- config_name: {name}", "  data_files:", "  - split: test", f"    path: {name}/test-*"]
    (folder / "README.md").write_text("\n".join([*card, "---", "# pages", ""]))


def test_the_text_of_pages_stays_beside_their_images(tmp_path, monkeypatch):
    write_task(tmp_path / V3_1, 0)
    monkeypatch.setattr(benchmarks, "ensure_benchmark", lambda name: tmp_path / name)
    task = use_fetched_data(mteb.get_task(V3_1, hf_subsets=["english"]))
    task.load_data()
    task.convert_v1_dataset_format_to_v2(None)
    pages = task.dataset["english"]["test"]["corpus"][:]
    assert pages["text"] == [f"text of {page.name}" for page in generate_corpus("test", 4, 1, seed=0)]
    assert len(pages["image"]) == 4 and all(image.size == (224, 336) for image in pages["image"])


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    top, recipe = tmp_path_factory.mktemp("hub"), load_recipe(RECIPE)
    for split, drawn, number in (("train", "train", ROWS), ("test", "dev", 4)):
        rows = [
            TrainingRow(encode_png(page.image), page.name, page.queries[0])
            for page in generate_corpus(drawn, number, 1, seed=0)
        ]
        write_training_split(top / "train", split, rows)
    with running() as hub:
        hub.add_folder("model", recipe.base, recipe.base_revision, BASE)
        hub.add_folder("dataset", recipe.train_data, recipe.train_revision, top / "train")
        for number, task in enumerate(TASKS):
            write_task(top / task.name, number)
            hub.add_folder("dataset", task.dataset["path"], task.dataset["revision"], top / task.name)
        colpali.write(top / "base", top / "colpali")
        hub.add_folder("model", colpali.NAME, mteb.get_model_meta(colpali.NAME).revision, top / "colpali")
        hub.add_folder("model", colpali.BASE, "main", top / "base")  # mteb does not pin it
        yield hub


@pytest.fixture(scope="module")
def repo(hub, tmp_path_factory):
    """A copy of this repository with the recipe, whose first stage has run."""
    path, home = tmp_path_factory.mktemp("repo"), tmp_path_factory.mktemp("home")
    copy_working_tree(path)
    hf = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home / "hf")}
    with run_server(f"{UNHUBBED} {DVC}", HF_HUB_OFFLINE="", **hf) as forked:
        env = {key: value for key, value in bare_environment(home, forked).items() if not key.startswith("HF_")}
        yield first_stage(set_up(Repo(path, env | hf)), path)


def first_stage(repo: Repo, path: Path) -> Repo:
    repo.output("git init -q -b main")
    repo.commit()
    repo.output(documented("colintern recipe internvl3_5-1b"))
    params = (path / "params.yaml").read_text()
    assert params == render_recipe(RECIPE)
    for key, value in SIZES.items():
        params, found = re.subn(rf"(?m)^{key}: \S+", f"{key}: {value}", params)
        assert found == 1, key
    params, found = re.subn(r"(?m)^- ViDoRe\(v3\)$", f"- {V3}\n- {V3_1}", params)
    assert found == 1
    (path / "params.yaml").write_text(params)
    repo.output(documented('git commit -am "The 1B recipe"'), **IDENTITY)
    assert ran(repo.output(documented("dvc repro fetch-data"))) == ["check-params", "fetch-data"]
    return repo


def test_the_manifest_names_every_data_set_at_its_commit(repo, hub):
    manifest, recipe = json.loads((repo.path / "data/manifest.json").read_text()), load_recipe(RECIPE)
    assert (manifest["base"]["folder"], manifest["base"]["revision"]) == (recipe.base, recipe.base_revision)
    [train] = manifest["train"]
    assert (train["folder"], train["revision"]) == (recipe.train_data, recipe.train_revision)
    assert list(manifest["evaluation"]) == sorted(task.name for task in TASKS)
    for task in TASKS:
        entry, served = manifest["evaluation"][task.name], hub.repos["dataset", *task.dataset.values()]
        assert (entry["folder"], entry["revision"]) == (task.dataset["path"], task.dataset["revision"])
        assert entry["files"] == {k: {"size": len(v), "sha256": sha256(v)} for k, v in served.items()}


def test_the_recipe_trains_and_evaluates_without_another_word_to_the_hub(repo, hub):
    hub.requests.clear()
    assert ran(repo.output(documented("dvc repro verify"))) == ["verify"]
    assert ran(repo.output(documented("dvc repro train"))) == ["train"]
    assert ran(repo.output(documented("dvc repro eval"))) == ["eval"]
    assert hub.requests == []
    state = json.loads((repo.path / "experiments/colintern/trainer_state.json").read_text())
    assert state["global_step"] == ROWS // 8
    summary = repo.metric("eval")
    assert sorted(row["task"] for row in summary["tasks"]) == sorted(task.name for task in TASKS)
    mean = sum(row["ndcg_at_5"] for row in summary["tasks"]) / len(TASKS)
    assert summary["ndcg_at_5"] == pytest.approx(mean, abs=1e-5)
    scores = json.loads((repo.path / "results/mteb_evaluation/eval.json").read_text())
    assert list(scores) == ["ViDoRe(v1)", "ViDoRe(v2)", V3, V3_1]
    assert sorted(name for found in scores.values() for name in found["tasks"]) == sorted(t.name for t in TASKS)
    assert len(scores[V3]["languages"]) == len(scores[V3_1]["languages"]) == 6
    for task in TASKS:
        [result] = (repo.path / "results/mteb_evaluation").rglob(f"{task.name}.json")
        assert json.loads(result.read_text())["dataset_revision"] == task.dataset["revision"]


def test_the_adapter_names_its_base_as_others_find_it(repo):
    config = json.loads((repo.path / "experiments/colintern/adapter_config.json").read_text())
    recipe = load_recipe(RECIPE)
    assert (config["base_model_name_or_path"], config["revision"]) == (recipe.base, recipe.base_revision)


def test_one_benchmark_again_trains_nothing_and_asks_the_hub_nothing(repo, hub):
    hub.requests.clear()
    said = repo.output(
        documented('colintern evaluate MODEL --benchmarks "ViDoRe(v2)" --batch-size 16', MODEL="experiments/colintern")
    )
    assert said.count("Vidore2") >= 4
    assert hub.requests == []


def test_another_model_that_mteb_knows_is_fetched_and_evaluated(repo, hub):
    said = repo.output(documented('colintern evaluate vidore/colpali-v1.3 --benchmarks "ViDoRe(v2)"'))
    assert said.count("Vidore2") >= 4 and hub.asked("GET", colpali.NAME)
    assert list((repo.path / "results" / "evaluate").glob("colpali-v1.3-*/eval.json"))


def test_its_results_are_a_submission_that_mteb_reads(repo):
    command = documented(
        "colintern export experiments/colintern --submission --out submission --name NAME --revision COMMIT "
        "--license apache-2.0 --release-date 2026-12-01",
        NAME="someone/pages-1B",
        COMMIT="c0ffee0000c0ffee0000c0ffee0000c0ffee0000",
    )
    said = repo.output(command)
    assert "not evaluated" in said and "Vidore3EnergyRetrieval" in said and V3 not in said
    folder, commit = repo.path / "submission", command.split("--revision ")[1].split()[0]
    cache = mteb.ResultCache(folder)
    [result] = cache.load_results(require_model_meta=True, include_remote=False, validate_and_filter=True).model_results
    assert (result.model_name, result.model_revision) == ("someone/pages-1B", commit)
    assert {task.task_name for task in result.task_results} == {task.name for task in TASKS}
    scores = json.loads((repo.path / "results/mteb_evaluation/eval.json").read_text())
    [v3] = [task for task in result.task_results if task.task_name == V3]
    assert len(v3.scores["test"]) == 6 and v3.get_score() == pytest.approx(scores[V3]["ndcg_at_10"], abs=1e-5)
    place = folder / "results" / "someone__pages-1B" / commit
    assert {json.loads(line)["task"] for line in (place / "run_settings.jsonl").open()} == {task.name for task in TASKS}
    request = (folder / "evaluation_request.md").read_text()
    assert "Vidore3TelecomRetrieval, Vidore3NuclearRetrieval." in request and f"| {V3} | " in request
    saved = ModelMeta.model_validate_json_resolved((place / "model_meta.json").read_text())
    names: dict[str, ModelMeta] = {}
    exec((folder / "model_meta.py").read_text(), names)
    check_meta(names["pages_1b"], saved)


def check_meta(meta: ModelMeta, saved: ModelMeta) -> None:
    """The ModelMeta of model_meta.py, which is that of model_meta.json, has the facts of the run."""
    assert meta.loader is MultiVectorWrapper and meta.to_dict() | {"loader": None} == saved.to_dict() | {"loader": None}
    assert (meta.license, meta.languages) == ("apache-2.0", ["eng-Latn"])
    assert (meta.embed_dim, meta.n_parameters) == (128, 1028224)
    assert (meta.reference, meta.adapted_from) == ("https://huggingface.co/someone/pages-1B", load_recipe(RECIPE).base)
    assert meta.training_datasets == COLPALI_TRAINING_DATA and meta.is_zero_shot_on(["VidoreDocVQARetrieval"]) is False
    required = "name revision release_date memory_usage_mb max_tokens framework similarity_fn_name open_weights".split()
    assert all(getattr(meta, key) for key in required)


def test_a_second_repro_runs_nothing(repo):
    output = repo.output("dvc repro")
    assert (ran(output), skipped(output)) == ([], list(STAGES))


def test_with_the_hub_gone_its_files_are_listed_and_evaluated_again(repo, hub):
    before = (repo.path / "metrics/eval.json").read_text()
    hub.shutdown()
    hub.server_close()
    assert ran(repo.output(documented("dvc repro -f fetch-data"))) == ["check-params", "fetch-data"]
    assert ran(repo.output("dvc repro -f -s eval")) == ["eval"]
    assert (repo.path / "metrics/eval.json").read_text() == before
