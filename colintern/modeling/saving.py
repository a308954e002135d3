"""Complete an adapter's folder: PEFT saves neither the head's base weights nor the processor."""

from pathlib import Path
from typing import Any

from colintern.params import on_hub

USAGE = """\
```python
import torch
from PIL import Image
from colintern.model import ColIntern3_5
from colintern.processor import ColIntern3_5Processor

folder = "."  # where this file is
model = ColIntern3_5.from_pretrained(folder)
processor = ColIntern3_5Processor.from_pretrained(folder)
with torch.no_grad():
    pages = model(**processor.process_images([Image.open("page.png")]))
    queries = model(**processor.process_queries(["what does the invoice come to"]))
print(processor.score_multi_vector(list(queries), list(pages)))
```

`colintern evaluate FOLDER` and `colintern search FOLDER ...` take this folder too.
"""

ADAPTER_README = """\
---
{base_model}library_name: peft
pipeline_tag: visual-document-retrieval
tags:
- colpali
- late-interaction
- lora
- multi-vector
- visual-document-retrieval
---

# ColIntern3.5 adapter

LoRA of rank {rank} (alpha {alpha:g}) on `{base}`{at_revision}: a visual document retriever, fine-tuned by colintern.
A page image and a query each become many 128-d vectors, and MaxSim is their score. A page has at most
{max_visual_tokens} visual tokens, a query at most {max_query_tokens} tokens.

## Use with colintern

{usage}
The base is loaded from where `base_model_name_or_path` in `adapter_config.json` says; `base=` names another folder.

## Use with plain PEFT

```python
from peft import PeftModel
from colintern.model import ColIntern3_5

base = ColIntern3_5.from_pretrained({base!r}{revision_argument})
model = PeftModel.from_pretrained(base, folder).eval()
```

The base has no projection head: `from_pretrained` draws one at random. The head that this adapter was trained over is
in `adapter_model.safetensors`, as `base_model.model.custom_text_proj.base_layer.*`, so PEFT replaces the random one.
`head.safetensors` holds the same weights by themselves.

## License

The adapter is derived from `{base}`, whose license applies to it; see the card of that model.
"""


def complete_adapter(wrapped: Any, processor: Any, folder: Path) -> None:
    """Add the head, the processor and the README to the folder in which PEFT has saved an adapter.

    Args:
        wrapped: the PeftModel.
        processor: saved with the bounds that it was trained with.
        folder: see above.
    """
    wrapped.base_model.model.save_head(folder)
    processor.save_pretrained(folder)
    config = wrapped.peft_config["default"]
    base, revision = config.base_model_name_or_path, config.revision
    text = ADAPTER_README.format(
        base_model=f"base_model: {base}\n" if revision and on_hub(base) else "",
        base=base,
        at_revision=f" at `{revision}`" if revision else "",
        revision_argument=f", revision={revision!r}" if revision else "",
        rank=config.r,
        alpha=config.lora_alpha,
        max_visual_tokens=processor.max_visual_tokens,
        max_query_tokens=processor.max_query_tokens,
        usage=USAGE,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
