"""`ColIntern3_5ForRetrieval`: the backbone without its language-model head, projected to 128-d token embeddings.

Module paths are those of the guide: `language_model.layers.*`, `vision_tower`, `multi_modal_projector`,
`custom_text_proj`. Shapes: B rows, L tokens of a padded row.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import InternVLModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging as transformers_logging

from colintern.modeling.configuration_colintern import (
    EMBEDDING_DIM,
    FROZEN_PARTS,
    HEAD,
    HEAD_KEYS,
    KEY_MAPPING,
    LANGUAGE_MODEL,
    BackboneConfig,
    ColIntern3_5Config,
    load_config,
)

HUB_KEYWORDS = {"cache_dir", "force_download", "local_files_only", "proxies", "subfolder", "token"}


class ColIntern3_5ForRetrieval(InternVLModel):
    """Embeds pages and queries as many 128-d unit vectors each; the score of a pair is MaxSim.

    Args:
        config: configuration of a trained model or of a base.
        mask_non_image_embeddings: as in colpali-engine, keep only the vectors of a page's visual tokens; those of its
            prompt become zeros. Rows without an image are not changed.

    Raises:
        ValueError: the configuration asks for another attention mask than the causal one.
    """

    config_class = ColIntern3_5Config
    main_input_name = "input_ids"
    dim = EMBEDDING_DIM  # colpali-engine's name, like padding_side, patch_size and spatial_merge_size
    padding_side = "right"

    def __init__(self, config: BackboneConfig, mask_non_image_embeddings: bool = False):
        if not getattr(config.get_text_config(), "is_causal", True):
            raise ValueError("text_config.is_causal: false is not supported; ColIntern3_5 has causal attention")
        super().__init__(config)
        self.mask_non_image_embeddings = mask_non_image_embeddings
        self.add_module(HEAD, nn.Linear(config.get_text_config().hidden_size, EMBEDDING_DIM))
        self.post_init()

    @property
    def head(self) -> nn.Linear:
        """Return the projection head, wrapped in LoRA or not."""
        return self.get_submodule(HEAD)  # type: ignore[return-value]

    @property
    def decoder_layers(self) -> nn.ModuleList:
        """Return the layers of the language model."""
        return self.get_submodule(LANGUAGE_MODEL).layers  # type: ignore[return-value]

    @property
    def frozen_parts(self) -> list[nn.Module]:
        """Return the vision tower and the projector."""
        return [self.get_submodule(part) for part in FROZEN_PARTS]

    @property
    def patch_size(self) -> int:
        """Return the side in pixels of a patch of the vision tower."""
        size: Any = self.config.vision_config.patch_size  # type: ignore[union-attr]
        return int(size[0] if isinstance(size, list | tuple) else size)

    @property
    def spatial_merge_size(self) -> int:
        """Return the number of patches across, and down, one visual token."""
        return round(1 / self.config.downsample_ratio)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        config: BackboneConfig | None = None,
        revision: str | None = None,
        seed: int = 0,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load a trained model or a base.

        Args:
            pretrained_model_name_or_path: hub id or folder.
            config: None: the checkpoint's own.
            revision: hub commit.
            seed: initializes the head of a base, which has none, independently of the global random state.
            output_loading_info: whether transformers' report of the keys is returned too.
            kwargs: passed on to transformers (dtype, attn_implementation, ...) and to `__init__`.

        Raises:
            TypeError: an unknown keyword.
            ValueError: weights that are missing or left over, such as a trained model without its head.
        """
        path = str(pretrained_model_name_or_path)
        if config is None:
            options = {key: kwargs[key] for key in HUB_KEYWORDS & kwargs.keys()}
            config = load_config(path, revision=revision or "main", **options)
        with suppress_load_warnings():
            loaded: Any = super().from_pretrained(
                path,
                config=config,
                revision=revision or "main",
                key_mapping=KEY_MAPPING,
                output_loading_info=True,
                **kwargs,
            )
        model, info = loaded
        head, missing = set(HEAD_KEYS), set(info["missing_keys"])
        # Not isinstance: transformers imports a model's configuration and its code as two modules.
        needs_head = head <= missing and config.model_type != ColIntern3_5Config.model_type
        lacking = sorted(missing - head if needs_head else missing)  # half a head is an error
        # Retrieval has no use for next-token logits, which hub checkpoints carry.
        unexpected = sorted(set(info["unexpected_keys"]) - {"lm_head.weight"})
        if lacking or unexpected or info["mismatched_keys"]:
            misshapen = shorten_names(sorted(map(str, info["mismatched_keys"])))
            raise ValueError(
                f"{path}: the checkpoint does not fit ColIntern3_5: missing {shorten_names(lacking)}; unexpected "
                f"{shorten_names(unexpected)}; of another shape {misshapen}"
            )
        if needs_head:
            model.init_head(seed)
        return (model.eval(), info) if output_loading_info else model.eval()

    def init_head(self, seed: int) -> None:
        """Initialize the head from `seed` alone: normal weights of variance 1 / hidden size, zero bias."""
        weight = torch.randn(self.head.weight.shape, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            self.head.weight.copy_(weight / self.head.in_features**0.5)
            self.head.bias.zero_()

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Embed a batch.

        Args:
            input_ids: (B, L), padded on the right.
            attention_mask: (B, L), 0 at the padding.
            pixel_values: (tiles of the batch, 3, tile size, tile size), as `process_images` returns them; rows of text
                between the pages have none.
            image_features: output of `get_page_features`, page after page, instead of `pixel_values`.
            kwargs: passed on to the language model; `return_dict` and `use_cache`, which PEFT and scripts for
                colpali-engine's models pass, have no effect.

        Returns:
            (B, L, 128): unit vectors, zeros where `attention_mask` is 0, and with
            `mask_non_image_embeddings` also at a page's other tokens.

        Raises:
            ValueError: a batch that is padded on the left, or a number of tiles that its image tokens do not match.
        """
        if (attention_mask[:, 1:] > attention_mask[:, :-1]).any():
            raise ValueError("attention_mask: ColIntern3_5 takes right-padded batches; set padding_side='right'")
        if pixel_values is not None:
            tokens = (input_ids == self.config.image_token_id).sum(1)
            counts = (tokens // self.config.image_seq_length).tolist()
            if sum(counts) != len(pixel_values):
                raise ValueError(
                    f"pixel_values: {len(pixel_values)} tiles, but input_ids holds image tokens for {sum(counts)} "
                    f"({counts} by row); split a batch by pages, not each tensor by rows"
                )
            pages = pixel_values.split(counts)
            image_features = torch.cat([self.get_page_features(tiles) for tiles in pages if len(tiles)])
        images = None if image_features is None else {"image": BaseModelOutputWithPooling(pooler_output=image_features)}
        # Causal attention never looks right, so right padding needs no attention mask. The pages of a batch change a
        # page's embeddings by rounding alone: matrix products of other sizes sum in another order.
        kwargs |= {"use_cache": False, "return_dict": True}
        hidden = super().forward(input_ids=input_ids, mm_encoder_outputs=images, **kwargs).last_hidden_state
        embeddings = normalize(self.head(hidden).float(), dim=-1)
        if self.mask_non_image_embeddings:
            visual = input_ids == self.config.image_token_id
            attention_mask = attention_mask * (visual | ~visual.any(dim=1, keepdim=True))
        return embeddings.masked_fill(attention_mask.unsqueeze(-1) == 0, 0.0)

    def get_page_features(self, tiles: Tensor) -> Tensor:
        """Run vision tower and projector on one page.

        A page at a time, because matrix products of other sizes round differently: a page's features must not
        depend on its batch.

        Args:
            tiles: (n, 3, tile size, tile size).

        Returns:
            (n, visual tokens of a tile, hidden size).
        """
        trained = any(p.requires_grad for part in self.frozen_parts for p in part.parameters())
        # A frozen tower must stay out of the graph even where PEFT or checkpointing hooks its inputs.
        with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
            return self.get_image_features(pixel_values=tiles, return_dict=True).pooler_output


ColIntern3_5 = ColIntern3_5ForRetrieval  # adapters of any age name a class of this name, here or in `colintern`


@contextmanager
def suppress_load_warnings() -> Iterator[None]:
    """Suppress messages of transformers and PEFT that mislead users while a model is built.

    transformers logs a table of missing keys, in which a random head looks like a broken language model (the check
    after loading reports which it is), every layer that no tensor-parallel plan names, and a progress bar for a
    second's work; PEFT reads an attribute that transformers has renamed.
    """
    names = ("transformers.modeling_utils", "transformers.distributed.tensor_parallel")
    levels = {logging.getLogger(name): logging.getLogger(name).level for name in names}
    has_bar = transformers_logging.is_progress_bar_enabled()
    for logger in levels:
        logger.setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
        if has_bar:
            transformers_logging.enable_progress_bar()


def shorten_names(names: list[str]) -> str:
    """Return the first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "none"
