"""The geometry of heatmaps: exact, against the real tower; bench/heatmap.py measures the demo's."""

import json
import re
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from conftest import BASE, ROOT
from matplotlib import pyplot
from PIL import Image, ImageDraw

from bench.heatmap import find_hottest_box
from colintern.encoding.embed import embed_pages
from colintern.modeling.processor import ColIntern3_5Processor
from colintern.modeling.tiling import Grid
from colintern.reporting.heatmaps import compute_similarity_map

CELL = 28  # pixels of the demo base's tiles that one visual token sees


@pytest.fixture
def local(model):
    """The demo base with its attention switched off: what a token becomes is decided by its own pixels alone."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith(("self_attn.o_proj.weight", "attention.projection_layer.weight")):
                value.zero_()
    return model


@pytest.mark.parametrize(
    ("size", "bound", "grid"),
    [
        ((224, 336), 96, Grid(2, 3, False)),
        ((336, 224), 112, Grid(3, 2, True)),
        ((112, 112), 96, Grid(1, 1, False)),
        ((448, 112), 96, Grid(4, 1, True)),
    ],
)
def test_a_spot_is_hottest_where_it_was_put_in_every_cell(local, size, bound, grid):
    processor = ColIntern3_5Processor.from_pretrained(BASE, max_visual_tokens=bound, max_query_tokens=64)
    assert processor.get_page_grid(size[::-1]) == grid
    blank = Image.new("RGB", size, "white")
    [plain] = embed_pages(local, processor, [blank], 1)
    corners = [(x, y) for y in range(0, size[1], CELL) for x in range(0, size[0], CELL)]
    pages = []
    for x, y in corners:
        page = blank.copy()
        ImageDraw.Draw(page).rectangle((x + 4, y + 4, x + CELL - 5, y + CELL - 5), fill="black")
        pages.append(page)
    assert len(pages) == grid.cols * grid.rows * 16
    for corner, page in zip(corners, embed_pages(local, processor, pages, 16), strict=True):
        # Where a token has changed from the blank page: with attention off, in one place of the tiles.
        changed = (page - plain).norm(dim=1, keepdim=True)
        found = compute_similarity_map(processor, torch.ones(1, 1), changed, size)
        assert (found.page > 1e-3).sum() == 1
        assert find_hottest_box(found.page[0], size)[:2] == corner
        assert (found.thumbnail is not None) == grid.thumbnail
        if found.thumbnail is not None:  # which sees the whole page small, at the same place
            left, top, right, bottom = find_hottest_box(found.thumbnail[0], size)
            assert left < corner[0] + CELL and corner[0] < right and top < corner[1] + CELL and corner[1] < bottom
        assert not found.rest.any()


def test_visual_tokens_come_tile_by_tile_and_row_by_row(processor):
    """In a page of 2 x 1 tiles of 4 x 4 tokens the second row begins with token 4, and the right tile with token 16."""
    [first] = processor.get_image_mask(processor.tokenize_pages([3]))[0].nonzero()[:1].flatten().tolist()
    products = torch.arange(float(len(processor.tokenize_pages([3]).input_ids[0])))[:, None] - first
    found = compute_similarity_map(processor, torch.ones(1, 1), products, (224, 112))
    rows = [[*range(4 * row, 4 * row + 4), *range(16 + 4 * row, 20 + 4 * row)] for row in range(4)]
    assert found.page.tolist() == [rows]
    assert found.thumbnail.flatten().tolist() == list(range(32, 48)) and found.rest.shape[1] == len(products) - 48


def test_what_each_token_adds_is_the_score(model, processor, pages):
    from colintern.encoding.embed import embed_queries
    from colintern.scoring.maxsim import maxsim_scores

    [query] = embed_queries(model, processor, ["which bill is from Halde"], 1)
    for image, page in zip(pages, embed_pages(model, processor, pages, 4), strict=True):
        found = compute_similarity_map(processor, query, page, image.size)
        assert found.best_scores.sum().item() == pytest.approx(maxsim_scores([query], [page]).item(), abs=1e-4)
        assert found.page.shape[1:] == processor.get_n_patches(image.size[::-1])[::-1]
        assert found.is_on_page.dtype == torch.bool


def test_a_page_that_is_too_short_is_refused(processor):
    num_tokens = len(processor.tokenize_pages([1]).input_ids[0])
    with pytest.raises(ValueError, match=f"expected .* {num_tokens} tokens of a page of 112 x 112 pixels"):
        compute_similarity_map(processor, torch.ones(1, 4), torch.ones(10, 4), (112, 112))


def test_after_training_the_hottest_cell_lies_on_the_answer(processor):
    """The adapter of `make repro`, where there is one: 9 of 10 demo pages; `python -m bench.heatmap` has all 200."""
    from bench.heatmap import BOUND, measure
    from colintern.modeling.retriever import ColIntern3_5
    from demo.corpus import generate_corpus

    adapter = ROOT / "experiments" / "colintern"
    config = adapter / "adapter_config.json"
    if not config.is_file() or json.loads(config.read_text())["base_model_name_or_path"] != "demo/base":
        pytest.skip("experiments/colintern holds no adapter of the demo; make repro trains one")
    model = ColIntern3_5.from_pretrained(adapter, base=str(BASE), dtype=torch.float32)
    found = measure(model, processor, generate_corpus("test", 60, 1, seed=0))
    assert found.cases >= BOUND > 2 * found.cells


@pytest.fixture
def interpretability(monkeypatch):
    """colpali-engine's module, with what it needs of einops and seaborn where these, which are extras, are missing."""

    def rearrange(array, pattern, h=0, w=0):
        assert pattern in ("(h w) c -> w h c", "h w -> w h")
        return (array.reshape(h, w, -1) if h else array).swapaxes(0, 1)

    pretended = {"einops": {"rearrange": rearrange}, "seaborn": {"color_palette": lambda name, as_cmap: "viridis"}}
    for name in [name for name in pretended if not find_spec(name)]:
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**pretended[name]))
    pyplot.switch_backend("agg")
    from colpali_engine import interpretability

    return interpretability


