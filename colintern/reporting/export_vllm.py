"""Write a merged model for vLLM: the layout of `InternVLForConditionalGeneration`, with the head as a `Dense` module.

vLLM applies the `Dense` of modules.json to the last hidden states and normalizes them, which is what `ColIntern3_5`
does. It cuts a page into the tiles of transformers' processor, so only adapters of `tiling: stock` can be exported.
"""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from transformers import InternVLProcessor

from colintern.core.errors import UserError
from colintern.modeling.configuration_colintern import EMBEDDING_DIM, HEAD
from colintern.modeling.processor import ColIntern3_5Processor
from colintern.modeling.retriever import ColIntern3_5
from colintern.storage.files import format_json

DENSE = "1_Dense"  # sentence-transformers' name of the folder
# Renders a message with an image as `visual_prompt`, and one with text as `process_queries` does.
CHAT_TEMPLATE = """\
{%- macro query(text) -%}{{ PREFIX + text + SUFFIX }}{%- endmacro -%}
{%- for message in messages -%}
{%- if message.content is string -%}{{ query(message.content) }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == "text" -%}{{ query(part.text) }}{%- else -%}{{ PAGE }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
"""


def require_stock_tiling(folder: Path, identity: dict[str, Any]) -> None:
    """Raise UserError if an adapter was trained on tiles that vLLM does not cut.

    Args:
        folder: the adapter's.
        identity: its identity.json.
    """
    tiling = identity["params"].get("tiling", "exact")
    if tiling != "stock":
        raise UserError(
            f"--for vllm: {folder} was trained with tiling: {tiling}, but vLLM cuts pages as transformers does; set "
            "tiling: stock in params.yaml, train again (dvc repro) and export that adapter"
        )


def write_vllm_model(model: ColIntern3_5, processor: ColIntern3_5Processor, base: Path, out: Path) -> None:
    """Write weights, config, head and processor.

    Args:
        model: with the adapter merged, in the type in which it is stored.
        processor: its processor.
        base: folder of the base, whose config.json is copied.
        out: an empty folder.
    """
    head = {key.replace(HEAD, "linear"): value for key, value in model.state_dict().items() if key.startswith(HEAD)}
    weights = {key: value for key, value in model.state_dict().items() if not key.startswith(HEAD)}
    save_torch_state_dict(weights, out)
    dtype = str(model.dtype).removeprefix("torch.")
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    for part in (config, config["text_config"], config["vision_config"]):
        part.pop("torch_dtype", None)  # its name in older files
        part["dtype"] = dtype
    config["architectures"] = ["InternVLForConditionalGeneration"]
    (out / "config.json").write_text(format_json(config), encoding="utf-8")
    dense, (width, hidden) = out / DENSE, head["linear.weight"].shape
    dense.mkdir()
    save_file({key: value.contiguous() for key, value in head.items()}, dense / "model.safetensors")
    activation = "torch.nn.modules.linear.Identity"
    layer = {"in_features": hidden, "out_features": width, "bias": True, "activation_function": activation}
    (dense / "config.json").write_text(format_json(layer), encoding="utf-8")
    module = {"idx": 1, "name": "1", "path": DENSE, "type": "sentence_transformers.models.Dense"}
    (out / "modules.json").write_text(format_json([module]), encoding="utf-8")
    InternVLProcessor(
        processor.image_processor, processor.tokenizer, processor.video_processor,
        image_seq_length=processor.image_seq_length, chat_template=render_chat_template(processor),
    ).save_pretrained(out)  # fmt: skip


def render_chat_template(processor: ColIntern3_5Processor) -> str:
    """Return the template by which a server formats a message: a page's prompt, or a query."""
    texts = {
        "PREFIX": processor.query_prefix,
        "SUFFIX": processor.query_augmentation_token * 10,
        "PAGE": processor.visual_prompt_prefix,
    }
    template = CHAT_TEMPLATE
    for name, text in texts.items():
        template = template.replace(name, json.dumps(text))
    return template


def describe_vllm_use(processor: ColIntern3_5Processor, dtype: str) -> dict[str, Any]:
    """Return what the card says of the use with vLLM."""
    query = f"{processor.query_prefix}QUERY{processor.query_augmentation_token * 10}"
    return {
        "dtype": dtype,
        "dim": EMBEDDING_DIM,
        "query": f"`{json.dumps(query)}`",
        "page": f"`{json.dumps(processor.visual_prompt_prefix)}`",
        "max_query_tokens": processor.max_query_tokens,
        "max_patches": processor.max_tiles - 1,
    }
