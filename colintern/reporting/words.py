"""A query as the model reads it, token by token, for people."""

from typing import Any, NamedTuple


class Word(NamedTuple):
    """A token of a query. `own`: the user's, not of the prefix and the augmentation that every query has."""

    text: str
    own: bool


def query_words(processor: Any, query: str) -> list[Word]:
    """One for each token that `process_queries` makes of a query, in its order."""
    ids = processor.process_queries([query])["input_ids"][0].tolist()
    text = processor.format_query(query)
    whole = processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    tail = len(processor.tokenizer(processor.query_augmentation_token * 10, add_special_tokens=False)["input_ids"])
    # A token's text is a slice of the query's, since part of a letter cannot be decoded. The space before a word may be
    # the prefix's: the end tells whose a token is.
    prefix = len(processor.query_prefix)
    said = [Word(text[start:end].strip(), end > prefix) for start, end in whole["offset_mapping"][: len(ids) - tail]]
    return [*said, *(Word(processor.tokenizer.decode([token]), False) for token in ids[len(ids) - tail :])]
