"""Page features: what the frozen vision tower and projector make of a page, computed once.

They are the same in every epoch, experiment and evaluation, so they are kept by the content of the page. A page goes
through the tower alone, with whatever pages it shares a batch, so that a feature has the same bits wherever it comes
from. Deleting the cache costs time and changes no result.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from colintern.core.progress import ProgressBar
from colintern.encoding import fp8
from colintern.encoding.tensor_cache import TensorCache
from colintern.encoding.workers import check_workers, init_worker, stop_workers_on_exit
from colintern.modeling.images import rgb
from colintern.storage.identity import code_hashes
from colintern.storage.lock import locked

SAMPLE = 64  # pages over which the error of fp8 is told: always the same, whatever the cache holds
FEATURES = "data/.features"  # below the repository's root
LIBRARIES = ("torch", "torchvision", "transformers", "pillow")
# What decides a feature. Scores are computed from features, not the reverse: MaxSim is left out.
CODE = (
    "colintern.data.images",
    "colintern.encoding.page_features",
    "colintern.modeling.attention",
    "colintern.modeling.processing_colintern",
)


class Page(NamedTuple):
    """A page that is decoded only where its features are not known yet; `key` is a hash of its content."""

    key: str
    image: Callable[[], Image]

    @classmethod
    def of(cls, image: Image) -> "Page":
        """A decoded page, keyed by its pixels."""
        image = rgb(image)
        pixels = hashlib.sha256(f"{image.size}".encode())
        pixels.update(image.tobytes())
        return cls(pixels.hexdigest(), partial(_same, image))


def _same(image: Image) -> Image:
    return image


class PageFeatures:
    """Callable: a `Page` to its features, (tiles, tokens of a tile, hidden size), on the CPU.

    Args:
        model: `ColIntern3_5`, wrapped in PEFT or not; its tower and projector must be frozen.
        processor: its `ColIntern3_5Processor`.
        top: folder of the cache; see `TensorCache`.
        limit_gb: size of the cache in GB (1e9 bytes); 0 keeps nothing.
        form: "exact", or "fp8": then every feature is rounded, kept or not, so that the cache changes no result.
    """

    def __init__(self, model: Any, processor: Any, top: Path, limit_gb: float, form: str):
        self.model, self.processor, self.rounds = model, processor, form == "fp8"
        self.error: float | None = None  # relative, of fp8, once the cache is filled
        name = f"{fingerprint(model, processor)[:16]}{'-fp8' * self.rounds}" if limit_gb else "none"
        unpack = partial(fp8.unpack, dtype=model.dtype) if self.rounds else None
        self.cache = TensorCache(top, name, int(limit_gb * 1e9), unpack)

    def __call__(self, page: Page) -> Tensor:
        known = self.cache.get(page.key)
        if known is not None:
            return known
        stored = self._put(page.key, self.processor.page_tiles(page.image()))
        return fp8.unpack(stored, self.model.dtype) if self.rounds else stored

    def _put(self, key: str, tiles: Tensor) -> Tensor:
        """Compute the features of a page's normalised tiles, (n, 3, tile, tile), and keep them as they are returned."""
        with torch.no_grad():
            features = self.model.page_features(tiles.to(self.model.device)).cpu()
        stored = fp8.pack(features) if self.rounds else features
        self.cache.put(key, stored)
        return stored

    def _measure(self, pages: Sequence[Page]) -> None:
        """Tell the error of fp8 on some pages, as it was when each was rounded."""
        changed = values = 0.0
        for page in pages:
            stored = self.cache.stored(page.key)
            found = fp8.error(
                self._put(page.key, self.processor.page_tiles(page.image())) if stored is None else stored
            )
            changed, values = changed + found.changed, values + found.values
        self.error = (changed / values) ** 0.5 if values else 0.0
        print(f"page features in fp8: relative error {self.error:.2%} over {len(pages)} pages")

    def fill(self, pages: Sequence[Page], workers: int) -> None:
        """Compute what the cache lacks, in one pass with a progress bar, until its limit is reached."""
        distinct = {page.key: page for page in pages}
        if not self.cache.full:
            self._fill(distinct, workers)
        if self.rounds:
            self._measure(list(distinct.values())[:SAMPLE])

    def _fill(self, distinct: dict[str, Page], workers: int) -> None:
        check_workers(workers)
        computed = 0
        # A second process waits, and finds the first one's work.
        lock = self.cache.top / f"{self.cache.folder.name}.lock"
        waiting = f"page features: another process computes them, waiting for it ({lock})"
        with ExitStack() as held:
            try:
                held.enter_context(locked(lock, waiting))
            except OSError as error:  # a folder that is mounted read-only, or somebody else's
                self.cache.stop(error)
            self.cache.refresh()
            self.cache.keep(distinct)
            may = not self.cache.full
            missing = {key: page for key, page in distinct.items() if may and key not in self.cache}
            held.enter_context(stop_workers_on_exit(workers))
            # A generator of its own: the loader must not draw from the training's random numbers.
            loader = DataLoader(
                Tiles(list(missing.values()), self.processor),
                batch_size=None,
                num_workers=workers if missing else 0,
                generator=torch.Generator(),
                worker_init_fn=init_worker,
            )
            bar = ProgressBar(loader, desc="page features", unit="page", disable=not missing)
            for key, tiles in zip(missing, bar, strict=True):
                self._put(key, tiles)
                computed += 1
                if self.cache.full:
                    break
            self.cache.flush()
        have = sum(key in self.cache for key in distinct)
        print(f"page features: {computed} computed, {have} of {len(distinct)} pages in the cache")


class Tiles(Dataset):
    """The normalised tiles of each page."""

    def __init__(self, pages: Sequence[Page], processor: Any):
        self.pages, self.processor = pages, processor

    def __len__(self) -> int:
        return len(self.pages)

    def __getitem__(self, index: int) -> Tensor:
        return self.processor.page_tiles(self.pages[index].image())


def fingerprint(model: Any, processor: Any) -> str:
    """sha256 of all that decides the bits of a feature, besides the page: weights, preprocessing, code, machine."""
    weights = hashlib.sha256()
    for part in (model.vision_tower, model.multi_modal_projector):
        for name, value in sorted(part.state_dict().items()):
            weights.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            weights.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    device = model.device
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    facts = {
        "weights": weights.hexdigest(),
        "images": json.loads(processor.image_processor.to_json_string()),
        "max_visual_tokens": processor.max_visual_tokens,
        "attention": model.config.vision_config._attn_implementation,
        "machine": f"{device.type} {machine}",
        "threads": torch.get_num_threads() if device.type == "cpu" else 0,  # they decide in which order sums are taken
        "versions": {name: version(name) for name in LIBRARIES},
        "code": code_hashes(*CODE, without={"scoring"}),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