@pytest.mark.parametrize(
    ("size", "bound", "grid"),
    [((224, 336), 96, Grid(2, 3, False)), ((336, 224), 112, Grid(3, 2, True)), ((112, 112), 96, Grid(1, 1, False))],
)
def test_colpali_engines_maps_are_right_or_refused(local, interpretability, size, bound, grid):
    """By the steps of its README; a query of the spot's own token is most like the spot."""
    processor = ColIntern3_5Processor.from_pretrained(BASE, max_visual_tokens=bound)
    assert processor.get_page_grid(size[::-1]) == grid
    blank = Image.new("RGB", size, "white")
    theirs = interpretability.get_similarity_maps_from_embeddings
    for x, y in ((0, 0), (84, 0), (0, 84), (size[0] - CELL, 28), (size[0] - CELL, size[1] - CELL)):
        image = blank.copy()
        ImageDraw.Draw(image).rectangle((x + 4, y + 4, x + CELL - 5, y + CELL - 5), fill="black")
        batch = processor.process_images([image])
        with torch.no_grad():
            page, plain = local(**batch), local(**processor.process_images([blank]))
        mask, tiles = processor.get_image_mask(batch), processor.get_local_image_mask(batch)
        query = page[:, ((page - plain).norm(dim=-1) * tiles).argmax(dim=1)]
        if grid.tiles > 1:
            with pytest.raises(
                ValueError, match=r"\(height, width\)\) .* the processor's get_similarity_maps_from_emb"
            ):
                processor.get_n_patches(image_size=image.size, patch_size=local.patch_size)
            with pytest.raises(ValueError, match=r"\(height, width\); Pillow's"):
                processor.get_similarity_maps_from_embeddings(
                    page, query, processor.get_n_patches(image.size), processor.get_image_mask(batch)
                )
        else:
            for keyword in ({"patch_size": local.patch_size}, {"spatial_merge_size": local.spatial_merge_size}):
                [found] = theirs(page, query, processor.get_n_patches(image_size=image.size, **keyword), mask)
                assert divmod(int(found[0].argmax()), found.shape[2]) == (x // CELL, y // CELL)
        [found] = processor.get_similarity_maps_from_embeddings(page, query, processor.get_n_patches(size[::-1]), tiles)
        assert divmod(int(found[0].argmax()), found.shape[2]) == (x // CELL, y // CELL)
    [(figure, axes)] = interpretability.plot_all_similarity_maps(image, ["spot"], found)
    shown = torch.tensor(axes.images[1].get_array())
    top, left = divmod(int(shown.argmax()), size[0])
    assert (left // CELL, top // CELL) == (x // CELL, y // CELL)
    pyplot.close(figure)


def test_the_examples_of_the_page_for_colpali_engine(interpretability, tmp_path, monkeypatch):
    text = (ROOT / "docs" / "colpali-engine.md").read_text()
    code = "".join(re.findall(r"^```python\n(.*?)^```", text, re.M | re.S))
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (224, 336), "white").save("page.png")
    names = {}
    exec(code.replace('"experiments/colintern"', repr(str(BASE))), names)
    assert names["similarity_maps"].shape[1:] == (8, 12)
    assert len(names["tokens"]) == len(names["similarity_maps"])
    assert Image.open("similarity_map.png").size[0] > 100
