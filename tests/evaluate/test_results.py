"""Records on disk and tables of them."""

import pytest

from smelt.errors import SmeltError
from smelt.evaluate.results import load, markdown, save


def test_a_table_is_aligned_and_says_nothing_of_what_is_not_there():
    table = markdown(
        [
            {"name": "a|b", "loss": 1.23456, "none": None},
            {"name": "longer name", "loss": 123456.0, "tokens": 70000},
        ]
    )
    assert table == (
        "| name        |    loss | tokens |\n"
        "| ----------- | ------: | -----: |\n"
        "| a\\|b        |   1.235 |        |\n"
        "| longer name | 123,456 | 70,000 |\n"
    )
    assert markdown([]) == ""


@pytest.mark.parametrize("text", ["", "[]", '{"version": 1}', '{"version": 1, "results": [{}]}'])
def test_a_damaged_file_of_results_is_named(text, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(SmeltError, match="results.json: cannot be read"):
        load(path)


def test_other_versions_and_absent_files_are_named(tmp_path):
    with pytest.raises(SmeltError, match="no such results"):
        load(tmp_path / "none.json")
    (tmp_path / "later.json").write_text('{"version": 2, "results": []}')
    with pytest.raises(SmeltError, match="version 2"):
        load(tmp_path / "later.json")


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SmeltError, match="cannot be written"):
        save([], tmp_path / "file" / "results.json")
