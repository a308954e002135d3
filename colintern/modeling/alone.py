"""A model without a params.yaml: what is in its own folder says how it is loaded."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from torch import nn

from colintern.core.errors import UserError
from colintern.modeling.adapter_files import (
    WEIGHTS_FILE,
    is_adapter,
    read_adapter_config,
    read_adapter_files,
    validate_adapter,
)
from colintern.modeling.loading import load_model, require_adapter, require_finite, require_merged
from colintern.modeling.modeling_colintern import attention_kernel
from colintern.params import split_hub_id
from colintern.storage.hub import describe_error
from colintern.storage.identity import content_hash, read_identity

DTYPES = ("float32", "bfloat16", "float16")
PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.jinja"]  # no pickles


class Alone(NamedTuple):
    """A model's folder that is loaded without a params.yaml. `revision` tells its weights apart."""

    folder: Path
    revision: str
    is_adapter: bool

    @classmethod
    def at(cls, model: str | Path) -> "Alone":
        """What is at a folder, or on the hub at ID@COMMIT, fetched if it must be; no weight is loaded.

        Raises:
            UserError: neither; or what is there has no weights or no head, or is an adapter that was never trained.
        """
        if Path(model).is_dir():
            folder, revision = Path(model), ""
        else:
            name, revision = split_hub_id("model", str(model))
            try:
                folder = Path(snapshot_download(name, revision=revision, allow_patterns=PATTERNS))
            except (HfHubHTTPError, LocalEntryNotFoundError) as error:
                raise UserError(f"model: {model!r} cannot be fetched: {describe_error(error)}") from error
        if not is_adapter(folder) and (folder / "config.json").is_file():
            require_merged(folder)
            return cls(folder, revision or content_hash(folder)[:40], False)
        require_adapter(folder)
        validate_adapter(read_adapter_files(folder), None)
        return cls(folder, revision or content_hash(folder / WEIGHTS_FILE)[:40], True)

    @property
    def identity(self) -> dict[str, Any]:
        """What the training run wrote of itself, if it is there."""
        return read_identity(self.folder)

    def load(self, base: str | Path | None, dtype: str | None, merge: bool, device: str | None) -> nn.Module:
        """The model.

        Args:
            base: folder of an adapter's base; None: where the adapter says.
            dtype: such as "float32"; None: what it was trained in, else what is stored.
            merge: fold the adapter into the weights; a merged model is as it is.
            device: None: the GPU if there is one.

        Raises:
            UserError: weights that are missing, do not fit or are not finite; a base that is not there or is not the
                one the adapter was trained on.
        """
        stored = self.identity.get("params", {}).get("dtype")
        dtype = dtype or stored or "auto"
        if dtype not in ("auto", *DTYPES):
            raise UserError(f"dtype: {dtype!r} is not valid; it must be one of {', '.join(DTYPES)}")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        options: dict[str, Any] = {"attn_implementation": attention_kernel("auto", dtype, device)}
        if self.is_adapter:
            options |= {"base": str(self._base(base)), "merge": merge}
        model: Any = load_model(self.folder, dtype=dtype if dtype == "auto" else getattr(torch, dtype), **options)
        require_finite(model, self.folder)
        return model.to(device)

    def _base(self, base: str | Path | None) -> str | Path:
        """A hub id, or the folder: of a relative one also in the folders around the adapter, where it was trained."""
        config = read_adapter_config(self.folder)
        name = base or str(config.base_model_name_or_path)
        if base is None and config.revision:
            return name
        tops = [Path(), *self.folder.resolve().parents] if base is None else [Path()]
        found = next((top / name for top in tops if (top / name / "config.json").is_file()), None)
        if found is None:
            raise UserError(f"base: {str(name)!r}, the base of {self.folder}, is no model's folder here; give base=")
        for file, want in self.identity.get("base", {}).get("files", {}).items():
            if not (found / file).is_file() or content_hash(found / file) != want["sha256"]:
                raise UserError(f"base: {found / file} is not the file that {self.folder} was trained on; give base=")
        return found
