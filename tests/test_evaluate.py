"""Fault E1, real kills of the eval stage, and `colintern evaluate`, on a small adapter of the demo base.

Each run is a separate process, see processes.py.
"""

import contextlib
import csv
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT
from hub import running
from pages import documented
from processes import Place, kill, leave, program
from safetensors.torch import load_file, save_file
from test_survey import PAGES, SET, row, write_rows

from colintern.core.recipes import render_recipe

pytestmark = pytest.mark.integration
ADAPTER = Path("experiments/colintern")
BENCHMARKS = ("data/own/one", "data/own/two")
MEANS = "results/mteb_evaluation/eval.json"
WRITTEN = ("results/mteb_evaluation", "metrics/eval.json", "plots/eval.csv", "plots/benchmarks.csv")
MERGED = "someone/merged", "b" * 40
SHARED = "someone/adapter", "c" * 40


def work(*command: str) -> None:
    """A `colintern` command, or the eval stage."""
    from colintern import __main__ as cli
    from stages import evaluate

    if command:
        cli.main(list(command))
    else:
        evaluate.main()


def at_call(number: int, do: Callable[[], None]) -> None:
    """Do something in the middle of the encoder's nth call: queries and pages of each task take one each."""
    from colintern.evaluation import mteb_encoder

    calls, real = [0], mteb_encoder.embed_queries

    def embed_queries(*args):
        calls[0] += 1
        if calls[0] == number:
            do()
        return real(*args)

    mteb_encoder.embed_queries = embed_queries


