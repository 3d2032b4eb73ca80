"""Models that tasks are asked of, and a slow reference for what they answer."""

import torch
from transformers import GenerationMixin, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


def random_llama(positions, **changes):
    torch.manual_seed(0)
    config = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": positions,
        "initializer_range": 0.3,
        "eos_token_id": 0,
        "bos_token_id": None,
    }
    return LlamaForCausalLM(LlamaConfig(**config | changes)).eval()


class Bigram(PreTrainedModel, GenerationMixin):
    """Logits of the next word, whatever came before."""

    config_class = LlamaConfig

    def __init__(self, logits):
        super().__init__(LlamaConfig(vocab_size=len(logits), max_position_embeddings=64))
        self.logits = torch.nn.Parameter(torch.tensor(logits))

    def forward(self, input_ids, **_):
        return CausalLMOutput(logits=self.logits.expand(*input_ids.shape, -1))


VOCABULARY = {word: i for i, word in enumerate("<end> <unk> it was good bad".split())}


def preferring(**words):
    return Bigram([float(words.get(word, 0)) for word in VOCABULARY])


def slow_nats(model, words, question, answer):
    """−log p of the answer after the question, one forward per token, the nearest tokens only."""
    before = words(question)["input_ids"] if question else [words.eos_token_id]
    after = words(question + answer)["input_ids"][len(before) if question else 0 :]
    longest = model.config.max_position_embeddings
    total = 0.0
    start = 0  # of the window that holds this token; an answer longer than it has several
    for i, token in enumerate(after):
        if len(after) > longest:
            start = slow_window_start(i, len(before), len(after), longest)
        else:
            start = max(0, len(before) + len(after) - longest - 1)
        context = (before + after)[start : len(before) + i]
        with torch.no_grad():
            logits = model(torch.tensor([context])).logits[0, -1].double()
        total += float(logits.log_softmax(-1)[token])
    return total


def slow_window_start(place, num_before, num_after, longest):
    """Windows of `longest` answer tokens, each behind one token; the last has full length."""
    window = place // longest
    if window == num_after // longest and num_after % longest:
        return num_before + num_after - longest - 1
    return num_before + window * longest - 1
