"""Complete an adapter's folder: PEFT saves neither the head's base weights nor the processor."""

from pathlib import Path
from typing import Any

from colintern.params import is_on_hub

ADAPTER_README = """\
---
{base_model}library_name: peft
pipeline_tag: visual-document-retrieval
tags: [colpali, late-interaction, lora, multi-vector]
---

# ColIntern3.5 adapter

LoRA of rank {rank} (alpha {alpha:g}) on `{base}`{at_revision}, for visual document retrieval: a page image and a query
each become many 128-d vectors, scored by MaxSim. A page has at most {max_visual_tokens} visual tokens, a query at most
{max_query_tokens} tokens.

With colintern (`colintern evaluate` and `colintern search` take this folder too). If the base is a local
folder, its path is relative to the current working directory:

```python
from colintern import ColIntern3_5, ColIntern3_5Processor

folder = "."  # the folder of this README
model = ColIntern3_5.from_pretrained(folder)
processor = ColIntern3_5Processor.from_pretrained(folder)
```

With plain PEFT:

```python
from colintern import ColIntern3_5
from peft import PeftModel

folder = "."  # the folder of this README
base = ColIntern3_5.from_pretrained({base!r}{revision_argument})
model = PeftModel.from_pretrained(base, folder).eval()
```

The base model has no projection head, so `from_pretrained` initializes one randomly. The head that this adapter was
trained with is in `adapter_model.safetensors` as `base_model.model.custom_text_proj.base_layer.*`, where PEFT finds it,
and again in `head.safetensors`.

The adapter is derived from `{base}`, whose license applies to it.
"""


def save_adapter_extras(wrapped: Any, processor: Any, folder: Path) -> None:
    """Save the head, the processor and a README into a folder in which PEFT has saved an adapter.

    Args:
        wrapped: the PeftModel.
        processor: saved with the token limits used in training.
    """
    wrapped.base_model.model.save_head(folder)
    processor.save_pretrained(folder)
    config = wrapped.peft_config["default"]
    base, revision = config.base_model_name_or_path, config.revision
    text = ADAPTER_README.format(
        base_model=f"base_model: {base}\n" if revision and is_on_hub(base) else "",
        base=base,
        at_revision=f" at `{revision}`" if revision else "",
        revision_argument=f", revision={revision!r}" if revision else "",
        rank=config.r,
        alpha=config.lora_alpha,
        max_visual_tokens=processor.max_visual_tokens,
        max_query_tokens=processor.max_query_tokens,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
