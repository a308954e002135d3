"""Convert pages and queries to model inputs: `ColIntern3_5Processor`, with colpali-engine's public methods.

It is transformers' `InternVLProcessor` with three differences: grids come from `tiling` (a hard bound on visual
tokens), padding is on the right (the stock processor pads left whatever the tokenizer says), and one function formats a
query, for training, evaluation and search alike. docs/colpali-engine.md shows its use in scripts written for
colpali-engine's models. Shapes: B rows, L tokens of a padded row.
"""

import logging
import os
from inspect import signature
from typing import ClassVar

import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from torchvision.transforms.v2.functional import pil_to_tensor
from transformers import BatchFeature, InternVLProcessor
from transformers.image_utils import SizeDict

from colintern.modeling.configuration_colintern import load_config
from colintern.modeling.images import to_rgb
from colintern.modeling.interpretability import InterpretabilityMixin, PageBatch
from colintern.modeling.tiling import MIN_TILES, Grid, choose_grid, count_max_tiles
from colintern.scoring.maxsim import maxsim_scores

logger = logging.getLogger(__name__)
HUB_KEYWORDS = {  # of transformers' `from_pretrained`, and device_map, which colpali-engine's scripts pass
    *("_commit_hash", "_from_auto", "_from_pipeline", "cache_dir", "device_map", "force_download", "local_files_only"),
    *("proxies", "return_unused_kwargs", "revision", "subfolder", "token", "use_fast"),
}
CALL_KEYWORDS = {  # of transformers' processors, with the values that have no effect here
    "add_special_tokens": (False,),
    "audio": (None,),
    "max_length": (None,),
    "padding": (True, "longest"),
    "padding_side": ("right",),
    "return_tensors": ("pt",),
    "truncation": (False, None),
    "videos": (None,),
}


