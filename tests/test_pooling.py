"""Pages made smaller: what pooling and cutting leave, and what the evaluation makes of it."""

import pytest
import torch
from torch.nn.functional import normalize

from colintern.encoding.pooling import pool_tiles, truncate_dim


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
