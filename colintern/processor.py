"""Pages and queries as model inputs: `ColIntern3_5Processor`, with colpali-engine's public surface.

It is transformers' `InternVLProcessor` with three differences: tiles come from `colintern.tiles` (a hard bound on
visual tokens), padding is on the right (the stock processor pads left whatever the tokenizer says), and one
function formats a query, for training, evaluation and search alike.
"""

import logging
from typing import ClassVar

import torch
from colpali_engine.utils.processing_utils import BaseVisualRetrieverProcessor
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from torchvision.transforms.v2.functional import pil_to_tensor
from transformers import BatchFeature, InternVLProcessor
from transformers.image_utils import SizeDict

from colintern.maxsim import maxsim_scores
from colintern.pixels import rgb
from colintern.tiles import Grid, choose_grid

logger = logging.getLogger(__name__)


class ColIntern3_5Processor(BaseVisualRetrieverProcessor, InternVLProcessor):
    """Turns page images and query strings into right-padded batches for `ColIntern3_5`.

    Args:
        image_processor, tokenizer, video_processor, image_seq_length, chat_template: as in `InternVLProcessor`;
            `image_seq_length` is the number of visual tokens of one tile (256 for InternVL3.5).
        max_visual_tokens: hard bound on the visual tokens of a page; at least one tile's worth.
        max_query_tokens: a query is cut to this many tokens, prefix and augmentation included, and says so.

    Raises:
        ValueError: a bound that leaves no room for one tile, or for one word of a query.
    """

    query_prefix: ClassVar[str] = "Query: "
    query_augmentation_token: ClassVar[str] = "<|endoftext|>"
    visual_prompt: ClassVar[tuple[str, str]] = (
        "<|im_start|>user\n",
        "\nDescribe the image.<|im_end|><|endoftext|>",
    )

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        video_processor=None,
        image_seq_length: int = 256,
        chat_template=None,
        max_visual_tokens: int = 1536,
        max_query_tokens: int = 128,
        **kwargs,
    ):
        super().__init__(image_processor, tokenizer, video_processor, image_seq_length, chat_template, **kwargs)
        if max_visual_tokens < image_seq_length:
            raise ValueError(
                f"max_visual_tokens={max_visual_tokens}: one tile takes {image_seq_length} visual tokens, "
                f"so the bound must be {image_seq_length} or more"
            )
        self.max_visual_tokens = max_visual_tokens
        self.max_query_tokens = max_query_tokens
        # Only so many characters of a query are tokenized, since 16 MB would take minutes. Those beyond cannot be among
        # its first tokens: each is at most as long as the longest, and NFC makes one character of four at most.
        self.max_query_characters = 4 * max_query_tokens * max(map(len, self.tokenizer.get_vocab()))
        self.tokenizer.padding_side = "right"
        around = len(self._ids(self.query_prefix)) + len(self._tail(None))
        if max_query_tokens <= around:
            raise ValueError(
                f"max_query_tokens={max_query_tokens}: prefix and augmentation take {around} tokens of a query, "
                f"so the bound must be {around + 1} or more"
            )
        before, after = self.visual_prompt
        self._before_tiles = [*self._ids(before), self.start_image_token_id]
        self._after_tiles = [self.end_image_token_id, *self._ids(after)]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @property
    def tile(self) -> int:
        """Side of a tile in pixels."""
        return self.image_processor.size["height"]

    def grid(self, image_size: tuple[int, int]) -> Grid:
        """The tile grid of a page of `image_size` = (height, width) pixels."""
        height, width = image_size
        return choose_grid(width, height, self.max_visual_tokens // self.image_seq_length, self.tile)

    def process_images(self, images: list[Image.Image]) -> BatchFeature:
        """A batch of pages.

        Returns:
            input_ids, attention_mask: (B, L) int64, padded on the right.
            pixel_values: (sum of the pages' tiles, 3, tile, tile) float32, page after page, each page row by row
                and its thumbnail last.
        """
        tiles = [self.page_tiles(image) for image in images]
        batch = self.page_tokens([len(t) for t in tiles])
        batch["pixel_values"] = torch.cat(tiles)
        return batch

    def page_tokens(self, tiles: list[int]) -> BatchFeature:
        """input_ids and attention_mask of pages of so many tiles each."""
        visual = [self.image_token_id] * self.image_seq_length
        return self._pad([self._before_tiles + visual * n + self._after_tiles for n in tiles])

    @property
    def text_before(self) -> int:
        """Tokens of a page that stand before its visual ones."""
        return len(self._before_tiles)

    def page_tiles(self, image: Image.Image) -> torch.Tensor:
        """One page's tiles, normalised, (n, 3, tile, tile) float32: row by row, the thumbnail last."""
        p = self.image_processor
        return p.rescale_and_normalize(
            self._cut(image), p.do_rescale, p.rescale_factor, p.do_normalize, p.image_mean, p.image_std
        )

    def _cut(self, image: Image.Image) -> torch.Tensor:
        """The page's tiles as (n, 3, tile, tile) uint8."""
        page = pil_to_tensor(rgb(image))
        grid, side, resample = self.grid(page.shape[1:]), self.tile, self.image_processor.resample
        resize = self.image_processor.resize
        canvas = resize(page, SizeDict(height=grid.rows * side, width=grid.cols * side), resample=resample)
        cells = canvas.unfold(1, side, side).unfold(2, side, side)  # (3, rows, cols, side, side)
        tiles = cells.permute(1, 2, 0, 3, 4).reshape(-1, 3, side, side)
        if grid.thumbnail:
            small = resize(page, SizeDict(height=side, width=side), resample=resample)
            tiles = torch.cat([tiles, small[None]])
        return tiles

    def process_texts(self, texts: list[str]) -> BatchFeature:
        """A batch of texts as they are, without prefix or augmentation: input_ids and attention_mask, (B, L)."""
        return self._pad([self._ids(text) for text in texts])

    def process_queries(
        self,
        texts: list[str] | None = None,
        queries: list[str] | None = None,
        max_length: int = 50,
        contexts: list[str] | None = None,
        suffix: str | None = None,
    ) -> BatchFeature:
        """A batch of queries: "Query: ", the text, then ten augmentation tokens. The one place that formats a query.

        Args:
            texts, queries: the query strings (two names for one thing, as in colpali-engine).
            max_length, contexts: accepted for colpali-engine's signature and, as there, without meaning;
                `max_query_tokens` of the processor is the bound that counts.
            suffix: instead of the ten augmentation tokens.

        Returns:
            input_ids, attention_mask: (B, L) int64, padded on the right.

        Raises:
            ValueError: both or none of `texts` and `queries`, an empty query, or `contexts`.
        """
        if (texts is None) == (queries is None):
            raise ValueError("process_queries takes either texts or queries")
        if contexts is not None:
            raise ValueError("process_queries: contexts are not part of this model's queries")
        tail = self._tail(suffix)
        room = self.max_query_tokens - len(tail)
        rows = []
        for text in texts if texts is not None else queries or []:
            if not text.strip():
                raise ValueError(f"query {text!r}: a query needs at least one word")
            ids = self._ids(self.query_text(text))
            if len(ids) > room:
                more = " or more" if len(text) > self.max_query_characters else ""
                logger.warning("query of %d tokens%s cut to %d (max_query_tokens): %.60r", len(ids), more, room, text)
            rows.append(ids[:room] + tail)
        return self._pad(rows)

    def query_text(self, query: str) -> str:
        """The text of a query that is tokenized: more than `max_query_tokens` can hold, and never megabytes."""
        return self.query_prefix + query[: self.max_query_characters]

    def _tail(self, suffix: str | None) -> list[int]:
        return self._ids(self.query_augmentation_token * 10 if suffix is None else suffix)

    def count_cut(self, queries: list[str]) -> int:
        """How many of the queries `process_queries` cuts, because they are longer than `max_query_tokens`."""
        room = self.max_query_tokens - len(self._tail(None))
        cut = 0
        for start in range(0, len(queries), 100):  # a tokenised query takes 4 kB, the longest takes megabytes
            texts = [self.query_text(query) for query in queries[start : start + 100]]
            cut += sum(len(ids) > room for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"])
        return cut

    def _pad(self, rows: list[list[int]]) -> BatchFeature:
        if not rows:
            raise ValueError("an empty batch: at least one page or query is needed")
        ids = pad_sequence([torch.tensor(r) for r in rows], batch_first=True, padding_value=self.tokenizer.pad_token_id)
        lengths = torch.tensor([len(r) for r in rows])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        return BatchFeature({"input_ids": ids, "attention_mask": mask})

    def score(self, qs, ps, device=None, **kwargs) -> torch.Tensor:
        """MaxSim of every query with every page: see `score_multi_vector`."""
        return self.score_multi_vector(qs, ps, device=device, **kwargs)

    @staticmethod
    def score_multi_vector(qs, ps, batch_size: int = 128, device=None) -> torch.Tensor:
        """MaxSim scores, (n_queries, n_pages) float32 on the CPU.

        Unlike colpali-engine's, no padding takes part in the maximum: all-zero rows are the padding `ColIntern3_5`
        writes, in a padded (n, length, 128) tensor as in the list that colpali-engine's users make of it.
        """
        qs, ps = ([e[(e != 0).any(-1)] for e in es] for es in (qs, ps))  # a row with NaN is broken, not padding
        return maxsim_scores(qs, ps)

    def get_n_patches(self, image_size: tuple[int, int], *args, **kwargs) -> tuple[int, int]:
        """Visual tokens across and down a page of `image_size` = (height, width), its thumbnail left out.

        As colpali-engine's base class has it; Pillow's `image.size` is (width, height), and would transpose the page.
        """
        grid, side = self.grid(image_size), int(self.image_seq_length**0.5)
        return grid.cols * side, grid.rows * side

    def get_image_mask(self, batch_images: BatchFeature) -> torch.Tensor:
        """(B, L) bool: True where a token is a visual token, those of a thumbnail included."""
        return batch_images.input_ids == self.image_token_id

    def rearrange_image_embeddings(
        self, image_embeddings: torch.Tensor, image_mask: torch.Tensor, n_patches: tuple[int, int]
    ) -> torch.Tensor:
        """A page's tokens where they lie on it, (across, down, dim), its thumbnail left out.

        Args:
            image_embeddings, image_mask: (L, dim), and (L,) of `get_image_mask`.
            n_patches: (across, down) of `get_n_patches`.

        Raises:
            ValueError: a mask that is not of a page of so many tokens.
        """
        (across, down), side = n_patches, int(self.image_seq_length**0.5)
        tokens, count = image_embeddings[image_mask], across * down
        if len(tokens) not in (count, count + self.image_seq_length):
            raise ValueError(
                f"n_patches={n_patches}: {len(tokens)} visual tokens are not {count}, nor with a thumbnail"
            )
        tiles = tokens[:count].reshape(down // side, across // side, side, side, -1)
        return tiles.permute(1, 3, 0, 2, 4).reshape(across, down, -1)

    def get_similarity_maps_from_embeddings(
        self,
        image_embeddings: torch.Tensor,
        query_embeddings: torch.Tensor,
        n_patches: tuple[int, int] | list[tuple[int, int]],
        image_mask: torch.Tensor,
    ) -> list[torch.Tensor]:
        """One (query tokens, across, down) for each page, as `plot_similarity_map` of colpali-engine takes it.

        Not colpali-engine's function of this name: that expects tokens row by row of the page, ours come tile by tile.
        """
        sizes = n_patches if isinstance(n_patches, list) else [n_patches] * len(image_embeddings)
        pages = zip(image_embeddings, image_mask, sizes, strict=True)
        grids = [self.rearrange_image_embeddings(*page) for page in pages]
        return [torch.einsum("nk,ijk->nij", q, grid) for q, grid in zip(query_embeddings, grids, strict=True)]
