"""Laws of what `smelt compress` does where nothing is said."""

import pytest

from commands import contents, make_source, smelt, text_file
from smelt import api
from smelt.compress.calibrate import RoutingStats
from smelt.compress.defaults import TOKENS, fill
from smelt.compress.plan import Plan
from smelt.compress.reconstructor import CannotFitError
from smelt.recipe import CompressRecipe, nest
from smelt.settings import check_recipe

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*calibration tokens reach:UserWarning", "ignore:.*numbers for each:UserWarning"
)


def some_text(folder):
    return {"text": [str(text_file(folder))], "num_tokens": 600, "sequence_length": 32}


def recipe(**settings):
    values = nest({"source": "a", "output": "b", "keep": 0.5, **settings})
    return check_recipe(values, CompressRecipe)


def statistics(**details):
    return RoutingStats({}, "c", "t", 9, details)


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    folder = tmp_path_factory.mktemp("defaults")
    make_source(folder / "source")
    api.calibrate(folder / "source", folder / "stats", **some_text(folder))
    return folder


def plan_of(folder):
    return Plan.load(folder / "smelt" / "plan.json")


# --- what is filled in ---------------------------------------------------------------------------


def test_a_fit_left_out_is_the_usual_one_and_a_fit_refused_stays_refused():
    assert fill(recipe(), None).reconstruct is not None
    assert fill(recipe(reconstruct=False), None).reconstruct is None
    assert fill(recipe(reconstruct=None), None).reconstruct is None
    assert fill(recipe(reconstruct={"steps": 7}), None).reconstruct.steps == 7
    assert fill(recipe(form="expanded"), None).reconstruct is None


def test_a_fit_calibrates_on_enough_unless_told_how_much():
    assert fill(recipe(), None).calibration.num_tokens == TOKENS
    assert fill(recipe(num_tokens=9), None).calibration.num_tokens == 9
    plain = CompressRecipe.model_fields["calibration"].default.num_tokens
    assert fill(recipe(reconstruct=False), None).calibration.num_tokens == plain


def test_the_text_of_statistics_is_walked_again_unless_another_is_named():
    stats = statistics(text=["theirs"], num_tokens=77, seed=3)
    found = fill(recipe(), stats).calibration
    assert (found.text, found.num_tokens, found.seed) == (("theirs",), 77, 3)
    assert fill(recipe(seed=5), stats).calibration.seed == 5
    named = fill(recipe(text=["mine"]), stats).calibration
    assert (named.text, named.num_tokens) == (("mine",), recipe().calibration.num_tokens)


def test_what_is_filled_in_is_written_and_read_back_as_it_is(tmp_path):
    once = fill(recipe(reconstruct=False), None)
    again = CompressRecipe.model_validate(once.model_dump(mode="json"))
    assert fill(again, None) == once


# --- what is done --------------------------------------------------------------------------------


def test_compress_repairs_unless_told_not_to(ground):
    given = ("--keep", 0.5, "--stats", ground / "stats")
    for name, more, is_fitted in (("yes", (), True), ("no", ("--no-reconstruct",), False)):
        done = smelt("compress", ground / "source", ground / name, *given, *more)
        assert done.code == 0, done.err
        made = plan_of(ground / name)
        assert [layer.fit is not None for layer in made.layers] == [is_fitted] * 2
        assert made.recipe.calibration.text == (str(ground / "text.txt"),)


def test_without_the_text_of_its_statistics_nothing_is_repaired_and_said_so(ground, tmp_path):
    gone = tmp_path / "gone.txt"
    gone.write_text(text_file(ground).read_text())
    settings = {"text": [str(gone)], "num_tokens": 600, "sequence_length": 32}
    stats = api.calibrate(ground / "source", **settings)
    gone.unlink()
    with pytest.warns(UserWarning, match="not repaired"):
        folder = api.compress(ground / "source", tmp_path / "out", keep=0.5, stats=stats)
    assert all(layer.fit is None for layer in plan_of(folder).layers)


def cannot(*_):
    raise CannotFitError("It cannot be run so. Leave reconstruct out.")


@pytest.mark.parametrize("place", ["pipeline.check_runs_alone", "walking.check_alone"])
def test_a_family_that_cannot_be_fitted_is_compressed_without_and_said_so(
    place, ground, tmp_path, monkeypatch
):
    """Whether that is known before anything runs or at the first layer."""
    monkeypatch.setattr(f"smelt.compress.{place}", cannot)
    source, settings = ground / "source", {**some_text(ground), "keep": 0.5}
    with pytest.raises(CannotFitError, match="Leave reconstruct out"):
        api.compress(source, tmp_path / "out", **settings, reconstruct={"steps": 4})
    assert not (tmp_path / "out").exists()
    with pytest.warns(UserWarning, match="not repaired"):
        folder = api.compress(source, tmp_path / "out", **settings)
    plain = api.compress(source, tmp_path / "plain", **settings, reconstruct=False)
    found = [{n: h for n, h in contents(f).items() if "safetensors" in n} for f in (folder, plain)]
    assert found[0] == found[1]
