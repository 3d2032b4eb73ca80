"""What the loss holds, what the gradients are, where α begins, and that the Trainer takes it."""

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainingArguments

from samoe.tiny import PRESETS, SCOPES, build, checkpointed, logits, tiny, tokens
from smelt.samoe.model import SaMoEForCausalLM, SaMoEForMaskedLM
from smelt.samoe.moe import balance_loss, z_loss

IDS = tokens(2, 12)


# --- routers' losses -----------------------------------------------------------------------------


def test_an_even_load_costs_one_per_layer():
    even = 20 * torch.eye(6).repeat(5, 1)
    assert balance_loss((even,) * 3, 1) == pytest.approx(3)
    assert balance_loss((torch.zeros(5, 6),), 6) == pytest.approx(1)


def test_all_tokens_on_one_expert_cost_as_much_as_there_are_experts():
    one = 30 * torch.eye(6)[[2] * 7]
    assert balance_loss((one, one), 1) == pytest.approx(12)
    # Half of each token's choices, and all of the probability.
    assert balance_loss((one,), 2) == pytest.approx(3)


def test_balance_is_the_product_of_shares_and_probabilities():
    scores = torch.randn(11, 5)
    probability = scores.softmax(-1)
    chosen = [set(row.topk(2).indices.tolist()) for row in probability]
    share = [sum(e in ids for ids in chosen) / 22 for e in range(5)]
    expected = 5 * sum(share[e] * float(probability[:, e].mean()) for e in range(5))
    assert float(balance_loss((scores,), 2)) == pytest.approx(expected)


def test_router_losses_leave_padding_out():
    scores, real = torch.randn(12, 5), torch.rand(3, 4) < 0.6
    kept = scores[real.flatten()]
    assert balance_loss((scores,), 2, real) == balance_loss((kept,), 2)
    assert z_loss((scores,), real) == z_loss((kept,))
    assert z_loss((torch.zeros(3, 8),) * 2) == pytest.approx(2 * float(np.log(8)) ** 2)


@pytest.mark.parametrize("kind", [SaMoEForCausalLM, SaMoEForMaskedLM])
def test_the_loss_is_that_of_the_tokens_and_of_the_routers(kind):
    model = build(tiny(router_aux_loss_coef=0.3, router_z_loss_coef=0.2, moe_every=1), kind)
    mask = torch.ones_like(IDS)
    mask[1, 7:] = 0
    labels = IDS.masked_fill(mask == 0, -100)
    found = model(IDS, attention_mask=mask, labels=labels, output_router_logits=True)
    shift = int(model.config.is_causal)
    targets = labels[:, shift:]
    picked = found.logits[:, : 12 - shift][targets != -100].log_softmax(-1)
    nats = -picked.gather(1, targets[targets != -100][:, None]).mean()
    scores = tuple(layer[mask.bool().flatten()] for layer in found.router_logits)
    assert [layer.shape for layer in found.router_logits] == [(24, 4)] * 4
    expected = 0.3 * balance_loss(scores, 1) + 0.2 * z_loss(scores)
    torch.testing.assert_close(found.aux_loss, expected)
    torch.testing.assert_close(found.loss, nats + expected)


def test_router_losses_of_a_cached_step_are_of_its_tokens():
    model = build(tiny())
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :10] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)

    def losses(ids, past=None):
        length = ids.shape[1] + (past.get_seq_length() if past else 0)
        return model(
            ids,
            attention_mask=mask[:, :length],
            position_ids=positions[:, length - ids.shape[1] : length],
            past_key_values=past,
            labels=ids,
            output_router_logits=True,
        )

    with torch.no_grad():
        cache = losses(IDS[:, :9]).past_key_values
        found = losses(IDS[:, 9:], cache)
        real = mask[:, 9:].bool().flatten()
        kept = tuple(layer[real] for layer in found.router_logits)
    torch.testing.assert_close(found.aux_loss, 0.01 * balance_loss(kept, 1))


def test_a_dense_model_has_no_router_loss():
    found = build(tiny(sharing="dense"))(IDS, labels=IDS, output_router_logits=True)
    assert found.aux_loss is None and not found.router_logits and found.dropped is None


# --- what sees what ------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_masked_models_see_both_sides_and_causal_ones_the_past(preset):
    changed = IDS.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 32
    causal, masked = build(tiny(preset)), build(tiny(preset), SaMoEForMaskedLM)
    difference = (logits(causal, changed) - logits(causal, IDS)).abs().amax(-1)
    assert (difference[:, :6] < 1e-5).all() and (difference[:, 6:] > 1e-5).all()
    difference = (logits(masked, changed) - logits(masked, IDS)).abs().amax(-1)
    assert (difference > 1e-5).all()


# --- gradients -----------------------------------------------------------------------------------


def gradients(model, **inputs):
    model.zero_grad()
    loss = model(IDS, labels=IDS, **inputs).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("fields", [{}, {"sharing": "residual"}, {"mix": "weight"}])
def test_gradient_checkpointing_changes_no_gradient(fields, use_reentrant):
    model = build(tiny(capacity_factor=0.5, **fields)).train()
    mask = torch.ones_like(IDS)
    mask[1, 9:] = 0
    loss, expected = gradients(model, attention_mask=mask)
    assert expected.keys() == {n for n, _ in model.named_parameters()}
    checkpointed(model, use_reentrant=use_reentrant)
    if use_reentrant:
        model.enable_input_require_grads()
    again, found = gradients(model, attention_mask=mask)
    assert torch.equal(loss, again) and found.keys() == expected.keys()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("mix", ["activation", "weight"])
