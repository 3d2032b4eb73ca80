"""Laws of a fit: it never ends worse, finds what there is to find, and depends on no chance."""

import warnings
from itertools import pairwise

import pytest
import torch

from reference.reconstruction import best_down_by_gradient, relative_error
from smelt.compress.closed_form import solve_down
from smelt.compress.reconstruct import fit
from smelt.compress.sample import LayerSample, alone
from smelt.experts import ExpertBank, mixture
from smelt.recipe import ReconstructRecipe

D, F, E, N, K = 8, 12, 3, 600, 2
QUICK = ReconstructRecipe(steps=60, batch_tokens=64)


def a_bank(generator, *, biased=False):
    def draw(*shape):
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    biases = {"down_bias": draw(E, D), "up_bias": draw(E, F), "gate_bias": draw(E, F)}
    return ExpertBank(
        up=draw(E, F, D), down=draw(E, D, F), gate=draw(E, F, D), **(biases if biased else {})
    )


def routing(generator):
    choice = torch.rand(N, E, generator=generator).topk(K).indices
    gate = torch.rand(N, K, generator=generator).softmax(1)
    return choice, gate


class Layer:
    """A bank behind a fixed routing, as a replacement with parameters."""

    def __init__(self, bank, x, choice, gate):
        self.parameters = {n: t.clone().requires_grad_() for n, t in bank.tensors().items()}
        self.bank, self.x, self.routing = bank, x, (choice, gate)

    def run(self, x):
        rows = torch.stack([torch.where((self.x == row).all(1))[0][0] for row in x])
        bank = self.bank.replaced(self.parameters)
        return mixture(bank, x, self.routing[0][rows], self.routing[1][rows])

    @property
    def start(self):
        return self.bank.tensors()


def a_sample(x, target):
    return LayerSample(x, target, torch.arange(len(x)) % 5 == 4)


def linear(start, x, target, recipe=QUICK, stored=torch.float32, seed=0, **more):
    """One matrix fitted to a target; the parameter as it is left, and what the fit says."""
    weight = start.clone().requires_grad_()
    found = fit(
        lambda rows: rows @ weight.T,
        {"w": weight},
        a_sample(x, target),
        recipe,
        start={"w": start.to(stored)},
        seed=seed,
        **more,
    )
    return weight.detach(), found


@pytest.fixture
def problem(generator):
    x = torch.randn(N, D, generator=generator)
    true = torch.randn(D, D, generator=generator)
    return x, x @ true.T, true, true + 0.3 * torch.randn(D, D, generator=generator)


def test_a_fit_finds_the_function_it_is_shown(problem):
    x, target, true, start = problem
    recipe = ReconstructRecipe(steps=400, batch_tokens=64)
    weight, found = linear(start, x, target, recipe)
    assert found.before > 0.02
    assert found.after < 1e-3 * found.before
    torch.testing.assert_close(weight, true, atol=0.02, rtol=0)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rate", [1e-3, 0.03, 10.0, 1e30])
def test_a_fit_never_ends_worse_than_it_began(problem, stored, rate):
    x, target, _, start = problem
    weight, found = linear(start, x, target, QUICK.model_copy(update={"rate": rate}), stored)
    assert torch.equal(weight, weight.to(stored).float()), "left as it will be stored"
    sample = a_sample(x, target)
    held = sample.held_out
    error = relative_error(x[held] @ weight.T, target[held])
    assert found.after == pytest.approx(error, rel=1e-4)
    assert found.after <= found.before
    assert found.before == pytest.approx(
        relative_error(x[held] @ start.to(stored).float().T, target[held]), rel=1e-4
    )
    if rate == 1e30:
        assert found.ended == "diverged"
        assert torch.equal(weight, start.to(stored).float())


def test_a_start_that_is_the_target_stays_bit_for_bit(problem):
    x, target, true, _ = problem
    weight, found = linear(true, x, target)
    assert torch.equal(weight, true)
    assert (found.before, found.after, found.best_step) == (0.0, 0.0, 0)
    assert found.ended == "no better"


