"""The way out: a SaMoE checkpoint frozen into an ordinary one of a stock family, block by block.

What is done to the weights is in `smelt.samoe.freeze`; here they are read and written.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from smelt.checkpoint.card import card
from smelt.checkpoint.sink import Sink, check_destination
from smelt.checkpoint.source import Checkpoint
from smelt.checkpoint.verify import verify as verify_files
from smelt.errors import CheckpointError, PlanError, RecipeError, SmeltError
from smelt.samoe.config import SaMoEConfig
from smelt.samoe.freeze import (
    check_expressible,
    freeze_experts,
    frozen_config,
    stock_config,
    stream_products,
)
from smelt.samoe.model import SaMoEForCausalLM
from smelt.samoe.moe import SaMoELayer
from smelt.samoe.pool import Alpha, PoolWeights

TARGETS = ("qwen3_moe",)
"""The families that an export can be of."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Exported:
    """What was written, and how much larger it is than what it was made from."""

    folder: Path
    to: str
    dtype: str
    params_before: int
    params_after: int
    bytes_before: int
    bytes_after: int
    experts_before: int  # stored, in all groups and entries
    experts_after: int
    beta_products: list[float]  # ∏β before each block, and after the last one


def export(
    source: str | Path,
    destination: str | Path,
    *,
    to: str = "qwen3_moe",
    dtype: str | None = None,
    verify: bool = True,
    progress: Callable[[str, int, int], None] | None = None,
) -> Exported:
    """Freeze the SaMoE checkpoint `source` into one of the family `to`, which needs no smelt.

    One block of the export and the experts it is made from are in memory at a time. The folder
    appears when it is whole; a killed export, called again, goes on where it stopped.

    Args:
        destination: the folder to make; must not exist.
        dtype: "float32", "bfloat16" or "float16"; the source's unless given. Products are taken in
            float32 and rounded once.
        verify: compare the weight files with their checksums first, where they are known.

    Raises:
        RecipeError: another `to` or `dtype`.
        PlanError: no SaMoE language model, or one with a setting that the family has no place for;
            ∏β near zero; weights that do not fit the dtype.
        CheckpointError: a source that cannot be read, a destination that cannot be written.
    """
    _known("to", to, TARGETS)
    if dtype is not None:
        _known("dtype", dtype, DTYPES)
    checkpoint = Checkpoint.open(source)
    place = check_destination(destination, checkpoint.folder)
    config = _samoe_config(checkpoint)
    check_expressible(config, checkpoint.config.architectures or (), where=str(checkpoint.folder))
    dtype = dtype or str(checkpoint.dtype).removeprefix("torch.")
    _known("dtype", dtype, DTYPES)
    checkpoint.check()
    if verify:
        verify_files(checkpoint.folder)
    freezer = _Freezer(checkpoint, config, DTYPES[dtype])
    done = _sizes(checkpoint, config, place, to, dtype, freezer.products)
    key = f"{version('smelt')} {checkpoint.fingerprint} export {to} {dtype}"
    digest = hashlib.sha256(key.encode()).hexdigest()
    sink = Sink(destination, checkpoint, key=digest, num_bytes=done.bytes_after)
    count = config.num_hidden_layers + 1
    for index in range(count):
        if not sink.has(index, count):
            sink.write(index, count, _tensors(freezer, index, sink))
        if progress:
            progress(f"block {index}" if index + 1 < count else "the rest", index + 1, count)
    provenance = json.dumps(_provenance(checkpoint, done), indent=1) + "\n"
    text = (
        f"# {checkpoint.folder.name} as {to}\n\nFrozen by `smelt export` from a SaMoE checkpoint: "
        f"{done.params_after:,} parameters instead of {done.params_before:,}, the same function. "
        "Load it as any checkpoint of its family."
    )
    documents = {"smelt/provenance.json": provenance, "README.md": card(text, [to], checkpoint)}
    sink.finish(count, stock_config(config, DTYPES[dtype]), documents)
    return done


