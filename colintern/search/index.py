"""Index pages: their embeddings on disk, which may be deleted at any time; what is lost is computed again.

An index belongs to one model and one precision: its folder is named by all that decides what is stored. A page is kept
by the hash of its pixels, so a copy, a renamed file or a PDF with one page changed costs only what is new; a list
beside the embeddings says which pixels each page of a known file has, so that what has not changed is not even
rendered.
"""

import json
import os
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from colintern.core.errors import UserError
from colintern.core.progress import ProgressBar
from colintern.encoding.embed import embed_pages
from colintern.encoding.page_features import Page
from colintern.encoding.precision import dequantize, quantize
from colintern.encoding.tensor_cache import TensorCache
from colintern.ingest.documents import InvalidRow
from colintern.modeling.configuration_colintern import EMBEDDING_DIM
from colintern.modeling.processor import ColIntern3_5Processor
from colintern.modeling.retriever import ColIntern3_5
from colintern.scoring.maxsim import maxsim_scores
from colintern.search.sources import PageSource, render_sources
from colintern.storage.files import MISSING, format_json, irregular_type
from colintern.storage.identity import code_hashes, fingerprint
from colintern.storage.lock import hold_lock

MAX_BYTES = 10**15  # as much as the disk has, less what the cache leaves free
PAGES_PER_SAVE = 64
PAGES_PER_BLOCK = 256  # scored at once, so that memory does not grow with the index
DEFAULT_PRECISION = "float16"  # of unit vectors: at most 0.0003 off an element, at half the size
CODE = ("colintern.search.index", "colintern.modeling.loading")  # what decides an embedding
LIBRARIES = ("torch", "torchvision", "transformers", "pillow", "peft")


def get_index_identity(
    weights: str, base: object, model: ColIntern3_5, processor: ColIntern3_5Processor
) -> dict[str, object]:
    """Return all that decides a page's embedding, besides the page; `weights`: hash of the model's folder."""
    return {
        "weights": weights,
        "base": base,
        "dtype": str(model.dtype),
        "attention": model.config._attn_implementation,
        "max_visual_tokens": processor.max_visual_tokens,
        "tiling": processor.tiling,
        "device": torch.cuda.get_device_name() if model.device.type == "cuda" else "cpu",
        "versions": {name: version(name) for name in LIBRARIES},
        "code": code_hashes(*CODE, without={"scoring"}),
    }


class PageIndex:
    """The pages of one model below `folder`.

    Args:
        folder: of all indexes.
        identity: see `get_index_identity`.
        precision: how numbers are stored, see `encoding.precision`.
        keeps_full: store a float16 copy too, from which the best pages can be scored again.
    """

    def __init__(
        self,
        folder: Path,
        identity: dict[str, object],
        precision: str = DEFAULT_PRECISION,
        keeps_full: bool = False,
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self.precision = precision
        self.full = PageIndex(folder, identity) if keeps_full else None
        self.cache = TensorCache(folder, fingerprint(identity | {"precision": precision})[:16], MAX_BYTES)
        self.list_file = self.cache.folder / "pages.json"
        self.page_keys: dict[str, str] = self._read_list()  # of a source -> of its pixels
        self.in_memory: dict[str, Tensor] = {}  # stored tensors that do not fit the disk

    def _read_list(self) -> dict[str, str]:
        if (kind := irregular_type(self.list_file)) not in ("", MISSING):
            raise UserError(f"{self.list_file}: is {kind}, not a regular file; delete it, it is then written again")
        try:
            return json.loads(self.list_file.read_text())
        except (OSError, ValueError):  # none yet, or torn: then pages are rendered again, and found by their pixels
            return {}

    def list_missing(self, sources: Sequence[PageSource]) -> list[PageSource]:
        """Return the pages that are not in the index."""
        return [source for source in sources if self.page_keys.get(source.key) not in self]

    def __contains__(self, key: str | None) -> bool:
        """Tell whether the page with these pixels is in the index."""
        if key is None or (self.full is not None and key not in self.full):
            return False
        return key in self.cache or key in self.in_memory

    def add_pages(
        self,
        sources: Sequence[PageSource],
        model: nn.Module,
        processor: ColIntern3_5Processor,
        batch_size: int,
        bad: list[InvalidRow],
    ) -> int:
        """Embed the pages that are missing, and return how many were embedded; `bad` gets those that do not render."""
        missing = self.list_missing(sources)
        pages = iter(ProgressBar(render_sources(missing, bad), total=len(missing), desc="indexing", unit="page"))
        num_embedded = num_unsaved = 0
        try:
            while batch := list(islice(pages, batch_size)):
                images = {}
                for source, image in batch:
                    key = self.page_keys[source.key] = Page.from_image(image).key
                    if key not in self:
                        images[key] = image
                embeddings = embed_pages(model, processor, list(images.values()), len(images)) if images else []
                for key, embedding in zip(images, embeddings, strict=True):
                    self._put(key, embedding)
                num_embedded, num_unsaved = num_embedded + len(images), num_unsaved + len(batch)
                if num_unsaved >= PAGES_PER_SAVE:
                    self._save()
                    num_unsaved = 0
        finally:  # also after Ctrl-C
            if missing:
                self._save()
        return num_embedded

    def _put(self, key: str, embedding: Tensor) -> None:
        stored = quantize(embedding, self.precision)
        self.cache.put(key, stored)
        if key not in self.cache:
            self.in_memory[key] = stored
        if self.full is not None:
            self.full._put(key, embedding)

    def _save(self) -> None:
        if self.full is not None:
            self.full.page_keys |= self.page_keys
            self.full._save()
        pending = dict(self.cache.pending)
        self.cache.flush()
        self.in_memory |= {key: value for key, value in pending.items() if key not in self.cache}
        with hold_lock(self.cache.root / "pages.lock"):
            self.page_keys = self._read_list() | self.page_keys
            self.cache.folder.mkdir(exist_ok=True)
            partial = self.list_file.with_suffix(f".{os.getpid()}")
            partial.write_text(format_json(self.page_keys))
            partial.replace(self.list_file)

    def has_pixels(self, source: PageSource, image: Image.Image) -> bool:
        """Tell whether a page looks as it did when it was embedded."""
        return self.page_keys.get(source.key) == Page.from_image(image).key

    def load_embedding(self, source: PageSource) -> Tensor | None:
        """Load the stored (tokens, 128) of a page as float32, None where it is lost."""
        return self._load(self.page_keys.get(source.key, ""))

    def load_best_embedding(self, source: PageSource) -> Tensor | None:
        """Load the float16 copy of a page where there is one; see `load_embedding`."""
        full = None if self.full is None else self.full._load(self.page_keys.get(source.key, ""))
        return self.load_embedding(source) if full is None else full

    def _load(self, key: str) -> Tensor | None:
        stored = self.in_memory[key] if key in self.in_memory else self.cache.get(key)
        return None if stored is None else dequantize(stored, self.precision, EMBEDDING_DIM)

    def score_pages(self, query: Tensor, sources: Sequence[PageSource]) -> Iterator[tuple[PageSource, float]]:
        """Yield the MaxSim of a query with each of the pages that can be read, in their order."""
        for start in range(0, len(sources), PAGES_PER_BLOCK):
            block = {
                source: embedding
                for source in sources[start : start + PAGES_PER_BLOCK]
                if (embedding := self.load_embedding(source)) is not None
            }
            if block:
                yield from zip(block, maxsim_scores([query], list(block.values()))[0].tolist(), strict=True)