def test_what_rounding_undoes_is_not_taken_for_better(problem):
    """The start is the best that 16 bits hold: a fit in 32 bits finds more, and loses it again."""
    x, target, true, _ = problem
    start = true.to(torch.bfloat16)
    weight, found = linear(start.float(), x, target, stored=torch.bfloat16)
    assert 0 < found.before == found.after
    assert min(error for _, error in found.curve) < found.before
    assert found.best_step == 0
    assert torch.equal(weight, start.float())


def test_noise_that_says_nothing_leaves_the_start(problem, generator):
    """Of 40 tokens and a target that is the start's output and noise: no state is better."""
    x, _, true, _ = problem
    few = x[:40]
    target = few @ true.T + torch.randn(40, D, generator=generator)
    recipe = ReconstructRecipe(steps=300, batch_tokens=32, rate=0.3)
    weight, found = linear(true, few, target, recipe)
    held = a_sample(few, target).held_out
    assert found.after == pytest.approx(
        relative_error(few[held] @ weight.T, target[held]), rel=1e-4
    )
    assert found.after <= found.before


def test_the_same_seed_gives_the_same_bits_and_another_one_does_not(problem):
    x, target, _, start = problem
    first, again, other = (linear(start, x, target, seed=s)[0] for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("anchor", [0.0, 0.1])
def test_steps_within_the_backward_pass_are_those_after_it(generator, anchor):
    bank = a_bank(generator, biased=True)
    x = torch.randn(N, D, generator=generator)
    target = torch.randn(N, D, generator=generator)
    choice, gate = routing(generator)

    def fitted(reduce):
        layer = Layer(bank, x, choice, gate)
        unused = {"unused": torch.ones(D).requires_grad_()}  # no gradient reaches it
        found = fit(
            layer.run,
            layer.parameters | unused,
            a_sample(x, target),
            QUICK.model_copy(update={"steps": 5, "anchor": anchor}),
            start=layer.start | {"unused": torch.ones(D)},
            reduce=reduce,
        )
        return layer.parameters | unused, found

    within, found = fitted(alone)
    after, again = fitted(lambda tensors: None)  # sums, so gradients have to be waited for
    assert found == again
    assert found.best_step
    assert all(torch.equal(within[name], after[name]) for name in within)


@pytest.mark.parametrize("num_layers", [2, 4])
def test_gradients_do_not_lie_side_by_side(num_layers, generator):
    x = torch.randn(N, D, generator=generator)
    weights = {f"w{i}": torch.eye(D).requires_grad_() for i in range(num_layers)}
    alive = []

    def run(rows):
        for weight in weights.values():
            rows = rows @ weight.T
        if rows.requires_grad:
            for weight in weights.values():
                weight.register_post_accumulate_grad_hook(
                    lambda _: alive.append(sum(w.grad is not None for w in weights.values()))
                )
        return rows

    start = {name: weight.detach().clone() for name, weight in weights.items()}
    recipe = QUICK.model_copy(update={"steps": 1})
    fit(run, weights, a_sample(x, x.flip(1)), recipe, start=start)
    assert len(alive) >= num_layers
    assert max(alive) <= 1


def test_an_anchor_keeps_a_fit_near_its_start(problem):
    x, target, _, start = problem
    moved = [
        (linear(start, x, target, QUICK.model_copy(update={"anchor": a}))[0] - start).norm()
        for a in (0.0, 1.0, 100.0)
    ]
    assert all(near < far for far, near in pairwise(moved))


def test_time_that_is_up_ends_a_fit_and_keeps_what_it_found(problem):
    x, target, _, start = problem
    recipe = QUICK.model_copy(update={"seconds": 1e-9, "steps": 10_000})
    _, found = linear(start, x, target, recipe)
    assert found.ended == "out of time"
    assert found.steps == 1
    assert found.after <= found.before


@pytest.mark.parametrize("weight", ["none", "saliency", "relative"])
def test_tokens_count_as_the_rule_says(problem, weight):
    """The error is the weighted one; scaling all targets changes no share of it."""
    x, target, _, start = problem
    target = target * torch.linspace(0.1, 3, N)[:, None]
    recipe = QUICK.model_copy(update={"weight": weight, "steps": 0})
    _, found = linear(start, x, target, recipe)
    held = a_sample(x, target).held_out
    norm = target[held].norm(dim=1)
    by_token = {"none": torch.ones_like(norm), "saliency": norm, "relative": norm**-2}[weight]
    wrong = ((x @ start.T - target)[held] ** 2).sum(1)
    expected = (by_token * wrong).sum() / (by_token * norm**2).sum()
    assert found.before == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("biased", [False, True])
def test_the_closed_form_is_what_gradient_descent_would_end_at(generator, biased):
    bank = a_bank(generator, biased=biased)
    x = torch.randn(N, D, generator=generator)
    choice, gate = routing(generator)
    residual = torch.randn(N, D, generator=generator)
    weight = torch.rand(N, generator=generator)
    for w in (None, weight):
        solved = solve_down(bank, x, choice, gate, residual, ridge=1e-7, sweeps=60, weight=w)
        expected = best_down_by_gradient(bank, x, choice, gate, residual, w)
        left = [
            float(((change_of(bank, b, x, choice, gate) - residual).square().sum(1) * scale).sum())
            for b, scale in ((b, 1.0 if w is None else w) for b in (solved, expected, bank))
        ]
        assert left[0] == pytest.approx(left[1], rel=1e-4)
        assert left[0] < 0.98 * left[2], "there is something to find"
        assert torch.equal(solved.up, bank.up)


def change_of(bank, new, x, choice, gate):
    return mixture(new, x, choice, gate) - mixture(bank, x, choice, gate)


def test_every_sweep_of_the_closed_form_lowers_the_error(generator):
    bank = a_bank(generator)
    x = torch.randn(N, D, generator=generator)
    choice, gate = routing(generator)
    residual = torch.randn(N, D, generator=generator)
    errors = []
    for sweeps in range(5):
        new = solve_down(bank, x, choice, gate, residual, ridge=1e-8, sweeps=sweeps)
        change = change_of(bank, new, x, choice, gate)
        errors.append(float((residual - change).square().sum()))
    assert all(after < before for before, after in pairwise(errors))


def test_an_expert_that_no_token_reaches_stays_as_it_is(generator):
    bank = a_bank(generator)
    x = torch.randn(N, D, generator=generator)
    choice, gate = routing(generator)
    choice = choice.masked_fill(choice == 1, E)  # an id beyond the experts: nothing
    new = solve_down(bank, x, choice, gate, torch.randn(N, D), ridge=1e-2)
    assert torch.equal(new.down[1], bank.down[1])
    assert not torch.equal(new.down[0], bank.down[0])


def test_a_closed_form_that_is_worse_on_held_out_tokens_is_not_kept(problem):
    x, target, _, start = problem

    def spoil(sample, reduce):
        weight.data.mul_(50)

    weight = start.clone().requires_grad_()
    found = fit(
        lambda rows: rows @ weight.T,
        {"w": weight},
        a_sample(x, target),
        QUICK.model_copy(update={"steps": 0}),
        start={"w": start},
        solve=spoil,
    )
    assert found.solved > found.before == found.after
    assert torch.equal(weight.detach(), start)


def test_a_bank_that_lost_an_expert_is_repaired_most_of_the_way(generator):
    """Two experts stand for three whose third is the mean of the others: it can be learnt."""
    bank = a_bank(generator)
    x = torch.randn(N, D, generator=generator)
    choice, gate = routing(generator)
    target = mixture(bank, x, choice, gate)
    kept = bank.map(lambda t: torch.cat([t[:2], 0.5 * (t[:1] + t[1:2])]))
    layer = Layer(kept, x, choice, gate)
    recipe = ReconstructRecipe(steps=150, batch_tokens=128)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = fit(layer.run, layer.parameters, a_sample(x, target), recipe, start=layer.start)
    assert found.after < 0.3 * found.before
