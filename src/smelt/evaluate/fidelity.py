"""How near a compressed checkpoint stays to its original: logits, layers, routing."""

import warnings
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from smelt.checkpoint.bind import MoeLayer, find_layers
from smelt.checkpoint.inputs import Batch
from smelt.checkpoint.source import Checkpoint
from smelt.checkpoint.walk import Walk
from smelt.compress.calibrate import Progress
from smelt.compress.plan import Plan
from smelt.errors import CalibrationError, CheckpointError, PlanError
from smelt.evaluate.layers import Groups, LayerFidelity, LayerProbe
from smelt.evaluate.perplexity import check_finite
from smelt.evaluate.results import Result, Setting, record
from smelt.evaluate.sequences import PerSequence, is_measured, per_sequence
from smelt.evaluate.walks import Steps


@dataclass(frozen=True)
class Fidelity:
    """A compressed checkpoint held against its original on the same tokens."""

    kl: PerSequence  # KL(original ‖ compressed) of the next-token distributions, nats
    agreement: PerSequence  # 1 where both find the same token likeliest
    layers: tuple[LayerFidelity, ...]

    def records(self, compressed: Checkpoint, setting: Setting) -> list[Result]:
        """The measurement as named records; those of layers have no standard error."""

        def one(metric: str, value: float, n: int, error: float | None = None) -> Result:
            return record(
                compressed,
                setting,
                task="fidelity",
                metric=metric,
                value=value,
                n=n,
                standard_error=error,
            )

        found = [
            one("logit KL", self.kl.mean, self.kl.num_tokens, self.kl.standard_error),
            one(
                "top-1 agreement",
                self.agreement.mean,
                self.agreement.num_tokens,
                self.agreement.standard_error,
            ),
        ]
        for layer in self.layers:
            found.append(one(f"output error of {layer.name}", layer.error, layer.num_tokens))
            if (share := layer.routing_agreement) is not None:
                found.append(one(f"routing agreement of {layer.name}", share, layer.num_tokens))
        return found


def fidelity(
    original: Checkpoint,
    compressed: Checkpoint,
    batches: Sequence[Batch],
    *,
    device: str = "cpu",
    sample_tokens: int | None = 16_384,
    seed: int = 0,
    progress: Progress | None = None,
) -> Fidelity:
    """Logit KL, top-1 agreement, and each layer's output error and routing agreement.

    Both models walk in lockstep, one block of each in memory and the logits of one batch. Logits
    are compared where the batches have targets (perplexity's tokens). A layer is compared on the
    inputs that the original gives it, by the output of its whole MoE module, shared experts
    included (where a family keeps its experts in the block itself, such as gemma4, by the block's).

    Args:
        sample_tokens: layers are compared on whole batches, drawn by `seed`, that hold at least so
            many real tokens; None: on all.

    Raises:
        CheckpointError: another architecture, other layers, another vocabulary.
        PlanError: the compressed folder's smelt/plan.json does not fit its weights.
    """
    pairs = _pairs(original, compressed)
    groups = _groups(original, compressed, pairs)
    if not any(bool(is_measured(batch).any()) for batch in batches):
        raise CalibrationError("No token of this text is predicted: a sequence needs at least two.")
    probe = LayerProbe(compressed, pairs, groups, batches, _sample(batches, sample_tokens, seed))
    steps = Steps(progress, len(original.blocks) + len(compressed.blocks) - 2)
    inputs = [batch.inputs for batch in batches]
    before = Walk(original, inputs, device=device).run(steps.around(probe.visit))
    after = Walk(compressed, inputs, device=device).run(steps.visit)
    found: dict[int, list[PerSequence]] = {}
    with closing(before), closing(after):  # type: ignore[type-var]
        for (index, ours), (other, theirs) in zip(before, after, strict=True):
            assert index == other, "the walks are out of step"
            where = is_measured(batches[index])
            found[index] = compare_logits(ours.logits, theirs.logits, where)
    kl, agreement = (PerSequence.join([found[i][q] for i in range(len(batches))]) for q in range(2))
    check_finite(compressed, kl)
    return Fidelity(kl, agreement, probe.results())


