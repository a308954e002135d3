"""Page features: the output of the frozen vision tower and projector for a page, computed once.

They are the same in every epoch, experiment and evaluation, so they are cached by the content of the page. Each page
goes through the tower by itself, whatever batch it is in, so that a feature has the same bits wherever it comes from.
Deleting the cache costs time and changes no result.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from colintern.core.progress import ProgressBar
from colintern.encoding.fp8 import dequantize_fp8, quantize_fp8, read_quantization_error
from colintern.encoding.tensor_cache import TensorCache
from colintern.encoding.workers import check_workers, init_worker, stop_workers_on_exit
from colintern.modeling.images import to_rgb
from colintern.modeling.modeling_colintern import ColIntern3_5ForRetrieval
from colintern.modeling.processing_colintern import ColIntern3_5Processor as Processor
from colintern.storage.identity import code_hashes
from colintern.storage.lock import hold_lock

logger = logging.getLogger(__name__)
Model = ColIntern3_5ForRetrieval | PeftModel
NUM_ERROR_PAGES = 64  # the error of fp8 is measured on the same first pages, whatever the cache contains
FEATURES_DIR = "data/.features"  # below the repository's root
LIBRARIES = ("torch", "torchvision", "transformers", "pillow")
# What decides a feature. Scores are computed from features, not the reverse: MaxSim is left out.
CODE = (
    "colintern.data.images",
    "colintern.encoding.page_features",
    "colintern.modeling.attention",
    "colintern.modeling.processing_colintern",
)


class Page(NamedTuple):
    """A page that is decoded only if its features are not cached; `key` is a hash of its content."""

    key: str
    image: Callable[[], Image]

    @classmethod
    def from_image(cls, image: Image) -> "Page":
        """Return a decoded page, keyed by its pixels."""
        image = to_rgb(image)
        pixels = hashlib.sha256(f"{image.size}".encode())
        pixels.update(image.tobytes())
        return cls(pixels.hexdigest(), partial(_return_image, image))


def _return_image(image: Image) -> Image:
    return image  # a function of the module, which can be sent to a DataLoader worker


class PageFeatures:
    """Callable that returns the features of a `Page`, (tiles, tokens of a tile, hidden size), on the CPU.

    Args:
        model: `ColIntern3_5ForRetrieval`, wrapped in PEFT or not; its tower and projector must be frozen.
        limit_gb: size of the cache in GB (1e9 bytes); 0 caches nothing.
        cache_format: "exact" or "fp8"; with "fp8" every feature is rounded, cached or not, so that the cache changes no
            result.
    """

    def __init__(self, model: Model, processor: Processor, root: Path, limit_gb: float, cache_format: str):
        self.model, self.processor, self.quantizes = model, processor, cache_format == "fp8"
        self.relative_error: float | None = None  # of fp8, after `precompute`
        name = f"{fingerprint_features(model, processor)[:16]}{'-fp8' * self.quantizes}" if limit_gb else "none"
        unpack = partial(dequantize_fp8, dtype=model.dtype) if self.quantizes else None
        self.cache = TensorCache(root, name, int(limit_gb * 1e9), unpack)

    def __call__(self, page: Page) -> Tensor:
        """Return a page's features, from the cache or computed."""
        cached = self.cache.get(page.key)
        if cached is not None:
            return cached
        stored = self._compute_features(page.key, self.processor.preprocess_page(page.image()))
        return dequantize_fp8(stored, self.model.dtype) if self.quantizes else stored

    def precompute(self, pages: Sequence[Page], workers: int) -> None:
        """Compute what the cache lacks, in one pass with a progress bar, until its limit is reached."""
        distinct = {page.key: page for page in pages}
        if not self.cache.is_full:
            self._precompute_missing(distinct, workers)
        if self.quantizes:
            self._measure_error(list(distinct.values())[:NUM_ERROR_PAGES])

    def _compute_features(self, key: str, tiles: Tensor) -> Tensor:
        """Compute the features of a page's tiles; return them as they are stored."""
        with torch.no_grad():
            features = self.model.get_page_features(tiles.to(self.model.device)).cpu()
        stored = quantize_fp8(features) if self.quantizes else features
        self.cache.put(key, stored)
        return stored

    def _measure_error(self, pages: Sequence[Page]) -> None:
        """Print the error of fp8 on some pages, as it was when each was rounded."""
        error = values = 0.0
        for page in pages:
            stored = self.cache.get_stored(page.key)
            if stored is None:
                stored = self._compute_features(page.key, self.processor.preprocess_page(page.image()))
            sums = read_quantization_error(stored)
            error, values = error + sums.error, values + sums.values
        self.relative_error = (error / values) ** 0.5 if values else 0.0
        logger.info(f"page features in fp8: relative error {self.relative_error:.2%} over {len(pages)} pages")

    def _precompute_missing(self, distinct: dict[str, Page], workers: int) -> None:
        check_workers(workers)
        computed = 0
        lock = self.cache.root / f"{self.cache.folder.name}.lock"  # a second process waits, then reads the results
        message = f"page features: another process computes them, waiting for it ({lock})"
        with ExitStack() as stack:
            try:
                stack.enter_context(hold_lock(lock, message))
            except OSError as error:  # a folder that is mounted read-only, or of another user
                self.cache.disable_writes(error)
            self.cache.refresh()
            self.cache.pin(distinct)
            missing = {} if self.cache.is_full else {k: page for k, page in distinct.items() if k not in self.cache}
            stack.enter_context(stop_workers_on_exit(workers))
            # Its own generator: the loader must not draw from the training's random numbers.
            loader = DataLoader(
                TileDataset(list(missing.values()), self.processor),
                batch_size=None,
                num_workers=workers if missing else 0,
                generator=torch.Generator(),
                worker_init_fn=init_worker,
            )
            bar = ProgressBar(loader, desc="page features", unit="page", disable=not missing)
            for key, tiles in zip(missing, bar, strict=True):
                self._compute_features(key, tiles)
                computed += 1
                if self.cache.is_full:
                    break
            self.cache.flush()
        cached = sum(key in self.cache for key in distinct)
        logger.info(f"page features: {computed} computed, {cached} of {len(distinct)} pages in the cache")


class TileDataset(Dataset):
    """The normalized tiles of each page."""

    def __init__(self, pages: Sequence[Page], processor: Processor):
        self.pages, self.processor = pages, processor

    def __len__(self) -> int:
        return len(self.pages)

    def __getitem__(self, index: int) -> Tensor:
        return self.processor.preprocess_page(self.pages[index].image())


def fingerprint_features(model: Model, processor: Processor) -> str:
    """Return a sha256 of all that decides the bits of a feature, except the page: weights, settings, code, machine."""
    weights = hashlib.sha256()
    for part in model.frozen_parts:
        for name, value in sorted(part.state_dict().items()):
            weights.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            weights.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    device = model.device
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    facts = {
        "weights": weights.hexdigest(),
        "images": json.loads(processor.image_processor.to_json_string()),
        "max_visual_tokens": processor.max_visual_tokens,
        "attention": model.config.vision_config._attn_implementation,  # type: ignore[union-attr]
        "tiling": processor.tiling,
        "machine": f"{device.type} {machine}",
        "threads": torch.get_num_threads() if device.type == "cpu" else 0,  # they decide in which order sums are taken
        "versions": {name: version(name) for name in LIBRARIES},
        "code": code_hashes(*CODE, without={"scoring"}),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
