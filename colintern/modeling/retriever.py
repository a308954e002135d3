"""`ColIntern3_5` as the library uses it: `ColIntern3_5ForRetrieval` and adapters.

What needs peft and huggingface_hub is here, because `colintern export` copies `modeling_colintern` into the folder of a
model, where neither is needed.
"""

from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError
from peft import PeftModel

from colintern.modeling.adapter_files import (
    HEAD_FILE,
    AdapterFiles,
    State,
    is_adapter,
    read_adapter_files,
    validate_adapter,
    write_head,
)
from colintern.modeling.configuration_colintern import HEAD, BackboneConfig, load_config
from colintern.modeling.modeling_colintern import ColIntern3_5ForRetrieval, suppress_load_warnings


class ColIntern3_5(ColIntern3_5ForRetrieval):
    """`ColIntern3_5ForRetrieval` that also loads adapters."""

    # PEFT writes the module into adapter_config.json, where AutoPeftModel finds it: a path that will not change.
    __module__ = "colintern"

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
            seed: initializes the head of a base, independently of the global random state.
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
        return super().from_pretrained(path, revision=revision, seed=seed, **kwargs)

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
        base = load_config(base, revision=revision or "main")
    with torch.device("meta"):
        return ColIntern3_5(base)


def _hub_adapter(name: str, revision: str | None) -> Path | None:
    """Return the cached folder of an adapter on the hub with its head; None if `name` is not an adapter there."""
    try:
        hf_hub_download(name, "adapter_config.json", revision=revision)
    except (EntryNotFoundError, RepositoryNotFoundError, HFValidationError):  # transformers' message is clearer
        return None
    return Path(snapshot_download(name, revision=revision, allow_patterns=["adapter_*", HEAD_FILE]))
