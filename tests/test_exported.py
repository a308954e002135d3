"""What `colintern export` writes, loaded where colintern is not: the same vectors, by the lines of its card."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from mteb.models import ModelMeta
from mteb.models.sentence_transformer_wrapper import MultiVectorWrapper
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from test_saved_files import SAVED

from colintern import ColIntern3_5, ColIntern3_5Processor
from colintern.core.recipes import render_recipe
from colintern.encoding.embed import embed_pages, embed_queries
from colintern.params import load_params
from colintern.reporting.export import CODE_HEADER, export_model
from colintern.scoring.maxsim import maxsim_scores
from colintern.scoring.metrics import ndcg_at_k
from colintern.storage.manifest import hash_local_files

pytestmark = pytest.mark.integration
CODE = {"configuration_colintern", "custom_st", "images", "interpretability", "maxsim", "modeling_colintern"}
CODE |= {"processing_colintern", "tiling"}
WORDS = "Oslo Rome Halde milk paper bread stone green".split()
SIZES = ((224, 336), (112, 112), (224, 112), (150, 400))  # grids with and without a thumbnail
QUERIES = [f"find the bill sent to {word}" for word in WORDS]


def make_page(number: int) -> Image.Image:
    page = Image.new("RGB", SIZES[number % len(SIZES)], "white")
    ImageDraw.Draw(page).text((10, 20 + number), WORDS[number], fill="black")
    return page


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """A folder with an exported model, pages, and the vectors that the pipeline gives them; and its NDCG@5."""
    top, out = tmp_path_factory.mktemp("pipeline"), tmp_path_factory.mktemp("outside")
    shutil.copytree(SAVED / "adapter", top / "adapter")
    for name in ("colintern", "demo", "dvc.yaml", "stages", "versions.yaml"):
        (top / name).symlink_to(ROOT / name)
    (top / "params.yaml").write_text(render_recipe(ROOT / "recipes" / "demo.yaml"))
    (top / "data").mkdir()
    with contextlib.chdir(top):
        base = hash_local_files("demo/base", (".json", ".safetensors"))
        Path("data/manifest.json").write_text(json.dumps({"base": base._asdict()}))
        assert export_model(load_params(), Path("adapter"), out / "model", "exported")
        model = ColIntern3_5.from_pretrained("adapter", dtype=torch.float32)
        processor = ColIntern3_5Processor.from_pretrained("adapter")
    pages = [make_page(number) for number in range(len(WORDS))]
    vectors = embed_pages(model, processor, pages, 3), embed_queries(model, processor, QUERIES, 3)
    torch.save(vectors, out / "vectors.pt")
    for number, page in enumerate(pages):
        page.save(out / f"{number}.png")
    pages[0].save(out / "model" / "page.png")
    return out, ndcg_at_k(maxsim_scores(vectors[1], vectors[0]), [{number} for number in range(len(WORDS))], 5)


# Prepended to what runs outside. None in sys.modules is an import that fails, and a package that is not installed.
START = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        assert name.partition(".")[0] != "colintern", f"{name} was imported"

sys.meta_path.insert(0, Refuse())
sys.modules |= dict.fromkeys(BLOCKED)
import torch
from PIL import Image

vectors = torch.load("../vectors.pt")
images = [Image.open(f"../{number}.png") for number in range(len(vectors[0]))]

def refused(words, do, *args, **kwargs):
    try:
        do(*args, **kwargs)
    except Exception as error:
        assert words in str(error), f"{type(error).__name__}: {error}"
    else:
        raise AssertionError(f"{words}: not refused")

def check(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one[: len(other)], other, atol=1e-5, rtol=0)

def ndcg(scores):
    places = [int((row >= row[i]).sum()) for i, row in enumerate(scores)]
    return sum(1 / torch.log2(torch.tensor(place + 1.0)).item() for place in places if place <= 5) / len(places)
"""


