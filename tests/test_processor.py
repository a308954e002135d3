import inspect
import itertools
import logging
import pickle
from random import Random

import pytest
import torch
from colpali_engine.utils.processing_utils import BaseVisualRetrieverProcessor
from conftest import BASE
from PIL import Image
from transformers import InternVLProcessor

from colintern.modeling.processor import ColIntern3_5Processor


def test_the_public_surface_is_colpali_engines(processor):
    assert isinstance(processor, BaseVisualRetrieverProcessor)
    for name in ("process_images", "process_texts", "process_queries", "score", "score_multi_vector", "get_n_patches"):
        ours = inspect.signature(getattr(ColIntern3_5Processor, name)).parameters
        theirs = inspect.signature(getattr(BaseVisualRetrieverProcessor, name)).parameters
        positional = [p for p in theirs if p not in ("args", "kwargs")]
        assert list(ours)[: len(positional)] == positional, name


def test_pixels_are_the_stock_processors_where_the_grid_is(processor):
    # A page of exactly two by three tiles, with a thumbnail: both tilers choose the same grid.
    page = Image.effect_noise((224, 336), 90).convert("RGB")
    ours = ColIntern3_5Processor.from_pretrained(BASE, max_visual_tokens=112).process_images([page])
    stock = InternVLProcessor.from_pretrained(BASE)
    prompt = "".join([processor.visual_prompt[0], stock.image_token, processor.visual_prompt[1]])
    theirs = stock(images=[page], text=[prompt], min_patches=6, max_patches=6, return_tensors="pt")
    torch.testing.assert_close(ours["pixel_values"], theirs["pixel_values"], rtol=0, atol=0)
    assert ours["input_ids"].tolist() == theirs["input_ids"].tolist()


@pytest.mark.parametrize("bound", [32, 96, 112, 208])
def test_stock_tiles_are_the_stock_processors(bound, tmp_path):
    """With `InternVLProcessor` from the saved folder, and the `max_patches` that is saved there."""
    processor = ColIntern3_5Processor.from_pretrained(BASE, max_visual_tokens=bound, tiling="stock")
    processor.save_pretrained(tmp_path)
    again, stock = ColIntern3_5Processor.from_pretrained(tmp_path), InternVLProcessor.from_pretrained(tmp_path)
    assert (again.tiling, stock.image_processor.crop_to_patches) == ("stock", True)
    assert stock.image_processor.max_patches == bound // 16 - 1
    sizes = [(224, 336), (336, 224), (112, 112), (113, 112), (9, 9), (1, 700), (700, 1), (620, 877), (500, 501)]
    rng = Random(bound)
    sizes += [(rng.randrange(1, 600), rng.randrange(1, 600)) for _ in range(15)]
    prompt = stock.image_token.join(processor.visual_prompt)
    for size in sizes:
        page = Image.effect_noise(size, 90).convert("RGB")
        ours, theirs = again.process_images([page]), stock(images=[page], text=[prompt], return_tensors="pt")
        assert torch.equal(ours["pixel_values"], theirs["pixel_values"]), size
        assert ours["input_ids"].tolist() == theirs["input_ids"].tolist()
        assert len(ours["pixel_values"]) == again.get_page_grid(size[::-1]).tiles <= bound // 16


def test_tiles_of_a_batch_follow_each_other(processor, pages):
    whole = processor.process_images(pages)
    alone = [processor.process_images([page])["pixel_values"] for page in pages]
    assert [len(a) for a in alone] == [processor.get_page_grid(page.size[::-1]).tiles for page in pages]
    assert torch.equal(whole["pixel_values"], torch.cat(alone))


def test_padding_is_on_the_right_and_masked(processor, pages):
    batch = processor.process_images(pages)
    for ids, mask, page in zip(batch["input_ids"], batch["attention_mask"], pages, strict=True):
        length = processor.process_images([page])["input_ids"].shape[1]
        assert mask.tolist() == [1] * length + [0] * (len(ids) - length)


def test_the_bound_on_visual_tokens_holds(pages):
    for bound in (16, 40, 96, 200):
        processor = ColIntern3_5Processor.from_pretrained(BASE, max_visual_tokens=bound)
        assert processor.get_image_mask(processor.process_images(pages)).sum(1).max() <= bound


def test_a_bound_below_one_tile_is_refused():
    with pytest.raises(ValueError, match=r"max_visual_tokens: 15 is less than one tile costs; .* at least 16"):
        ColIntern3_5Processor.from_pretrained(BASE, max_visual_tokens=15)
    with pytest.raises(ValueError, match=r"max_visual_tokens: 31 .* thumbnail cost with tiling: stock; .* least 32"):
        ColIntern3_5Processor.from_pretrained(BASE, max_visual_tokens=31, tiling="stock")
    with pytest.raises(ValueError, match="tiling='exakt': must be one of exact, stock"):
        ColIntern3_5Processor.from_pretrained(BASE, tiling="exakt")


