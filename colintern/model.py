"""`ColIntern3_5`: InternVL3.5 without its language-model head, with a projection to 128-d token embeddings.

Module paths are those of the guide: `language_model.layers.*`, `vision_tower`, `multi_modal_projector`,
`custom_text_proj`.
"""

import copy
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
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import normalize
from transformers import InternVLConfig, InternVLModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging as transformers_logging

from colintern import causal
from colintern.adapter_files import (
    CONFIG_FILE,
    HEAD_FILE,
    HEAD_KEYS,
    PREFIX,
    WEIGHTS_FILE,
    AdapterFiles,
    ExpectedTensors,
    State,
    is_adapter,
    read_adapter_files,
    read_head,
    read_json_object,
    read_tensors,
    require_regular_file,
    require_sound,
    shorten,
)
from colintern.matching import match_names
from colintern.params import UserError

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
    """Pages and queries as many 128-d unit vectors; the score of a pair is MaxSim."""

    main_input_name = "input_ids"

    def __init__(self, config: InternVLConfig):
        super().__init__(config)
        self.custom_text_proj = nn.Linear(config.get_text_config().hidden_size, EMBEDDING_DIM)
        self.post_init()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        path: str | Path,
        *,
        revision: str | None = None,
        base: str | None = None,
        merge: bool = False,
        seed: int = 0,
        **kwargs: Any,
    ) -> Self:
        """Load a base, an adapter or a merged model.

        Args:
            path: hub id or folder: with adapter_config.json it is an adapter (its base and its head are loaded
                with it, see `read_checked_adapter`), else a checkpoint with or without `custom_text_proj`.
            revision: hub commit of what is at `path`; an adapter itself names the commit of its base.
            base: where an adapter's base is, if not where the adapter says.
            merge: fold the adapter into the base weights; without it the LoRA layers stay visible.
            seed: draws the head where the checkpoint has none, independently of the global random state.
            kwargs: passed on to transformers (dtype, attn_implementation, ...).

        Raises:
            ValueError: weights that are missing or left over, an adapter without its head, or `merge` on a folder
                that holds no adapter. It is a UserError, which names the file, where one is damaged.
        """
        folder = Path(path) if Path(path).is_dir() else _hub_adapter(str(path), revision)
        if folder and is_adapter(folder):
            files = read_checked_adapter(folder, base)
            place = base or str(files.config.base_model_name_or_path)
            model = cls.from_pretrained(place, revision=files.config.revision, seed=seed, **kwargs)
            model.set_head(files.head)
            with quiet():
                wrapped = PeftModel.from_pretrained(model, str(folder), config=files.config)
            return (wrapped.merge_and_unload() if merge else wrapped.base_model.model).eval()
        if merge:
            raise ValueError(f"{path}: nothing to merge, the folder holds no adapter_config.json")
        model, info = _load_checkpoint(super().from_pretrained, path, revision, kwargs)
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
            part = ".base_layer." if hasattr(self.custom_text_proj, "base_layer") else "."
            copies = {PREFIX + key.replace(".", part): value for key, value in head.items()}
            save_file(read_tensors(file) | copies, file, metadata={"format": "pt"})

    def head_state(self) -> dict[str, torch.Tensor]:
        """The head's base weights as `save_head` writes them."""
        layer = getattr(self.custom_text_proj, "base_layer", self.custom_text_proj)
        return {f"custom_text_proj.{k}": v.detach().float().cpu().contiguous() for k, v in layer.named_parameters()}

    def load_head(self, folder: str | Path) -> None:
        """Read the head's base weights from an adapter folder.

        Raises:
            UserError: see `read_head`; or the head is of another shape.
        """
        head = read_head(Path(folder))
        for key, value in head.items():
            own = self.get_parameter(key)
            if value.shape != own.shape:
                raise UserError(f"{folder}: the head's {key} is {tuple(value.shape)}, expected {tuple(own.shape)}")
        self.set_head(head)

    def set_head(self, head: State) -> None:
        """Copy weights that `read_head` or `read_checked_adapter` has returned into the head."""
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
            pixel_values: (tiles of the whole batch, 3, tile, tile), as `process_images` makes them.
            image_features: instead of `pixel_values`, what `page_features` made of them, page after page.

        Returns:
            (B, L, 128): unit vectors, zeros where `attention_mask` is 0.

        Raises:
            ValueError: a batch that is padded on the left.
        """
        if (attention_mask[:, 1:] > attention_mask[:, :-1]).any():
            raise ValueError("attention_mask: ColIntern3_5 takes right-padded batches; set padding_side='right'")
        if pixel_values is not None:
            tokens = (input_ids == self.config.image_token_id).sum(1)
            pages = pixel_values.split((tokens // self.config.image_seq_length).tolist())
            image_features = torch.cat([self.page_features(tiles) for tiles in pages])
        images = None if image_features is None else {"image": BaseModelOutputWithPooling(pooler_output=image_features)}
        # Causal attention never looks right, so right padding needs no attention mask, and a page's embeddings
        # cannot depend on the pages beside it.
        hidden = (
            super()
            .forward(input_ids=input_ids, mm_encoder_outputs=images, use_cache=False, return_dict=True, **kwargs)
            .last_hidden_state
        )
        embeddings = normalize(self.custom_text_proj(hidden).float(), dim=-1)
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


def read_checked_adapter(folder: Path, base: str | Path | None = None) -> AdapterFiles:
    """Read an adapter folder and check every tensor in it against its configuration and its base.

    Args:
        folder: of the adapter.
        base: folder or hub id of its base; None: where the adapter says. No weight of it is read.

    Raises:
        UserError: a file is damaged; a tensor is missing, left over, of another shape or type, or not finite; or the
            adapter is untrained or has no head.
    """
    files = read_adapter_files(folder)
    place = str(base or files.config.base_model_name_or_path)
    require_sound(files, expect_tensors(files, build_on_meta(place, files.config.revision)))
    return files


def expect_tensors(files: AdapterFiles, base: ColIntern3_5) -> ExpectedTensors:
    """Return the tensors that PEFT would save for an adapter's configuration, without allocating them.

    Args:
        files: of the adapter.
        base: see `build_on_meta`; it is changed.

    Raises:
        UserError: PEFT cannot apply the configuration to this base, or `target_modules` takes too long to match.
    """
    config, file = copy.deepcopy(files.config), files.folder / CONFIG_FILE
    head = {key: tuple(base.get_parameter(key).shape) for key in HEAD_KEYS}
    try:
        if isinstance(config.target_modules, str):
            match_names(config.target_modules, (name for name, _ in base.named_modules()), f"{file}: target_modules")
        with torch.device("meta"), quiet():
            state = get_peft_model_state_dict(PeftModel(base, config), save_embedding_layers=False)
    except UserError:
        raise
    except Exception as error:  # PEFT checks few values of a configuration, and trips over the others
        raise UserError(f"{file}: cannot be applied to the base: {_first_line(error)}") from error
    return ExpectedTensors({name: tuple(value.shape) for name, value in state.items()}, head)


def build_on_meta(base: str | Path | InternVLConfig, revision: str | None = None) -> ColIntern3_5:
    """Return a model without memory or weights.

    Args:
        base: its config, or the folder or hub id where its config.json is.
        revision: commit of a hub id.

    Raises:
        UserError: a folder's config.json is missing, damaged, or that of another kind of model.
    """
    file = Path(base) / "config.json" if not isinstance(base, InternVLConfig) and Path(base).is_dir() else None
    if file and (kind := read_json_object(file).get("model_type")) != "internvl":
        raise UserError(f"{file}: model_type: {kind!r} is not valid; it must be internvl")
    try:
        if not isinstance(base, InternVLConfig):
            base = InternVLConfig.from_pretrained(str(base), revision=revision or "main")
        with torch.device("meta"), quiet():
            return ColIntern3_5(base)
    except Exception as error:  # of transformers' dataclasses, or of torch where a size is impossible
        if not file:
            raise
        raise UserError(f"{file}: is not the config of a model: {_first_line(error)}") from error


def _load_checkpoint(load: Any, path: str | Path, revision: str | None, options: dict[str, Any]) -> Any:
    """Call transformers' `from_pretrained`; what it cannot read in a local folder is named."""
    folder = Path(path)
    if folder.is_dir():
        build_on_meta(folder)
        for file in [*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")]:
            require_regular_file(file)
    try:
        with quiet():
            return load(
                str(path), revision=revision or "main", key_mapping=KEY_MAPPING, output_loading_info=True, **options
            )
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        if not folder.is_dir():
            raise
        raise UserError(f"{path}: its weights cannot be loaded: {_first_line(error)}") from error


def attention_kernel(choice: str, dtype: str, device: str | None = None) -> str:
    """transformers' name for a `choice` that is no kernel of the hub: `auto` is what is fastest, in bfloat16
    flash_attention_2 on CUDA, where it is installed, and our own `blocked` on the CPU; else sdpa.

    flash-attn's kernels know no float32. `device`: None for the GPU where there is one.
    """
    assert "/" not in choice, f"{choice}: transformers would load what the hub's cache has, see modeling/attention.py"
    if choice != "auto":
        return choice
    if dtype != "bfloat16":
        return "sdpa"
    if device == "cpu" or not torch.cuda.is_available():
        return causal.NAME
    return "flash_attention_2" if find_spec("flash_attn") else "sdpa"


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


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"
