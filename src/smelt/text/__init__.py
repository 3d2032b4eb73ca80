"""Text as blocks of tokens: what a model is calibrated, trained and evaluated on."""

from smelt.text.blocks import TokenBlocks, make_blocks, tokenize
from smelt.text.sources import TextSource, as_source, parse_source, read_documents

__all__ = [
    "TextSource",
    "TokenBlocks",
    "as_source",
    "make_blocks",
    "parse_source",
    "read_documents",
    "tokenize",
]
