"""Laws of the distillation loss: that of the obvious version, whatever is chunked or left out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference.healing import bucketed, distilled
from smelt.train import distill
from smelt.train.distill import distillation, top_of

N, V = 23, 40


@pytest.fixture
def batch(generator):
    """Logits of student and teacher, and targets, some of which are padding."""
    logits = torch.randn(N, V, generator=generator) * 3
    teacher = torch.randn(N, V, generator=generator) * 3
    target = torch.randint(V, (N,), generator=generator)
    target[torch.tensor([0, 7, 22])] = -100
    return logits, target, teacher


def slope(logits, target, teacher, **scales):
    leaf = logits.clone().requires_grad_()
    terms = distillation(leaf, target, teacher, **scales)
    terms.loss.backward()
    return terms, leaf.grad


SCALES = {"temperature": 2.0, "cross_entropy_scale": 0.05, "divergence_scale": 0.3}


@pytest.mark.parametrize("chunk", [1 << 20, 3 * V])
def test_loss_and_gradient_are_those_of_autograd(batch, monkeypatch, chunk):
    monkeypatch.setattr(distill, "CHUNK", chunk)
    logits, target, teacher = batch
    terms, found = slope(logits, target, teacher, **SCALES)
    leaf = logits.clone().requires_grad_()
    loss = distilled(leaf, target, teacher, **SCALES)
    loss.backward()
    torch.testing.assert_close(terms.loss, loss)
    torch.testing.assert_close(found, leaf.grad)


def test_padding_has_no_part(batch):
    logits, target, teacher = batch
    padded = target == -100
    other, taught = logits.clone(), teacher.clone()
    other[padded], taught[padded] = 100.0, -100.0
    first, at_first = slope(logits, target, teacher, **SCALES)
    second, at_second = slope(other, target, taught, **SCALES)
    assert torch.equal(first.loss, second.loss)
    assert torch.equal(at_first, at_second) and not at_first[padded].any()


def test_everywhere_padding_is_compared_but_not_predicted(batch):
    logits, target, teacher = batch
    terms, found = slope(logits, target, teacher, everywhere=True, **SCALES)
    leaf = logits.clone().requires_grad_()
    ce = distilled(leaf, target, leaf.detach(), **SCALES)  # no KL to itself
    kl = distilled(leaf, torch.zeros_like(target), teacher, **{**SCALES, "cross_entropy_scale": 0})
    (ce + kl).backward()
    torch.testing.assert_close(terms.loss, ce + kl)
    torch.testing.assert_close(found, leaf.grad)


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it(batch):
    logits, target, _ = batch
    scales = {"temperature": 2.0, "cross_entropy_scale": 0.0, "divergence_scale": 1.0}
    for teacher in (logits, top_of(logits[target != -100], 5, (1.0, 2.0), torch.float32)):
        terms, found = slope(logits, target, teacher, **scales)
        assert abs(float(terms.divergence)) < 1e-5
        assert float(found.abs().max()) < 1e-6


def test_a_token_the_teacher_rules_out_adds_nothing(batch):
    logits, target, teacher = batch
    teacher, logits = teacher.clone(), logits.clone()
    teacher[:, 3] = logits[:, 3] = -torch.inf
    target = torch.where(target == 3, 4, target)
    terms, found = slope(logits, target, teacher, **SCALES)
    without = torch.arange(V) != 3
    fewer = torch.where(target > 3, target - 1, target)
    expected = distilled(logits[:, without], fewer, teacher[:, without], **SCALES)
    torch.testing.assert_close(terms.loss, expected)
    assert torch.isfinite(found).all()


# --- what is kept of a teacher -------------------------------------------------------------------


@given(k=st.integers(1, V), temperature=st.sampled_from([1.0, 2.0, 0.5]), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_the_kept_kl_is_that_of_the_buckets_and_a_lower_bound(k, temperature, seed):
    generator = torch.Generator().manual_seed(seed)
    logits, teacher = torch.randn(2, N, V, generator=generator) * 4
    target = torch.zeros(N, dtype=torch.int64)
    top = top_of(teacher, k, (1.0, temperature), torch.float32)
    kept = distillation(logits, target, top, temperature=temperature).divergence
    whole = distillation(logits, target, teacher, temperature=temperature).divergence
    expected = bucketed(logits, teacher, k, temperature).sum().float()
    torch.testing.assert_close(kept, expected, rtol=1e-4, atol=1e-4)
    assert float(kept) <= float(whole) * (1 + 1e-5) + 1e-5


def test_with_the_whole_vocabulary_kept_the_kl_is_exact(batch):
    logits, target, teacher = batch
    top = top_of(teacher[target != -100], V, (1.0, 2.0), torch.float32)
    kept, at_kept = slope(logits, target, top, **SCALES)
    whole, at_whole = slope(logits, target, teacher, **SCALES)
    torch.testing.assert_close(kept.divergence, whole.divergence)
    torch.testing.assert_close(at_kept, at_whole)


def test_the_kept_gradient_is_that_of_autograd(batch):
    logits, target, teacher = batch
    real = target != -100
    scales = {"temperature": 2.0, "cross_entropy_scale": 0.0, "divergence_scale": 1.0}
    top = top_of(teacher[real], 6, (1.0, 2.0), torch.float32)
    _, found = slope(logits, target, top, **scales)
    leaf = logits.clone().requires_grad_()
    bucketed(leaf[real], teacher[real], 6, 2.0).sum().backward()
    torch.testing.assert_close(found, leaf.grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_values_are_still_a_distribution_with_the_same_rest(generator, dtype):
    teacher = torch.randn(200, 500, generator=generator) * 5
    top = top_of(teacher, 20, (1.0, 2.0), dtype)
    for t in (1.0, 2.0):
        mass = top.log_probability(t).double().exp().sum(-1)
        exact = (teacher.double() / t).softmax(-1).topk(20).values.sum(-1)
        assert float(mass.max()) <= 1 + 1e-6
        # the rest keeps its unnormalised mass: only the normaliser changes
        torch.testing.assert_close(1 - mass, 1 - exact, rtol=2e-2, atol=1e-5)


def test_a_student_that_gives_the_rest_no_chance_has_a_finite_gradient():
    teacher = torch.zeros(1, V)
    logits = torch.full((1, V), -300.0)
    logits[0, 0] = 0.0
    top = top_of(teacher, 1, (1.0,), torch.float32)
    _, found = slope(logits, torch.tensor([0]), top, divergence_scale=1.0)
    assert torch.isfinite(found).all()
