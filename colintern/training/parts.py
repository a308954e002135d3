"""One side of a batch in parts that go through the model one by one.

Rows of like length are together and each part is only as long as its longest row, so that little of it is padding: the
batch stays as random as it was, and each row's embeddings are the same wherever it stands.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from colintern.modeling.processing_colintern import ColIntern3_5Processor

# How many tokens of padding a further part may cost: below that, its own calls take longer than the padding would. On a
# CPU by measurement (`python -m bench.parts`), on CUDA assumed, from the launches of a step.
FURTHER = {"cpu": 128, "cuda": 2048}


def places(inputs: dict[str, Tensor], size: int) -> list[list[int]]:
    """The rows of each part of at most `size` rows, the longest first: what does not fit the memory fails at once.

    Of all ways to cut the rows, sorted by length, the one with the fewest tokens, padding and `FURTHER` for each part
    counted in. Rows that stay together stay as they are.
    """
    lengths = inputs["attention_mask"].sum(1)
    order = lengths.argsort(descending=True, stable=True)
    longest, further = lengths[order].tolist(), FURTHER.get(lengths.device.type, FURTHER["cuda"])
    # Of so many first rows: what they cost, and where their last part begins.
    cheapest, begins = [0] * (len(longest) + 1), [0] * (len(longest) + 1)
    for end in range(1, len(longest) + 1):
        cheapest[end], begins[end] = min(
            (cheapest[start] + (end - start) * longest[start] + further, start)
            for start in range(max(0, end - size), end)
        )
    parts, end = list[list[int]](), len(longest)
    while end:
        parts.insert(0, order[begins[end] : end].tolist())
        end = begins[end]
    return parts if len(parts) > 1 else [list(range(len(longest)))]


def take(inputs: dict[str, Tensor], rows: Sequence[int], processor: ColIntern3_5Processor) -> dict[str, Tensor]:
    """Inputs of the model for `rows`, padded to the longest of them; the flat tiles of `image_features` go with their
    pages. All rows are `inputs` itself, not a copy."""
    if rows == list(range(len(inputs["input_ids"]))):
        return inputs
    ids, mask = (inputs[key][rows] for key in ("input_ids", "attention_mask"))
    longest = int(mask.sum(1).max())
    part = {"input_ids": ids[:, :longest], "attention_mask": mask[:, :longest]}
    if "image_features" in inputs:
        tiles = (inputs["input_ids"] == processor.image_token_id).sum(1) // processor.image_seq_length
        pages = inputs["image_features"].split(tiles.tolist())
        part["image_features"] = torch.cat([pages[row] for row in rows])
    return part


def restored(rows: Iterable[Sequence[int]], embeddings: Iterable[Tensor]) -> Tensor:
    """The embeddings of all parts in the order of the batch, zeros after a row's own part ends.

    Args:
        rows: of each part; see `places`.
        embeddings: of each part, (rows of the part, its longest row, dimension).
    """
    rows, embeddings = list(rows), list(embeddings)
    if len(rows) == 1:
        return embeddings[0]
    numbers = (row for part in rows for row in part)
    by_row = dict(zip(numbers, (row for part in embeddings for row in part.unbind()), strict=True))
    return pad_sequence([by_row[row] for row in range(len(by_row))], batch_first=True)
