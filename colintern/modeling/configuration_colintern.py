"""Configuration of `ColIntern3_5ForRetrieval`, and the names of its parts.

Other modules take parts and classes from here. A second backbone is a folder with modules like this one,
`modeling_colintern`, `processing_colintern` and `tiling`.
"""

from typing import Any

from transformers import InternVLConfig as BackboneConfig

EMBEDDING_DIM = 128
LANGUAGE_MODEL, HEAD = "language_model", "custom_text_proj"
FROZEN_PARTS = ("vision_tower", "multi_modal_projector")
PARTS = (LANGUAGE_MODEL, HEAD, *FROZEN_PARTS)
HEAD_KEYS = (f"{HEAD}.bias", f"{HEAD}.weight")
# Where a checkpoint may keep the parts: the hub's InternVL3_5-*-HF files, what transformers 5 writes for the
# generating model, and our own. transformers converts keys only for its own classes, and leaves the whole language
# model of a subclass random with no more than a log line, so the mapping is ours and a gap in it is an error.
KEY_MAPPING = {
    rf"^{LANGUAGE_MODEL}\.model\.": f"{LANGUAGE_MODEL}.",
    rf"^{LANGUAGE_MODEL}\.lm_head\.": "lm_head.",
    rf"^model\.({'|'.join((LANGUAGE_MODEL, *FROZEN_PARTS))})\.": r"\1.",
}


class ColIntern3_5Config(BackboneConfig):
    """Configuration of a trained model, whose checkpoint has a projection head.

    It has the fields of a base's configuration. Its `model_type` is another, so that transformers' own class for the
    backbone, which has no head, is not selected for it.
    """

    model_type = "colintern3_5"


# Of the checkpoints that `ColIntern3_5ForRetrieval` loads.
CONFIG_CLASSES = {kind.model_type: kind for kind in (BackboneConfig, ColIntern3_5Config)}


def load_config(path: str, **options: Any) -> BackboneConfig:
    """Load config.json of a trained model or a base; `options` are transformers' (revision, token, ...)."""
    content, _ = BackboneConfig.get_config_dict(path, **options)
    return CONFIG_CLASSES.get(str(content.get("model_type")), BackboneConfig).from_pretrained(path, **options)
