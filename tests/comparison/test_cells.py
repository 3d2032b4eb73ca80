"""Laws of the recipe: what a variant inherits, what a cell is, what nothing may be chosen on."""

import pytest

from smelt.comparison.cells import Cell, cells, needs_search, searched
from smelt.comparison.settings import FULL, merged
from smelt.comparison.works import Works
from smelt.errors import RecipeError
from smelt.study.store import Store


def works(study):
    return Works(study, Store(study.output))


def test_a_variant_is_its_base_with_what_it_changes(make):
    study = make()
    common = {"experts": 4, "budget": "global", "excluded": [0]}
    assert study.resolve("average").compress == {**common, "method": "average"}
    assert study.resolve("mc-smoe").compress == study.resolve("m-smoe").compress
    assert study.resolve("mc-smoe").heal == {**study.heal, "decompose": {"rank": 4}}
    assert study.resolve("unhealed").heal is None
    assert study.resolve(FULL).compress is None and study.resolve(FULL).heal is None


def test_null_undoes_a_group_for_all_that_build_on_it(make):
    study = make(
        variants__longer={"compress": None},
        variants__again={"base": "longer"},
        variants__back={"base": "unhealed", "heal": {"steps": 3}},
    )
    assert study.resolve("longer").compress is None
    assert study.resolve("again").compress is None and study.resolve("again").heal["steps"] == 20
    assert study.resolve("back").heal["steps"] == 3


def test_a_variant_wins_over_a_ground_and_a_ground_over_the_comparison(make):
    study = make(variants__short={"base": "m-smoe", "heal": {"steps": 7}})
    steps = {
        (name, task): study.resolve(name, task).heal["steps"]
        for name in ("m-smoe", "short")
        for task in ("sst2", "mrpc")
    }
    assert steps["m-smoe", "sst2"] == 20 and steps["m-smoe", "mrpc"] == 30
    assert steps["short", "sst2"] == steps["short", "mrpc"] == 7


def test_groups_of_settings_are_joined_and_dotted_names_go_into_them():
    base = {"a": {"b": 1, "c": 2}, "d": 3}
    assert merged(base, {"a": {"b": 5}}, {"a.c": 6, "e.f": 7}) == {
        "a": {"b": 5, "c": 6},
        "d": 3,
        "e": {"f": 7},
    }
    assert base == {"a": {"b": 1, "c": 2}, "d": 3}


def test_cells_run_seed_by_seed_after_their_full_model_and_each_is_one(make):
    own = [cell.id for cell in cells(make())]
    first = [f"sst2/seed-0/{name}" for name in (FULL, "m-smoe", "average", "mc-smoe", "twice")]
    second = [name.replace("seed-0", "seed-1") for name in first]
    assert own == [*first, *second, "sst2/seed-0/other", "sst2/seed-0/unhealed"]
    more = [cell.variant for cell in cells(make(), "more")]
    assert more == [FULL, "other", "unhealed"]


def test_what_comes_after_a_variant_asks_for_it(make):
    study = make(parts__more__variants=["twice"])
    assert [cell.variant for cell in cells(study, "more")] == [FULL, "m-smoe", "twice"]
    made = works(study).variant(Cell("sst2", 1, "twice"))
    assert made.compress is None
    assert made.heal.student.endswith("cells/sst2/seed-1/m-smoe")
    assert made.heal.teacher.endswith("cells/sst2/seed-1/full")


def test_all_that_is_compressed_is_made_from_one_full_model_and_its_statistics(make):
    study = make()
    made = [works(study).variant(Cell("sst2", 1, name)) for name in ("m-smoe", "average")]
    full = works(study).full(Cell("sst2", 1, FULL))
    assert {one.compress.source for one in made} == {full.model} == {one.source for one in made}
    assert {one.stats for one in made} == {full.stats}
    assert full.calibration.task.name == "sst2" and full.calibration.seed == 1
    assert full.train.task.name == "sst2" and (full.train.steps, full.train.seed) == (6, 1)
    assert {one.heal.task for one in made} == {full.train.task}


def test_every_seed_of_a_ground_is_fine_tuned_from_the_stage_before_it_and_others_are_not(make):
    stage = {"task": {"name": "sst2"}, "steps": 3}
    study = make(tasks__sst2__before=stage)
    made = works(study)
    name, work = made.before("sst2")
    assert name == "sst2/before" and work.train.start == study.start and work.train.steps == 3
    fulls = [made.full(Cell("sst2", seed, FULL)) for seed in (0, 1)]
    assert {one.train.start for one in fulls} == {work.model} == {one.source for one in fulls}
    assert made.before("mrpc") is None
    assert made.full(Cell("mrpc", 0, FULL)).train.start == study.start
    named = "switch-small-questions.yaml"
    both = works(make(tasks__sst2__before=named, tasks__mrpc__before=named))
    assert both.before("sst2") == both.before("mrpc")  # run once
    whole = make(
        tasks__sst2__before=stage, tasks__sst2__fine_tune=None
    )  # what the stage made is the full model
    assert str(works(whole).folder(Cell("sst2", 0, FULL))) == work.model


