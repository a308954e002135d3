import contextlib
import json
import re

import pytest
import torch
from conftest import BASE
from PIL import Image
from small_run import params
from test_model import load

from colintern.encoding import fp8
from colintern.encoding.embed import embed_features, embed_pages
from colintern.encoding.page_features import Page, PageFeatures, fingerprint_features
from colintern.modeling.processor import ColIntern3_5Processor


def counted(page: Page) -> tuple[Page, list[int]]:
    decoded: list[int] = []
    return Page(page.key, lambda: decoded.append(1) or page.image()), decoded


def test_features_give_the_embeddings_of_the_pages_to_the_bit(model, processor, pages, tmp_path):
    features = PageFeatures(model, processor, tmp_path, 1.0, "exact")
    want = embed_pages(model, processor, pages, 4)
    for _ in ("cold", "warm"):
        have = embed_features(model, processor, map(features, map(Page.from_image, pages)), 3)
        assert all(torch.equal(a, b) for a, b in zip(have, want, strict=True))
    assert len(features.cache.pending) == len(pages)


def test_a_known_page_is_not_decoded(model, processor, pages, tmp_path, capsys):
    keyed = [Page.from_image(page) for page in pages]
    PageFeatures(model, processor, tmp_path, 1.0, "exact").precompute([*keyed, keyed[0]], workers=0)
    assert "4 computed, 4 of 4 pages in the cache" in capsys.readouterr().out
    again = PageFeatures(model, processor, tmp_path, 1.0, "exact")
    page, decoded = counted(keyed[1])
    again.precompute([page], workers=0)
    again(page)
    assert decoded == [] and "0 computed, 1 of 1" in capsys.readouterr().out
    again(Page("new", page.image))
    assert decoded == [1]


def test_filling_draws_no_random_numbers_of_the_training(model, processor, pages, tmp_path):
    torch.manual_seed(3)
    want = torch.rand(1)
    torch.manual_seed(3)
    PageFeatures(model, processor, tmp_path, 1.0, "exact").precompute(
        [Page.from_image(page) for page in pages], workers=1
    )
    assert torch.equal(torch.rand(1), want)


def test_pages_of_other_pixels_size_or_palette_have_other_keys(pages):
    red, blue = Image.new("P", (8, 8)), Image.new("P", (8, 8))
    red.putpalette([255, 0, 0])
    blue.putpalette([0, 0, 255])
    keys = {Page.from_image(p).key for p in (*pages, red, blue, pages[0].transpose(2), pages[0].resize((8, 8)))}
    assert len(keys) == len(pages) + 4
    assert Page.from_image(pages[0].convert("L")).key == Page.from_image(pages[0]).key, "black on white in both"
    assert Page.from_image(pages[0].copy()).key == Page.from_image(pages[0]).key


def test_whatever_decides_a_feature_is_in_the_fingerprint(model, processor, monkeypatch):
    seen = {fingerprint_features(model, processor)}
    assert fingerprint_features(load(BASE, seed=9), processor) in seen, "the head has no part in it"
    other = ColIntern3_5Processor.from_pretrained(BASE, max_visual_tokens=64, max_query_tokens=64)
    seen.add(fingerprint_features(model, other))
    other = ColIntern3_5Processor.from_pretrained(BASE, max_visual_tokens=96, max_query_tokens=64)
    other.image_processor.image_mean = [0.5] * 3
    seen.add(fingerprint_features(model, other))
    other = ColIntern3_5Processor.from_pretrained(BASE, max_visual_tokens=96, max_query_tokens=64, tiling="stock")
    seen.add(fingerprint_features(model, other))
    seen.add(fingerprint_features(load(BASE, dtype=torch.bfloat16), processor))
    seen.add(fingerprint_features(load(BASE, attn_implementation="eager"), processor))
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    seen.add(fingerprint_features(model, processor))
    torch.set_num_threads(threads)
    with torch.no_grad():
        next(model.multi_modal_projector.parameters()).add_(1e-6)
    seen.add(fingerprint_features(model, processor))
    assert len(seen) == 8


@pytest.mark.parametrize("limit_gb", [0.0, 1e-5])
def test_a_cache_that_is_too_small_computes_the_rest_each_time(model, processor, pages, tmp_path, limit_gb, capsys):
    features = PageFeatures(model, processor, tmp_path, limit_gb, "exact")
    features.precompute([Page.from_image(page) for page in pages], workers=0)
    assert ("0 of 4 pages in the cache" in capsys.readouterr().out) == bool(limit_gb)
    want = embed_pages(model, processor, pages, 4)
    have = embed_features(model, processor, map(features, map(Page.from_image, pages)), 4)
    assert all(torch.equal(a, b) for a, b in zip(have, want, strict=True))


