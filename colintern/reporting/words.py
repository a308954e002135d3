"""A query as the model reads it, token by token, for people."""

from typing import Any, NamedTuple


class Word(NamedTuple):
    """A token of a query. `own`: the user's, not of the prefix and the augmentation that every query has."""

    text: str
    own: bool


def query_words(processor: Any, query: str) -> list[Word]:
    """One for each token that `process_queries` makes of a query, in its order."""
    ids = processor.process_queries([query])["input_ids"][0].tolist()
    whole = processor.tokenizer(processor.query_prefix + query, add_special_tokens=False, return_offsets_mapping=True)
    # A byte-level token has the space before its word in it, which may be the prefix's: its end tells whose it is.
    ends = [end for _, end in whole["offset_mapping"]]
    tail = len(processor.tokenizer(processor.query_augmentation_token * 10, add_special_tokens=False)["input_ids"])
    last = len(ids) - tail
    prefix = len(processor.query_prefix)
    return [
        Word(processor.tokenizer.decode([token]).strip(), place < last and ends[place] > prefix)
        for place, token in enumerate(ids)
    ]