def _tensors(freezer: "_Freezer", index: int, sink: Sink) -> dict[str, Tensor]:
    """What one shard holds. Nothing else keeps it while the next one is made."""
    try:
        return freezer.rest() if index == len(freezer.products) - 1 else freezer.block(index)
    except SmeltError:  # weights that cannot be exported: no second attempt goes on from here
        shutil.rmtree(sink.staging, ignore_errors=True)
        raise


class _Freezer:
    """Makes the tensors of one block of the export at a time, under Qwen3-MoE's names on disk."""

    def __init__(self, checkpoint: Checkpoint, config: SaMoEConfig, dtype: torch.dtype) -> None:
        self.checkpoint, self.config, self.dtype = checkpoint, config, dtype
        layout = config.layout
        model = cast(SaMoEForCausalLM, checkpoint.skeleton()).model
        self.layers: dict[int, SaMoELayer] = {
            place.block: layer
            for place, layer in zip(layout.layers, model.moe_layers(), strict=True)
        }
        self.group_of = {place.block: place.group for place in layout.layers}
        self.products = stream_products([self._beta(i) for i in range(config.num_hidden_layers)])
        self._held: tuple[int, PoolWeights] | None = None  # the group of experts read last

    def block(self, index: int) -> dict[str, Tensor]:
        """All of one block; what it writes to the stream is divided by ∏β."""
        own = f"model.layers.{index}"
        before, after = self.products[index], self.products[index + 1]
        sign = math.copysign(1.0, before)
        out = {
            f"{own}.input_layernorm.weight": self._read(f"{own}.attention_norm.weight", sign),
            f"{own}.post_attention_layernorm.weight": self._read(f"{own}.mlp_norm.weight", sign),
            f"{own}.self_attn.o_proj.weight": self._read(f"{own}.attention.o_proj.weight", before),
        }
        for name in ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm"):
            out[f"{own}.self_attn.{name}.weight"] = self._read(f"{own}.attention.{name}.weight")
        if index in self.layers:
            router = "model.router" if self.config.shared_router else f"{own}.mlp.router"
            out[f"{own}.mlp.gate.weight"] = self._read(f"{router}.weight")
            return out | self._experts(index, after)
        for name, divisor in (("gate_proj", 1.0), ("up_proj", 1.0), ("down_proj", before)):
            key = f"{own}.mlp.{name}.weight"
            out[key] = self._read(key, divisor)
        return out

    def rest(self) -> dict[str, Tensor]:
        """What lies outside the blocks."""
        sign = math.copysign(1.0, self.products[-1])
        out = {"model.norm.weight": self._read("model.norm.weight", sign)}
        out["model.embed_tokens.weight"] = self._read("model.embed_tokens.weight")
        if not self.config.tie_word_embeddings:
            out["lm_head.weight"] = self._read("lm_head.weight")
        return out

    def _experts(self, index: int, divisor: float) -> dict[str, Tensor]:
        """The experts of one block, frozen one by one: only one is ever widened to float32."""
        layer, weights, alpha = self.layers[index], self._weights(index), self._alpha(index)
        out = {}
        for expert in range(layer.num_experts):
            factors = None if alpha is None else alpha.picked(torch.tensor([expert]))
            one = _widened(weights, expert)
            frozen = freeze_experts(one, factors, mix=layer.mix, divisor=divisor)
            for name in ("gate", "up", "down"):
                key = f"model.layers.{index}.mlp.experts.{expert}.{name}_proj.weight"
                out[key] = self._fitted(key, getattr(frozen, name)[0])
        return out

    def _weights(self, index: int) -> PoolWeights:
        """The experts that a block's layer uses, in the type they have on disk."""
        layout, number = self.config.layout, self.group_of[index]
        if self._held is None or self._held[0] != number:
            self._held = None  # given back before the next are read
            group = layout.groups[number]
            own = f"model.layers.{index}.mlp.pool"
            if group.is_shared:
                own = f"model.pools.{layout.shared().index(number)}"
            up, gate, down = (self.checkpoint.read(f"{own}.{n}") for n in ("up", "gate", "down"))
            read = PoolWeights(up, down, gate, None, None, None, group.entries, nn.Identity())
            self._held = (number, read)
        return self._held[1]

    def _alpha(self, index: int) -> Alpha | None:
        """α of one block, as its layer reads it."""
        layer = self.layers[index]
        if layer.alpha is None:
            return None
        name = f"model.layers.{index}.mlp.alpha"
        value = self.checkpoint.read(name).double()
        if not value.isfinite().all():
            raise _damaged(self.checkpoint, name)
        layer.alpha = nn.Parameter(value, requires_grad=False)
        return layer.spread_alpha()

    def _beta(self, index: int) -> float | None:
        if index not in self.layers or self.layers[index].beta is None:
            return None
        return float(self.checkpoint.read(f"model.layers.{index}.mlp.beta"))

    def _read(self, name: str, divisor: float = 1.0) -> Tensor:
        value = self.checkpoint.read(name)
        return self._fitted(name, value if divisor == 1 else value.float() / divisor)

    def _fitted(self, name: str, value: Tensor) -> Tensor:
        """The value in the type of the export."""
        fitted = value.to(self.dtype)
        if fitted.isfinite().all():
            return fitted
        if not value.isfinite().all():
            raise _damaged(self.checkpoint, name)
        raise PlanError(
            f"{name} reaches {float(value.abs().max()):.3g} once α and β are in it, which "
            f"{str(self.dtype).removeprefix('torch.')} does not hold. Choose --dtype bfloat16 or "
            "float32."
        )


