"""Pages made smaller: what pooling, truncation and quantization leave, and how the evaluation ranks with it."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from colintern.encoding.pooling import pool_tiles, truncate_dim
from colintern.encoding.precision import dequantize, get_bytes_per_vector, quantize
from colintern.scoring.maxsim import maxsim_scores, rescore_best


def unit(count: int, seed: int) -> torch.Tensor:
    return normalize(torch.randn(count, 128, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize(("tiles", "factor"), [(2, 4), (1, 3), (6, 2)])
def test_each_tile_is_clustered_by_itself_and_text_stays(tiles, factor):
    text, after = unit(10, 0), unit(5, 1)
    # In each tile 16 directions, each some times over with a little noise: those are the clusters.
    page = torch.cat([text, *(unit(16, 2 + n).repeat(16, 1) + 0.001 * unit(256, 9) for n in range(tiles)), after])
    pooled = pool_tiles(page, factor, tile=256, before=10)
    assert len(pooled) == 10 + tiles * (256 // factor) + 5
    assert torch.equal(pooled[:10], text) and torch.equal(pooled[-5:], after)
    torch.testing.assert_close(pooled.norm(dim=1), torch.ones(len(pooled)))
    for n in range(tiles):
        own = pooled[10 + n * (256 // factor) : 10 + (n + 1) * (256 // factor)]
        assert (own @ unit(16, 2 + n).T).amax(1).min() > 0.99, "a mean over two tiles would be near none of them"


def test_all_dimensions_change_nothing():
    page = unit(300, 0)
    assert truncate_dim([page], 128)[0] is page


def test_cut_vectors_are_unit_vectors_of_the_first_numbers():
    page = unit(7, 0)
    [short] = truncate_dim([page], 32)
    assert short.shape == (7, 32)
    torch.testing.assert_close(short, page[:, :32] / page[:, :32].norm(dim=1, keepdim=True))


@pytest.mark.parametrize(
    ("precision", "bytes_per_vector", "error"), [("float32", 400, 0), ("float16", 200, 3e-4), ("int8", 100, 0.5 / 127)]
)
def test_numbers_are_kept_to_within_their_precision(precision, bytes_per_vector, error):
    page = unit(50, 0)[:, :100]
    stored = quantize(page, precision)
    assert stored.nbytes == 50 * bytes_per_vector == 50 * get_bytes_per_vector(precision, 100)
    assert (dequantize(stored, precision, 100) - page).abs().max() <= error + 1e-7


def test_bits_are_those_of_packbits_and_stand_for_unit_vectors():
    page = unit(50, 0)[:, :100]
    stored = quantize(page, "binary")
    assert np.array_equal(stored.numpy(), np.packbits(page.numpy() > 0, axis=1))
    assert stored.shape == (50, get_bytes_per_vector("binary", 100)) == (50, 13)
    signs = torch.where(page > 0, 1.0, -1.0) / 10
    torch.testing.assert_close(dequantize(stored, "binary", 100), signs)
    assert quantize(torch.tensor([[0.5, -0.2]]), "int8").tolist() == [[64, -25]]
    assert quantize(torch.tensor([[0.5, -0.2]]), "binary").tolist() == [[128]]


def test_rescoring_orders_the_best_pages_by_full_vectors_and_leaves_the_others_below():
    queries, pages = [unit(5, 1), unit(7, 2)], [unit(20, 10 + n) for n in range(30)]
    exact = maxsim_scores(queries, pages)
    coarse = maxsim_scores(queries, [dequantize(quantize(page, "binary"), "binary", 128) for page in pages])
    scores = coarse.clone()
    rescore_best(scores, queries, pages, 8, torch.device("cpu"))
    for row, first, full in zip(scores, coarse, exact, strict=True):
        best = first.topk(8).indices
        torch.testing.assert_close(row[best], full[best])
        others = [page for page in range(30) if page not in best.tolist()]
        assert row[others].max() < row[best].min()
        assert first[others].argsort().tolist() == row[others].argsort().tolist()
    everything = coarse.clone()
    rescore_best(everything, queries, pages, 100, torch.device("cpu"))
    torch.testing.assert_close(everything, exact)
