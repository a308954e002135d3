import pytest
import torch
from conftest import BASE
from PIL import Image
from test_model import load

from colintern.modeling.embed import embed_features, embed_pages
from colintern.modeling.features import Page, PageFeatures, fingerprint
from colintern.processor import ColIntern3_5Processor


def counted(page: Page) -> tuple[Page, list[int]]:
    decoded: list[int] = []
    return Page(page.key, lambda: decoded.append(1) or page.image()), decoded


def test_features_give_the_embeddings_of_the_pages_to_the_bit(model, processor, pages, tmp_path):
    features = PageFeatures(model, processor, tmp_path, 1.0)
    want = embed_pages(model, processor, pages, 4)
    for _ in ("cold", "warm"):
        have = embed_features(model, processor, map(features, map(Page.of, pages)), 3)
        assert all(torch.equal(a, b) for a, b in zip(have, want, strict=True))
    assert len(features.cache.pending) == len(pages)


def test_a_known_page_is_not_decoded(model, processor, pages, tmp_path, capsys):
    keyed = [Page.of(page) for page in pages]
    PageFeatures(model, processor, tmp_path, 1.0).fill([*keyed, keyed[0]], workers=0)
    assert "4 computed, 4 of 4 pages in the cache" in capsys.readouterr().out
    again = PageFeatures(model, processor, tmp_path, 1.0)
    page, decoded = counted(keyed[1])
    again.fill([page], workers=0)
    again(page)
    assert decoded == [] and "0 computed, 1 of 1" in capsys.readouterr().out
    again(Page("new", page.image))
    assert decoded == [1]


def test_filling_draws_no_random_numbers_of_the_training(model, processor, pages, tmp_path):
    torch.manual_seed(3)
    want = torch.rand(1)
    torch.manual_seed(3)
    PageFeatures(model, processor, tmp_path, 1.0).fill([Page.of(page) for page in pages], workers=1)
    assert torch.equal(torch.rand(1), want)


def test_pages_of_other_pixels_size_or_palette_have_other_keys(pages):
    red, blue = Image.new("P", (8, 8)), Image.new("P", (8, 8))
    red.putpalette([255, 0, 0])
    blue.putpalette([0, 0, 255])
    keys = {Page.of(p).key for p in (*pages, red, blue, pages[0].transpose(2), pages[0].resize((8, 8)))}
    assert len(keys) == len(pages) + 4
    assert Page.of(pages[0].convert("L")).key == Page.of(pages[0]).key, "black on white in both"
    assert Page.of(pages[0].copy()).key == Page.of(pages[0]).key


def test_whatever_decides_a_feature_is_in_the_fingerprint(model, processor, monkeypatch):
    seen = {fingerprint(model, processor)}
    assert fingerprint(load(BASE, seed=9), processor) in seen, "the head has no part in it"
    other = ColIntern3_5Processor.from_pretrained(BASE, max_visual_tokens=64, max_query_tokens=64)
    seen.add(fingerprint(model, other))
    other = ColIntern3_5Processor.from_pretrained(BASE, max_visual_tokens=96, max_query_tokens=64)
    other.image_processor.image_mean = [0.5] * 3
    seen.add(fingerprint(model, other))
    seen.add(fingerprint(load(BASE, dtype=torch.bfloat16), processor))
    seen.add(fingerprint(load(BASE, attn_implementation="eager"), processor))
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    seen.add(fingerprint(model, processor))
    torch.set_num_threads(threads)
    with torch.no_grad():
        next(model.multi_modal_projector.parameters()).add_(1e-6)
    seen.add(fingerprint(model, processor))
    assert len(seen) == 7


@pytest.mark.parametrize("limit_gb", [0.0, 1e-5])
def test_a_cache_that_is_too_small_computes_the_rest_each_time(model, processor, pages, tmp_path, limit_gb, capsys):
    features = PageFeatures(model, processor, tmp_path, limit_gb)
    features.fill([Page.of(page) for page in pages], workers=0)
    assert ("0 of 4 pages in the cache" in capsys.readouterr().out) == bool(limit_gb)
    want = embed_pages(model, processor, pages, 4)
    have = embed_features(model, processor, map(features, map(Page.of, pages)), 4)
    assert all(torch.equal(a, b) for a, b in zip(have, want, strict=True))