class ColIntern3_5Processor(InterpretabilityMixin, InternVLProcessor):
    """Converts page images and query strings to right-padded batches for `ColIntern3_5ForRetrieval`.

    Args:
        image_processor, tokenizer, video_processor, image_seq_length, chat_template: as in `InternVLProcessor`;
            `image_seq_length` is the number of visual tokens of one tile (256 for InternVL3.5).
        max_visual_tokens: hard bound on the visual tokens of a page; at least one tile's worth, two with "stock".
        max_query_tokens: a longer query, prefix and augmentation included, is truncated with a warning.
        tiling: "exact", or "stock" for the tiles of `InternVLProcessor` with `crop_to_patches`, which is then saved.

    Raises:
        ValueError: an unknown tiling, or a bound below its tiles or below one word of a query.
    """

    query_prefix: ClassVar[str] = "Query: "
    query_augmentation_token: ClassVar[str] = "<|endoftext|>"
    visual_prompt: ClassVar[tuple[str, str]] = ("<|im_start|>user\n", "\nDescribe the image.<|im_end|><|endoftext|>")
    visual_prompt_prefix: ClassVar[str] = "<IMG_CONTEXT>".join(visual_prompt)

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        video_processor=None,
        image_seq_length: int = 256,
        chat_template=None,
        max_visual_tokens: int = 1536,
        max_query_tokens: int = 128,
        tiling: str = "exact",
        **kwargs,
    ):
        super().__init__(image_processor, tokenizer, video_processor, image_seq_length, chat_template, **kwargs)
        if tiling not in MIN_TILES:
            raise ValueError(f"tiling={tiling!r}: must be one of {', '.join(MIN_TILES)}")
        self.tiling, self.max_visual_tokens = tiling, max_visual_tokens
        max_tiles = self.max_tiles
        if tiling == "stock":  # what other programs read from the saved processor, to cut pages alike
            self.image_processor.crop_to_patches = True
            self.image_processor.min_patches, self.image_processor.max_patches = 1, max_tiles - 1
        self.max_query_tokens = max_query_tokens
        # Characters of a query that are tokenized, since 16 MB would take minutes. Later ones cannot be among its first
        # tokens: each is at most as long as the longest, and NFC merges at most four characters into one.
        self.max_query_characters = 4 * max_query_tokens * max(map(len, self.tokenizer.get_vocab()))
        self.tokenizer.padding_side = "right"
        overhead = len(self._tokenize_texts(self.query_prefix)) + len(self._tokenize_suffix(None))
        if max_query_tokens <= overhead:
            raise ValueError(
                f"max_query_tokens={max_query_tokens}: prefix and augmentation take {overhead} tokens of a query, "
                f"so the bound must be {overhead + 1} or more"
            )
        before, after = self.visual_prompt
        self._ids_before_tiles = [*self._tokenize_texts(before), self.start_image_token_id]
        self._ids_after_tiles = [self.end_image_token_id, *self._tokenize_texts(after)]

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path,
        *,
        max_num_visual_tokens: int | None = None,
        trust_remote_code=None,
        **kwargs,
    ):
        """Load a processor.

        Args:
            pretrained_model_name_or_path: folder or hub id.
            max_num_visual_tokens: colpali-engine's name of `max_visual_tokens`.
            trust_remote_code: accepted, as transformers' `AutoProcessor` passes it, and without effect: no code is run.
            kwargs: arguments of the class, which override the saved ones, and of transformers (revision, token, ...).

        Raises:
            TypeError: an unknown keyword, which transformers would ignore; `use_fast=False`; both names of the bound.
        """
        known = {name for name in signature(cls).parameters if name != "kwargs"} | HUB_KEYWORDS
        if unknown := sorted(kwargs.keys() - known):
            raise TypeError(
                f"{cls.__name__}.from_pretrained: unknown keyword {', '.join(unknown)}; remove it. The processor's own "
                "settings are max_visual_tokens (or max_num_visual_tokens), max_query_tokens and tiling; "
                "transformers' are "
                f"{', '.join(sorted(name for name in HUB_KEYWORDS if name[0] != '_'))}"
            )
        if kwargs.get("use_fast") is False:
            raise TypeError("use_fast=False: the slow image processor cannot cut a page into tiles; leave it out")
        if max_num_visual_tokens is not None:
            if "max_visual_tokens" in kwargs:
                raise TypeError("max_num_visual_tokens and max_visual_tokens are one argument; give one of them")
            kwargs["max_visual_tokens"] = max_num_visual_tokens
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def _load_tokenizer_from_pretrained(  # type: ignore[override]
        cls, sub_processor_type, pretrained_model_name_or_path, **kwargs
    ):
        """Load the tokenizer without transformers' question whether to run the code that config.json names."""
        config = load_config(pretrained_model_name_or_path, **kwargs)
        return super()._load_tokenizer_from_pretrained(
            sub_processor_type, pretrained_model_name_or_path, config=config, **kwargs
        )

    def __call__(self, images=None, text=None, **kwargs) -> BatchFeature:
        """Process pages, texts, or texts with a page at each image token, within the same bound as `process_images`.

        Args:
            images: page images, or one; in the order of the image tokens of all texts.
            text: texts, or one, without prefix or augmentation; None: `visual_prompt_prefix` for each page.
            kwargs: transformers' keywords; only the values in `CALL_KEYWORDS` are accepted.

        Returns:
            See `process_images`; without images no `pixel_values`.

        Raises:
            TypeError: another keyword, or another value of one.
            ValueError: the numbers of image tokens and images differ, both are missing, or a text is empty.
        """
        for name, value in kwargs.items():
            if name not in CALL_KEYWORDS or value not in CALL_KEYWORDS[name]:
                raise TypeError(f"{type(self).__name__}: {name}={value!r} is not supported; leave it out")
        pages = [] if images is None else _as_list(images)
        if text is None:
            return self.process_images(pages)
        segments = [row.split(self.image_token) for row in _as_list(text)]
        if (count := sum(len(row) - 1 for row in segments)) != len(pages):
            raise ValueError(f"{count} image tokens ({self.image_token}) in the texts, but {len(pages)} images")
        tiles = [self.preprocess_page(page) for page in pages]
        next_tiles, rows = iter(tiles), []
        for first, *others in segments:
            row = self._tokenize_texts(first)
            for segment in others:
                visual = self._make_visual_ids(len(next(next_tiles)))
                row += [self.start_image_token_id, *visual, self.end_image_token_id, *self._tokenize_texts(segment)]
            rows.append(row)
        return self._add_pages(self._pad_batch(rows), pages, tiles)

    def _tokenize_texts(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @property
    def max_tiles(self) -> int:
        """Return the most tiles that a page may get, thumbnail included."""
        return count_max_tiles(self.max_visual_tokens, self.image_seq_length, self.tiling)

    @property
    def tile_size(self) -> int:
        """Return the side of a tile in pixels."""
        return self.image_processor.size["height"]

    def get_page_grid(self, image_size: tuple[int, int]) -> Grid:
        """Return the tile grid of a page of `image_size` = (height, width) pixels."""
        height, width = image_size
        return choose_grid(width, height, self.max_tiles, self.tile_size, self.tiling)

    def process_images(self, images: list[Image.Image]) -> BatchFeature:
        """Convert pages to a batch.

        Returns:
            input_ids, attention_mask: (B, L) int64, padded on the right.
            pixel_values: (sum of the pages' tiles, 3, tile size, tile size) float32, page after page, see
                `preprocess_page`.
        """
        images = _as_list(images)
        tiles = [self.preprocess_page(image) for image in images]
        return self._add_pages(self.tokenize_pages([len(page) for page in tiles]), images, tiles)

    def _add_pages(self, batch: PageBatch, images: list[Image.Image], tiles: list[torch.Tensor]) -> BatchFeature:
        if tiles:
            batch["pixel_values"] = torch.cat(tiles)
        batch.grids = [self.get_page_grid((image.height, image.width)) for image in images]
        return batch

    def tokenize_pages(self, num_tiles: list[int]) -> PageBatch:
        """Return input_ids and attention_mask of pages with these numbers of tiles."""
        return self._pad_batch(
            [self._ids_before_tiles + self._make_visual_ids(n) + self._ids_after_tiles for n in num_tiles]
        )

    def _make_visual_ids(self, num_tiles: int) -> list[int]:
        return [self.image_token_id] * (self.image_seq_length * num_tiles)

    @property
    def image_seq_len(self) -> int:
        """Return the visual tokens of a tile; colpali-engine's name of `image_seq_length`."""
        return self.image_seq_length

    @property
    def num_tokens_before_tiles(self) -> int:
        """Return the number of a page's tokens before its visual ones."""
        return len(self._ids_before_tiles)

    def preprocess_page(self, image: Image.Image) -> torch.Tensor:
        """Return a page's normalized tiles, (n, 3, tile size, tile size) float32: row by row, the thumbnail last."""
        p = self.image_processor
        return p.rescale_and_normalize(
            self._tile_image(image), p.do_rescale, p.rescale_factor, p.do_normalize, p.image_mean, p.image_std
        )

    def _tile_image(self, image: Image.Image) -> torch.Tensor:
        """Return the page's tiles, (n, 3, tile size, tile size) uint8."""
        if not isinstance(image, Image.Image):
            raise TypeError(
                f"a page of type {type(image).__name__}: expected a Pillow image; open a file with PIL.Image.open"
            )
        page = pil_to_tensor(to_rgb(image))
        grid, side, resample = self.get_page_grid(page.shape[1:]), self.tile_size, self.image_processor.resample
        resize = self.image_processor.resize
        canvas = resize(page, SizeDict(height=grid.rows * side, width=grid.cols * side), resample=resample)
        cells = canvas.unfold(1, side, side).unfold(2, side, side)  # (3, rows, cols, side, side)
        tiles = cells.permute(1, 2, 0, 3, 4).reshape(-1, 3, side, side)
        if grid.thumbnail:
            thumbnail = resize(page, SizeDict(height=side, width=side), resample=resample)
            tiles = torch.cat([tiles, thumbnail[None]])
        return tiles

    def process_texts(self, texts: list[str]) -> BatchFeature:
        """Convert texts without prefix or augmentation to a batch: input_ids and attention_mask, (B, L)."""
        return self._pad_batch([self._tokenize_texts(text) for text in _as_list(texts)])

    def process_queries(
        self,
        texts: list[str] | None = None,
        queries: list[str] | None = None,
        max_length: int = 50,
        contexts: list[str] | None = None,
        suffix: str | None = None,
    ) -> BatchFeature:
        """Convert queries to a batch: "Query: ", the text, then ten augmentation tokens.

        Args:
            texts: the query strings.
            queries: another name of `texts`, as in colpali-engine.
            max_length: accepted for colpali-engine's signature and, as there, without effect; the processor's
                `max_query_tokens` is the bound.
            contexts: must be None.
            suffix: replaces the ten augmentation tokens.

        Returns:
            input_ids, attention_mask: (B, L) int64, padded on the right.

        Raises:
            ValueError: both or none of `texts` and `queries`, an empty query, or `contexts`.
        """
        if (texts is None) == (queries is None):
            raise ValueError("process_queries takes either texts or queries")
        if contexts is not None:
            raise ValueError("process_queries: contexts are not part of this model's queries")
        suffix_ids = self._tokenize_suffix(suffix)
        room = self.max_query_tokens - len(suffix_ids)
        rows = []
        for text in _as_list(texts if texts is not None else queries):
            if not text.strip():
                raise ValueError(f"query {text!r}: a query needs at least one word")
            ids = self._tokenize_texts(self.format_query(text))
            if len(ids) > room:
                more = " or more" if len(text) > self.max_query_characters else ""
                logger.warning("query of %d tokens%s cut to %d (max_query_tokens): %.60r", len(ids), more, room, text)
            rows.append(ids[:room] + suffix_ids)
        return self._pad_batch(rows)

    def format_query(self, query: str) -> str:
        """Return the text of a query that is tokenized: more than `max_query_tokens` can hold, but never megabytes."""
        return self.query_prefix + query[: self.max_query_characters]

    def _tokenize_suffix(self, suffix: str | None) -> list[int]:
        return self._tokenize_texts(self.query_augmentation_token * 10 if suffix is None else suffix)

    def count_truncated(self, queries: list[str]) -> int:
        """Return how many of the queries `process_queries` truncates to `max_query_tokens`."""
        room = self.max_query_tokens - len(self._tokenize_suffix(None))
        count = 0
        for start in range(0, len(queries), 100):  # a tokenized query takes 4 kB, the longest takes megabytes
            texts = [self.format_query(query) for query in queries[start : start + 100]]
            count += sum(len(ids) > room for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"])
        return count

    def _pad_batch(self, rows: list[list[int]]) -> PageBatch:
        if not rows:
            raise ValueError("an empty batch: at least one page or query is needed")
        if not all(rows):
            raise ValueError("an empty text: at least one token is needed")
        ids = pad_sequence([torch.tensor(r) for r in rows], batch_first=True, padding_value=self.tokenizer.pad_token_id)
        lengths = torch.tensor([len(r) for r in rows])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        return PageBatch({"input_ids": ids, "attention_mask": mask})

    def score(self, qs, ps, device=None, **kwargs) -> torch.Tensor:
        """Compute MaxSim scores: see `score_multi_vector`."""
        return self.score_multi_vector(qs, ps, device=device, **kwargs)

    @staticmethod
    def score_multi_vector(qs, ps, batch_size: int = 128, device=None) -> torch.Tensor:
        """Compute MaxSim scores, (n_queries, n_pages) float32 on the CPU, without a gradient.

        Unlike colpali-engine, this ignores padding in the maximum: all-zero rows, both in a padded (n, length, 128)
        tensor and in a list of its rows.

        Args:
            qs: queries: (tokens, dim) tensors or arrays, or all of them as one padded (n, tokens, dim).
            ps: pages, in the same form.
            batch_size: accepted for colpali-engine's signature, without effect: pages are read one by one.
            device: where the scores are computed; None: the device of the first page.

        Raises:
            ValueError: no queries or pages, one without tokens, dims that differ, or a score that is not finite.
        """
        queries, pages = _strip_padding("qs", qs), _strip_padding("ps", ps)
        return maxsim_scores(queries, pages, device or pages[0].device)


def _as_list(items) -> list:
    """Flatten one page or text, several, or transformers' lists of lists into one list."""
    if isinstance(items, str | bytes | os.PathLike | Image.Image):
        return [items]
    return [part for item in items for part in (_as_list(item) if isinstance(item, list | tuple) else [item])]


def _strip_padding(name: str, items) -> list[torch.Tensor]:
    """Convert embeddings to (tokens, dim) tensors without a gradient and without their all-zero rows."""
    if not len(items):
        raise ValueError(f"score_multi_vector: {name} is empty; pass at least one embedding")
    rows = [torch.as_tensor(item).detach() for item in items]
    return [row[(row != 0).any(-1)] if row.dim() == 2 else row for row in rows]  # NaN is broken, not padding