def _widened(weights: PoolWeights, expert: int) -> PoolWeights:
    """One expert of every entry in float32; a view where it has that type already."""
    one = slice(expert, expert + 1)
    gate = None if weights.gate is None else weights.gate[one].float()
    return replace(weights, up=weights.up[one].float(), down=weights.down[one].float(), gate=gate)


def _damaged(checkpoint: Checkpoint, name: str) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.folder}: {name} has NaN or Inf. The weights are damaged or training "
        "diverged: take a checkpoint of an earlier step."
    )


def _known(name: str, given: str, allowed: Collection[str]) -> None:
    if given not in allowed:
        raise RecipeError(f"{name} = {given!r}: it is one of {', '.join(allowed)}.")


def _samoe_config(checkpoint: Checkpoint) -> SaMoEConfig:
    if not isinstance(checkpoint.config, SaMoEConfig):
        raise PlanError(
            f"{checkpoint.folder}: is of family {checkpoint.config.model_type}. `smelt export` "
            "freezes SaMoE models (model_type samoe) into ordinary checkpoints; for a GGUF file, "
            "name OUT.gguf."
        )
    return checkpoint.config


def _sizes(
    checkpoint: Checkpoint,
    config: SaMoEConfig,
    place: Path,
    to: str,
    dtype: str,
    products: list[float],
) -> Exported:
    """The export by the numbers, before it is made."""
    after = frozen_config(config)
    return Exported(
        folder=place,
        to=to,
        dtype=dtype,
        params_before=config.num_params(),
        params_after=after.num_params(),
        bytes_before=sum(entry.num_bytes for entry in checkpoint.tensors.values()),
        bytes_after=after.num_params() * DTYPES[dtype].itemsize,
        experts_before=sum(group.entries * group.experts for group in config.layout.groups),
        experts_after=sum(layer.experts for layer in after.layout.layers),
        beta_products=products,
    )


def _provenance(checkpoint: Checkpoint, done: Exported) -> dict[str, Any]:
    names = "sharing mix alpha_scope pool_size num_experts moe_intermediate_size use_beta".split()
    return {
        **{name: version(name) for name in ("smelt", "torch", "transformers")},
        "source": str(checkpoint.config_dict.get("_name_or_path") or checkpoint.folder.name),
        "source_fingerprint": checkpoint.fingerprint,
        "export": {name: value for name, value in asdict(done).items() if name != "folder"},
        "settings": {name: getattr(checkpoint.config, name) for name in names},
    }