def test_bfloat16_autocast_is_near_float32(mix, preset):
    model = build(tiny(preset, mix=mix, num_experts_per_tok=4, capacity_factor=None)).train()
    loss, expected = gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(IDS, output_router_logits=True)
    assert out.router_logits[0].dtype == torch.float32
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        again = model(IDS, labels=IDS).loss
    again.backward()
    assert float(again.detach()) == pytest.approx(float(loss), rel=0.02)
    found = {n: p.grad for n, p in model.named_parameters()}
    assert {g.dtype for g in found.values()} == {torch.float32}
    together, difference = (
        torch.cat([(g - m * found[n]).flatten() for n, g in expected.items()]).norm()
        for m in (0, 1)
    )
    assert difference < 0.1 * together


# --- where α begins ------------------------------------------------------------------------------


def first_alpha(seed=0, **fields):
    torch.manual_seed(seed)
    model = SaMoEForCausalLM(tiny(moe_every=1, num_hidden_layers=6, **fields))
    return torch.stack([layer.alpha.detach() for layer in model.model.moe_layers()])


def test_alpha_begins_orthogonal_with_rows_of_unit_norm():
    alpha = first_alpha(pool_size=6)
    torch.testing.assert_close(alpha @ alpha.T, torch.eye(6), atol=1e-5, rtol=0)
    alpha = first_alpha(pool_size=3)
    torch.testing.assert_close(alpha.norm(dim=1), torch.ones(6))
    assert torch.linalg.matrix_rank(alpha) == 3
    assert torch.equal(alpha, first_alpha(pool_size=3))
    assert not torch.allclose(alpha, first_alpha(seed=1, pool_size=3))


def test_alpha_begins_uniform_or_by_group_on_request():
    assert torch.equal(first_alpha(alpha_init="uniform", pool_size=4), torch.full((6, 4), 0.5))
    grouped = first_alpha(alpha_init="group", pool_size=3)
    expected = torch.eye(3).repeat_interleave(2, 0)
    assert 0 < (grouped - expected).abs().max() < 0.06


@pytest.mark.parametrize("init", ["orthogonal", "uniform", "group"])
def test_one_entry_begins_at_alpha_one(init):
    assert torch.equal(first_alpha(alpha_init=init, pool_size=1), torch.ones(6, 1))


@pytest.mark.parametrize("mix", ["activation", "weight"])
def test_a_finer_alpha_begins_as_the_same_function(mix):
    models = []
    for scope in SCOPES:
        torch.manual_seed(0)
        models.append(SaMoEForCausalLM(tiny(mix=mix, alpha_scope=scope)).eval())
        models[-1].load_state_dict(
            {n: p for n, p in models[0].state_dict().items() if "alpha" not in n}, strict=False
        )
        with torch.no_grad():
            for layer, first in zip(
                models[-1].model.moe_layers(), models[0].model.moe_layers(), strict=True
            ):
                assert layer.beta == 1
                row = layer.alpha if scope == "layer" else layer.alpha[:, -1]
                torch.testing.assert_close(row, first.alpha)
    for model in models[1:]:
        torch.testing.assert_close(logits(model, IDS), logits(models[0], IDS))


def test_what_writes_to_the_stream_begins_smaller():
    model = SaMoEForCausalLM(tiny(hidden_size=64, num_hidden_layers=8, initializer_range=0.02))
    pool, layers = model.model.pools[0], model.model.layers
    for wide in (pool.up, layers[0].mlp.up_proj.weight, layers[0].attention.q_proj.weight):
        assert float(wide.detach().std()) == pytest.approx(0.02, rel=0.1)
    for narrow in (pool.down, layers[0].mlp.down_proj.weight, layers[0].attention.o_proj.weight):
        assert float(narrow.detach().std()) == pytest.approx(0.02 / 4, rel=0.1)
    assert not pool.down_bias.any()


# --- the Trainer ---------------------------------------------------------------------------------


def trained(model, folder, **settings):
    """One step of plain gradient descent by transformers' own Trainer."""
    rows = [{"input_ids": row, "labels": row} for row in tokens(4, 8)]
    defaults = {"max_steps": 1, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
    arguments = TrainingArguments(
        folder,
        **{**defaults, "use_cpu": True, "report_to": "none", "save_strategy": "no", **settings},
    )
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    return trainer


def test_the_trainer_takes_a_step_and_accumulation_changes_nothing(tmp_path):
    weights = []
    for size, parts in ((4, 1), (1, 4)):
        model = build(tiny(router_aux_loss_coef=0))  # the balance of parts is not that of the whole
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        trained(
            model, tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=parts
        )
        weights.append(model.state_dict())
        same = {n for n, p in model.named_parameters() if torch.equal(p, before[n])}
        assert all("k_proj.bias" in name for name in same)  # a softmax does not see it
    torch.testing.assert_close(*weights, rtol=0, atol=2e-5)


def test_the_trainer_evaluates_logits(tmp_path):
    shapes = []

    def metrics(predictions):
        shapes.append(np.shape(predictions.predictions))
        return {}

    trainer = trained(build(tiny()), tmp_path)
    trainer.compute_metrics = metrics
    assert trainer.evaluate()["eval_loss"] > 0
    assert shapes == [(4, 8, 32)]