def test_gradients_are_taken_where_a_variant_reads_them(make):
    def wants(study):
        return works(study).full(Cell("sst2", 0, FULL)).calibration.gradients

    assert not wants(make())
    assert wants(make(variants__other__compress={"similarity": "gradient"}))
    assert wants(make(variants__other__compress={"method": "fisher"}))


def test_layers_that_are_excluded_are_decomposed_neither(make):
    for name in ("mc-smoe", "twice"):
        made = works(make()).variant(Cell("sst2", 0, name))
        assert made.heal.decompose.excluded == (0,)


def test_nothing_is_chosen_on_what_is_reported(make):
    study = make()
    assert searched(study, "sst2") == ["m-smoe", "mc-smoe"]  # one for each kind
    for rate in (0.001, 0.002):
        for name in searched(study, "sst2"):
            _, trial = works(study).trial("sst2", name, rate)
            assert trial.ask.part == "choose" and trial.heal.steps == 5
            assert trial.heal.learning_rate == rate
    asked = [work.ask.part for _, work in works(study).every() if work.ask is not None]
    assert set(asked) == {"report"}
    lenders = {v: needs_search(study, v) for v in ("average", "twice", "unhealed", FULL)}
    assert lenders == {"average": "m-smoe", "twice": "mc-smoe", "unhealed": None, FULL: None}


def test_a_text_that_is_reported_is_neither_trained_nor_chosen_on(make):
    text = {"train": ["a.txt"], "choose": ["b.txt"], "report": ["b.txt"]}
    with pytest.raises(RecipeError, match="b.txt is reported"):
        make(tasks__prose={"text": text})


def test_a_text_needs_no_fine_tuning_and_is_calibrated_and_healed_on(make, tmp_path):
    text = {"train": ["a.txt"], "choose": ["b.txt"], "report": ["c.txt"], "sequence_length": 64}
    study = make(
        tasks={"prose": {"text": text}},
        calibration={"num_tokens": 100},
        parts={"main": {"variants": ["m-smoe"], "tasks": ["prose"], "seeds": [0]}},
    )
    full = works(study).full(Cell("prose", 0, FULL))
    assert full.train is None and full.model == str(tmp_path / "start")
    assert full.calibration.text == ("a.txt",) and full.calibration.sequence_length == 64
    made = works(study).variant(Cell("prose", 0, "m-smoe"))
    assert [str(one) for one in made.heal.text.train] == ["a.txt"]
    assert [str(one) for one in made.heal.text.held_out] == ["b.txt"]
    assert made.ask.text == ("c.txt",) and made.ask.benchmark is None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"focus": "mine"}, "focus of parts.main: there is no 'mine'"),
        ({"variants__full": {}}, "variants.full: there is one always"),
        ({"variants__average__base": "averaged"}, "no 'averaged'; there are m-smoe"),
        ({"variants__m-smoe__base": "average"}, "has no end"),
        ({"variants__average__rate": "twice"}, "twice has no search of its own"),
        ({"variants__average__rate": "unhealed"}, "unhealed has no search of its own"),
        ({"variants__twice__heal": None}, "nothing is left to do"),
        ({"variants__again": {"after": "twice"}}, "twice comes after another one"),
        ({"parts__main__tasks": ["sst3"]}, "parts.main.tasks: there is no 'sst3'"),
        ({"parts__main__variants": ["m-smo"]}, "there is no 'm-smo'; there are full, m-smoe"),
        ({"tasks__sst3": {}}, "tasks.sst3: there is no such benchmark; they are sst2"),
        ({"heal_search__rates": [0.2, 0.1]}, "ascending"),
        ({"latency": {"task": "squad"}}, "latency.task: there is no 'squad'"),
    ],
)
def test_a_recipe_that_cannot_be_says_what_is_wrong(make, changed, message):
    with pytest.raises(RecipeError, match=message):
        make(**changed)


def test_a_cell_that_cannot_be_is_named(make):
    study = make(variants__average__compress={"method": "average", "exprts": 3})
    with pytest.raises(RecipeError, match="variant average: there is no setting 'exprts'"):
        list(works(study).every())
