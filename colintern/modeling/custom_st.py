"""`ColIntern3_5ForRetrieval` as a module of sentence-transformers' MultiVectorEncoder.

`colintern export` copies this file and those it imports into the folder of a model, whose modules.json names the class.
Only sentence-transformers loads it.
"""

from collections.abc import Sequence
from typing import Any

from PIL import Image
from sentence_transformers.base.modules import InputModule
from torch import Tensor

from colintern.modeling.modeling_colintern import ColIntern3_5ForRetrieval
from colintern.modeling.processing_colintern import ColIntern3_5Processor


class ColIntern3_5Module(InputModule):
    """Embeds queries (text) and pages (Pillow images) with a model and its processor."""

    def __init__(self, model: ColIntern3_5ForRetrieval, processor: ColIntern3_5Processor):
        super().__init__()
        self.model, self.processor, self.tokenizer = model, processor, processor.tokenizer

    @classmethod
    def load(  # type: ignore[override]
        cls,
        model_name_or_path: str,
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        config_kwargs: dict[str, Any] | None = None,
        backend: str = "torch",
        **kwargs: Any,
    ) -> "ColIntern3_5Module":
        """Load a model and its processor with the arguments of MultiVectorEncoder.

        Raises:
            ValueError: `config_kwargs` or another backend than torch; see also `from_pretrained` of the model.
        """
        if config_kwargs or backend != "torch":
            raise ValueError(f"config_kwargs={config_kwargs}, backend={backend!r}: not supported; leave them out")
        hub: dict[str, Any] = {"token": token, "cache_dir": cache_folder, "revision": revision}
        hub["local_files_only"] = local_files_only
        model = ColIntern3_5ForRetrieval.from_pretrained(model_name_or_path, **hub, **(model_kwargs or {}))
        processor = ColIntern3_5Processor.from_pretrained(model_name_or_path, **hub, **(processor_kwargs or {}))
        return cls(model, processor)

    @property
    def modalities(self) -> list[Any]:
        """Return the kinds of input."""
        return ["text", "image"]

    @property
    def max_seq_length(self) -> int:
        """Return the bound on the tokens of a query."""
        return self.processor.max_query_tokens

    def get_embedding_dimension(self) -> int:
        """Return the dimension of a vector."""
        return self.model.dim

    def preprocess(
        self, inputs: Sequence[Any], prompt: str | None = None, task: str | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Convert queries (`task="query"`) or pages to a batch.

        Args:
            inputs: strings or Pillow images, or dicts of one of them, as mteb passes them.
            prompt: must be empty.
            task: "query" for queries.
            kwargs: must be empty.

        Raises:
            ValueError: a prompt, a page among queries, or a text among pages.
        """
        if prompt or kwargs:
            raise ValueError(f"prompt={prompt!r}, {kwargs}: not supported; the processor formats queries and pages")
        expected = str if task == "query" else Image.Image
        items = [next(iter(item.values())) if isinstance(item, dict) and len(item) == 1 else item for item in inputs]
        if wrong := [type(item).__name__ for item in items if not isinstance(item, expected)]:
            raise ValueError(f"{wrong[0]}: encode_query takes text, encode_document takes Pillow images")
        return dict(self.processor.process_queries(items) if task == "query" else self.processor.process_images(items))

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Add `token_embeddings`, (B, L, 128); every token that is no padding takes part in MaxSim."""
        return features | {"token_embeddings": self.model(**features)}

    def arrange_page(self, embedding: Tensor, image: Image.Image) -> tuple[Tensor, tuple[int, int]]:
        """Put a page's visual tokens, which come tile by tile, in page order for `maxsim_heatmap`.

        Args:
            embedding: (tokens, 128) of `encode_document`, not pooled.
            image: the page.

        Returns:
            (down * across, 128), row by row, and (across, down).
        """
        size = (image.height, image.width)
        n_patches = self.processor.get_n_patches(size)
        mask = self.processor.get_image_mask(self.processor.tokenize_pages([self.processor.get_page_grid(size).tiles]))
        grid = self.processor.rearrange_image_embeddings(embedding, mask[0].to(embedding.device), n_patches)
        return grid.transpose(0, 1).flatten(0, 1), n_patches

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Write weights, configuration and processor, with their code."""
        for part in (self.model, self.model.config, self.processor):
            type(part).register_for_auto_class()
        self.model.save_pretrained(output_path)
        self.processor.save_pretrained(output_path)
