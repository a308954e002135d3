"""`colintern export`: the folder is the model, its card says what it is, and nothing is sent unless asked."""

import base64
import hashlib
import json
import os
import re
import shutil
from itertools import cycle
from pathlib import Path

import hub
import pytest
import torch
from conftest import page_image
from huggingface_hub import ModelCard
from loopback import run_in_thread
from mteb.models import ModelMeta
from mteb.types import OutputDType
from pages import documented, words
from processes import FORKS
from safetensors.torch import load_file, save_file
from test_adapters import DAMAGES, READ
from test_exported import CODE
from test_report import evaluated, fork, run  # noqa: F401
from transformers import AutoProcessor, InternVLModel, InternVLProcessor

from colintern.__main__ import main
from colintern.core.errors import UserError
from colintern.encoding.embed import embed_pages, embed_queries
from colintern.modeling.processor import ColIntern3_5Processor
from colintern.modeling.retriever import ColIntern3_5
from colintern.reporting.submission import SubmissionFacts, _make_model_meta

pytestmark = pytest.mark.integration
FILES = {"README.md", "config.json", "identity.json", "model.safetensors"}
FILES |= {"processor_config.json", "tokenizer.json", "tokenizer_config.json"}
FILES |= {"modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"}
FILES |= {f"{name}.py" for name in CODE}


@pytest.fixture
def top(evaluated, tmp_path):  # noqa: F811
    return shutil.copytree(evaluated, tmp_path / "top", symlinks=True, ignore=shutil.ignore_patterns("run", "features"))


def test_it_scores_as_its_adapter_and_its_card_holds_the_results(top, pages):
    code, log = fork(top, "export", "adapter", "--out", "exported/demo")
    assert code == 0 and "its results are in its card" in log, log
    assert "export: checking adapter" in log and "export: merging adapter into its base, writing exported/demo" in log
    out = top / "exported" / "demo"
    assert {file.name for file in out.iterdir()} == FILES
    assert len({file.stat().st_mode for file in out.iterdir()}) == 1
    processor = ColIntern3_5Processor.from_pretrained(out)
    assert (processor.max_visual_tokens, processor.max_query_tokens) == (96, 64)
    found = []
    for model in (
        ColIntern3_5.from_pretrained(out, dtype=torch.float32),
        ColIntern3_5.from_pretrained(top / "adapter", base=str(top / "demo" / "base"), dtype=torch.float32),
    ):
        found.append(
            torch.cat([*embed_pages(model, processor, pages, 2), *embed_queries(model, processor, ["Oslo"], 1)])
        )
    assert torch.allclose(*found, atol=1e-4)
    code, log = fork(top, "evaluate", "exported/demo", "--out", "results/merged")
    assert code == 0, log
    [adapter] = [path for path in (top / "results" / "evaluate").iterdir() if path.name.startswith("adapter")]
    scores = [json.loads((path / "eval.json").read_text())["pages"] for path in (top / "results" / "merged", adapter)]
    assert scores[0]["ndcg_at_5"] == pytest.approx(scores[1]["ndcg_at_5"], abs=1e-3)
    card = ModelCard.load(out / "README.md").data
    values = {result.metric_type: result.metric_value for result in card.eval_results}
    assert values == {m: pytest.approx(100 * scores[1][m], abs=1e-3) for m in values} and len(values) == 3
    assert card.library_name == "transformers" and {"custom_code", "sentence-transformers"} <= {*card.tags}
    assert card.model_name == "demo" and card.pipeline_tag == "visual-document-retrieval"
    text = (out / "README.md").read_text()
    assert "| Pages |" in text and re.search(r"base, model.safetensors: sha256 `[0-9a-f]{64}`", text)
    code, log = fork(top, "export", "adapter", "--out", "exported/demo")
    assert code == 2 and "--out: exported/demo exists" in log


def test_without_results_the_card_says_so(top):
    shutil.rmtree(top / "results")
    code, log = fork(top, "export", "adapter", "--out", "exported")
    assert code == 0 and "without results in its card: MODEL: its revision is" in log, log
    text = (top / "exported" / "README.md").read_text()
    assert (
        "This model had not been evaluated when it was exported." in text
        and ModelCard.load(top / "exported" / "README.md").data.eval_results is None
    )


def test_results_whose_data_is_not_fetched_any_more_are_left_out_with_the_reason(top):
    manifest = json.loads((top / "data" / "manifest.json").read_text())
    (top / "data" / "manifest.json").write_text(json.dumps(manifest | {"evaluation": {}}))
    code, log = fork(top, "export", "adapter", "--out", "exported")
    assert code == 0 and "without results in its card: benchmarks: 'data/own/pages' is not among" in log, log
    assert ModelCard.load(top / "exported" / "README.md").data.eval_results is None


