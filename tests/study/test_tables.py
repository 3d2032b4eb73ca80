"""Laws of the tables: what stands in them follows from the runs that are done."""

import pytest

from smelt.study.cells import cells
from smelt.study.markdown import report
from smelt.study.rows import gather
from smelt.study.store import Store, write
from smelt.study.tables import results

NATS = {
    ("ar-moe", 0): 3.000,
    ("ar-moe", 1): 3.040,
    ("samoe", 0): 2.910,
    ("samoe", 1): 2.930,
}


@pytest.fixture
def study(make):
    return make(parts__core__search="base", parts__size__search="base", effects={"α": 0.02})


@pytest.fixture
def core(study, trained):
    """A study whose core is done."""
    for cell in cells(study, "core"):
        trained(study, cell.id, cell.recipe, NATS[cell.variant, cell.seed])
    return study


def test_a_loss_is_the_mean_over_texts_with_its_deviation_over_seeds(core):
    row = results(core)["rows"][0]
    assert row["row"] == "core/ar-moe" and row["seeds"] == [0, 1]
    assert row["nats"]["mean"] == pytest.approx(3.02)
    assert row["nats"]["sd"] == pytest.approx(0.04 / 2**0.5)
    assert row["nats_by_source"]["a"]["mean"] == pytest.approx(2.52)
    assert row["nats_sd_of_last_checkpoints"] == pytest.approx(1.0)


def test_differences_are_paired_by_seed(core):
    (one,) = results(core)["differences"]
    assert (one["row"], one["less"], one["n"]) == ("core/samoe", "core/ar-moe", 2)
    assert one["mean"] == pytest.approx(-0.1)
    assert one["sd"] == pytest.approx(0.02 / 2**0.5)


def test_noise_is_pooled_over_the_variants_of_the_first_part(core):
    noise = results(core)["noise"]
    assert noise["run"]["freedom"] == 2
    assert noise["run"]["sd"] == pytest.approx(((0.04**2 + 0.02**2) / 2 / 2) ** 0.5)
    assert noise["difference"]["sd"] == pytest.approx(0.02 / 2**0.5)


def test_power_says_how_many_seeds_an_effect_needs(core):
    power = results(core)["power"]
    (effect,) = power["effects"]
    needed, smallest = effect["seeds_paired"], power["smallest_effect"]["paired"]
    assert smallest[needed] <= 0.02 < smallest[needed - 1]
    assert effect["tokens"] == 2 * needed * 20 * 8 * 32


def test_unfinished_cells_are_named_and_finished_ones_are_tabled(study, trained):
    cell = cells(study)[0]
    trained(study, cell.id, cell.recipe, 3.0)
    found = results(study)
    assert [row["row"] for row in found["rows"]] == ["core/ar-moe"]
    assert set(found["unfinished"]) == {one.id for one in cells(study)} - {cell.id}
    text = report(found)
    assert "core/ar-moe | 1/2" in text and "core/samoe/seed-0: not begun" in text
    assert found["power"] is None and found["differences"] == []


def test_nothing_done_is_a_list_of_what_is_left(study):
    text = report(results(study))
    assert "Unfinished" in text and "Rows" not in text


def test_a_twin_is_one_row_and_stands_for_itself_in_comparisons(make, trained):
    study = make(
        parts__core__search="base",
        parts__size__search="base",
        parts__size__beside="size/{variant}/E4/L2",
    )
    for cell in cells(study):
        trained(study, cell.id, cell.recipe, 3.0 - cell.recipe.model.fields()["num_experts"] / 100)
    found = results(study)
    assert "size/samoe/E4/L2" not in [row["row"] for row in found["rows"]]
    rows = {row.id: row for row in gather(study)}
    assert rows["size/samoe/E4/L2"].is_twin
    besides = {one["row"]: one for one in found["differences"] if one["less"].startswith("size")}
    assert besides["size/samoe/E8/L2"]["mean"] == pytest.approx(-0.04)


def test_equal_costs_are_compared_and_unequal_ones_are_said_to_be(core):
    matched = results(core)["matched"]
    (one,) = matched["total parameters"]  # P = 2 pool entries, two layers
    assert (one["row"], one["beside"], one["how"]) == ("core/samoe", "ar-moe", "picked")
    assert one["difference"] == pytest.approx(-0.1)
    (one,) = matched["FLOPs per token"]
    assert one["difference"] is None and one["how"].startswith("not spanned: the nearest costs 0.")
    assert "not spanned" in report(results(core))


def test_variants_that_span_nothing_share_one_line_of_their_row(make, trained):
    own = {name: {"model.sharing": name} for name in ("all", "groups", "dense")}
    study = make(
        variants={"samoe": {"model.sharing": "pool"}, "ar-moe": {"model.sharing": "none"}, **own},
        parts__core__variants=["samoe", "ar-moe", *own],
        parts__core__search="base",
        parts__size__search="base",
        focus="samoe",
    )
    for number, cell in enumerate(cells(study, "core")):
        size = 1000 if cell.variant in ("samoe", "ar-moe") else 3000
        trained(study, cell.id, cell.recipe, 3.0 + number / 10, parameters=size)
    text = report(results(study))
    table = text.partition("At equal total parameters")[2].partition("###")[0]
    lines = [line for line in table.splitlines() if "core/samoe " in line]
    assert len(lines) == 2 and "picked: core/ar-moe" in lines[0]
    assert "all, groups, dense" in lines[1] and "not spanned" in lines[1]