def test_colpali_engines_name_of_the_bound_and_no_unknown_keyword(tmp_path):
    load = ColIntern3_5Processor.from_pretrained
    bounded = load(pretrained_model_name_or_path=BASE, max_num_visual_tokens=48, device_map="cpu", use_fast=True)
    assert (
        bounded.max_visual_tokens == 48
        and load(BASE, revision="main", token=None, trust_remote_code=True).max_visual_tokens == 96
    )
    bounded.save_pretrained(tmp_path)
    assert load(tmp_path).max_visual_tokens == 48
    for keyword in ("max_num_visual_token", "max_pixels", "padding_side", "size"):
        with pytest.raises(TypeError, match=f"unknown keyword {keyword}; remove it. The processor's own settings are"):
            load(BASE, **{keyword: 48})
    with pytest.raises(TypeError, match="use_fast=False"):
        load(BASE, use_fast=False)
    with pytest.raises(TypeError, match="give one of them"):
        load(BASE, max_visual_tokens=96, max_num_visual_tokens=48)
    with pytest.raises(ValueError, match="max_visual_tokens: 15"):
        load(BASE, max_num_visual_tokens=15)


def test_a_call_is_process_images_within_the_bound(processor, pages):
    want = processor.process_images(pages)
    prompts = [processor.visual_prompt_prefix] * len(pages)
    for got in (
        processor(text=prompts, images=pages, padding="longest", return_tensors="pt"),
        processor(images=[[page] for page in pages]),
        processor(pages, videos=None),
    ):
        assert got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want)
        assert torch.equal(processor.get_local_image_mask(got), processor.get_local_image_mask(want))
    assert processor.get_image_mask(got).sum(1).max() <= processor.max_visual_tokens
    two = processor(text=f"a {processor.image_token} b {processor.image_token}", images=pages[1:3])
    assert processor.get_image_mask(two).sum() == processor.get_image_mask(want)[1:3].sum()
    assert torch.equal(two["pixel_values"], processor.process_images(pages[1:3])["pixel_values"])
    for one in (processor.process_images(pages[0]), processor.process_images(page for page in pages[:1])):
        assert torch.equal(one["pixel_values"], processor.process_images(pages[:1])["pixel_values"])
        assert processor.get_local_image_mask(one).sum() == 96
    text = processor(text=["from Halde"])
    assert text.keys() == {"input_ids", "attention_mask"}
    assert torch.equal(text["input_ids"], processor.process_texts(["from Halde"])["input_ids"])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_patches": 12}, TypeError, "max_patches=12"),
        ({"padding": "max_length"}, TypeError, "padding='max_length'"),
        ({"return_tensors": "np"}, TypeError, "return_tensors='np'"),
        ({"videos": ["a.mp4"]}, TypeError, "videos="),
        ({"text": ["no image token"]}, ValueError, "0 image tokens .* but 1 images"),
        ({"text": ["<IMG_CONTEXT>"], "images": None}, ValueError, "1 image tokens .* but 0 images"),
        ({"images": None}, ValueError, "an empty batch"),
        ({"images": ["page.png"]}, TypeError, "of type str: expected a Pillow image"),
        ({"text": ""}, ValueError, "0 image tokens"),
        ({"text": ["a", ""], "images": None}, ValueError, "an empty text"),
    ],
)
def test_a_call_refuses_what_it_does_not_do(processor, pages, options, error, message):
    with pytest.raises(error, match=message):
        processor(**{"images": pages[:1]} | options)


def test_a_bound_that_leaves_no_word_of_a_query_is_refused():
    """Of 14 tokens the prefix takes 4 and the augmentation 10; a cut at a negative place would leave most of it."""
    with pytest.raises(ValueError, match=r"max_query_tokens=14: .* take 14 tokens .* must be 15 or more"):
        ColIntern3_5Processor.from_pretrained(BASE, max_query_tokens=14)


def test_patches_across_and_down(processor):
    assert processor.get_n_patches((336, 224)) == (8, 12)
    assert processor.get_n_patches((112, 224)) == (8, 4)
    wide, tall, square, small = (
        processor.get_n_patches(size, 14) for size in ((300, 600), (600, 300), (500, 500), (9, 9))
    )
    assert 1.5 <= wide[0] / wide[1] <= 2.5 and tall == wide[::-1] and square[0] == square[1] and small == (4, 4)
    with pytest.raises(TypeError, match="patchsize"):
        processor.get_n_patches((112, 224), patchsize=14)


