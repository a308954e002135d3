"""The demo base as a process of `EmbeddingPool` loads it; imports little, since each process imports it again."""

from pathlib import Path


def load_base(base: Path):
    """Return a function that embeds a batch of images."""
    import torch

    from colintern.encoding.embed import embed_pages
    from colintern.modeling.modeling_colintern import ColIntern3_5
    from colintern.modeling.processing_colintern import ColIntern3_5Processor

    model = ColIntern3_5.from_pretrained(base, dtype=torch.float32)
    processor = ColIntern3_5Processor.from_pretrained(base, max_visual_tokens=96, max_query_tokens=64)
    return lambda images: embed_pages(model, processor, images, len(images))