def test_results_under_another_bound_are_not_those_of_what_is_exported(top):
    text = (top / "params.yaml").read_text()
    (top / "params.yaml").write_text(text.replace("max_query_tokens: 64", "max_query_tokens: 32"))
    code, log = fork(top, "export", "adapter", "--out", "exported")
    assert code == 0 and "without results in its card: MODEL: " in log and "max_query_tokens 32" in log, log


def set_tiling(adapter: Path, tiling: str | None) -> None:
    """Name the tiling as a training run does, with 112 tokens if it is stock; None: as one of an older version."""
    processor = json.loads((adapter / "processor_config.json").read_text())
    processor |= {"tiling": tiling or "exact", "max_visual_tokens": 112 if tiling == "stock" else 96}
    (adapter / "processor_config.json").write_text(json.dumps(processor))
    identity = json.loads((adapter / "identity.json").read_text())
    identity["params"].pop("tiling")
    identity["params"] |= {"tiling": tiling} if tiling else {}
    (adapter / "identity.json").write_text(json.dumps(identity))


def test_for_vllm_an_adapter_of_exact_tiles_is_refused(top):
    for tiling in ("exact", None):
        set_tiling(top / "adapter", tiling)
        code, log = fork(top, "export", "adapter", "--out", "exported", "--for", "vllm")
        assert code == 2 and "--for vllm: adapter was trained with tiling: exact, but vLLM cuts" in log, log
        assert "tiling: stock in params.yaml, train again" in log and not (top / "exported").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_for_vllm_it_is_the_model_of_transformers_with_a_dense_module(top, pages, dtype):
    """tests/test_vllm.py asks vLLM itself; here transformers does what vLLM does, on the same folder."""
    set_tiling(top / "adapter", "stock")
    text = (top / "params.yaml").read_text().replace("dtype: float32", f"dtype: {dtype}")
    (top / "params.yaml").write_text(text.replace("max_visual_tokens: 96", "max_visual_tokens: 112"))
    command = documented("colintern export MODEL --out FOLDER --for vllm", MODEL="adapter", FOLDER="exported")
    code, log = fork(top, *words(command)[1:])
    assert code == 0, log
    out, kind = top / "exported", getattr(torch, dtype)
    state = load_file(out / "model.safetensors")
    assert {value.dtype for value in state.values()} == {kind} and not any("custom_text_proj" in key for key in state)
    config = json.loads((out / "config.json").read_text())
    assert (config["architectures"], config["dtype"]) == (["InternVLForConditionalGeneration"], dtype)
    model, info = InternVLModel.from_pretrained(out, output_loading_info=True, dtype=kind)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    [module] = json.loads((out / "modules.json").read_text())
    layer = json.loads((out / module["path"] / "config.json").read_text())
    dense = torch.nn.Linear(layer["in_features"], layer["out_features"], layer["bias"], dtype=kind)
    dense.load_state_dict(
        {key.removeprefix("linear."): v for key, v in load_file(out / module["path"] / "model.safetensors").items()}
    )
    base = str(top / "demo" / "base")
    ours = ColIntern3_5.from_pretrained(top / "adapter", base=base, merge=True, dtype=torch.float32).to(kind)
    own = ColIntern3_5Processor.from_pretrained(top / "adapter", max_visual_tokens=112, tiling="stock")
    stock = AutoProcessor.from_pretrained(out)
    assert type(stock) is InternVLProcessor and stock.image_processor.max_patches == 6

    def embed(inputs) -> torch.Tensor:
        with torch.no_grad():
            return torch.nn.functional.normalize(dense(model(**inputs)[0]).float(), dim=-1)[0]

    def render(content) -> str:
        return stock.apply_chat_template([{"role": "user", "content": content}])

    tolerance = 1e-5 if dtype == "float32" else 0.05
    for page, want in zip(pages, embed_pages(ours, own, pages, 1), strict=True):
        inputs = stock(images=[page], text=[render([{"type": "image"}])], return_tensors="pt")
        torch.testing.assert_close(embed(inputs.to(kind)), want.float(), rtol=0, atol=tolerance)
    query = 'what {{ is }} due to "Oslo"'
    for content in (query, [{"type": "text", "text": query}]):
        inputs = stock.tokenizer([render(content)], return_tensors="pt", add_special_tokens=False)
        assert inputs["input_ids"].tolist() == own.process_queries([query])["input_ids"].tolist()
    [want] = embed_queries(ours, own, [query], 1)
    torch.testing.assert_close(embed(inputs), want.float(), rtol=0, atol=tolerance)
    card = ModelCard.load(out / "README.md")
    assert card.data.library_name == "vllm" and f"--dtype {dtype} " in card.text
    assert json.dumps(own.visual_prompt_prefix) in card.text and "at most 6 tiles and a thumbnail" in card.text


