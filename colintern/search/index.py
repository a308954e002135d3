"""Embeddings of pages on disk, which may be deleted at any time: what is lost is computed again.

An index belongs to one model: its folder is named by all that decides an embedding. A page is kept by the hash of its
pixels, so a copy, a renamed file or a PDF with one page changed costs only what is new; a list beside the embeddings
says which pixels each page of a known file has, so that what has not changed is not even rendered.
"""

import json
import os
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from colintern.core.errors import UserError
from colintern.core.progress import ProgressBar
from colintern.encoding.embed import embed_pages
from colintern.encoding.page_features import Page
from colintern.encoding.tensor_cache import TensorCache
from colintern.ingest.documents import InvalidRow
from colintern.scoring.maxsim import maxsim_scores
from colintern.search.sources import Source, images
from colintern.storage.files import MISSING, dumps, irregular_type
from colintern.storage.identity import code_hashes, fingerprint
from colintern.storage.lock import locked

LIMIT = 10**15  # bytes: as much as the disk has, less what the cache leaves free
FLUSH = 64  # pages after which what is done is on the disk
BLOCK = 256  # pages scored at once, so that memory does not grow with the index
STORED = torch.float16  # of unit vectors: at most 0.0003 off an element, for half the room
CODE = ("colintern.search.index", "colintern.modeling.loading")  # what decides an embedding
LIBRARIES = ("torch", "torchvision", "transformers", "pillow", "peft")


def identity(weights: str, base: Any, model: Any, processor: Any) -> dict[str, Any]:
    """All that decides a page's embedding, besides the page; `weights`: hash of the adapter or merged folder."""
    cuda = model.device.type == "cuda"
    return {
        "weights": weights,
        "base": base,
        "dtype": str(model.dtype),
        "attention": model.config._attn_implementation,
        "max_visual_tokens": processor.max_visual_tokens,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "versions": {name: version(name) for name in LIBRARIES},
        "code": code_hashes(*CODE, without={"scoring"}),
    }


class Index:
    """The pages of one model below `top`; `of`: see `identity`."""

    def __init__(self, top: Path, of: dict[str, Any]):
        top.mkdir(parents=True, exist_ok=True)
        self.cache = TensorCache(top, fingerprint(of)[:16], LIMIT)
        self.list = self.cache.folder / "pages.json"
        self.keys: dict[str, str] = self._listed()  # of a source -> of its pixels
        self.kept: dict[str, Tensor] = {}  # what the disk has no room for

    def _listed(self) -> dict[str, str]:
        if (kind := irregular_type(self.list)) not in ("", MISSING):
            raise UserError(f"{self.list}: is {kind}, not a regular file; delete it, it is then written again")
        try:
            return json.loads(self.list.read_text())
        except (OSError, ValueError):  # none yet, or torn: then pages are rendered again, and found by their pixels
            return {}

    def missing(self, wanted: Sequence[Source]) -> list[Source]:
        return [source for source in wanted if self.keys.get(source.key) not in self]

    def __contains__(self, key: str | None) -> bool:
        return key is not None and (key in self.cache or key in self.kept)

    def fill(self, wanted: Sequence[Source], model: Any, processor: Any, batch: int, bad: list[InvalidRow]) -> int:
        """Embed the pages that are not known; how many were embedded. What cannot be rendered goes to `bad`."""
        todo = self.missing(wanted)
        pages = iter(ProgressBar(images(todo, bad), total=len(todo), desc="indexing", unit="page"))
        done = unsaved = 0
        try:
            while part := list(islice(pages, batch)):
                fresh = {}
                for source, image in part:
                    key = self.keys[source.key] = Page.of(image).key
                    if key not in self:
                        fresh[key] = image
                for key, value in zip(fresh, self._embed(list(fresh.values()), model, processor), strict=True):
                    self._put(key, value.to(STORED))
                done, unsaved = done + len(fresh), unsaved + len(part)
                if unsaved >= FLUSH:
                    self._save()
                    unsaved = 0
        finally:  # also what a Ctrl-C leaves
            if todo:
                self._save()
        return done

    def _embed(self, fresh: list[Image.Image], model: Any, processor: Any) -> list[Tensor]:
        return embed_pages(model, processor, fresh, len(fresh)) if fresh else []

    def _put(self, key: str, value: Tensor) -> None:
        self.cache.put(key, value)
        if key not in self.cache:
            self.kept[key] = value

    def _save(self) -> None:
        pending = dict(self.cache.pending)
        self.cache.flush()
        self.kept |= {key: value for key, value in pending.items() if key not in self.cache}
        with locked(self.cache.top / "pages.lock"):
            self.keys = self._listed() | self.keys
            self.cache.folder.mkdir(exist_ok=True)
            partial = self.list.with_suffix(f".{os.getpid()}")
            partial.write_text(dumps(self.keys))
            partial.replace(self.list)

    def tokens(self, source: Source) -> Tensor | None:
        """(tokens, 128) of a page, None where it is lost."""
        key = self.keys.get(source.key, "")
        return self.kept[key] if key in self.kept else self.cache.get(key)

    def scores(self, query: Tensor, wanted: Sequence[Source]) -> Iterator[tuple[Source, float]]:
        """MaxSim of a query with each of the pages that can be read, in their order."""
        for start in range(0, len(wanted), BLOCK):
            read = [(source, self.tokens(source)) for source in wanted[start : start + BLOCK]]
            have = [(source, tokens) for source, tokens in read if tokens is not None]
            if have:
                found = maxsim_scores([query], [tokens for _, tokens in have])
                yield from zip((source for source, _ in have), found[0].tolist(), strict=True)