def test_a_chat_template_makes_the_same_page(processor, pages, monkeypatch):
    monkeypatch.setattr(processor, "chat_template", processor.visual_prompt_prefix)
    messages = [{"role": "user", "content": [{"type": "image", "image": pages[0]}]}]
    got, want = processor.apply_chat_template(messages, tokenize=True, return_dict=True), processor(pages[0])
    assert got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want)


@pytest.mark.parametrize(("size", "thumbnail"), [((224, 112), True), ((224, 336), False), ((112, 112), False)])
def test_similarity_maps_show_a_token_at_its_place(processor, size, thumbnail):
    batch = processor.process_images([Image.new("RGB", size)])
    assert processor.get_page_grid(size[::-1]).thumbnail == thumbnail
    across, down = processor.get_n_patches(size[::-1])
    mask, side = processor.get_image_mask(batch), 4  # tokens across a tile
    visual = mask[0].nonzero()[:, 0]
    for x, y in itertools.product(range(across), range(down)):
        number = ((y // side) * (across // side) + x // side) * side**2 + (y % side) * side + x % side
        page = torch.zeros(1, mask.shape[1], 1)
        page[0, visual[number]] = 1
        [found] = processor.get_similarity_maps_from_embeddings(page, torch.ones(1, 1, 1), (across, down), mask)
        assert found.shape == (1, across, down) and found.nonzero().tolist() == [[0, x, y]]
    local = processor.get_local_image_mask(batch)
    assert local.sum() == across * down == mask.sum() - processor.image_seq_len * thumbnail
    [same] = processor.get_similarity_maps_from_embeddings(page, torch.ones(1, 1, 1), (across, down), local)
    assert torch.equal(same, found)
    for wrong, known in (((across + 4, down + 4), "the pages have"), ((across + 4, down + 4), None)):
        with pytest.raises(ValueError, match=known or "visual tokens, or .* but image_mask selects"):
            processor.get_similarity_maps_from_embeddings(
                page, torch.ones(1, 1, 1), wrong, mask if known else mask.clone()
            )


@pytest.mark.parametrize("tiling", ["exact", "stock"])
def test_masks_are_of_the_page_they_belong_to(tiling, pages):
    processor = ColIntern3_5Processor.from_pretrained(BASE, max_visual_tokens=96, tiling=tiling)
    batch = processor.process_images(pages).to("cpu", torch.bfloat16)
    mask, local = processor.get_image_mask(batch), processor.get_local_image_mask(batch)
    assert mask.shape == local.shape == batch["input_ids"].shape and mask.dtype == local.dtype == torch.bool
    sizes = [processor.get_n_patches(page.size[::-1], 14) for page in pages]
    assert local.sum(1).tolist() == [across * down for across, down in sizes]
    thumbnails = [processor.get_page_grid(page.size[::-1]).thumbnail for page in pages]
    assert (mask.sum(1) - local.sum(1)).tolist() == [16 * thumbnail for thumbnail in thumbnails]
    assert set(thumbnails) == {True, False} and not (local & ~mask).any()
    sent = pickle.loads(pickle.dumps(batch))  # as the worker of a DataLoader sends it
    assert torch.equal(processor.get_local_image_mask(sent), local)
    with pytest.raises(ValueError, match="80 visual tokens, but the grids of the batch describe 0"):
        processor.get_local_image_mask(processor.tokenize_pages([5]))
    with pytest.raises(ValueError, match=r"n_patches=\(6, 16\): expected 96 visual tokens"):
        processor.rearrange_image_embeddings(torch.rand(96, 8), torch.ones(96, dtype=torch.bool), (6, 16))
    maps = processor.get_similarity_maps_from_embeddings(
        torch.rand(*mask.shape, 8), torch.rand(len(pages), 3, 8), sizes, mask
    )
    assert [tuple(found.shape) for found in maps] == [(3, *size) for size in sizes]


def test_one_form_of_a_query(processor):
    ids = processor.process_queries(["the invoice from Halde"])["input_ids"][0]
    assert processor.tokenizer.decode(ids) == "Query: the invoice from Halde" + "<|endoftext|>" * 10
    for queries in (["the invoice from Halde"], "the invoice from Halde"):
        same = processor.process_queries(queries=queries)["input_ids"]
        assert len(same) == 1 and ids.tolist() == same[0].tolist()


def test_texts_are_left_as_they_are(processor):
    assert processor.tokenizer.decode(processor.process_texts(["from Halde"])["input_ids"][0]) == "from Halde"


def test_a_long_query_is_cut_and_says_so(processor, caplog):
    with caplog.at_level(logging.WARNING):
        batch = processor.process_queries(["the invoice " * 200])
    assert batch["input_ids"].shape == (1, 64)
    assert "cut to 54 (max_query_tokens)" in caplog.text
    assert batch["input_ids"][0, -10:].eq(processor.tokenizer.pad_token_id).all(), "the augmentation tokens stay"


def test_no_more_of_a_query_is_tokenized_than_its_tokens_can_hold(processor, monkeypatch):
    longest = max(processor.tokenizer.get_vocab(), key=len)
    bound = processor.max_query_characters
    fits = [
        longest * 49,
        "e\u0301" * 12,
        "ᾂ" * 8,
        "\u03b1\u0313\u0300\u0345" * 6,
        "invoice " * 12,
        "\U0001f4c4" * 10,
        "x",
    ]
    over = ["the invoice from Halde " * 10_000, "x" * 2**17, " " * 2**17 + "x", "\n\t" * 2**15 + "y", "📄ü" * 2**14]
    whole = [processor._tokenize_texts(processor.query_prefix + query) for query in fits + over]
    room = processor.max_query_tokens - 10
    assert max(map(len, whole[: len(fits)])) <= room < min(map(len, whole[len(fits) :]))
    assert max(map(len, fits)) < bound < min(map(len, over))
    read = []
    monkeypatch.setattr(
        processor, "_tokenize_texts", lambda text, real=processor._tokenize_texts: read.append(len(text)) or real(text)
    )
    found = processor.process_queries(fits + over)
    rows = [
        ids[mask.bool()][:-10].tolist() for ids, mask in zip(found["input_ids"], found["attention_mask"], strict=True)
    ]
    assert rows == [ids[:room] for ids in whole], "token for token as if all of it were tokenized"
    assert max(read) <= bound + len(processor.query_prefix)
    assert processor.count_truncated(fits + over) == len(over)


@pytest.mark.parametrize("query", ["", "  \n"])
def test_an_empty_query_is_refused(processor, query):
    with pytest.raises(ValueError, match="at least one word"):
        processor.process_queries([query])


@pytest.mark.parametrize("query", ["🙂🙂 facture n° 7", "فاتورة من حلب", "x"])
def test_any_script_is_a_query(processor, query):
    ids = processor.process_queries([query])["input_ids"][0]
    assert query in processor.tokenizer.decode(ids)


def test_scores_are_maxsim_without_padding(processor):
    q, p = torch.tensor([[1.0, 0.0]]), [torch.tensor([[-1.0, 0.0]]), torch.tensor([[-0.5, 0.0], [0.0, 0.0]])[:1]]
    padded = torch.nn.utils.rnn.pad_sequence([p[0], torch.tensor([[-0.5, 0.0], [-0.6, 0.0]])], batch_first=True)
    assert processor.score([q], p).tolist() == [[-1.0, -0.5]]
    assert processor.score(q[None], padded).tolist() == [[-1.0, -0.5]]
    assert processor.score(list(q[None]), list(padded)).tolist() == [[-1.0, -0.5]], "as a model's card shows it"
    padded[0, 0, 1] = torch.nan
    with pytest.raises(ValueError, match="embeddings are broken"):
        processor.score(q[None], padded)


def test_scores_of_what_colpali_engines_users_pass(processor):
    torch.manual_seed(0)
    qs, ps = [[torch.nn.functional.normalize(torch.randn(n, 32), dim=-1) for n in of] for of in ((2, 4), (8, 4, 16))]
    want = torch.stack([torch.stack([(q @ p.T).amax(1).sum() for p in ps]) for q in qs])
    pad = torch.nn.utils.rnn.pad_sequence
    for q, p in (
        (qs, ps),
        (pad(qs, batch_first=True), pad(ps, batch_first=True)),
        ([q.numpy() for q in qs], [p.numpy() for p in ps]),
        (pad(qs, batch_first=True).numpy(), ps),
        ([q.clone().requires_grad_() for q in qs], [p.clone().requires_grad_() for p in ps]),
    ):
        scores = processor.score(q, p, device="cpu", batch_size=1)
        assert not scores.requires_grad and scores.dtype == torch.float32
        torch.testing.assert_close(scores, want)
    for q, p, message in (
        ([], ps, "qs is empty"),
        (qs, [], "ps is empty"),
        (torch.empty(0, 4, 32), ps, "qs is empty"),
        (qs[0], ps, r"query 0: embeddings of shape \(32,\)"),
        (qs, [ps[0], ps[1][:, :16]], r"page 1: embeddings of shape \(4, 16\)"),
        (qs, [torch.zeros(3, 32)], r"page 0: embeddings of shape \(0, 32\)"),
    ):
        with pytest.raises(ValueError, match=message):
            processor.score(q, p)
    with pytest.raises(NotImplementedError, match="meta"):  # a device without data: computed there, not on the CPU
        processor.score(qs, ps, device="meta")


def test_the_bounds_travel_with_the_processor(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    again = ColIntern3_5Processor.from_pretrained(tmp_path)
    assert (again.max_visual_tokens, again.max_query_tokens) == (96, 64)
    assert again.tokenizer.padding_side == "right"
