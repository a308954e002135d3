"""`ColIntern3_5`: the backbone without its language-model head, with a projection to 128-d token embeddings.

Module paths are those of the guide: `language_model.layers.*`, `vision_tower`, `multi_modal_projector`,
`custom_text_proj`. Shapes: B rows, L tokens of a padded row.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging as transformers_logging

from colintern.modeling.adapter_files import (
    HEAD_FILE,
    AdapterFiles,
    State,
    is_adapter,
    read_adapter_files,
    shorten_names,
    validate_adapter,
    write_head,
)
from colintern.modeling.configuration_colintern import (
    EMBEDDING_DIM,
    FROZEN_PARTS,
    HEAD,
    HEAD_KEYS,
    KEY_MAPPING,
    LANGUAGE_MODEL,
    BackboneConfig,
    BackboneModel,
)


class ColIntern3_5(BackboneModel):
    """Embeds pages and queries as many 128-d unit vectors each; the score of a pair is MaxSim.

    Args:
        config: configuration of the base.
        mask_non_image_embeddings: as in colpali-engine, keep only the vectors of a page's visual tokens; those of its
            prompt become zeros. Rows without an image are not changed.
    """

    # PEFT writes the module into adapter_config.json, where AutoPeftModel finds it: a path that will not change.
    __module__ = "colintern"
    main_input_name = "input_ids"
    dim = EMBEDDING_DIM  # colpali-engine's name, like padding_side, patch_size and spatial_merge_size
    padding_side = "right"

    def __init__(self, config: BackboneConfig, mask_non_image_embeddings: bool = False):
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
        revision: str | None = None,
        base: str | None = None,
        merge: bool = False,
        seed: int = 0,
        **kwargs: Any,
    ) -> Self:
        """Load a base, an adapter or a merged model.

        Args:
            pretrained_model_name_or_path: hub id or folder. With adapter_config.json it is an adapter, which is loaded
                with its base and its head (see `read_checked_adapter`); else a checkpoint with or without a head.
            revision: hub commit of the above; an adapter names the commit of its base.
            base: folder or hub id of an adapter's base, if not the one that the adapter names.
            merge: fold the adapter into the base weights; else the LoRA layers stay visible.
            seed: initializes the head of a checkpoint without one, independently of the global random state.
            kwargs: passed on to transformers (dtype, attn_implementation, ...) and to `__init__`.

        Raises:
            TypeError: an unknown keyword.
            ValueError: weights that are missing or left over, an adapter without its head, or `merge` on a folder
                that holds no adapter.
            UserError: see `read_checked_adapter`.
        """
        path = pretrained_model_name_or_path
        folder = Path(path) if Path(path).is_dir() else _hub_adapter(str(path), revision)
        if folder and is_adapter(folder):
            files = read_checked_adapter(folder, base)
            source = base or str(files.config.base_model_name_or_path)
            model = cls.from_pretrained(source, revision=files.config.revision, seed=seed, **kwargs)
            model._set_head(files.head)
            with suppress_load_warnings():
                wrapped = PeftModel.from_pretrained(model, str(folder), config=files.config)
            return (wrapped.merge_and_unload() if merge else wrapped.base_model.model).eval()
        if merge:
            raise ValueError(f"{path}: nothing to merge, the folder holds no adapter_config.json")
        with suppress_load_warnings():
            loaded: Any = super().from_pretrained(
                str(path), revision=revision or "main", key_mapping=KEY_MAPPING, output_loading_info=True, **kwargs
            )
        model, info = loaded
        head, missing = set(HEAD_KEYS), set(info["missing_keys"])
        lacking = sorted(missing if len(head & missing) == 1 else missing - head)  # half a head is an error
        # Retrieval has no use for next-token logits, which hub checkpoints carry.
        unexpected = sorted(set(info["unexpected_keys"]) - {"lm_head.weight"})
        if lacking or unexpected or info["mismatched_keys"]:
            misshapen = shorten_names(sorted(map(str, info["mismatched_keys"])))
            raise ValueError(
                f"{path}: the checkpoint does not fit ColIntern3_5: missing {shorten_names(lacking)}; unexpected "
                f"{shorten_names(unexpected)}; of another shape {misshapen}"
            )
        if head <= missing:
            model.init_head(seed)
        return model.eval()

    def init_head(self, seed: int) -> None:
        """Initialize the head from `seed` alone: normal weights of variance 1 / hidden size, zero bias."""
        weight = torch.randn(self.head.weight.shape, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            self.head.weight.copy_(weight / self.head.in_features**0.5)
            self.head.bias.zero_()

    def save_head(self, folder: str | Path) -> None:
        """Write the head's base weights beside an adapter, and into it, where plain PEFT finds them.

        PEFT saves only LoRA's matrices, and LoRA on a head that is initialized again is worth nothing.
        """
        write_head(self.get_head_state(), Path(folder), has_lora=hasattr(self.head, "base_layer"))

    def get_head_state(self) -> State:
        """Return the head's base weights as `save_head` writes them."""
        layer = getattr(self.head, "base_layer", self.head)
        return {f"{HEAD}.{k}": v.detach().float().cpu().contiguous() for k, v in layer.named_parameters()}

    def load_head(self, folder: str | Path) -> None:
        """Load the head's base weights from an adapter of this base.

        Raises:
            UserError: see `read_checked_adapter`.
        """
        self._set_head(read_checked_adapter(Path(folder), self.config).head)

    def _set_head(self, head: State) -> None:
        with torch.no_grad():
            for key, value in head.items():
                self.get_parameter(key).copy_(value)

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
        # Causal attention never looks right, so right padding needs no attention mask, and a page's embeddings
        # cannot depend on the pages beside it.
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


def read_checked_adapter(folder: Path, base: str | BackboneConfig | None = None) -> AdapterFiles:
    """Read an adapter folder and check its tensors against its configuration and its base.

    Args:
        folder: the adapter.
        base: config, folder or hub id of its base, whose weights are not read; None: the one that the adapter names.

    Raises:
        UserError: a file is damaged, or the first error of `find_faults`.
    """
    files = read_adapter_files(folder)
    base = base or str(files.config.base_model_name_or_path)
    validate_adapter(files, build_meta_model(base, files.config.revision))
    return files


def build_meta_model(base: str | BackboneConfig, revision: str | None) -> ColIntern3_5:
    """Build the architecture of `base`, a config or where its config.json is, without memory or weights."""
    if not isinstance(base, BackboneConfig):
        base = BackboneConfig.from_pretrained(base, revision=revision or "main")
    with torch.device("meta"):
        return ColIntern3_5(base)


def _hub_adapter(name: str, revision: str | None) -> Path | None:
    """Return the cached folder of an adapter on the hub with its head; None if `name` is not an adapter there."""
    try:
        hf_hub_download(name, "adapter_config.json", revision=revision)
    except (EntryNotFoundError, RepositoryNotFoundError, HFValidationError):  # transformers' message is clearer
        return None
    return Path(snapshot_download(name, revision=revision, allow_patterns=["adapter_*", HEAD_FILE]))


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
