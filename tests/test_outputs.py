"""Laws of outputs: looked at before the work, written at once or not at all."""

import pytest

from smelt.errors import RecipeError, SmeltError
from smelt.outputs import check_new, write_text


def test_a_place_that_can_be_is_left_as_it_was(tmp_path):
    place = tmp_path / "not" / "yet" / "a.json"
    assert check_new(str(place)) == place
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_is_taken_or_cannot_be_is_named(tmp_path):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(RecipeError, match=r"taken: exists\. .* name another folder"):
        check_new(tmp_path / "taken", "folder")
    with pytest.raises(RecipeError, match=r"taken/a/b: cannot be written \(.*taken: Not a dir"):
        check_new(tmp_path / "taken" / "a" / "b")
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_text_is_written_whole_with_the_folders_above_it(tmp_path):
    place = tmp_path / "a" / "b.json"
    write_text(place, "one")
    write_text(place, "two")
    assert place.read_text() == "two" and list(place.parent.iterdir()) == [place]


def test_a_text_that_cannot_be_written_leaves_what_was_there(tmp_path, monkeypatch):
    place = tmp_path / "b.json"
    write_text(place, "one")

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(place), "replace", full)
    with pytest.raises(SmeltError, match=r"b\.json: cannot be written .*No space left"):
        write_text(place, "two")
    assert place.read_text() == "one" and list(tmp_path.iterdir()) == [place]
