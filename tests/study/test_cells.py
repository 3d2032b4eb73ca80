"""Laws of what a study file means: every cell is a line that follows from it."""

from pathlib import Path

import pytest

from smelt.errors import RecipeError
from smelt.settings import load_recipe, read_values
from smelt.study.cells import cells, model_config, searches, training_flops_per_token
from smelt.study.settings import StudyRecipe

ROOT = Path(__file__).resolve().parents[2]


def names(study, only=None):
    return [cell.id for cell in cells(study, only)]


def test_cells_come_seed_by_seed_and_part_by_part(make):
    assert names(make())[:4] == [
        "core/ar-moe/seed-0",
        "core/samoe/seed-0",
        "core/ar-moe/seed-1",
        "core/samoe/seed-1",
    ]


def test_every_point_has_its_first_seed_before_any_has_its_second(make):
    seeds = [cell.seed for cell in cells(make(parts__size__seeds=[0, 1])) if cell.part == "size"]
    assert seeds == sorted(seeds) and len(seeds) == 6  # E4, L2 is samoe of the core


def test_points_of_several_axes_are_all_combined_and_override_the_base(make):
    study = make()
    found = {cell.id: cell.recipe.model.fields() for cell in cells(study)}
    both = found["size/samoe/E8/L4/seed-0"]
    assert (both["num_experts"], both["num_hidden_layers"], both["pool_size"]) == (8, 4, 2)
    assert found["size/samoe/E4/L4/seed-0"]["num_experts"] == 4


def test_a_run_that_two_parts_ask_for_is_one_cell(make):
    study = make()
    assert "size/samoe/E4/L2/seed-0" not in names(study)  # it is samoe of the core
    assert len(names(study)) == 4 + 3
    assert names(study, "size")[0] == "core/samoe/seed-0"


def test_rows_that_are_left_out_are_neither_run_nor_searched_for(make):
    study = make(parts__size__without=["samoe/E8/L4"], parts__size__search="own")
    left = [name for name in names(make(parts__size__search="own")) if "E8/L4" not in name]
    assert names(study) == left
    assert {one.key for one in searches(study, "size")} == {
        f"size/samoe/{point}" for point in ("E4/L2", "E4/L4", "E8/L2")
    }


def test_the_same_run_at_another_rate_is_another_cell(make):
    assert "size/samoe/E4/L2/seed-0" in names(make(parts__size__search="base"))


def test_equal_flops_gives_as_many_steps_as_the_work_of_the_plain_variant(make):
    axes = {"depth": {"double": {"model.num_hidden_layers": 4, "steps": "equal-flops"}}}
    study = make(parts__size__axes=axes)
    plain, deep = (cells(study)[i].recipe for i in (1, -1))
    work = [one.steps * training_flops_per_token(one) for one in (plain, deep)]
    assert work[1] == pytest.approx(work[0], rel=0.5 / deep.steps)
    assert deep.steps < plain.steps and deep.warmup_steps < plain.warmup_steps


def test_equal_flops_can_be_those_of_another_point(make):
    axes = {
        "depth": {
            "double": {"model.num_hidden_layers": 4},
            "plain": {"steps": "equal-flops:double"},
        }
    }
    study = make(parts__size__axes=axes)
    deep, plain = (cells(study)[i].recipe for i in (-2, -1))
    assert plain.steps > deep.steps == 20
    work = [one.steps * training_flops_per_token(one) for one in (plain, deep)]
    assert work[0] == pytest.approx(work[1], rel=0.02)


def test_a_trial_differs_from_its_cells_in_rate_seed_length_and_what_it_is_judged_on(make):
    study = make(search__held_out=["python:held-out:code"])
    name, trial = searches(study, "core")[1].trial(study.search, 0.004)
    cell = cells(study)[1].recipe
    assert name == "core/samoe/rate-0.004"
    assert (trial.learning_rate, trial.seed, trial.steps) == (0.004, 100, 5)
    assert trial.warmup_steps / trial.steps == cell.warmup_steps / cell.steps
    assert str(trial.text.held_out[0]) == "python:held-out:code"
    assert trial.model == cell.model and trial.text.train == cell.text.train


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"base__stepz": 3}, "stepz"),
        ({"variants__samoe": {"model.hidden_sice": 3, "batch_sise": 4}}, "cell core/samoe: .*sise"),
        ({"parts__core__variants": ["ar-moe", "samo"]}, "no variant 'samo'; there are ar-moe"),
        ({"parts__core__search": "size"}, "earlier part"),
        (
            {"parts__last": {"variants": ["samoe"], "seeds": [0], "search": "size"}}
            | {"parts__size__search": "own"},
            "'size': it is 'own', 'base' or an earlier part without axes",
        ),
        ({"parts__size__search": "cor"}, "'cor': it is 'own', 'base' or an earlier"),
        ({"search": None}, "give search"),
        ({"search__rates": [0.004, 0.002]}, "ascending"),
        ({"base__seed": 3}, "neither output nor seeds"),
        ({"reference": "nobody"}, "'nobody' is no variant"),
        ({"parts__size__beside": "core/{variant}/E9"}, "no row 'core/samoe/E9'"),
        ({"parts__size__without": ["samoe/E9/L2"]}, "no row 'samoe/E9/L2'; the rows are samoe/E4"),
        (
            {"parts__size__without": [f"samoe/E{e}/L{n}" for e in (4, 8) for n in (2, 4)]},
            "leaves no row",
        ),
        (
            {"parts__size__without": ["samoe/E8/L4"]}
            | {
                "parts__last": {
                    "variants": ["samoe"],
                    "seeds": [0],
                    "beside": "size/{variant}/E8/L4",
                }
            },
            "no row 'size/samoe/E8/L4'",
        ),
        ({"parts__size__axes__experts__E8": {"steps": "equal-flops:E9"}}, "the points are E4/L2"),
        ({"parts__core/x": {"variants": ["samoe"], "seeds": [0]}}, "core/x"),
    ],
)
def test_a_study_that_does_not_hang_together_is_refused(make, changed, message):
    with pytest.raises(RecipeError, match=message):
        make(**changed)


OWN = [  # the others are comparisons of compression
    path
    for path in sorted((ROOT / "recipes/study").glob("*.yaml"))
    if "kind" not in read_values(path, StudyRecipe)
]


@pytest.mark.parametrize("path", OWN, ids=lambda p: p.stem)
def test_every_cell_of_the_studies_that_come_along_can_be_built(path):
    study = load_recipe(path, StudyRecipe)
    found = cells(study)
    assert len({cell.id for cell in found}) == len(found)
    for cell in found:
        assert model_config(cell.recipe).num_params() > 0


def test_the_core_of_the_study_has_no_duplicates_but_differs_in_one_thing_each():
    study = load_recipe(ROOT / "recipes/study/samoe.yaml", StudyRecipe)
    core = {cell.variant: cell.recipe for cell in cells(study, "core") if cell.seed == 0}
    assert len(core) == 8
    models = [recipe.model.model_dump_json() for recipe in core.values()]
    assert len(set(models)) == 8
    rest = {recipe.model_dump_json(exclude={"model"}) for recipe in core.values()}
    assert len(rest) == 1
    assert all(r.steps * r.batch_size * r.text.sequence_length >= 3e6 for r in core.values())
