import doctest
import os
import subprocess
import sys

import pytest
from conftest import ROOT

import colintern.modeling.tiling
from colintern.__main__ import main
from colintern.modeling.base_tile import format_a4_tilings
from colintern.modeling.tiling import Grid, choose_grid

A4 = (1240, 1754)


def test_examples():
    assert doctest.testmod(colintern.modeling.tiling).failed == 0


@pytest.mark.parametrize(
    ("tokens", "grid"), [(1536, Grid(2, 3, False)), (1792, Grid(2, 3, True)), (256, Grid(1, 1, False))]
)
def test_an_a4_page(tokens, grid):
    assert choose_grid(*A4, max_tiles=tokens // 256, tile=448) == grid


def test_an_a4_page_under_each_tiling():
    assert format_a4_tilings(1536, 448, 256).splitlines() == [
        "A4 page, tiling exact: 2 x 3, 6 tiles, 1536 visual tokens",
        "A4 page, tiling stock: 1 x 2 + thumbnail, 3 tiles, 768 visual tokens",
    ]
    assert format_a4_tilings(1792, 448, 256).count("2 x 3 + thumbnail, 7 tiles, 1792 visual tokens") == 2
    assert "stock: not possible: max_visual_tokens: 511 is less than a tile\n" in format_a4_tilings(511, 448, 256)


def test_the_bound_is_never_exceeded_and_a_larger_one_never_shows_less():
    for size in [A4, (1754, 1240), (448, 448), (3000, 200), (200, 3000), (1, 1), (5000, 5000)]:
        sharpness = []
        for bound in range(1, 30):
            grid = choose_grid(*size, max_tiles=bound, tile=448)
            assert 1 <= grid.tiles <= bound
            sharpness.append(min(grid.cols * 448 / size[0], grid.rows * 448 / size[1], 1))
        assert sharpness == sorted(sharpness)


@pytest.mark.parametrize(
    ("size", "tile", "tiles"), [((113, 112), 112, 1), ((112, 114), 112, 1), ((115, 112), 112, 3), ((456, 905), 448, 3)]
)
def test_a_few_pixels_too_many_cost_no_tile(size, tile, tiles):
    assert choose_grid(*size, max_tiles=12, tile=tile).tiles == tiles


def test_landscape_is_portrait_turned():
    for bound in range(1, 30):
        a, b = choose_grid(*A4, bound, 448), choose_grid(*A4[::-1], bound, 448)
        assert (a.cols, a.rows, a.thumbnail) == (b.rows, b.cols, b.thumbnail)


@pytest.mark.parametrize("bad", [dict(width=0, height=5, max_tiles=1), dict(width=5, height=5, max_tiles=0)])
@pytest.mark.parametrize("tiling", ["exact", "stock"])
def test_impossible_input_is_refused(bad, tiling):
    with pytest.raises(ValueError, match="at least"):
        choose_grid(**bad, tile=448, tiling=tiling)


def test_a_reader_that_has_enough_is_no_error():
    """`colintern tiles 1240 1754 | true`, whose reader is gone."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "colintern", "tiles", "1240", "1754"]
    done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_broken_pipe_of_a_commands_own_is_told(monkeypatch):
    from colintern.commands import tiles

    def run(args):
        raise BrokenPipeError("a loader's")

    monkeypatch.setattr(tiles, "run", run)
    with pytest.raises(BrokenPipeError, match="a loader's"):
        main(["tiles", "1240", "1754"])
