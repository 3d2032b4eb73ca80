"""Laws of costs: what is counted is what a formula says."""

import warnings

import pytest

from checkpoints import save
from commands import make_source
from smelt import api
from smelt.comparison.costs import costs
from smelt.comparison.peak import peak_memory


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("costs")


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "switch_transformers"])
def test_flops_of_experts_are_two_for_every_weight_that_a_token_meets(folder, family):
    source = save(family, folder / family)
    about, found = api.inspect(source), costs(source)
    one = found["parameters_of_experts"] / found["experts"]
    layers, router = len(about.layers), 2 * 8 * 32
    assert found["experts"] == 8 * layers
    assert found["moe_flops_per_token"] == layers * (2 * about.top_k * one + router)
    assert found["parameters"] == about.num_params
    assert found["nonzero_parameters"] == found["parameters"]
    assert found["moe_flops_per_token"] < found["flops_per_token"]


def test_low_rank_costs_less_and_merging_alone_as_much(folder):
    source = make_source(folder / "source", "qwen3_moe")
    text = folder / "text.txt"
    text.write_text("one two three four five six seven eight. " * 50)
    settings = {"experts": 4, "form": "mapped", "method": "m-smoe", "text": [str(text)]}
    settings |= {"num_tokens": 300, "sequence_length": 32, "reconstruct": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = api.compress(source, folder / "whole", **settings)
        low = api.compress(source, folder / "low", **settings, decompose={"rank": 2})
    full, merged, decomposed = costs(source), costs(whole), costs(low)
    assert merged["moe_flops_per_token"] == full["moe_flops_per_token"]
    assert decomposed["moe_flops_per_token"] < 0.6 * merged["moe_flops_per_token"]
    assert merged["experts"] == full["experts"] / 2
    assert decomposed["parameters_of_experts"] < merged["parameters_of_experts"]
    sizes = [one["bytes"] for one in (full, merged, decomposed)]
    assert sizes == sorted(sizes, reverse=True)


def test_peak_memory_is_at_least_that_of_the_weights(folder):
    source = save(
        "mixtral", folder / "large", hidden_size=256, intermediate_size=512, vocab_size=96
    )
    weights = costs(source)["bytes"]
    found = peak_memory(source, 2, 32)
    assert weights * 0.9 < found["weights"] <= found["peak"] < 3 * weights + 50e6
