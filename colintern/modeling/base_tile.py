"""Read the size of a base's tiles; no library is imported, so that `colintern tiles` starts at once."""

import json
from pathlib import Path

from colintern.core.errors import UserError
from colintern.modeling.tiling import INTERNVL_TILE, INTERNVL_TOKENS


def read_base_tile(base: Path) -> tuple[int, int]:
    """Return side in pixels and visual tokens of the base's tiles, from its config.json if the base is a folder.

    Raises:
        UserError: the config lacks them.
    """
    if not base.is_dir():
        return INTERNVL_TILE, INTERNVL_TOKENS
    try:
        vision = json.loads((base / "config.json").read_text(encoding="utf-8"))["vision_config"]
        # InternVL's configs hold [448, 448]; the code that wrote them also takes 448.
        tile, patch = (
            int(size[0] if isinstance(size, list) else size) for size in (vision["image_size"], vision["patch_size"])
        )
        return tile, (tile // patch // 2) ** 2
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError) as error:
        raise UserError(f"{base / 'config.json'}: no vision_config with image_size and patch_size: {error}") from error