def in_result_file(number: int) -> None:
    """Kill when mteb has written half of its nth result file."""
    import mteb

    count, real = [0], mteb.TaskResult.to_disk

    def to_disk(self, path):
        real(self, path)
        count[0] += 1
        if count[0] == number:
            os.truncate(path, path.stat().st_size // 2)
            kill()

    mteb.TaskResult.to_disk = to_disk


def in_query_file(number: int) -> None:
    from colintern.evaluation import run

    count, real = [0], run.write_query_results

    def write(path, results):
        real(path, results)
        count[0] += 1
        if count[0] == number:
            os.truncate(path, path.stat().st_size // 2)
            kill()

    run.write_query_results = write


def never_load() -> None:
    from colintern.encoding import loading

    loading.load_adapter = loading.load_merged = lambda *args: leave()


def write_params(*benchmarks: str) -> None:
    small = {
        "train_data": SET,
        "max_visual_tokens": 16,
        "eval_batch_size": 8,
        "feature_cache_gb": 0.1,
        "embedding_cache_gb": 0.1,
    }
    text = render_recipe(ROOT / "recipes" / "demo.yaml")
    text = text.replace("- demo\n", "".join(f"- {name}\n" for name in benchmarks))
    for key, value in small.items():
        text, found = re.subn(rf"(?m)^{key}: .*$", f"{key}: {value}", text)
        assert found == 1, key
    Path("params.yaml").write_text(text)


def write_eval(folder: str, numbers: range) -> None:
    from colintern.data.formats import CorpusPage, Qrel, Query, write_beir

    write_beir(
        Path(folder),
        [CorpusPage(number, PAGES[number], f"{number}.png") for number in numbers],
        [Query(number, f"page {number}") for number in numbers],
        [Qrel(number, number) for number in numbers],
    )


def write_adapter() -> None:
    """One that no one has trained, but for B, which is no longer zero."""
    import torch
    from test_training import TARGETS

    from colintern.modeling.lora import add_lora
    from colintern.modeling.processor import ColIntern3_5Processor
    from colintern.modeling.retriever import ColIntern3_5

    wrapped = add_lora(ColIntern3_5.from_pretrained("demo/base", dtype=torch.float32), TARGETS, 4, 4, 0.0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in wrapped.named_parameters():
            if "lora_B" in name:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
    wrapped.save_pretrained(ADAPTER)
    wrapped.base_model.model.save_head(ADAPTER)
    processor = ColIntern3_5Processor.from_pretrained("demo/base", max_visual_tokens=16)
    processor.save_pretrained(ADAPTER)
    wrapped.merge_and_unload().save_pretrained("merged")
    processor.save_pretrained("merged")


@pytest.fixture(scope="session")
def fetched(tmp_path_factory) -> Path:
    """A repository whose fetch-data has run, with an adapter, merged too."""
    folder = tmp_path_factory.mktemp("evaluate")
    with contextlib.chdir(folder):
        shutil.copytree(ROOT / "demo", "demo")
        for name in ("colintern", "stages", "dvc.yaml", "versions.yaml"):
            Path(name).symlink_to(ROOT / name)
        write_rows("train", [row(number) for number in range(40)], SET)
        write_rows("test", [row(number) for number in range(40, 45)], SET)
        for name, numbers in zip(BENCHMARKS, (range(45, 52), range(52, 60)), strict=True):
            write_eval(name, numbers)
        write_params(*BENCHMARKS)
        assert program("stages.fetch_data").returncode == 0
        write_adapter()
    return folder


class Run(Place):
    """A copy of the repository, in which the eval stage and commands are started."""

    def result(self) -> dict[str, bytes]:
        """Every file a run leaves."""
        tops = [self.folder / name for name in WRITTEN]
        files = [file for top in tops for file in [top, *top.rglob("*")] if file.is_file()]
        return {str(file.relative_to(self.folder)): file.read_bytes() for file in files}


@pytest.fixture
def place(fetched, tmp_path) -> Run:
    shutil.copytree(fetched, tmp_path / "repo", symlinks=True, ignore=shutil.ignore_patterns(".scratch", "results"))
    return Run(tmp_path / "repo", work)


@pytest.fixture(scope="session")
def whole(fetched, tmp_path_factory) -> dict[str, bytes]:
    """What the undisturbed run leaves."""
    undisturbed = Run(tmp_path_factory.mktemp("whole") / "repo", work)
    shutil.copytree(fetched, undisturbed.folder, symlinks=True)
    assert undisturbed.run() == 0, undisturbed.log
    found = undisturbed.result()
    assert len([name for name in found if name.endswith("Retrieval.json")]) == 4
    return found


@pytest.mark.parametrize(
    ("fault", "number", "finished"),
    [(at_call, 3, 2), (in_result_file, 3, 1), (in_query_file, 6, 4),  # mteb writes two result files a task;
     *(pytest.param(*case, marks=pytest.mark.slow)  # the 6th query file is in the out folder
       for case in ((at_call, 1, 0), (at_call, 2, 1), (at_call, 4, 3), (in_query_file, 2, 1)))],
)  # fmt: skip
def test_e1_killed_at_any_point_finished_tasks_are_taken_and_the_end_is_the_same(place, whole, fault, number, finished):
    arguments = (number, kill) if fault is at_call else (number,)
    assert place.run(fault, *arguments) == -signal.SIGKILL, place.log
    assert not (place.folder / WRITTEN[0]).exists()
    assert place.run() == 0, place.log
    assert place.log.count("finished before") == finished
    assert place.result() == whole


def test_a_second_run_loads_nothing_and_another_setting_runs_all(place, whole):
    assert place.run() == 0, place.log
    assert place.run(never_load) == 0, place.log
    assert place.result() == whole
    with contextlib.chdir(place.folder):
        Path("params.yaml").write_text(
            Path("params.yaml").read_text().replace("max_query_tokens: 64", "max_query_tokens: 32")
        )
    assert place.run(never_load) == 99


def test_baselines_of_the_command_line_say_where_pages_have_no_text(place):
    command = documented("colintern evaluate experiments/colintern --baselines bm25").partition(" ")[2]
    assert place.run(command=command) == 0, place.log
    rows = [line.split() for line in place.out.splitlines() if line.startswith("  ")]
    assert [row[1] for row in rows] == ["trained", "untrained", "bm25", "chance"] * 2
    assert [" ".join(row[2:]) for row in rows if row[1] == "bm25"] == ["no text on its pages"] * 2


def test_one_task_more_one_task_less(place, whole):
    with contextlib.chdir(place.folder):
        write_params(BENCHMARKS[0])
    assert place.run() == 0, place.log
    assert "Two" not in "".join(place.result()) and len(place.log.splitlines()) > 1
    alone = place.result()
    with contextlib.chdir(place.folder):
        write_params(*BENCHMARKS)
    assert place.run(at_call, 3, leave) == 0, place.log  # two calls: the new task, trained and untrained
    assert place.result() == whole
    with contextlib.chdir(place.folder):
        write_params(BENCHMARKS[0])
    assert place.run(never_load) == 0, place.log
    assert place.result() == alone


@pytest.mark.slow
def test_two_processes_leave_what_one_leaves_and_fill_the_caches(place, whole):
    params = place.folder / "params.yaml"
    params.write_text(params.read_text().replace("launch: auto", "launch: 2"))
    for name in ("data/.features", "data/.embeddings"):
        shutil.rmtree(place.folder / name, ignore_errors=True)
    assert place.run() == 0, place.log
    assert place.result() == whole
    shutil.rmtree(place.folder / ".scratch")
    params.write_text(params.read_text().replace("launch: 2", "launch: auto"))
    assert place.run(no_page_embedded) == 0, place.log
    assert place.result() == whole


def no_page_embedded() -> None:
    from colintern.evaluation import mteb_encoder

    mteb_encoder.embed_features = lambda *args: leave()


def test_page_embeddings_are_kept_and_smaller_pages_are_made_of_them(place, whole):
    assert place.run() == 0, place.log
    shutil.rmtree(place.folder / ".scratch")
    assert place.run(no_page_embedded) == 0, place.log
    assert place.result() == whole
    command = f"evaluate {ADAPTER} --pool-factor 1 2 --dim 128 32 --out results/sizes"
    assert place.run(at_call, 1, leave, command=command) == 99, "killed within the second size"
    assert not (place.folder / "results/sizes/sizes.csv").exists()
    assert place.run(no_page_embedded, command=command) == 0, place.log
    assert "colintern/colintern3_5: OneRetrieval: finished before, its results are taken" in place.log
    rows = list(csv.DictReader((place.folder / "results/sizes/sizes.csv").open()))
    found = {
        (row["pool_factor"], row["dim"]): float(row["bytes_per_page"]) for row in rows if row["benchmark"] == "two"
    }
    assert len(rows) == 2 * 4 and found["1", "32"] == found["1", "128"] / 4 and found["2", "128"] < found["1", "128"]
    full = json.loads(whole[MEANS])["two"]
    assert found["1", "128"] == full["bytes_per_page"] == full["vectors_per_page"] * 128 * 4
    assert (place.folder / "results/sizes/sizes.svg").read_text().count("<text") == 0, "letters are drawn, not named"
    assert place.run(never_load, command=command) == 0, place.log
    # Full embeddings are the reference, once, whatever is asked for; rescored, they give their own ranking.
    command = f"evaluate {ADAPTER} --precision binary float32 --rescore 0 100 --out results/sizes"
    assert place.run(no_page_embedded, command=command) == 0, place.log
    rows = list(csv.DictReader((place.folder / "results/sizes/sizes.csv").open()))
    assert [(row["embedding_precision"], row["rescore_top_k"]) for row in rows if row["benchmark"] == "two"] == [
        ("float32", "0"), ("binary", "0"), ("binary", "100")
    ]  # fmt: skip
    full, coarse, rescored = (row for row in rows if row["benchmark"] == "two")
    assert float(full["bytes_per_page"]) == 32 * float(coarse["bytes_per_page"]) and full["change"] == "0.0"
    assert rescored["ndcg_at_5"] == full["ndcg_at_5"], "all pages are rescored"
    assert float(coarse["change"]) == pytest.approx(float(coarse["ndcg_at_5"]) - float(full["ndcg_at_5"]), abs=1e-5)
    assert all(float(row["seconds_per_query"]) > 0 for row in rows)
    assert all(len(line) <= 80 for line in place.out.splitlines() if line.startswith(("benchmark", "two")))
    assert place.run(command=f"evaluate {ADAPTER} --precision int4") == 2
    assert "--precision: 'int4' (str) is not valid; it must be text, one of float32, float16, int8, binary" in place.log
    assert place.run(command=f"evaluate {ADAPTER} --pool-factor 0") == 2
    assert "--pool-factor: 0 (int) is not valid; it must be a whole number, 1 to 64" in place.log


def metrics(file: Path) -> dict:
    return json.loads(file.read_text())


def test_the_command_gives_what_the_stage_gives_and_leaves_its_out_alone(place, whole):
    command = f"evaluate {ADAPTER} --benchmarks {BENCHMARKS[1]} --batch-size 8"
    assert place.run(command=command) == 0, place.log
    [out] = (place.folder / "results/evaluate").iterdir()
    assert out.name.startswith("colintern-") and not (place.folder / WRITTEN[0]).exists()
    assert not (place.folder / "metrics/eval.json").exists()
    assert metrics(out / "eval.json") == {"two": json.loads(whole[MEANS])["two"]}
    assert "two, mean of 1" in place.log
    assert place.run(at_call, 3, leave) == 0, "the stage takes what the command has finished, and runs the other task"
    assert place.result() == whole


def test_another_batch_size_is_another_run(place):
    command = f"evaluate {ADAPTER} --benchmarks {BENCHMARKS[1]} --out results/here --batch-size"
    assert place.run(command=f"{command} 8") == 0, place.log
    assert place.run(never_load, command=f"{command} 3") == 99
    assert place.run(command=f"{command} 0") == 2
    assert "--batch-size: 0 is not valid; it must be 1 or more" in place.log


def test_a_merged_model_scores_as_its_adapter(place, whole):
    assert place.run(command="evaluate merged") == 0, place.log
    [out] = (place.folder / "results/evaluate").iterdir()
    merged, adapter = metrics(out / "eval.json"), json.loads(whole[MEANS])
    for name in ("one", "two"):
        assert "untrained" in adapter[name] and "untrained" not in merged[name]
        assert merged[name]["ndcg_at_5"] == pytest.approx(adapter[name]["ndcg_at_5"], abs=1e-3)


PROGRAM = """
import json, sys
import mteb
from colintern.evaluation.mteb_encoder import load_encoder, register_encoder

adapter, pages = sys.argv[1:]
vidore = type(mteb.get_task("VidoreDocVQARetrieval"))
data = {"name": "TwoRetrieval", "dataset": {"path": pages, "revision": "1"}}
task = type("TwoRetrieval", (vidore,), {"metadata": vidore.metadata.model_copy(update=data)})()
settings = {"dtype": "float32", "max_visual_tokens": 16, "max_query_tokens": 64}
meta = register_encoder(adapter, "colintern/mine", **settings)
models = {"loaded": load_encoder(adapter, **settings), "merged": load_encoder(adapter, merge=True, **settings),
          "by name": mteb.get_model("colintern/mine"), "meta": meta}
for name, model in models.items():
    cache = mteb.ResultCache("cache")
    found = mteb.evaluate(model, task, cache=cache, encode_kwargs={"batch_size": 8}, overwrite_strategy="always")
    [scores] = found[0].scores["test"]
    print("FOUND", json.dumps([name, found.model_name, found.model_revision, scores]))
"""


def test_in_a_program_of_ones_own_mteb_scores_an_adapter_as_here(place, whole, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(tmp_path / "arrow"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", PROGRAM, place.folder / ADAPTER, place.folder / BENCHMARKS[1]]
    done = subprocess.run(command, env=env, cwd=tmp_path / "elsewhere", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads(line.partition(" ")[2]) for line in done.stdout.splitlines() if line.startswith("FOUND")]
    names = {"loaded": "colintern", "merged": "colintern", "by name": "mine", "meta": "mine"}
    assert [(name, model) for name, model, _, _ in found] == [(n, f"colintern/{m}") for n, m in names.items()]
    weights = hashlib.sha256((place.folder / ADAPTER / "adapter_model.safetensors").read_bytes()).hexdigest()
    want = json.loads(whole[MEANS])["two"]
    assert 0 < want["ndcg_at_5"] < 1, "neither trivial nor hopeless"
    for name, _, revision, scores in found:
        assert revision == weights[:40]
        bound = 1e-3 if name == "merged" else 1e-6
        for metric in ("ndcg_at_5", "ndcg_at_10", "recall_at_100"):
            assert scores[metric] == pytest.approx(want[metric], abs=bound), (name, metric)
    assert [file.name for file in (tmp_path / "elsewhere").iterdir()] == ["cache"], "nothing else is left behind"
    settings = [json.loads(file.read_text()) for file in (tmp_path / "elsewhere").rglob("model_meta.json")]
    assert {one["name"] for one in settings} == {"colintern/colintern", "colintern/mine"}
    assert str(tmp_path) not in json.dumps(settings)


def test_unknown_names_are_refused_with_the_nearest_before_anything_loads(place):
    assert place.run(never_load, command=f"evaluate {ADAPTER} --benchmarks VidoreDocVQARetreival") == 2
    assert "nearest names: VidoreDocVQARetrieval" in place.log
    assert place.run(never_load, command=f"evaluate {ADAPTER} --benchmarks VidoreDocVQARetrieval") == 2
    assert "'VidoreDocVQARetrieval' is not among the data sets in data/manifest.json" in place.log
    assert place.run(never_load, command="evaluate experiments/colintren") == 2
    assert "'experiments/colintren' is no folder here" in place.log
    assert place.run(never_load, command="evaluate demo/base") == 2
    assert "demo/base: its weights have no custom_text_proj.weight, so it is a base before training" in place.log


PEER = "someone/colpeer", "e" * 40


class Peer:
    """What mteb makes of its registry's entry: pages and queries of three vectors, drawn by their content."""

    def __init__(self, name: str, revision: str, device: str | None = None):
        print("loaded", name, revision)

    def encode(self, inputs, *, prompt_type, **kwargs):
        import torch

        key = "text" if prompt_type == "query" else "image"
        items = [item.encode() if key == "text" else item.tobytes() for batch in inputs for item in batch[key]]
        draw = [torch.Generator().manual_seed(sum(item)) for item in items]
        return torch.stack([torch.randn(3, 16, generator=one) for one in draw])

    def similarity(self, queries, pages):
        from mteb.similarity_functions import max_sim

        return max_sim(queries, pages)

    def similarity_pairwise(self, queries, pages):
        raise NotImplementedError


def register_peer() -> None:
    import mteb
    from mteb.models.model_implementations import MODEL_REGISTRY

    like, (name, revision) = mteb.get_model_meta("vidore/colpali-v1.3"), PEER
    changes = {"name": name, "revision": revision, "loader": Peer, "loader_kwargs": {}, "extra_requirements_groups": []}
    MODEL_REGISTRY[name] = like.model_copy(update=changes)


def test_a_peer_that_mteb_knows_stands_in_the_same_table(place, whole):
    command = f"evaluate {PEER[0]} --benchmarks {BENCHMARKS[1]} --out results/peer"
    assert place.run(register_peer, command=command) == 0, place.log
    assert f"loaded {PEER[0]} {PEER[1]}" in place.out and "two, mean of 1" in place.out
    out, ours = place.folder / "results/peer", json.loads(whole[MEANS])["two"]
    found = metrics(out / "eval.json")["two"]
    assert found.keys() == ours.keys() - {"untrained", "vectors_per_page", "bytes_per_page"} and "chance" in found
    place_of = out / "results" / PEER[0].replace("/", "__") / PEER[1]
    meta = metrics(place_of / "model_meta.json")
    assert (meta["name"], meta["revision"], meta["loader"]) == (*PEER, "Peer")
    [scores] = metrics(place_of / "TwoRetrieval.json")["scores"]["test"]
    assert scores["ndcg_at_5"] == pytest.approx(found["ndcg_at_5"], abs=1e-5)
    assert metrics(out / "run.json")["revision"] == PEER[1]
    assert place.run(register_peer, command=f"{command} --batch-size 8") == 0, "8 is what params.yaml has"
    assert "loaded" not in place.out and "someone/colpeer: TwoRetrieval: finished before" in place.out
    assert place.run(command=f"evaluate mteb/baseline-random-colbert --benchmarks {BENCHMARKS[1]}") == 0, place.log
    assert "two, mean of 1" in place.out, "mteb's own, which searches itself"


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("vidore/colpali-v1.4", "nor does mteb know it, the nearest of those: vidore/colpali-v1.3"),
        ("cross-encoder/ms-marco-MiniLM-L6-v2", "does not retrieve pages by text in mteb"),
        ("colbert-ir/colbertv2.0", "MODEL: colbert-ir/colbertv2.0 reads text, and the pages of OneRetrieval, "),
        (f"{PEER[0]}@{'f' * 40}", f"loads {PEER[0]} at {PEER[1]}, and at no other"),
        (
            f"{PEER[0]} --dim 64",
            "pool_factor, dim, embedding_precision, rescore_top_k: 1, 64, float32, 0 are of our own embeddings",
        ),
        ("vidore/colpali-v1.3", "MODEL: mteb cannot load 'vidore/colpali-v1.3': "),
    ],
)
def test_what_is_no_peer_is_refused_and_named(place, model, said):
    assert place.run(offline_with_peer, command=f"evaluate {model}") == 2, place.log
    assert said in " ".join(place.err.split()), place.log


def offline_with_peer() -> None:
    from colintern.storage.hub import enable_offline_mode

    enable_offline_mode()
    register_peer()


@pytest.mark.parametrize(("key", "trained", "value"), [("tiling", "exact", "stock"), ("max_visual_tokens", "16", "32")])
def test_pages_cut_in_another_way_than_in_training_are_refused(place, key, trained, value):
    (place.folder / "documents").mkdir()
    (place.folder / "documents" / "page.png").write_bytes(PAGES[0])
    params = place.folder / "params.yaml"
    params.write_text(re.sub(rf"(?m)^{key}: .*$", f"{key}: {value}", params.read_text()))
    if key == "tiling":  # needs two tiles
        params.write_text(params.read_text().replace("max_visual_tokens: 16", "max_visual_tokens: 32"))
    message = f"was trained with {key}: {trained}, but params.yaml has {value}; set {key}: {trained} in params.yaml"
    for command in (
        "",
        f"evaluate {ADAPTER}",
        "evaluate merged",
        "search documents x",
        "embed documents --out vectors",
    ):
        assert place.run(never_load, command=command) == 2
        assert message in place.log, place.log


@pytest.mark.parametrize("fault", ["head", "base", "nan"])
def test_e3_an_adapter_that_cannot_be_right_is_refused_and_named(place, fault):
    adapter = place.folder / ADAPTER
    if fault == "head":
        (adapter / "head.safetensors").unlink()
    elif fault == "base":
        config = metrics(adapter / "adapter_config.json")
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "other/base"}))
    else:
        weights = load_file(adapter / "adapter_model.safetensors")
        next(iter(weights.values())).fill_(float("nan"))
        save_file(weights, adapter / "adapter_model.safetensors")
    said = {
        "head": "head.safetensors: missing",
        "base": f"{ADAPTER}: was trained on base 'other/base'",
        "nan": r"has NaN or infinite values \(1 such",
    }
    assert place.run() == 2
    assert re.search(said[fault], place.log), place.log