def test_a_larger_reference_on_both_sides_is_interpolated(make, trained):
    study = make(
        parts__core__search="base",
        parts__size={
            "variants": ["ar-moe"],
            "seeds": [0],
            "search": "base",
            "axes": {"depth": {"L4": {"model.num_hidden_layers": 4}}},
        },
    )
    for cell in cells(study):
        trained(study, cell.id, cell.recipe, 2.8 if cell.part == "size" else 3.0)
    (one,) = results(study)["matched"]["FLOPs per token"]
    assert one["how"] == "interpolated"
    assert one["taken_from"] == ["core/ar-moe", "size/ar-moe/L4"]
    assert 2.8 < one["nats_beside"] < 3.0


@pytest.mark.parametrize(
    "point", [{"text.train": ["python:train:code"]}, {"steps": 21}, {"objective": "masked"}]
)
def test_losses_on_other_text_or_more_of_it_are_not_compared(make, trained, point):
    axes = {"other": {"one": point}}
    part = {"variants": ["ar-moe"], "seeds": [0], "search": "base", "axes": axes}
    study = make(parts__core__search="base", parts__core__variants=["samoe"], parts__size=part)
    for cell in cells(study):
        trained(study, cell.id, cell.recipe, 3.0)
    assert results(study)["matched"]["total parameters"] == []


def test_task_scores_keep_the_error_over_items_apart_from_that_over_seeds(make, trained):
    changed = {"parts__core__search": "base", "parts__size__search": "base"}
    study = make(evaluation={"tasks": ["blimp"]}, **changed)
    store = Store(study.output)
    for cell, value in zip(cells(study, "core"), (0.5, 0.6, 0.7, 0.6), strict=True):
        trained(study, cell.id, cell.recipe, 3.0)
        score = {"metric": "acc", "value": value, "standard_error": 0.02, "n": 100, "chance": 0.5}
        scores = [score | {"source": "blimp/test"}]
        write(store.beside(cell.id, "json"), {"tasks": {"blimp": {"scores": scores}}})
    blimp = results(study)["rows"][0]["tasks"]["blimp"]
    assert (blimp["mean"], blimp["standard_error"]) == (pytest.approx(0.6), pytest.approx(0.02))
    assert blimp["sd_over_seeds"] == pytest.approx(0.2 / 2**0.5)
    assert "blimp acc (chance 0.5)" in report(results(study))


def test_a_fitted_part_gets_its_law_per_variant_and_text(make, trained):
    axes = {
        "width": {f"D{D}": {"model.hidden_size": D} for D in (16, 32)},
        "experts": {f"E{E}": {"model.num_experts": E} for E in (2, 4, 8)},
    }
    part = {"variants": ["ar-moe", "samoe"], "seeds": [0], "search": "base", "axes": axes}
    study = make(parts__core__search="base", parts__size={**part, "is_fitted": True})
    for cell in cells(study):
        fields = cell.recipe.model.fields()
        nats = 5 * fields["hidden_size"] ** -0.1 * fields["num_experts"] ** -0.05
        trained(study, cell.id, cell.recipe, nats, parameters=fields["num_experts"] * 1000)
    fits = results(study)["fits"]
    assert [fit["variant"] for fit in fits] == ["ar-moe", "samoe"]
    assert len(fits[0]["rows"]) == 6  # the core's own size is one of them
    assert fits[0]["by_width_and_experts"]["slopes"] == pytest.approx((-0.1, -0.05))
    assert fits[0]["by_parameters"] is None  # three different sizes only


def test_a_law_that_the_points_do_not_determine_is_named_so(make, trained):
    experts = {f"E{E}": {"model.num_experts": E} for E in (2, 4, 8, 16)}
    part = {"variants": ["ar-moe"], "seeds": [0], "search": "base", "axes": {"experts": experts}}
    study = make(parts__core__search="base", parts__size={**part, "is_fitted": True})
    for cell, nats in zip(cells(study, "size"), (3.0, 3.1, 2.95, 3.05), strict=True):
        number = cell.recipe.model.fields()["num_experts"]
        trained(study, cell.id, cell.recipe, nats, parameters=number * 1000)
    (fit,) = results(study)["fits"]
    assert fit["by_parameters"]["is_determined"] is False
    assert "not determined" in report(results(study))


def test_decode_times_stand_in_the_row_of_their_cell(core):
    store = Store(core.output)
    write(store.folder / "decode.json", {"milliseconds": {"core/samoe/seed-0": {"1": 2.5}}})
    found = results(core)
    assert found["rows"][1]["decode_milliseconds"] == {1: 2.5}
    assert "ms, batch 1" in report(found) and "decode time, batch 1" in found["matched"]