def test_a_folder_that_cannot_be_written_is_read_and_the_rest_is_computed(model, processor, pages, tmp_path, capsys):
    """As where it is mounted read-only, or somebody else's: no lock can be taken."""
    known = list(map(Page.from_image, pages))
    PageFeatures(model, processor, tmp_path, 1.0, "exact").precompute(known[:2], workers=0)
    for lock in tmp_path.glob("*.lock"):
        lock.unlink()
        lock.mkdir()
    features = PageFeatures(model, processor, tmp_path, 1.0, "exact")
    features.precompute(known, workers=0)
    assert "0 computed, 2 of 4 pages in the cache" in capsys.readouterr().out
    have = embed_features(model, processor, map(features, known), 4)
    assert all(map(torch.equal, have, embed_pages(model, processor, pages, 4)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_takes_66_bytes_for_64_values_and_its_error_is_bounded_and_told(dtype):
    draw = torch.Generator().manual_seed(0)
    value = (torch.randn(3, 16, 128, generator=draw) * torch.logspace(-6, 4, 128)).to(dtype)
    value[0, 0, :64] = 0
    packed = fp8.quantize_fp8(value)
    assert packed.dtype == torch.uint8 and packed.nbytes == value.numel() * 66 // 64 + 20
    back = fp8.dequantize_fp8(packed, dtype)
    assert back.dtype == dtype and back.shape == value.shape and not back[0, 0, :64].any()
    groups, have = value.double().view(-1, 64), back.double().view(-1, 64)
    # Half a step of three bits of mantissa; below the smallest normal number, half of a fixed step; bfloat16 itself.
    bound = groups.abs() * (2**-4 + 2**-8) + groups.abs().amax(1, keepdim=True) / 448 * 2**-10 * 1.01
    assert ((groups - have).abs() <= bound).all()
    told = fp8.read_quantization_error(packed)
    assert told.error == pytest.approx((groups - have).square().sum().item(), rel=1e-4)
    assert told.values == pytest.approx(groups.square().sum().item(), rel=1e-4)
    assert 0.01 < (told.error / told.values) ** 0.5 < 0.04
    assert torch.equal(fp8.fake_quantize(value), back)


def test_fp8_gives_one_result_cold_warm_and_without_a_cache_and_tells_one_error(
    model, processor, pages, tmp_path, capsys
):
    keyed, seen = [Page.from_image(page) for page in pages], []
    for limit in (1.0, 1.0, 0.0):
        features = PageFeatures(model, processor, tmp_path, limit, "fp8")
        features.precompute(keyed, workers=0)
        seen.append([*map(features, keyed), torch.tensor(features.relative_error)])
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))
    told = re.findall(r"in fp8: relative error (\d\.\d\d)% over 4 pages", capsys.readouterr().out)
    assert len(told) == 3 and 1 < float(told[0]) < 4
    exact = PageFeatures(model, processor, tmp_path, 1.0, "exact")
    exact.precompute(keyed, workers=0)
    assert exact.relative_error is None and exact.cache.folder != features.cache.folder
    want = torch.cat([exact(page).flatten() for page in keyed])
    have = torch.cat([value.flatten() for value in seen[0][:-1]])
    assert ((want - have).norm() / want.norm()).item() == pytest.approx(seen[0][-1].item(), rel=1e-3)
    sizes = {cache: sum(f.stat().st_size for f in (tmp_path / cache).iterdir())
             for cache in (exact.cache.folder.name, exact.cache.folder.name + "-fp8")}  # fmt: skip
    assert sizes[exact.cache.folder.name + "-fp8"] < 0.3 * sizes[exact.cache.folder.name]


@pytest.mark.integration
def test_a_run_tells_the_error_of_fp8_in_its_metrics_and_its_log(place):
    told = []
    for limit in (0.1, 0.0):
        with contextlib.chdir(place.folder):
            params(feature_cache_format="fp8", feature_cache_gb=limit)
        assert place.run() == 0, place.log
        [file] = [*place.folder.glob("metrics.json"), *place.folder.glob("metrics/train.json")]
        metrics = json.loads(file.read_text())
        assert f"in fp8: relative error {metrics['feature_error']:.2%} over 45 pages" in place.log
        told.append((metrics["feature_error"], metrics["loss"], metrics["dev_ndcg_at_5"]))
    assert told[0] == told[1] and 0.01 < told[0][0] < 0.04
