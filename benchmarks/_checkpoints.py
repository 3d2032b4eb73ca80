"""Random-weight checkpoints of any size, written block by block: the whole model is never built.

The weights come from `initializer_range`-wide normals (norms are ones, biases zeros), under the
keys that the family has on disk, with a small tokenizer beside them.

    python benchmarks/_checkpoints.py FOLDER '{"model_type": "mixtral", …}' bfloat16
"""

import json
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from smelt.checkpoint import skeleton
from smelt.checkpoint.shards import INDEX, write_shard
from smelt.text.sources import parse_source
from smelt.train.data import train_tokenizer

EMBEDDED = Path(__file__).parents[1] / "src/smelt/data/tiny-moe"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def write_checkpoint(folder: Path, fields: Mapping[str, Any], dtype: str, seed: int = 0) -> Path:
    """A checkpoint of the family `fields["model_type"]` with those settings, a shard per block."""
    config = CONFIG_MAPPING[fields["model_type"]](**{**fields, "dtype": dtype})
    cls = skeleton.model_class(config, str(folder), trust_remote_code=False)
    model = skeleton.build(cls, config, _DTYPES[dtype])
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(_stages(model)):
        tensors = _on_disk(model, {n: _random(model, n, generator) for n in names})
        file = f"model-{number:05d}.safetensors"
        write_shard(folder / file, tensors)
        weight_map.update(dict.fromkeys(tensors, file))
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config.architectures = [cls.__name__]
    config.save_pretrained(folder)
    _write_tokenizer(
        folder, int(fields["vocab_size"]), num_sentinels=16 * config.is_encoder_decoder
    )
    return folder


def _stages(model: PreTrainedModel) -> Iterable[list[str]]:
    """The names of each block's tensors, then everything outside the blocks; ties written once."""
    tied = set(model.all_tied_weights_keys)
    names = [n for n in model.state_dict() if n not in tied]
    blocks = [f"{b}." for b in skeleton.outermost_blocks(model)]
    for block in blocks:
        yield [n for n in names if n.startswith(block)]
    yield [n for n in names if not n.startswith(tuple(blocks))]


def _random(model: PreTrainedModel, name: str, generator: torch.Generator) -> Tensor:
    meta = model.state_dict()[name]
    if "norm" in name:
        return torch.ones(meta.shape, dtype=meta.dtype)
    if meta.dim() < 2:
        return torch.zeros(meta.shape, dtype=meta.dtype)
    scale = float(getattr(model.config.get_text_config(), "initializer_range", 0.02))
    return torch.empty(meta.shape, dtype=meta.dtype).normal_(0, scale, generator=generator)


def _on_disk(model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under the family's keys; experts one by one where it keeps them so."""
    return dict(revert_weight_conversion(model, tensors))


def _write_tokenizer(folder: Path, vocab_size: int, num_sentinels: int) -> None:
    """The embedded checkpoint's tokenizer where there is one that fits, else one made now."""
    found = EMBEDDED / "tokenizer.json"
    if num_sentinels:
        fitted = train_tokenizer(
            [parse_source("python")], vocab_size=1024, num_sentinels=num_sentinels
        )
        fitted.save_pretrained(folder)
        return
    if found.is_file() and len(json.loads(found.read_text())["model"]["vocab"]) <= vocab_size:
        for file in EMBEDDED.glob("*token*"):
            shutil.copyfile(file, folder / file.name)
        return
    size = min(vocab_size, 1024)
    train_tokenizer([parse_source("python")], vocab_size=size).save_pretrained(folder)


def qwen3(**changes: Any) -> dict[str, Any]:
    """The real layer of Qwen3-30B-A3B, with as many blocks as asked."""
    return {
        "model_type": "qwen3_moe",
        "vocab_size": 151_936,
        "hidden_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "intermediate_size": 6144,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "tie_word_embeddings": False,
        **changes,
    }


def mixtral(**changes: Any) -> dict[str, Any]:
    """The real layer of Mixtral-8x7B, with as many blocks as asked."""
    return {
        "model_type": "mixtral",
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "num_hidden_layers": 2,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "intermediate_size": 14_336,
        "sliding_window": None,
        "tie_word_embeddings": False,
        **changes,
    }


def switch(**changes: Any) -> dict[str, Any]:
    """switch-base-32: twelve blocks on each side, every second one with 32 experts."""
    return {
        "model_type": "switch_transformers",
        "vocab_size": 32_128,
        "d_model": 768,
        "d_ff": 3072,
        "d_kv": 64,
        "num_heads": 12,
        "num_layers": 12,
        "num_decoder_layers": 12,
        "num_sparse_encoder_layers": 6,
        "num_sparse_decoder_layers": 6,
        "num_experts": 32,
        "feed_forward_proj": "relu",
        "decoder_start_token_id": 0,
        "tie_word_embeddings": True,
        **changes,
    }


if __name__ == "__main__":
    write_checkpoint(Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3])
