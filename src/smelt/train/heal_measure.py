"""What healing reached: held-out loss, and the distance to the teacher, before and after."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from smelt.train.batches import ExampleRows
from smelt.train.distill import IGNORED, Top, distillation
from smelt.train.measure import HeldOut, forward
from smelt.train.teacher import NUMBERS, CachedTeacher, NumberedRows, Teacher


@dataclass(frozen=True)
class Compared:
    """One held-out text, and who knows what the teacher says of it."""

    held_out: HeldOut
    teacher: Teacher


@torch.no_grad()
def compare(model: PreTrainedModel, sets: Sequence[Compared], batch_size: int) -> dict[str, Any]:
    """Per text: nats per token of student and teacher, and KL(teacher ‖ student) at T = 1.

    A KL from kept predictions is that of the k tokens and the rest: a lower bound.

    Args:
        model: the student.
        sets: the held-out texts.
        batch_size: sequences at a time.
    """
    was_training = model.training
    model.eval()
    found = {one.held_out.name: _compare(model, one, batch_size) for one in sets}
    model.train(was_training)
    return found


def _compare(model: PreTrainedModel, one: Compared, batch_size: int) -> dict[str, Any]:
    device = next(model.parameters()).device
    rows = NumberedRows(ExampleRows(one.held_out.examples))
    nats = divergence = teacher_nats = 0.0
    number = 0
    for at in range(0, len(rows), batch_size):
        numbers = list(range(at, min(at + batch_size, len(rows))))
        batch = {n: v.to(device) for n, v in rows.__getitems__(numbers).items()}
        outputs = forward(model, {n: v for n, v in batch.items() if n != NUMBERS})
        logits, target = outputs.logits.flatten(0, 1), outputs.target.flatten()
        theirs = one.teacher.of(batch)
        sums = distillation(logits, target, theirs)
        nats += float(sums.cross_entropy)
        divergence += float(sums.divergence)
        number += int((target != IGNORED).sum())
        if isinstance(theirs, Top):
            assert isinstance(one.teacher, CachedTeacher)
            teacher_nats += float(one.teacher.kept.nats(numbers).double().sum())
        else:
            teacher_nats += float(distillation(theirs, target, None).cross_entropy)
    return {
        "predicted_tokens": number,
        "nats_per_token": nats / number,
        "kl_to_teacher": divergence / number,
        "teacher_nats_per_token": teacher_nats / number,
    }
