"""Laws of the merge rules that the M-SMoE paper compares with, and their slow versions."""

from dataclasses import replace
from itertools import permutations

import pytest
import torch

from reference.compression import cosine_of, unit_vectors
from reference.merging import fisher_mean, pairs_fit, regmean_matrix, zipped
from reference.samples import KINDS, outputs, random_bank, random_stats, repeated, shuffles
from smelt.compress import zipit as zipit_module
from smelt.compress.align import Aligner
from smelt.compress.least_squares import least_squares
from smelt.compress.members import Group, groups_of, weighted_sum
from smelt.compress.merge import MERGES
from smelt.compress.rebasin import merge_many
from smelt.compress.regmean import regmean
from smelt.compress.repair import repair
from smelt.compress.rules import RULES, merge_by
from smelt.compress.subspace import subspace
from smelt.compress.zipit import zipit
from smelt.errors import PlanError
from smelt.experts import ExpertBank, apply, hidden, permute_hidden
from smelt.routing import LayerStats

LABELS = torch.tensor([0, 1, 0, -1, 1, 0, 2, 1])
WAYS = [(rule, False) for rule in RULES] + [(rule, True) for rule in RULES if rule != "zipit"]
DOMINANTS = torch.tensor([0, 1, 6])


def squares(bank: ExpertBank) -> dict[str, torch.Tensor]:
    return {n: torch.rand(t.shape) for n, t in bank.tensors().items()}


def group_of(
    kind: str, *, M: int = 3, F: int = 6, D: int = 6, stats: LayerStats | None = None
) -> Group:
    """The first of the layer's groups, weighted by usage."""
    bank, stats = random_bank(kind, E=8, F=F, D=D), stats or random_stats(D=D)
    labels = torch.tensor([0] * M + [-1] * (8 - M))
    weights = MERGES["usage"](labels, torch.rand(8))
    fisher = squares(bank)
    ((_, group),) = groups_of(bank, labels, weights, order=None, stats=stats, fisher=fisher)
    assert group is not None
    return group


def close(a: ExpertBank, b: ExpertBank, **tolerance: float) -> None:
    for name, tensor in a.tensors().items():
        torch.testing.assert_close(tensor, b.tensors()[name], **tolerance)


