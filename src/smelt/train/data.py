"""What a model is trained on: a tokenizer fitted to text, and token blocks as examples."""

from collections.abc import Iterator, Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from smelt.errors import CalibrationError
from smelt.text import TokenBlocks
from smelt.text.pieces import plain_text
from smelt.text.sources import TextSource, draw_documents
from smelt.text.spans import IGNORED

END_OF_TEXT = "<|endoftext|>"
MASK = "<|mask|>"
Example = dict[str, Tensor]  # one sequence as a model takes it, labels with it
TOKENIZER_BYTES = 1 << 24  # text a tokenizer is fitted to


def train_tokenizer(
    sources: Sequence[TextSource],
    *,
    vocab_size: int,
    num_sentinels: int = 0,
    with_mask: bool = False,
    seed: int = 0,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer fitted to the sources: every text has tokens, and comes back.

    At most 16 MiB of text is read, each source in proportion to its weight.

    Args:
        sources: the text; nothing held out.
        vocab_size: tokens in all: the special ones, 256 bytes, the merges.
        num_sentinels: `<extra_id_0>` … for span corruption.
        with_mask: `<|mask|>` for masked language models.
        seed: which documents are read where there are more.
    """
    fitted = fit_tokenizer(
        sources,
        vocab_size=vocab_size,
        num_sentinels=num_sentinels,
        with_mask=with_mask,
        seed=seed,
    )
    return wrap_tokenizer(fitted, num_sentinels=num_sentinels, with_mask=with_mask)


def fit_tokenizer(
    sources: Sequence[TextSource],
    *,
    vocab_size: int,
    num_sentinels: int,
    with_mask: bool,
    seed: int,
) -> Tokenizer:
    """What `train_tokenizer` fits, as the tokenizers library has it."""
    special = [END_OF_TEXT, *_sentinels(num_sentinels), *([MASK] if with_mask else [])]
    if vocab_size < 256 + len(special):
        raise CalibrationError(
            f"A vocabulary of {vocab_size} cannot hold 256 bytes and {len(special)} special "
            f"tokens. Ask for at least {256 + len(special)}."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_some_text(sources, seed), trainer)
    return tokenizer


def wrap_tokenizer(
    tokenizer: Tokenizer, *, num_sentinels: int, with_mask: bool
) -> PreTrainedTokenizerFast:
    """A fitted tokenizer as transformers takes it."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        mask_token=MASK if with_mask else None,
        additional_special_tokens=_sentinels(num_sentinels),
        clean_up_tokenization_spaces=False,
    )


def _sentinels(number: int) -> list[str]:
    return [f"<extra_id_{i}>" for i in range(number)]


def _some_text(sources: Sequence[TextSource], seed: int) -> Iterator[str]:
    generator = torch.Generator().manual_seed(seed)
    total = sum(source.weight for source in sources)
    for source in sources:
        left = TOKENIZER_BYTES * source.weight / total
        for document in draw_documents(source, generator, 65536):
            text = plain_text(document)
            yield text
            left -= len(text.encode())
            if left <= 0:
                break


def next_token_examples(blocks: TokenBlocks) -> list[Example]:
    """Each sequence with itself as labels, padding ignored; the shift is the loss's business."""
    labels = blocks.input_ids.masked_fill(~blocks.mask, IGNORED)
    return [
        {"input_ids": ids, "attention_mask": mask.long(), "labels": label}
        for ids, mask, label in zip(blocks.input_ids, blocks.mask, labels, strict=True)
    ]
