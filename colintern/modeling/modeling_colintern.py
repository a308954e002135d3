"""`ColIntern3_5`: InternVL3.5 without its language-model head, with a projection to 128-d token embeddings.

Module paths are those of the guide: `language_model.layers.*`, `vision_tower`, `multi_modal_projector`,
`custom_text_proj`.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError
from peft import PeftModel
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import normalize
from transformers import InternVLConfig, InternVLModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging as transformers_logging

from colintern.modeling.adapter_files import (
    HEAD_FILE,
    HEAD_KEYS,
    WEIGHTS_FILE,
    AdapterFiles,
    State,
    is_adapter,
    name_head_copy,
    read_adapter_files,
    read_tensors,
    shorten,
    validate_adapter,
)

EMBEDDING_DIM = 128

# Where a checkpoint may keep the parts: the hub's InternVL3_5-*-HF files, what transformers 5 writes for the
# generating model, and our own. transformers converts keys only for its own classes, and leaves the whole language
# model of a subclass random with no more than a log line, so the mapping is ours and a gap in it is an error.
KEY_MAPPING = {
    r"^language_model\.model\.": "language_model.",
    r"^language_model\.lm_head\.": "lm_head.",
    r"^model\.(language_model|vision_tower|multi_modal_projector)\.": r"\1.",
}


class ColIntern3_5(InternVLModel):
    """Pages and queries as many 128-d unit vectors; the score of a pair is MaxSim.

    Args:
        config: of the base.
        mask_non_image_embeddings: as in colpali-engine, a page keeps only the vectors of its visual tokens; those of
            its prompt become zeros. Rows without an image are not changed.
    """

    main_input_name = "input_ids"
    dim = EMBEDDING_DIM  # colpali-engine's name, as padding_side, patch_size and spatial_merge_size are
    padding_side = "right"

    def __init__(self, config: InternVLConfig, mask_non_image_embeddings: bool = False):
        super().__init__(config)
        self.mask_non_image_embeddings = mask_non_image_embeddings
        self.custom_text_proj = nn.Linear(config.get_text_config().hidden_size, EMBEDDING_DIM)
        self.post_init()

    @property
    def patch_size(self) -> int:
        """Return the side in pixels of a patch of the vision tower."""
        size: Any = self.config.vision_config.patch_size  # type: ignore[union-attr]
        return int(size[0] if isinstance(size, list | tuple) else size)

    @property
    def spatial_merge_size(self) -> int:
        """Return the patches across, and down, one visual token."""
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
            pretrained_model_name_or_path: hub id or folder: with adapter_config.json it is an adapter (its base and its
                head are loaded with it, see `read_checked_adapter`), else a checkpoint with or without
                `custom_text_proj`.
            revision: hub commit of what is there; an adapter itself names the commit of its base.
            base: where an adapter's base is, if not where the adapter says.
            merge: fold the adapter into the base weights; without it the LoRA layers stay visible.
            seed: draws the head where the checkpoint has none, independently of the global random state.
            kwargs: passed on to transformers (dtype, attn_implementation, ...) and to `__init__`.

        Raises:
            TypeError: a keyword that none of them knows.
            ValueError: weights that are missing or left over, an adapter without its head, or `merge` on a folder
                that holds no adapter.
            UserError: see `read_checked_adapter`.
        """
        path = pretrained_model_name_or_path
        folder = Path(path) if Path(path).is_dir() else _hub_adapter(str(path), revision)
        if folder and is_adapter(folder):
            files = read_checked_adapter(folder, base)
            place = base or str(files.config.base_model_name_or_path)
            model = cls.from_pretrained(place, revision=files.config.revision, seed=seed, **kwargs)
            model._set_head(files.head)
            with quiet():
                wrapped = PeftModel.from_pretrained(model, str(folder), config=files.config)
            return (wrapped.merge_and_unload() if merge else wrapped.base_model.model).eval()
        if merge:
            raise ValueError(f"{path}: nothing to merge, the folder holds no adapter_config.json")
        with quiet():
            loaded: Any = super().from_pretrained(
                str(path), revision=revision or "main", key_mapping=KEY_MAPPING, output_loading_info=True, **kwargs
            )
        model, info = loaded
        head = set(HEAD_KEYS)
        missing = set(info["missing_keys"])
        wrong = sorted(missing if len(head & missing) == 1 else missing - head)  # half a head is no head
        # Retrieval has no use for next-token logits, which hub checkpoints carry.
        unexpected = sorted(set(info["unexpected_keys"]) - {"lm_head.weight"})
        if wrong or unexpected or info["mismatched_keys"]:
            raise ValueError(
                f"{path}: the checkpoint does not fit ColIntern3_5: missing {shorten(wrong)}; unexpected "
                f"{shorten(unexpected)}; of another shape {shorten(sorted(map(str, info['mismatched_keys'])))}"
            )
        if head <= missing:
            model.init_head(seed)
        return model.eval()

    def init_head(self, seed: int) -> None:
        """Draw `custom_text_proj` from `seed` alone: normal weights of variance 1 / hidden size, zero bias."""
        proj = self.custom_text_proj
        drawn = torch.randn(proj.weight.shape, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            proj.weight.copy_(drawn / proj.in_features**0.5)
            proj.bias.zero_()

    def save_head(self, folder: str | Path) -> None:
        """Write the head's base weights beside an adapter, and into it, where plain PEFT finds them.

        PEFT saves only LoRA's matrices, and LoRA on a head that is drawn again is worth nothing.
        """
        head, file = self.head_state(), Path(folder) / WEIGHTS_FILE
        save_file(head, Path(folder) / HEAD_FILE)
        if file.is_file():
            has_lora = hasattr(self.custom_text_proj, "base_layer")
            copies = {name_head_copy(key, has_lora): value for key, value in head.items()}
            save_file(read_tensors(file) | copies, file, metadata={"format": "pt"})

    def head_state(self) -> dict[str, torch.Tensor]:
        """The head's base weights as `save_head` writes them."""
        layer = getattr(self.custom_text_proj, "base_layer", self.custom_text_proj)
        return {f"custom_text_proj.{k}": v.detach().float().cpu().contiguous() for k, v in layer.named_parameters()}

    def load_head(self, folder: str | Path) -> None:
        """Take the head's base weights from an adapter of this base.

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
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Embed a batch.

        Args:
            input_ids, attention_mask: (B, L), padded on the right.
            pixel_values: (tiles of the whole batch, 3, tile, tile), as `process_images` makes them; rows of text
                between the pages have none.
            image_features: instead of `pixel_values`, what `page_features` made of them, page after page.
            kwargs: passed on to the language model; `return_dict` and `use_cache`, which PEFT and scripts for
                colpali-engine's models pass, change nothing.

        Returns:
            (B, L, 128): unit vectors, zeros where `attention_mask` is 0, and with
            `mask_non_image_embeddings` also at a page's other tokens.

        Raises:
            ValueError: a batch that is padded on the left, or not as many tiles as its rows have image tokens for.
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
            image_features = torch.cat([self.page_features(tiles) for tiles in pages if len(tiles)])
        images = None if image_features is None else {"image": BaseModelOutputWithPooling(pooler_output=image_features)}
        # Causal attention never looks right, so right padding needs no attention mask, and a page's embeddings
        # cannot depend on the pages beside it.
        kwargs |= {"use_cache": False, "return_dict": True}
        hidden = super().forward(input_ids=input_ids, mm_encoder_outputs=images, **kwargs).last_hidden_state
        embeddings = normalize(self.custom_text_proj(hidden).float(), dim=-1)
        if self.mask_non_image_embeddings:
            visual = input_ids == self.config.image_token_id
            attention_mask = attention_mask * (visual | ~visual.any(dim=1, keepdim=True))
        return embeddings.masked_fill(attention_mask.unsqueeze(-1) == 0, 0.0)

    def page_features(self, tiles: torch.Tensor) -> torch.Tensor:
        """Tower and projector on one page: (n, 3, tile, tile) to (n, tokens of a tile, hidden size).

        A page at a time, because matrix products of other sizes round differently: a page's features must not
        depend on its batch.
        """
        parts = (*self.vision_tower.parameters(), *self.multi_modal_projector.parameters())
        # A frozen tower must stay out of the graph even where PEFT or checkpointing hooks its inputs.
        with torch.set_grad_enabled(torch.is_grad_enabled() and any(p.requires_grad for p in parts)):
            return self.get_image_features(pixel_values=tiles, return_dict=True).pooler_output


def read_checked_adapter(folder: Path, base: str | InternVLConfig | None = None) -> AdapterFiles:
    """Read an adapter folder and check its tensors against its configuration and its base.

    Args:
        base: config, folder or hub id of its base, none of whose weights are read; None: where the adapter says.

    Raises:
        UserError: a file is damaged, or the first of `colintern.modeling.adapter_files.find_faults`.
    """
    files = read_adapter_files(folder)
    validate_adapter(files, meta_model(base or str(files.config.base_model_name_or_path), files.config.revision))
    return files


def meta_model(base: str | InternVLConfig, revision: str | None) -> ColIntern3_5:
    """Build the architecture of `base`, a config or where its config.json is, without memory or weights."""
    if not isinstance(base, InternVLConfig):
        base = InternVLConfig.from_pretrained(base, revision=revision or "main")
    with torch.device("meta"):
        return ColIntern3_5(base)


def attention_kernel(choice: str, dtype: str, device: str | None = None) -> str:
    """transformers' name for a `choice` that is no kernel of the hub: `auto` is what is fastest, in bfloat16
    flash_attention_2 on CUDA, where it is installed; else sdpa.

    flash-attn's kernels know no float32. `device`: None for the GPU where there is one.
    """
    assert "/" not in choice, f"{choice}: transformers would load what the hub's cache has, see modeling/attention.py"
    if choice != "auto":
        return choice
    usable = dtype == "bfloat16" and device != "cpu" and torch.cuda.is_available() and find_spec("flash_attn")
    return "flash_attention_2" if usable else "sdpa"


def _hub_adapter(name: str, revision: str | None) -> Path | None:
    """The cached folder of an adapter on the hub, its head with it; None if `name` is no adapter there."""
    try:
        hf_hub_download(name, "adapter_config.json", revision=revision)
    except (EntryNotFoundError, RepositoryNotFoundError, HFValidationError):  # transformers says what it is, or is not
        return None
    return Path(snapshot_download(name, revision=revision, allow_patterns=["adapter_*", HEAD_FILE]))


@contextmanager
def quiet() -> Iterator[None]:
    """Around the making of a model, without what the libraries say about it that is no concern of a user's.

    transformers logs a table of missing keys, in which a random head looks like a broken language model (the check
    after loading says which it is), every layer that no tensor-parallel plan names, and a bar for a second's work;
    PEFT reads an attribute that transformers has renamed.
    """
    names = ("transformers.modeling_utils", "transformers.distributed.tensor_parallel")
    levels = {logging.getLogger(name): logging.getLogger(name).level for name in names}
    bar = transformers_logging.is_progress_bar_enabled()
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
        if bar:
            transformers_logging.enable_progress_bar()