def run_outside(folder: Path, blocked: list[str], code: str) -> str:
    """Run code in the exported folder, in a process whose path has neither the repository nor the tests."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env |= {"HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1"}
    script = START.replace("BLOCKED", repr(["colintern", *blocked])) + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], cwd=folder / "model", env=env, capture_output=True, text=True, input=""
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "You are using a model of type" not in done.stderr and "custom code" not in done.stderr, done.stderr
    return done.stdout


def find_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)


def snippet(folder: Path, *words: str) -> str:
    """The blocks of the card that have these words, in their order."""
    blocks = find_blocks(folder / "model" / "README.md")
    chosen = [[block for block in blocks if word in block] for word in words]
    assert all(len(one) == 1 for one in chosen), words
    return "".join(block for [block] in chosen)


def test_the_code_in_the_folder_is_the_librarys(outside):
    files = sorted((outside[0] / "model").glob("*.py"))
    assert {file.stem for file in files} == CODE
    for file in files:
        package = "scoring" if file.stem == "maxsim" else "modeling"
        text = (ROOT / "colintern" / package / file.name).read_text()
        lines = [line for line in text.splitlines() if not line.startswith("from colintern.")]
        exported = file.read_text()
        assert exported.startswith(CODE_HEADER) and "SPDX-License-Identifier: Apache-2.0" in CODE_HEADER
        found = exported.removeprefix(CODE_HEADER).splitlines()
        assert [line for line in found if not line.startswith("from .")] == lines
        imported = {re.split(r"[ .]", line)[1] for line in lines if re.match(r"(from|import) \w", line)}
        libraries = {"torch", "torchvision", "transformers", "PIL", "numpy"}
        libraries |= {"sentence_transformers"} if file.stem == "custom_st" else set()
        assert imported - sys.stdlib_module_names <= libraries, file.name


def test_the_card_and_the_page_show_what_is_run_here(outside, monkeypatch):
    folder, _ = outside
    blocks = find_blocks(folder / "model" / "README.md")
    used = ("AutoModel.", "plot_similarity_map", "MultiVectorEncoder(", "MultiVectorWrapper(", "from colintern import")
    assert "".join(blocks) == snippet(folder, *used)
    shown = find_blocks(ROOT / "docs" / "export.md")
    assert shown == [block for block in blocks if "AutoModel." in block or "MultiVectorEncoder(" in block]
    monkeypatch.chdir(folder / "model")
    names: dict = {}
    exec(snippet(folder, "from colintern import"), names)
    torch.testing.assert_close(names["pages"][0], torch.load("../vectors.pt")[0][0], atol=1e-5, rtol=0)
    card = (folder / "model" / "README.md").read_text()
    assert "at most 96 visual tokens: tiles of 112 px, 16 tokens each" in card and "128 dimensions" in card
    assert "`Query: `, the text, ten `<|endoftext|>`; at most 64 tokens" in card and "causal in the language" in card


def test_transformers_loads_it_with_its_head_or_not_at_all(outside):
    folder, expected = outside
    code = (
        snippet(folder, "AutoModel.")
        + """
from transformers import AutoConfig, AutoModelForImageTextToText
with torch.no_grad():
    pages, queries = model(**processor.process_images(images)), model(**processor.process_queries(QUERIES))
check(pages, vectors[0]), check(queries, vectors[1])
assert abs(ndcg(processor.score_multi_vector(queries, pages)) - EXPECTED) < 5e-5
assert abs(ndcg(processor.score(queries, pages)) - EXPECTED) < 5e-5
for one in (AutoConfig, AutoModel, AutoProcessor, AutoModelForImageTextToText):
    refused("trust_remote_code=True", one.from_pretrained, ".", trust_remote_code=False)
for broken in ("headless", "half a head"):
    refused("missing custom_text_proj.bias", AutoModel.from_pretrained, f"../{broken}", trust_remote_code=True)
refused("text_config.is_causal", AutoModel.from_pretrained, "../bidirectional", trust_remote_code=True)
refused("max_patches", processor, images, max_patches=12)
refused("max_patches", AutoProcessor.from_pretrained, ".", trust_remote_code=True, max_patches=12)
other = AutoModel.from_pretrained(".", trust_remote_code=True, attn_implementation="eager")
with torch.no_grad():
    check(other(**processor.process_images(images)), vectors[0])
    refused("right-padded", model, **{k: v.flip(1) for k, v in processor.process_queries(["a", "a b c"]).items()})
model.save_pretrained("../again"), processor.save_pretrained("../again")
again = AutoModel.from_pretrained("../again", trust_remote_code=True)
check(again(**AutoProcessor.from_pretrained("../again", trust_remote_code=True).process_queries(QUERIES)), vectors[1])
""".replace("QUERIES", repr(QUERIES)).replace("EXPECTED", repr(expected))
    )
    weights = load_file(folder / "model" / "model.safetensors")
    config = json.loads((folder / "model" / "config.json").read_text())
    for name, left_out in (("headless", "custom_text_proj"), ("half a head", "custom_text_proj.bias")):
        shutil.copytree(folder / "model", folder / name)
        kept = {key: value for key, value in weights.items() if not key.startswith(left_out)}
        save_file(kept, folder / name / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(folder / "model", folder / "bidirectional")
    config["text_config"]["is_causal"] = False
    (folder / "bidirectional" / "config.json").write_text(json.dumps(config))
    run_outside(folder, ["colpali_engine", "peft", "mteb", "sentence_transformers"], code)
    with pytest.raises(ValueError, match=r"missing custom_text_proj\.bias"):
        ColIntern3_5.from_pretrained(folder / "headless")


CHECK_SENTENCE_TRANSFORMERS = """
from sentence_transformers import SentenceTransformer, SparseEncoder
assert (pages[0].shape, pooled[0].shape, patches.shape, n_patches) == ((108, 128), (36, 128), (96, 128), (8, 12))
assert Image.open("heatmap.png").size == page.size
documents, queries = encoder.encode_document(images, batch_size=3), encoder.encode_query(QUERIES)
assert [len(one) for one in (*documents, *queries)] == [len(one) for one in (*vectors[0], *vectors[1])]
check(documents, vectors[0]), check(queries, vectors[1])
assert abs(ndcg(encoder.similarity(queries, documents)) - EXPECTED) < 5e-5
grid = encoder.processor.rearrange_image_embeddings(
    documents[0], encoder.processor.get_image_mask(encoder.processor.process_images(images[:1]))[0], n_patches
)
assert torch.equal(patches.view(12, 8, -1), grid.transpose(0, 1)) and encoder.get_embedding_dimension() == 128
refused("trust_remote_code=True", MultiVectorEncoder, ".")
refused("prompt='Find: '", encoder.encode_query, ["a"], prompt="Find: ")
refused("encode_query takes text", encoder.encode_query, images)
refused("encode_document takes Pillow images", encoder.encode_document, ["a"])
refused("encode_document takes Pillow images", encoder.encode, ["a"])
refused("backend='onnx'", MultiVectorEncoder, ".", trust_remote_code=True, backend="onnx")
refused("missing custom_text_proj.bias", MultiVectorEncoder, "../headless", trust_remote_code=True)
for one in (SentenceTransformer, SparseEncoder):  # made of the same weights; they would pool the vectors
    refused("", lambda: one(".", trust_remote_code=True).encode(["a"]))