def compare_logits(ours: Tensor, theirs: Tensor, where: Tensor) -> list[PerSequence]:
    """KL(ours ‖ theirs) in nats and top-1 agreement of logits [B, T, V], float32 in chunks."""
    p_flat, q_flat = ours.flatten(0, 1), theirs.flatten(0, 1)

    def measure(places: Tensor) -> Tensor:
        log_p = p_flat[places].float().log_softmax(-1)
        log_q = q_flat[places].float().log_softmax(-1)
        agrees = (log_p.argmax(-1) == log_q.argmax(-1)).float()
        p = log_p.exp()
        # A token that the original rules out (p = 0) adds nothing, whatever the other says of it.
        kl = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)
        return torch.stack([kl, agrees], -1)

    return per_sequence(where.to(ours.device), ours.shape[-1], 2, measure)


def _pairs(original: Checkpoint, compressed: Checkpoint) -> list[tuple[MoeLayer, MoeLayer]]:
    """The layers of both by name, once it is sure that the two compare."""
    ours, theirs = (c.config.get_text_config() for c in (original, compressed))
    who = f"{compressed.folder} cannot be held against {original.folder}: "
    families = [_family(c.config) for c in (original, compressed)]
    if families[0] != families[1]:
        raise CheckpointError(
            f"{who}it is a {families[1]}, the original a {families[0]}. Give the checkpoint that "
            "it was made from."
        )
    if ours.vocab_size != theirs.vocab_size:
        raise CheckpointError(
            f"{who}it has {theirs.vocab_size:,} tokens, the original {ours.vocab_size:,}, so their "
            "predictions do not compare. Give the checkpoint that it was made from."
        )
    before, after = find_layers(original.model), find_layers(compressed.model)
    widths = [getattr(config, "hidden_size", None) for config in (ours, theirs)]
    if [x.name for x in before] != [x.name for x in after] or widths[0] != widths[1]:
        raise CheckpointError(
            f"{who}it has {len(after)} MoE layers of width {widths[1]}, the original {len(before)} "
            f"of width {widths[0]}. Give the checkpoint that it was made from."
        )
    return list(zip(before, after, strict=True))


def _family(config: PreTrainedConfig) -> str:
    return str(getattr(config, "base_model_type", None) or config.model_type)


def _groups(
    original: Checkpoint, compressed: Checkpoint, pairs: Sequence[tuple[MoeLayer, MoeLayer]]
) -> dict[str, Groups | None]:
    """By layer: the group of each expert on both sides; None where that is not known."""
    path = compressed.folder / "smelt" / "plan.json"
    plan = Plan.load(path) if path.is_file() else None
    if plan is not None and plan.checkpoint != original.fingerprint:
        warnings.warn(
            f"{path} was made for checkpoint {plan.checkpoint[:12]}…, {original.folder} is "
            f"{original.fingerprint[:12]}…: routing agreement is left out.",
            stacklevel=3,
        )
        return {layer.name: None for layer, _ in pairs}
    return {before.name: _groups_of(before, after, plan, str(path)) for before, after in pairs}


def _groups_of(before: MoeLayer, after: MoeLayer, plan: Plan | None, path: str) -> Groups | None:
    if plan is None:
        same = torch.arange(before.num_experts)
        return (same, same) if before.num_experts == after.num_experts else None
    layer = next((layer for layer in plan.layers if layer.name == before.name), None)
    routed = (
        None if layer is None else layer.num_groups if plan.form == "stock" else layer.num_experts
    )
    if layer is None or routed != after.num_experts or len(layer.labels) != before.num_experts:
        raise PlanError(
            f"{path}: does not describe {before.name} of these weights, which has "
            f"{after.num_experts} experts. The plan is of another folder."
        )
    labels = torch.tensor(layer.labels)
    return labels, torch.arange(layer.num_groups) if plan.form == "stock" else labels


def _sample(batches: Sequence[Batch], sample_tokens: int | None, seed: int) -> set[int]:
    """Whole batches in a random order until they hold enough real tokens."""
    order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen: set[int] = set()
    held = 0
    for index in order:
        if sample_tokens is not None and held >= sample_tokens:
            break
        chosen.add(index)
        held += int(batches[index].mask.sum())
    return chosen