FACTS = "--name someone/demo --license mit --release-date 2026-12-01 --languages eng-Latn --training-datasets pages"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--submission", "give --name, --revision, --license, --release-date, --languages, --training-datasets"),
        ("--submission --name demo", "--name: 'demo' is no repository"),
        ("--submission --revision main", "--revision: 'main' is no commit"),
        ("--submission --for vllm", "--push and --for write another folder"),
        ("--license mit --languages eng-Latn", "--license, --languages: for --submission only"),
        (f"--submission --revision {'a' * 40} {FACTS}", "has a task of mteb"),
    ],
)
def test_a_submission_names_what_is_missing_and_writes_nothing(top, options, said):
    code, log = fork(top, "export", "adapter", "--out", "submission", *options.split())
    assert code == 2 and said in log and "Traceback" not in log, log
    assert not list(top.glob("submission*"))


def test_a_fact_that_mteb_refuses_is_named_by_its_option():
    written = ModelMeta.create_empty({"name": "colintern/demo", "revision": "a", "n_parameters": 10}).to_dict()
    facts = SubmissionFacts("someone/demo", "a" * 40, "my own", "1 May", ["english"], ["pages"])
    with pytest.raises(UserError) as error:
        _make_model_meta(written, facts, OutputDType.BF16, {})
    assert all(f"--{name}: " in str(error.value) for name in ("license", "release-date", "languages"))


@pytest.mark.parametrize("fault", ["untrained", "headless"])
def test_an_adapter_that_is_none_is_refused_and_nothing_is_left(top, fault):
    file = top / "adapter" / "adapter_model.safetensors"
    if fault == "headless":
        (top / "adapter" / "head.safetensors").unlink()
    else:
        save_file({key: value * ("lora_B" not in key) for key, value in load_file(file).items()}, file)
    code, log = fork(top, "export", "adapter", "--out", "exported")
    assert code == 2, log
    assert {"untrained": "trained: every lora_B is zero", "headless": "head.safetensors: missing"}[fault] in log
    assert not (top / "exported").exists()


@pytest.fixture(scope="module")
def shared(evaluated, tmp_path_factory):  # noqa: F811
    """A repository in which commands are refused and leave nothing."""
    at = tmp_path_factory.mktemp("damaged") / "top"
    shutil.copytree(evaluated, at, symlinks=True, ignore=shutil.ignore_patterns("run", "features"))
    (at / "documents").mkdir()
    page_image("Oslo").save(at / "documents" / "page.png")
    return at


def refusal(command: list[str], capsys) -> str:
    """What a command says, called in this process, before it exits with 1 or 2."""
    with pytest.raises(SystemExit) as ended:
        main(command)
    said = capsys.readouterr()
    assert ended.value.code in (1, 2) and "Traceback" not in said.err
    return said.out + said.err


def test_a_damaged_file_of_an_adapter_is_named_by_each_command(shared, monkeypatch, capsys):
    monkeypatch.chdir(shared)
    monkeypatch.setattr("colintern.storage.hub.enable_offline_mode", lambda: None)  # it is for the whole process
    monkeypatch.setenv("HF_DATASETS_CACHE", str(shared / "arrow"))
    for name, command in zip(
        READ, cycle(("search documents Oslo --model damaged", "check-adapter damaged", "export damaged --out exported"))
    ):
        shutil.rmtree("damaged", ignore_errors=True)
        shutil.copytree("adapter", "damaged")
        DAMAGES["truncated"](Path("damaged", name))
        said = refusal(command.split(), capsys)
        assert f"damaged/{name}" in said, (command, said)
    assert not Path("exported").exists()


@pytest.mark.parametrize(
    ("command", "name", "edit", "words"),
    [
        ("report", "adapter_config.json", {"lora_alpha": "4"}, "lora_alpha: '4' is not valid"),
        ("evaluate", "identity.json", {"params": None}, "params: None is not an object"),
        (
            "evaluate",
            "processor_config.json",
            {"image_seq_length": 1},
            "image_seq_length: 1 is not valid; the model has 16",
        ),
        ("report", "tokenizer_config.json", {"model_max_length": "x"}, "the processor cannot be used"),
    ],
)
def test_an_odd_value_is_named_by_evaluate_and_report(top, command, name, edit, words):
    file = top / "adapter" / name
    file.write_text(json.dumps(json.loads(file.read_text()) | edit))
    code, log = fork(top, command, "adapter")
    assert code == 2 and f"adapter/{name}: " in log and words in log and "Traceback" not in log, log


