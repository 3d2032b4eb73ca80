"""Slow, obvious versions of what healing computes."""

import torch
from torch.nn.functional import cross_entropy, kl_div


def distilled(logits, target, teacher, *, temperature, cross_entropy_scale, divergence_scale):
    """The weighted loss over tokens with a target, by torch's own functions and autograd."""
    real = target != -100
    ce = cross_entropy(logits.float(), target, ignore_index=-100, reduction="sum")
    q = (logits[real].float() / temperature).log_softmax(-1)
    p = (teacher[real].float() / temperature).log_softmax(-1)
    kl = kl_div(q, p, log_target=True, reduction="sum")
    return cross_entropy_scale * ce + divergence_scale * kl


def bucketed(logits, teacher, k, temperature):
    """KL of each token over the teacher's k likeliest tokens and the sum of all others."""
    found = []
    for z, t in zip(logits.double(), teacher.double(), strict=True):
        q, p = (z / temperature).softmax(-1), (t / temperature).softmax(-1)
        ids = t.argsort(descending=True)[:k]
        rest = torch.ones_like(p, dtype=torch.bool)
        rest[ids] = False
        pairs = [(p[i], q[i]) for i in ids]
        if rest.any():
            pairs.append((p[rest].sum(), q[rest].sum()))
        found.append(sum(a * (a / b).log() for a, b in pairs))
    return torch.stack(found)


def keep_share(t, T, p_f, initial, final):
    """The schedule of MC-SMoE, as METHODS §3 has it."""
    T_i, T_f = round(initial * T), round(final * T)
    if t <= T_i:
        return 1.0
    if t > T - T_f:
        return p_f
    return p_f + (1 - p_f) * (1 - (t - T_i) / (T - T_i - T_f)) ** 3


def kept_rows(importances, lengths, share):
    """Rows one by one in the order of importance, until the next one has no room."""
    rows = [
        (-float(one[g, o]), place, g, o)
        for place, one in enumerate(importances)
        for g in range(one.shape[0])
        for o in range(one.shape[1])
    ]
    total = sum(one.numel() * length for one, length in zip(importances, lengths, strict=True))
    masks = [torch.zeros_like(one, dtype=torch.bool) for one in importances]
    used = 0
    for _, place, g, o in sorted(rows):
        used += lengths[place]
        if used > share * total * (1 + 1e-12):
            break
        masks[place][g, o] = True
    return masks