LOAD = """
import sys
from colintern.evaluation.mteb_encoder import load_encoder
from colintern.core.errors import UserError

meta = load_encoder(sys.argv[1], base=sys.argv[2]).mteb_model_meta
print(meta.name, meta.revision)
try:
    load_encoder(sys.argv[3])
except UserError as error:
    print(error)
"""


def test_a_model_on_the_hub_by_its_commit(place, whole):
    with running() as hub:
        hub.add_folder("model", *MERGED, place.folder / "merged")
        env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        env |= {"PYTHONPATH": str(ROOT), "HF_ENDPOINT": hub.url, "HF_HOME": str(place.folder / "hf")}
        done = subprocess.run(
            [sys.executable, "-m", "colintern", "evaluate", "@".join(MERGED)],
            env=env, cwd=place.folder, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        hub.add_folder("model", *SHARED, place.folder / ADAPTER)
        loaded = subprocess.run(
            [sys.executable, "-c", LOAD, "@".join(SHARED), place.folder / "demo/base", f"{SHARED[0]}@{'d' * 40}"],
            env=env, cwd=place.folder / "hf", capture_output=True, text=True,
        )  # fmt: skip
        assert loaded.returncode == 0, loaded.stdout + loaded.stderr
    assert loaded.stdout.splitlines()[0] == " ".join(SHARED)
    assert f"model: '{SHARED[0]}@{'d' * 40}' cannot be fetched: " in loaded.stdout
    [out] = (place.folder / "results/evaluate").iterdir()
    found = metrics(out / "eval.json")["two"]["ndcg_at_5"]
    assert found == pytest.approx(json.loads(whole[MEANS])["two"]["ndcg_at_5"], abs=1e-3)
