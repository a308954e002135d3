"""ColIntern3.5 as mteb sees it: an encoder of queries and page images whose similarity is MaxSim."""

from hashlib import sha256
from typing import Any

import torch
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.types import PromptType
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from colintern.maxsim import maxsim_scores
from colintern.modeling.cache import TensorCache
from colintern.modeling.embed import embed_features, embed_pages, embed_queries
from colintern.modeling.features import Page, PageFeatures
from colintern.modeling.pooling import cut, pool
from colintern.params import UserError

LENGTHS = "-lengths"  # of the key under which a batch keeps how many vectors each page has


class ColIntern3_5Encoder(AbsEncoder):
    """What `mteb.evaluate` takes as a model.

    Args:
        model, processor: see `colintern.modeling.embed`.
        label: the model is called `colintern/<label>` in mteb's files.
        revision: tells weights apart under one label, for example a hash of them.
        features: where the pages' features come from; without it each page goes through the whole model.
        embeddings: where those of pages are kept; a batch is taken from it if it was embedded as the same batch before.
        pool_factor, dim: see `colintern.modeling.pooling`; 1 and 128 leave the embeddings as they are.

    `page_count` and `vector_count` say what was encoded.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        label: str,
        revision: str,
        features: PageFeatures | None = None,
        embeddings: TensorCache | None = None,
        pool_factor: int = 1,
        dim: int = 128,
    ):
        self.model = model
        self.processor = processor
        self.features = features
        self.embeddings = embeddings
        self.pool_factor, self.dim = pool_factor, dim
        self.page_count = self.vector_count = 0
        self.mteb_model_meta = ModelMeta(
            loader=None,
            name=f"colintern/{label}",
            revision=revision,
            release_date=None,
            languages=None,
            n_parameters=sum(p.numel() for p in model.parameters()),
            memory_usage_mb=None,
            max_tokens=None,
            embed_dim=None,
            license=None,
            open_weights=True,
            public_training_code=None,
            public_training_data=None,
            framework=["PyTorch"],
            similarity_fn_name=ScoringFunction.MAX_SIM,
            use_instructions=False,
            training_datasets=None,
            modalities=["text", "image"],
            model_type=["late-interaction"],
        )

    def encode(  # type: ignore[override]  # a list: one padded tensor would take the longest page's memory for each page
        self, inputs: DataLoader, *, task_metadata: TaskMetadata, prompt_type: PromptType | None = None, **kwargs: Any
    ) -> list[Tensor]:
        """One (tokens, dim) float32 tensor for each query or page, on the CPU, in the loader's order.

        mteb hands what `encode` returns to `similarity` untouched, so nothing is padded. Its prompts are ignored: a
        query is formatted by the processor alone, as in training.

        Raises:
            UserError: a page without an image, named by its id.
            ValueError: a batch of neither text queries nor page images.
        """
        rows: list[Tensor] = []
        what = "pages" if prompt_type == PromptType.document else "queries"
        for batch in tqdm(inputs, desc=f"{task_metadata.name}: {what}", disable=None):
            if prompt_type == PromptType.query and "text" in batch:
                found = embed_queries(self.model, self.processor, batch["text"], len(batch["text"]))
                rows += cut(found, self.dim)
            elif prompt_type == PromptType.document and "image" in batch:
                for page, image in zip(batch["id"], batch["image"], strict=True):
                    if image is None:
                        raise UserError(f"page {page} of the evaluation corpus has no image; remove or repair its row")
                rows += self._smaller(self.pages(batch["image"]))
            else:
                raise ValueError(f"{prompt_type}: expected queries as text or pages as images, got {sorted(batch)}")
        for cache in (self.features and self.features.cache, self.embeddings):
            if cache:
                cache.flush()
        return rows

    def _smaller(self, pages: list[Tensor]) -> list[Tensor]:
        if self.pool_factor > 1:
            tile, before = self.processor.image_seq_length, self.processor.text_before
            pages = [pool(page, self.pool_factor, tile, before) for page in pages]
        rows = cut(pages, self.dim)
        self.page_count, self.vector_count = self.page_count + len(rows), self.vector_count + sum(map(len, rows))
        return rows

    def pages(self, images: list[Any]) -> list[Tensor]:
        """One (tokens, 128) float32 tensor for each page image, on the CPU, neither pooled nor cut.

        Computed or kept: a batch as a whole, because its size decides the last bits.
        """
        if self.features is None:
            return embed_pages(self.model, self.processor, images, len(images))
        keyed = [Page.of(image) for image in images]
        key = sha256(" ".join(page.key for page in keyed).encode()).hexdigest()
        if self.embeddings:
            rows, lengths = self.embeddings.get(key), self.embeddings.get(key + LENGTHS)
            if rows is not None and lengths is not None:
                return list(rows.split(lengths.tolist()))
        found = embed_features(self.model, self.processor, map(self.features, keyed), len(keyed))
        if self.embeddings:
            self.embeddings.put(key, torch.cat(found))
            self.embeddings.put(key + LENGTHS, torch.tensor([len(row) for row in found]))
        return found

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """MaxSim of queries with pages, (queries, pages) float32; each argument is as `encode` returns it."""
        return maxsim_scores(list(embeddings1), list(embeddings2), next(self.model.parameters()).device)
