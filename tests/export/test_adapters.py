"""PEFT trains low-rank adapters on what smelt makes, as on any checkpoint."""

from typing import Any

import pytest
import torch

from checkpoints import random_inputs
from commands import make_source, text_file
from smelt import api

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning",  # peft asks by transformers' older names
    "ignore:.*calibration tokens reach:UserWarning",
    "ignore::RuntimeWarning",  # peft, of adapters on parameters
)

ADAPTERS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "the fused experts": {
        "target_modules": [],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
}


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "olmoe"])
@pytest.mark.parametrize("where", ADAPTERS)
def test_adapters_train_on_a_compressed_checkpoint(family, where, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    source = make_source(tmp_path / "model", family)
    calibration = {"text": (str(text_file(tmp_path)),), "num_tokens": 600, "sequence_length": 32}
    api.compress(source, tmp_path / "half", keep=0.5, calibration=calibration)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32)
    ids = random_inputs(model.config)["input_ids"]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", **ADAPTERS[where])
    adapted = peft.get_peft_model(model, config)
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=0.03)
    losses = []
    for _ in range(5):
        loss = adapted(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.02
    trained = [n for n, p in adapted.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    part = "experts" if where == "the fused experts" else "self_attn"
    assert all(part in name for name in trained)
    merged = adapted.merge_and_unload().state_dict()
    changed = {name for name in before if not torch.equal(before[name], merged[name])}
    assert changed and all(part in name for name in changed)
