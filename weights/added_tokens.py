"""How many tokens a checkpoint has: what its tensors say, whatever config.json says.

Official checkpoints have 8 rows more in the embedding than in the head, for <|image|>. After transformers'
`resize_token_embeddings`, both have one length: that of the tokenizer, or the next multiple of 64. Some tools
then add one or 8 rows to the embedding again, and some leave the old vocab_size in config.json.
"""
from dataclasses import replace
from pathlib import Path

from model.config import EXTRA_EMBEDDINGS, Config
from weights.messages import named, quoted
from weights.names import EMBEDDING, HEAD
from weights.stored import Stored


def with_stored_rows(config: Config, found: dict[str, Stored], folder: Path) -> Config:
    """The config with the rows that embedding and head have. Raises ValueError with one line.

    That is where the embedding has fewer rows than the head, or none for <|image|>, or where the head is the
    embedding (tied) and it is unclear how many of its rows.
    """
    path = named(folder / "config.json")
    sizes = {name: found[name].shape for name in (EMBEDDING, HEAD) if name in found}
    if EMBEDDING not in sizes or any(len(shape) != 2 for shape in sizes.values()):
        return config                                       # load.py says what is missing or misshapen
    rows = sizes[EMBEDDING][0]
    vocabulary = config.text.vocab_size
    if HEAD in sizes:
        vocabulary = sizes[HEAD][0]
    elif config.text.tie_word_embeddings and rows - vocabulary not in (0, 1, EXTRA_EMBEDDINGS):
        raise ValueError(f"{path}: vocab_size is {vocabulary}, the embedding has {rows} rows, and the head "
                         f"is tied to it: set vocab_size to how many of its rows are tokens, {rows} or "
                         f"{rows - EXTRA_EMBEDDINGS}")
    if rows < vocabulary:
        raise ValueError(f"{named(folder)}: {rows} rows of the embedding for {vocabulary} of the head, which "
                         "could not read its own answers: weights of two checkpoints seem to be mixed")
    if config.image_token_index >= rows:
        raise ValueError(f"{path}: image_token_index is {quoted(config.image_token_index)}, but the model "
                         f"embeds {rows} tokens")
    return replace(config, text=replace(config.text, vocab_size=vocabulary,
                                        extra_embeddings=rows - vocabulary))