# --- laws of all ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("rule", "repaired"), WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_copies_of_one_expert_give_it_back(kind: str, rule: str, repaired: bool) -> None:
    bank = repeated(random_bank(kind, D=6), 8)
    weights = MERGES["usage"](LABELS, torch.rand(8))
    merged = merge_by(
        bank,
        LABELS,
        weights,
        rule=rule,
        repaired=repaired,
        stats=random_stats(),
        fisher=squares(bank),
    )
    close(merged, repeated(bank, 3), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", KINDS)
def test_reordered_copies_of_one_expert_give_it_back(kind: str, rule: str) -> None:
    whole, shuffle = repeated(random_bank(kind, F=12, D=6), 8), shuffles(8, 12)
    mixed = permute_hidden(whole, shuffle)
    order = None
    fisher = permute_hidden(whole.replaced(squares(whole)), shuffle).tensors()
    if rule != "zipit":
        with Aligner() as aligner:
            order = merge_many(mixed, LABELS, DOMINANTS, aligner)
    weights = MERGES["mean"](LABELS, torch.ones(8))
    merged = merge_by(
        mixed, LABELS, weights, rule=rule, order=order, stats=random_stats(), fisher=fisher
    )
    x = torch.randn(9, 6)
    torch.testing.assert_close(outputs(merged, x), outputs(whole, x)[:3], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rule", RULES)
def test_the_scale_of_counts_and_of_gradients_does_not_matter(rule: str) -> None:
    bank, stats, usage = random_bank("biased", E=8, D=6), random_stats(), torch.rand(8)
    fisher, found = squares(bank), []
    for scale in (1.0, 1e6):
        scaled = {n: t * scale for n, t in fisher.items()}
        weights = MERGES["usage"](LABELS, usage * scale)
        found.append(merge_by(bank, LABELS, weights, rule=rule, stats=stats, fisher=scaled))
    close(found[0], found[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_a_group_of_one_is_a_copy_and_the_result_has_the_type_of_the_bank(rule: str) -> None:
    bank = random_bank("gated", E=8, D=6, dtype=torch.bfloat16)
    weights = MERGES["usage"](LABELS, torch.rand(8))
    merged = merge_by(bank, LABELS, weights, rule=rule, stats=random_stats(), fisher=squares(bank))
    for name, tensor in merged.tensors().items():
        assert tensor.dtype == torch.bfloat16
        assert tensor.shape[0] == 3
        assert torch.equal(tensor[2], bank.tensors()[name][6])


@pytest.mark.parametrize("rule", [n for n in RULES if n != "fisher"])
def test_a_group_that_no_sampled_token_reached_is_still_merged(rule: str) -> None:
    stats = random_stats()
    stats.sample_choice[:] = torch.tensor([3, 6])
    bank = repeated(random_bank("gated", D=6), 8)
    weights = MERGES["usage"](LABELS, torch.zeros(8))
    for repaired in (False, True) if rule != "zipit" else (False,):
        merged = merge_by(bank, LABELS, weights, rule=rule, repaired=repaired, stats=stats)
        close(merged, repeated(bank, 3), atol=1e-5, rtol=1e-5)


def test_a_choice_of_weight_zero_is_none() -> None:
    stats = random_stats()
    stats.sample_weight[:, 1] = 0
    ((_, group),) = groups_of(
        random_bank("gated", E=8, D=6),
        torch.tensor([0, 0] + [-1] * 6),
        torch.full((8,), 0.5, dtype=torch.float64),
        order=None,
        stats=stats,
    )
    assert group is not None
    first = stats.sample_choice[:, 0]
    assert torch.equal(group.tokens(1), stats.input_sample[first == 1])
    assert torch.equal(group.x, stats.input_sample[first <= 1])


# --- redirection ---------------------------------------------------------------------------------


def test_redirecting_keeps_the_best_expert_of_each_group() -> None:
    bank, usage = random_bank("biased", E=8), torch.tensor([5.0, 2, 5, 9, 3, 1, 0, 3])
    weights = MERGES["dominant"](LABELS, usage)
    assert weights.tolist() == [1, 0, 0, 0, 1, 0, 1, 0]
    merged = merge_by(bank, LABELS, weights)
    for name, tensor in merged.tensors().items():
        assert torch.equal(tensor, bank.tensors()[name][[0, 4, 6]])


# --- Fisher --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_fisher_is_the_weighted_mean_of_every_number(kind: str) -> None:
    group = group_of(kind)
    assert group.fisher is not None
    group.fisher["up"][:, 0, 0] = 0
    group.fisher["down"][1] = 0
    merged, w = RULES["fisher"](group), group.weights.tolist()
    for name, tensor in group.bank.tensors().items():
        values, sure = tensor.flatten(1).T.tolist(), group.fisher[name].flatten(1).T.tolist()
        expected = [fisher_mean(v, f, w) for v, f in zip(values, sure, strict=True)]
        torch.testing.assert_close(merged.tensors()[name].flatten(), torch.tensor(expected))


def test_equal_fisher_is_the_weighted_mean() -> None:
    group = group_of("biased")
    same = {n: torch.rand(t.shape[1:]).expand(t.shape) for n, t in group.bank.tensors().items()}
    close(RULES["fisher"](replace(group, fisher=same)), weighted_sum(group))


def test_fisher_without_gradients_says_how_to_get_them() -> None:
    with pytest.raises(PlanError, match="--gradients"):
        RULES["fisher"](replace(group_of("gated"), fisher=None))


def test_fisher_follows_the_order_of_its_weights() -> None:
    bank, labels = random_bank("biased", E=3), torch.zeros(3, dtype=torch.int64)
    order, weights, fisher = shuffles(3, 6), torch.full((3,), 1 / 3), squares(bank)
    found = merge_by(
        bank,
        labels,
        weights,
        rule="fisher",
        order=order,
        fisher=fisher,
        stats=random_stats(E=3, D=4),
    )
    moved = permute_hidden(bank, order)
    other = permute_hidden(bank.replaced(fisher), order).tensors()
    stats = random_stats(E=3, D=4)
    close(found, merge_by(moved, labels, weights, rule="fisher", fisher=other, stats=stats))


# --- RegMean -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shrink", [1.0, 0.9, 0.1])
@pytest.mark.parametrize("kind", KINDS)
def test_regmean_is_the_least_squares_of_its_members_outputs(kind: str, shrink: float) -> None:
    group = group_of(kind)
    merged, w = regmean(group, shrink=shrink), group.weights.tolist()
    inputs = [group.tokens(m) for m in range(3)]
    assert len({len(x) for x in inputs}) > 1
    units = [hidden(group.bank, m, x) for m, x in enumerate(inputs)]
    for name, read in (("up", inputs), ("gate", inputs), ("down", units)):
        if (matrices := group.bank.tensors().get(name)) is not None:
            expected = regmean_matrix(read, list(matrices), w, shrink)
            found = merged.tensors()[name][0].double()
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    if group.bank.up_bias is not None:
        close(
            replace(weighted_sum(group), up=merged.up, gate=merged.gate, down=merged.down), merged
        )


def test_equal_grams_are_the_weighted_mean() -> None:
    group = group_of("gated")
    one = group.bank.map(lambda t: t[:1].expand(t.shape))
    bank = replace(one, down=group.bank.down)  # as many hidden activations of each
    everyone = torch.ones_like(group.is_routed)
    same = replace(group, bank=bank, is_routed=everyone)
    close(regmean(same), weighted_sum(same), atol=1e-5, rtol=1e-5)
    mixed = replace(group, is_routed=everyone)
    close(
        replace(regmean(mixed), down=group.bank.down[:1]),
        replace(weighted_sum(mixed), down=group.bank.down[:1]),
        atol=1e-5,
        rtol=1e-5,
    )


def test_an_input_that_no_token_has_keeps_the_mean_of_its_column() -> None:
    stats = random_stats()
    stats.input_sample[:, 2] = 0
    group = group_of("gated", stats=stats)
    merged, mean = regmean(group), weighted_sum(group)
    torch.testing.assert_close(merged.up[0, :, 2], mean.up[0, :, 2])
    assert not torch.allclose(merged.up[0, :, 1], mean.up[0, :, 1], atol=1e-3)


# --- REPAIR --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_repair_leaves_the_statistics_as_it_says(kind: str) -> None:
    group = group_of(kind)
    # Any merged expert: of a plain sum the means are those of the members already.
    mean = weighted_sum(group).map(lambda t: t + 0.3 * torch.randn(t.shape))
    done = repair(mean, group)
    w = group.weights[:, None]
    for name in ("up", "gate"):
        if (members := group.bank.tensors().get(name)) is None:
            continue
        biases = group.bank.tensors().get(f"{name}_bias")

        def preactivations(weight, bias):
            z = torch.einsum("mfd,td->mtf", weight, group.x)
            return (z if bias is None else z + bias[:, None]).double()

        z = preactivations(members, biases)
        own = done.tensors()
        after = preactivations(own[name], own.get(f"{name}_bias"))[0]
        before = preactivations(mean.tensors()[name], mean.tensors().get(f"{name}_bias"))[0]
        expected = (w * z.std(1, correction=0)).sum(0)
        torch.testing.assert_close(after.std(0, correction=0), expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(before.std(0, correction=0), expected, rtol=1e-2)
        if biases is not None:
            torch.testing.assert_close(after.mean(0), (w * z.mean(1)).sum(0), rtol=1e-4, atol=1e-5)
        else:  # the row is scaled, and its mean with it
            scale = after.std(0, correction=0) / before.std(0, correction=0)
            torch.testing.assert_close(after.mean(0), before.mean(0) * scale, rtol=1e-4, atol=1e-5)
    assert torch.equal(done.down, mean.down)


def test_a_unit_that_does_not_vary_is_left_alone() -> None:
    group = group_of("gated")
    group.bank.up[:, 1] = 0
    done = repair(weighted_sum(group), group)
    assert torch.equal(done.up[0, 1], torch.zeros(6))


# --- Git Re-Basin --------------------------------------------------------------------------------


def vectors(bank: ExpertBank, members: list[int], order: torch.Tensor) -> list[torch.Tensor]:
    return [unit_vectors(bank, e)[order[e]] for e in members]


@pytest.mark.parametrize("kind", KINDS)
def test_no_member_fits_the_others_better_in_another_order(kind: str) -> None:
    bank, members = random_bank(kind, E=8, F=5, D=3), [1, 4, 7]
    with Aligner() as aligner:
        order = merge_many(bank, LABELS, DOMINANTS, aligner)
        first = aligner.orders(bank, LABELS, DOMINANTS)
    best = pairs_fit(vectors(bank, members, order))
    assert best >= pairs_fit(vectors(bank, members, first)) - 1e-9
    for member in members:
        for other in permutations(range(5)):
            changed = order.clone()
            changed[member] = torch.tensor(other)
            assert pairs_fit(vectors(bank, members, changed)) <= best + 1e-4


def test_two_members_are_one_assignment() -> None:
    bank, labels = random_bank("gated", E=4), torch.tensor([0, 1, 1, 0])
    with Aligner() as aligner:
        order = merge_many(bank, labels, torch.tensor([0, 2]), aligner)
        assert torch.equal(order, aligner.orders(bank, labels, torch.tensor([0, 2])))


def test_many_members_gain_by_it_and_the_number_of_workers_does_not_matter() -> None:
    bank, labels = random_bank("gated", E=10, F=16, D=8), torch.arange(10) % 2
    found = []
    for workers in (1, 3):
        with Aligner(workers) as aligner:
            found.append(merge_many(bank, labels, torch.tensor([0, 1]), aligner))
            first = aligner.orders(bank, labels, torch.tensor([0, 1]))
    assert torch.equal(found[0], found[1])
    for members in ([0, 2, 4, 6, 8], [1, 3, 5, 7, 9]):
        gained = pairs_fit(vectors(bank, members, found[0]))
        assert gained > 1.05 * pairs_fit(vectors(bank, members, first))


# --- ZipIt ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("M", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_zipit_merges_the_most_correlated_pair_again_and_again(kind: str, M: int) -> None:
    group = group_of(kind, M=M, F=5)
    merged = zipit(group)
    for name, expected in zipped(group).items():
        found = merged.tensors()[name][0].double()
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("width", [5, 10, 20, 40])
def test_clusters_are_those_of_a_search_over_all_pairs_at_every_step(width: int) -> None:
    features, weight = torch.randn(40, width, dtype=torch.float64), torch.rand(40) + 0.1
    features[7] = 0  # never merged while anything is correlated
    found = zipit_module.clusters((features @ features.T).float(), weight, 12)
    left = {i: (features[i], float(weight[i]), [i]) for i in range(40)}
    while len(left) > 12:
        best = max(
            ((i, j) for i in left for j in left if i < j),
            key=lambda pair: cosine_of(*(left[k][0].tolist() for k in pair)),
        )
        (a, u, first), (b, v, second) = left[best[0]], left.pop(best[1])
        left[best[0]] = ((u * a + v * b) / (u + v), u + v, first + second)
    expected = torch.zeros(40, dtype=torch.int64)
    for label, (_, _, members) in enumerate(left.values()):
        expected[members] = label
    assert torch.equal(found, expected)


def test_a_merged_unit_may_be_nearer_than_any_unit_was() -> None:
    gram = torch.eye(4)
    for i, j, cosine in ((0, 1, 0.48), (0, 2, 0.47), (0, 3, 0.47), (2, 3, 0.5)):
        gram[i, j] = gram[j, i] = cosine
    found = zipit_module.clusters(gram, torch.ones(4), 2)
    assert found.tolist() == [0, 1, 0, 0]  # 2 and 3 first; 0 is at 0.54 of their mean


@pytest.mark.parametrize("at_once", [1, 8192])
@pytest.mark.parametrize("tokens", [True, False])
def test_zipit_finds_the_permutation(
    tokens: bool, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zipit_module, "UNITS_AT_ONCE", at_once)
    bank, shuffle = repeated(random_bank("biased", F=12, D=6), 8), shuffles(8, 12)
    shuffle[0] = torch.arange(12)
    labels = torch.zeros(8, dtype=torch.int64)
    stats = random_stats()
    if not tokens:
        stats.sample_choice[:] = 9  # nobody: matched by weight
    weights = MERGES["usage"](labels, torch.rand(8))
    merged = merge_by(permute_hidden(bank, shuffle), labels, weights, rule="zipit", stats=stats)
    close(merged, repeated(bank, 1), atol=1e-5, rtol=1e-5)


def test_two_equal_units_of_one_expert_become_one() -> None:
    """Zipping within: nothing is lost where an expert says a thing twice."""
    one, other = random_bank("gated", E=1, F=3, D=6), random_bank("gated", E=1, F=3, D=6)
    halves = one.map(lambda t: t)
    halves = ExpertBank(
        up=torch.cat([one.up, one.up], 1),
        gate=torch.cat([one.gate, one.gate], 1),
        down=torch.cat([one.down, one.down], 2) / 2,
    )
    twice = ExpertBank(
        up=torch.cat([other.up, other.up], 1),
        gate=torch.cat([other.gate, other.gate], 1),
        down=torch.cat([other.down, other.down], 2) / 2,
    )
    bank = ExpertBank(
        **{n: torch.cat([t, twice.tensors()[n]]) for n, t in halves.tensors().items()}
    )
    labels = torch.tensor([0, 0])
    merged = merge_by(bank, labels, torch.tensor([0.3, 0.7]), rule="zipit", stats=random_stats(E=2))
    x = torch.randn(9, 6)
    expected = 0.3 * outputs(one, x) + 0.7 * outputs(other, x)
    torch.testing.assert_close(outputs(merged, x), expected, atol=1e-4, rtol=1e-4)


def test_an_expert_of_weight_zero_adds_nothing_to_an_expert_it_is_zipped_with() -> None:
    bank = repeated(random_bank("gated", F=5, D=6), 2)
    bank.down[1] += 1
    labels, weights = torch.tensor([0, 0]), torch.tensor([1.0, 0.0])
    merged = merge_by(bank, labels, weights, rule="zipit", stats=random_stats(E=2))
    close(merged, bank.map(lambda t: t[:1]), atol=1e-5, rtol=1e-5)


# --- the rules of later work ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_least_squares_brings_the_group_s_output_nearer_than_the_plain_merge(kind: str) -> None:
    group = group_of(kind)
    wanted = group_output(group, group.bank)
    errors = [
        float((group_output(group, bank) - wanted).square().sum())
        for bank in (weighted_sum(group), least_squares(group))
    ]
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("kind", KINDS)
def test_least_squares_is_the_ridge_solution_written_out(kind: str) -> None:
    """As one overdetermined system: the tokens, and λ times the change of each entry."""
    group = group_of(kind)
    mean, found = weighted_sum(group), least_squares(group)
    total = group.gate.sum(1, keepdim=True).double()
    rows = total * hidden(mean, 0, group.x).double()
    left = (group_output(group, group.bank) - group_output(group, mean)).double()
    ridge = 1e-3 * float((rows.T @ rows).diagonal().mean())
    padded = torch.cat([rows, ridge**0.5 * torch.eye(rows.shape[1], dtype=torch.float64)])
    wanted = torch.cat([left, torch.zeros(rows.shape[1], left.shape[1], dtype=torch.float64)])
    change = torch.linalg.lstsq(padded, wanted).solution.T
    torch.testing.assert_close(
        found.down[0].double(), mean.down[0].double() + change, atol=1e-4, rtol=1e-3
    )
    for name, tensor in found.tensors().items():
        if name != "down":
            assert torch.equal(tensor, mean.tensors()[name])


def group_output(group: Group, bank: ExpertBank) -> torch.Tensor:
    """Σ_m g_m f_m(x) for members; ĝ f(x) for what stands for them."""
    if bank.num_experts == 1:
        return group.gate.sum(1, keepdim=True) * apply(bank, 0, group.x)
    parts = [group.gate[:, m, None] * apply(bank, m, group.x) for m in range(bank.num_experts)]
    return torch.stack(parts).sum(0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("F", "D"), [(12, 4), (4, 12), (6, 6)])
def test_subspace_projects_the_weighted_sum_on_what_the_members_share(kind, F, D) -> None:
    group = group_of(kind, F=F, D=D)
    mean, found = weighted_sum(group), subspace(group)
    for name, stack in group.bank.tensors().items():
        expected = mean.tensors()[name][0].double()
        if stack.dim() == 3:
            left = torch.linalg.svd(torch.cat(list(stack), 1).double(), full_matrices=False).U
            shared = left[:, : min(stack.shape[1:])]
            expected = shared @ (shared.T @ expected)
        torch.testing.assert_close(
            found.tensors()[name][0].double(), expected, atol=1e-4, rtol=1e-4
        )