@pytest.mark.parametrize("fault", ["renamed", "empty"])
def test_an_adapter_of_other_weights_is_refused_by_each_command(shared, fault, monkeypatch, capsys):
    """The statistics of a renamed layer are those of all layers of its kind, and tell nothing."""
    monkeypatch.chdir(shared)
    monkeypatch.setattr("colintern.storage.hub.enable_offline_mode", lambda: None)
    shutil.rmtree("damaged", ignore_errors=True)
    shutil.copytree("adapter", "damaged")
    file = Path("damaged", "adapter_model.safetensors")
    state = load_file(file) if fault == "renamed" else {}
    save_file({key.replace("layers.1.", "layers.7."): value for key, value in state.items()}, file)
    for command in ("search documents x --model damaged", "check-adapter damaged", "mine --adapter damaged"):
        said = " ".join(refusal(command.split(), capsys).split())
        words = "layers.7." if fault == "renamed" else "0 weights" if "check" in command else "no weights"
        assert words in said


class Writable(hub.Handler):
    """What a client that uploads asks, besides what the hub of tests/hub.py answers."""

    def do_POST(self) -> None:
        body = self.read_body()
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.fault = hub.Fault("")
        self.server.requests.append(hub.Request("POST", self.path, "", token))
        if token != "hf_right":
            return self.error(401, "", "Invalid username or password.")
        store = self.server.store
        if self.path == "/api/repos/create":
            store["created"] = json.loads(body)
            answer = {"url": f"{self.server.url}/someone/demo", "name": "someone/demo"}
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(hub.LFS) else "regular" for name in names}
            answer = {
                "files": [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes.items()]
            }
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for one in objects:
                one["actions"] = {"upload": {"href": f"{self.server.url}/put/{one['oid']}"}}
            answer = {"transfer": "basic", "objects": objects}
        elif "/commit/" in self.path:
            store["commit"] = [json.loads(line) for line in body.splitlines()]
            answer = {"success": True, "commitOid": "c" * 40, "commitUrl": f"{self.server.url}/someone/demo/commit/c"}
        else:
            answer = {}
        return self.send(200, json.dumps(answer).encode())

    def do_PUT(self) -> None:
        data = self.read_body()
        self.fault = hub.Fault("")
        self.server.store[hashlib.sha256(data).hexdigest()] = data
        self.send(200, b"")


@pytest.fixture
def writable():
    server = hub.Hub()
    server.RequestHandlerClass = Writable
    server.store = {}
    with run_in_thread(server):
        yield server


def push(top: Path, url: str, *arguments: str, token: str = "hf_right") -> tuple[int, str]:
    """`colintern export` where the hub is at `url`; the exit code and what it printed."""
    process = FORKS.Process(target=pushing, args=(top, url, token, ("export", "adapter", *arguments)))
    process.start()
    process.join(180)
    assert process.exitcode is not None, "hangs"
    return process.exitcode, (top / "log.txt").read_text()


def pushing(top: Path, url: str, token: str, command: tuple[str, ...]) -> None:
    from huggingface_hub import constants

    # What the client reads from its environment when it is imported, which it has been here.
    constants.ENDPOINT, constants.HF_HUB_DISABLE_XET = url, True
    os.environ["HF_TOKEN"] = token
    run(top, command)


def test_it_is_pushed_when_asked_and_only_then(top, writable):
    code, log = push(top, writable.url, "--out", "kept")
    assert code == 0 and writable.requests == [], log
    code, log = push(top, writable.url, "--out", "exported", "--push", "someone/demo")
    assert code == 0 and "pushed: " in log, log
    assert writable.store["created"]["visibility"] == "private"
    sent = {line["value"]["path"]: line["value"] for line in writable.store["commit"] if line["key"] != "header"}
    assert sent.keys() == FILES
    for name, value in sent.items():
        data = writable.store[value["oid"]] if "oid" in value else base64.b64decode(value["content"])
        assert data == (top / "exported" / name).read_bytes(), name


def test_a_token_that_may_not_write_is_an_error_in_words(top, writable):
    code, log = push(top, writable.url, "--out", "exported", "--push", "someone/demo", token="hf_wrong")
    assert code == 2 and "HTTP 401" in log and "Traceback" not in log, log
    assert (top / "exported" / "README.md").is_file(), "what was made stays"
    code, log = push(top, writable.url, "--out", "other", "--push", "nonsense name")
    assert code == 2 and "--push: 'nonsense name' is no repository" in log
