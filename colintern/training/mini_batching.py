"""Divide one side of a batch into mini-batches that go through the model one at a time.

Rows of similar length share a mini-batch, which is only as long as its longest row, so that there is little padding.
The batch itself stays in its random order, and a row's embeddings depend on its mini-batch by rounding alone.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from colintern.modeling.processor import ColIntern3_5Processor

# Tokens of padding that cost as much as one more mini-batch. Measured on a CPU (`python -m bench.parts`); on CUDA
# assumed, from the kernel launches of a step.
MINI_BATCH_OVERHEAD_TOKENS = {"cpu": 128, "cuda": 2048}


def plan_mini_batches(inputs: dict[str, Tensor], max_rows: int) -> list[list[int]]:
    """Divide the rows of a side into mini-batches of at most `max_rows`.

    Of all divisions of the rows, sorted by length, this is the one with the fewest tokens, counting padding and
    `MINI_BATCH_OVERHEAD_TOKENS` for each mini-batch.

    Returns:
        Row indices of each mini-batch, the longest first: what does not fit in memory fails at once. A single
        mini-batch keeps the order of the rows.
    """
    lengths = inputs["attention_mask"].sum(1)
    order = lengths.argsort(descending=True, stable=True)
    sorted_lengths = lengths[order].tolist()
    overhead = MINI_BATCH_OVERHEAD_TOKENS.get(lengths.device.type, MINI_BATCH_OVERHEAD_TOKENS["cuda"])
    # For the first `end` rows: the least cost, and the start of their last mini-batch.
    costs, starts = [0] * (len(sorted_lengths) + 1), [0] * (len(sorted_lengths) + 1)
    for end in range(1, len(sorted_lengths) + 1):
        costs[end], starts[end] = min(
            (costs[start] + (end - start) * sorted_lengths[start] + overhead, start)
            for start in range(max(0, end - max_rows), end)
        )
    mini_batches, end = list[list[int]](), len(sorted_lengths)
    while end:
        mini_batches.insert(0, order[starts[end] : end].tolist())
        end = starts[end]
    return mini_batches if len(mini_batches) > 1 else [list(range(len(sorted_lengths)))]


def slice_mini_batch(
    inputs: dict[str, Tensor], rows: Sequence[int], processor: ColIntern3_5Processor
) -> dict[str, Tensor]:
    """Return the model's inputs for `rows`, padded to the longest of them, with the image features of their pages.

    All rows in their order are `inputs` itself, not a copy.
    """
    if rows == list(range(len(inputs["input_ids"]))):
        return inputs
    ids, mask = (inputs[key][rows] for key in ("input_ids", "attention_mask"))
    longest = int(mask.sum(1).max())
    mini_batch = {"input_ids": ids[:, :longest], "attention_mask": mask[:, :longest]}
    if "image_features" in inputs:
        num_tiles = (inputs["input_ids"] == processor.image_token_id).sum(1) // processor.image_seq_length
        features = inputs["image_features"].split(num_tiles.tolist())
        mini_batch["image_features"] = torch.cat([features[row] for row in rows])
    return mini_batch


def scatter_to_batch_order(mini_batches: Iterable[Sequence[int]], embeddings: Iterable[Tensor]) -> Tensor:
    """Put the embeddings of all mini-batches into the order of the batch, padded with zeros.

    Args:
        mini_batches: row indices, see `plan_mini_batches`.
        embeddings: of each mini-batch, (rows, its longest row, dimension).
    """
    mini_batches, embeddings = list(mini_batches), list(embeddings)
    if len(mini_batches) == 1:
        return embeddings[0]
    indices = (index for rows in mini_batches for index in rows)
    by_index = dict(zip(indices, (row for part in embeddings for row in part.unbind()), strict=True))
    return pad_sequence([by_index[index] for index in range(len(by_index))], batch_first=True)
