"""Page features: what the frozen vision tower and projector make of a page, computed once.

They are the same in every epoch, experiment and evaluation, so they are kept by the content of the page. A page goes
through the tower alone, with whatever pages it shares a batch, so that a feature has the same bits wherever it comes
from. Deleting the cache costs time and changes no result.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from colintern.files.identity import content_hash
from colintern.files.lock import locked
from colintern.modeling.cache import TensorCache

FEATURES = "data/.features"  # below the repository's root
LIBRARIES = ("torch", "torchvision", "transformers", "pillow")
CODE = ("data/images.py", "modeling/features.py", "model.py", "processor.py", "tiles.py")


class Page(NamedTuple):
    """A page that is decoded only where its features are not known yet; `key` is a hash of its content."""

    key: str
    image: Callable[[], Image]

    @classmethod
    def of(cls, image: Image) -> "Page":
        """A decoded page, keyed by its pixels."""
        image = image.convert("RGB")
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
    """

    def __init__(self, model: Any, processor: Any, top: Path, limit_gb: float):
        self.model, self.processor = model, processor
        name = fingerprint(model, processor)[:16] if limit_gb else "none"
        self.cache = TensorCache(top, name, int(limit_gb * 1e9))

    def __call__(self, page: Page) -> Tensor:
        known = self.cache.get(page.key)
        if known is not None:
            return known
        features = self.compute(self.processor.page_tiles(page.image()))
        self.cache.put(page.key, features)
        return features

    def compute(self, tiles: Tensor) -> Tensor:
        """Features of one page's normalised tiles, (n, 3, tile, tile)."""
        with torch.no_grad():
            return self.model.page_features(tiles.to(self.model.device)).cpu()

    def fill(self, pages: Sequence[Page], workers: int) -> None:
        """Compute what the cache lacks, in one pass with a progress bar, until its limit is reached."""
        if self.cache.full:
            return
        distinct = {page.key: page for page in pages}
        computed = 0
        # A second process waits, and finds the first one's work.
        lock = self.cache.top / f"{self.cache.folder.name}.lock"
        with locked(lock, f"page features: another process computes them, waiting for it ({lock})"):
            self.cache.refresh()
            self.cache.keep(distinct)
            missing = {key: page for key, page in distinct.items() if key not in self.cache}
            # A generator of its own: the loader must not draw from the training's random numbers.
            loader = DataLoader(
                Tiles(list(missing.values()), self.processor),
                batch_size=None,
                num_workers=workers if missing else 0,
                generator=torch.Generator(),
            )
            bar = tqdm(loader, desc="page features", unit="page", disable=None if missing else True)
            for key, tiles in zip(missing, bar, strict=True):
                self.cache.put(key, self.compute(tiles))
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
        "code": [content_hash(Path(__file__).parents[1] / name) for name in CODE],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