encoder.save("../saved")
check(MultiVectorEncoder("../saved", trust_remote_code=True).encode_query(QUERIES), vectors[1])

import mteb
from datasets import Dataset, Features, Image as ImageFeature, Value
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.tasks.retrieval.eng import VidoreDocVQARetrieval

class Local(VidoreDocVQARetrieval):
    def load_data(self, *args, **kwargs):
        ids = [str(number) for number in range(len(images))]
        corpus = Dataset.from_dict(
            {"id": ids, "image": images}, features=Features({"id": Value("string"), "image": ImageFeature()})
        )
        queries = Dataset.from_dict({"id": ids, "text": QUERIES})
        parts = {"corpus": corpus, "queries": queries, "relevant_docs": {i: {i: 1} for i in ids}, "top_ranked": None}
        self.dataset = {"default": {"test": parts}}
        self.data_loaded = True

mteb.get_task = lambda name: Local()
"""
CHECK_MTEB = """
assert abs(results.task_results[0].scores["test"][0]["ndcg_at_5"] - EXPECTED) < 5e-5

from importlib.util import find_spec
from types import SimpleNamespace

def rearrange(array, pattern, h=0, w=0):
    assert pattern in ("(h w) c -> w h c", "h w -> w h")
    return (array.reshape(h, w, -1) if h else array).swapaxes(0, 1)

extras = {"einops": {"rearrange": rearrange}, "seaborn": {"color_palette": lambda name, as_cmap: "viridis"}}
sys.modules |= {name: SimpleNamespace(**parts) for name, parts in extras.items() if not find_spec(name)}
import matplotlib
matplotlib.use("agg")
"""
CHECK_COLPALI_ENGINE = """
assert maps.shape == (queries.shape[1], 8, 12) and Image.open("map.png").size[0] > 100
best = torch.einsum("qd,pd->qp", queries[0], patches).argmax(1)  # row by row
assert torch.equal(maps.transpose(1, 2).flatten(1).argmax(1), best)
from colpali_engine.interpretability import get_similarity_maps_from_embeddings
batch = processor.process_images([images[1]])  # of one tile, where colpali-engine's own function is right
mask, patch_size = processor.get_image_mask(batch), model.patch_size
size = processor.get_n_patches(image_size=images[1].size, patch_size=patch_size)
[theirs] = get_similarity_maps_from_embeddings(model(**batch), queries, size, mask)
[ours] = processor.get_similarity_maps_from_embeddings(model(**batch), queries, size, mask)
assert theirs.shape == (queries.shape[1], 4, 4) and torch.equal(theirs, ours)
refused("several tiles", processor.get_n_patches, image_size=page.size, patch_size=patch_size)
"""


def test_sentence_transformers_mteb_and_colpali_engine_use_it(outside):
    folder, expected = outside
    code = (
        snippet(folder, "MultiVectorEncoder(")
        + CHECK_SENTENCE_TRANSFORMERS
        + snippet(folder, "MultiVectorWrapper(")
        + CHECK_MTEB
        + snippet(folder, "AutoModel.", "plot_similarity_map")
        + CHECK_COLPALI_ENGINE
    )
    code = code.replace("QUERIES", repr(QUERIES)).replace("EXPECTED", repr(expected))
    run_outside(folder, [], code)
    files = ("config_sentence_transformers.json", "sentence_bert_config.json", "modules.json", "config.json")
    contents = [json.loads((folder / "model" / name).read_text()) for name in files]
    loader = ModelMeta._resolve_loader("owner/name", *contents)  # what mteb does with these files of a hub repository
    assert loader == (MultiVectorWrapper, "late-interaction", ["image", "text"])
