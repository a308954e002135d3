"""ColIntern3.5 as mteb sees it: an encoder of queries and page images whose similarity is MaxSim."""

from typing import Any

from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.types import PromptType
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from colintern.maxsim import maxsim_scores
from colintern.modeling.embed import embed_features, embed_pages, embed_queries
from colintern.modeling.features import Page, PageFeatures
from colintern.params import UserError


class ColIntern3_5Encoder(AbsEncoder):
    """What `mteb.evaluate` takes as a model.

    Args:
        model, processor: see `colintern.modeling.embed`.
        label: the model is called `colintern/<label>` in mteb's files.
        revision: tells weights apart under one label, for example a hash of them.
        features: where the pages' features come from; without it each page goes through the whole model.
    """

    def __init__(
        self, model: nn.Module, processor: Any, label: str, revision: str, features: PageFeatures | None = None
    ):
        self.model = model
        self.processor = processor
        self.features = features
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
        """One (tokens, 128) float32 tensor for each query or page, on the CPU, in the loader's order.

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
                rows += embed_queries(self.model, self.processor, batch["text"], len(batch["text"]))
            elif prompt_type == PromptType.document and "image" in batch:
                for page, image in zip(batch["id"], batch["image"], strict=True):
                    if image is None:
                        raise UserError(f"page {page} of the evaluation corpus has no image; remove or repair its row")
                rows += self.pages(batch["image"])
            else:
                raise ValueError(f"{prompt_type}: expected queries as text or pages as images, got {sorted(batch)}")
        if self.features:
            self.features.cache.flush()
        return rows

    def pages(self, images: list[Any]) -> list[Tensor]:
        """One (tokens, 128) float32 tensor for each page image, on the CPU."""
        if self.features is None:
            return embed_pages(self.model, self.processor, images, len(images))
        return embed_features(self.model, self.processor, map(self.features, map(Page.of, images)), len(images))

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """MaxSim of queries with pages, (queries, pages) float32; each argument is as `encode` returns it."""
        return maxsim_scores(list(embeddings1), list(embeddings2))
