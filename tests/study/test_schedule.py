"""Laws of what is done next: decided by what is on disk."""

import pytest

from smelt.study.cells import cells, searches
from smelt.study.schedule import rates, ready, states
from smelt.study.store import Store, write


@pytest.fixture
def tried(make, trained):
    """A study whose trials are done; nats by variant and rate."""

    def made(nats, **changed):
        study = make(**changed)
        for one in searches(study, "core"):
            for rate, value in nats[one.variant].items():
                name, recipe = one.trial(study.search, rate)
                trained(study, name, recipe, value)
        return study, Store(study.output)

    return made


INSIDE = {"ar-moe": {0.002: 5.0, 0.004: 4.0, 0.008: 5.0}, "samoe": {0.002: 5, 0.004: 4, 0.008: 5}}
EDGE = {"ar-moe": {0.002: 5.0, 0.004: 4.5, 0.008: 4.0}, "samoe": {0.002: 5, 0.004: 4, 0.008: 5}}


def test_trials_come_first_rate_by_rate_and_no_cell_before_its_rate_is_known(make):
    study = make()
    jobs = ready(study, Store(study.output))
    assert [job.id for job in jobs] == [
        f"core/{variant}/rate-{rate:g}"
        for rate in (0.002, 0.004, 0.008)
        for variant in ("ar-moe", "samoe")
    ]


def test_cells_get_the_rate_that_was_best(tried):
    study, store = tried(INSIDE | {"samoe": {0.002: 5, 0.004: 5, 0.008: 5}}, search__extensions=0)
    jobs = {job.id: job.recipe for job in ready(study, store)}
    assert jobs["core/ar-moe/seed-0"].learning_rate == 0.004
    assert jobs["core/samoe/seed-1"].learning_rate == 0.002
    assert jobs["size/samoe/E8/L2/seed-0"].learning_rate == 0.002  # the core's


def test_a_best_rate_at_the_edge_asks_a_trial_more_of_every_variant(tried):
    study, store = tried(EDGE)
    assert [job.id for job in ready(study, store)] == [
        "core/ar-moe/rate-0.016",
        "core/samoe/rate-0.016",
    ]
    assert rates(study, store, "core").chosen == {}


def test_a_trial_that_diverged_counts_as_done(tried):
    nats = {"ar-moe": INSIDE["ar-moe"], "samoe": {0.002: 5.0, 0.004: 4.0}}
    study, store = tried(nats)
    write(store.beside("core/samoe/rate-0.008", "json"), {"diverged": "Training stopped"})
    assert rates(study, store, "core").chosen == {"core/ar-moe": 0.004, "core/samoe": 0.004}


def test_what_is_trained_is_evaluated_before_the_next_cell_and_then_left_alone(tried, trained):
    study, store = tried(INSIDE, evaluation={"tasks": ["blimp", "piqa"]})
    cell = cells(study)[0]
    trained(study, cell.id, cell.at(0.004), 3.0)
    first = ready(study, store)[0]
    assert (first.id, first.kind) == (cell.id, "evaluate")
    assert states(study, store, [cell])[cell.id] == "not evaluated: blimp, piqa"
    write(store.beside(cell.id, "json"), {"tasks": {"blimp": {}, "piqa": {}}})
    assert ready(study, store)[0].id == "core/samoe/seed-0"
    assert states(study, store, [cell])[cell.id] == "done"


def test_one_part_alone_brings_the_searches_it_borrows(make, tried):
    study = make()
    jobs = ready(study, Store(study.output), "size")
    assert {job.id.split("/")[0] for job in jobs} == {"core"}
    study, store = tried(INSIDE)
    assert [job.id for job in ready(study, store, "size")] == [
        "core/samoe/seed-0",  # which is E4, L2
        "size/samoe/E4/L4/seed-0",
        "size/samoe/E8/L2/seed-0",
        "size/samoe/E8/L4/seed-0",
    ]


def test_states_say_why_a_cell_is_not_done(tried):
    study, store = tried(INSIDE)
    store.fail("core/samoe/seed-0", "no room")
    log = store.run("core/ar-moe/seed-1.partial") / "smelt" / "log.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text('{"step": 5}\n{"step": 10}\n')
    found = states(study, store, cells(study))
    assert found["core/samoe/seed-0"] == "failed: no room"
    assert found["core/ar-moe/seed-1"] == "step 10 of 20"
    assert found["core/ar-moe/seed-0"] == "not begun"
