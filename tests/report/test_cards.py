"""Model cards: what the hub reads, what a reader reads, and that nobody's words are lost."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from commands import QUICK, make_source, smelt, text_file
from smelt.evaluate.results import Result


@pytest.fixture
def folder(ground: Any, tmp_path: Path) -> Path:
    """A copy of a compressed folder, whose card may be written to."""
    return Path(shutil.copytree(ground.merged, tmp_path / "merged"))


def fill(ground: Any, folder: Path, *more: Any) -> Any:
    return smelt("report", folder, "--card", "--results", ground.results, *more)


def test_a_card_names_its_source_and_takes_over_its_licence(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    head = "---\nlicense: other\nlicense_name: mine\nlanguage: [en]\npipeline_tag: fill-mask\n---\n"
    (source / "README.md").write_text(head + "# Source\n")
    text = text_file(tmp_path)
    assert (
        smelt("compress", source, tmp_path / "out", "--keep", 0.5, "--text", text, *QUICK).code == 0
    )
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == "source"
    assert (card.data.license, card.data.license_name) == ("other", "mine")
    assert card.data.language == ["en"]
    assert {"mixture-of-experts", "smelt", "expert-pruning"} <= set(card.data.tags)


def test_results_come_into_the_metadata_with_their_errors(ground: Any, folder: Path) -> None:
    done = fill(ground, folder)
    assert done.code == 0, done.err
    card = ModelCard.load(folder / "README.md")
    found = {(one.dataset_type, one.metric_type): one for one in card.data.eval_results}
    one = found["perplexity", "bits per byte"]
    assert one.metric_value == 1.2 and one.metric_args["standard_error"] == 0.05
    assert found["piqa", "acc"].metric_value == 0.5
    assert "| bits per byte ↓" in card.text and "1.000 ± 0.050" in card.text  # of the original


def test_a_second_time_changes_nothing(ground: Any, folder: Path) -> None:
    assert fill(ground, folder).code == 0
    once = (folder / "README.md").read_text()
    assert fill(ground, folder).code == 0
    assert (folder / "README.md").read_text() == once


def test_new_results_replace_old_ones_and_leave_others(
    ground: Any,
    folder: Path,
    make_result: Callable[..., Result],
    results_file: Callable[..., Path],
) -> None:
    assert fill(ground, folder).code == 0
    before = len(ModelCard.load(folder / "README.md").data.eval_results)
    again = results_file(make_result(ground.fingerprints["merged"], value=1.15))
    assert smelt("report", folder, "--card", "--results", again).code == 0
    found = ModelCard.load(folder / "README.md").data.eval_results
    values = [one.metric_value for one in found if one.metric_type == "bits per byte"]
    assert values == [1.15] and len(found) == before


def test_what_a_user_wrote_stays_word_for_word(ground: Any, folder: Path) -> None:
    path = folder / "README.md"
    path.write_text(path.read_text().replace("## Measured", "My own words.\n\n## Measured"))
    with path.open("a") as file:
        file.write("\nMore of mine.\n")
    assert fill(ground, folder).code == 0
    text = path.read_text()
    assert "My own words." in text and text.rstrip().endswith("More of mine.")


def test_a_measured_part_edited_by_hand_is_refused(ground: Any, folder: Path) -> None:
    assert fill(ground, folder).code == 0
    path = folder / "README.md"
    edited = path.read_text().replace("1.200 ± 0.050", "0.900 ± 0.050")
    path.write_text(edited)
    done = fill(ground, folder)
    assert done.code == 2 and "edited by hand" in done.err
    assert path.read_text() == edited


def test_a_folder_without_a_card_gets_one(ground: Any, folder: Path) -> None:
    (folder / "README.md").unlink()
    assert fill(ground, folder).code == 0
    assert "| bits per byte ↓" in (folder / "README.md").read_text()


def test_results_of_another_checkpoint_are_refused(
    ground: Any,
    folder: Path,
    make_result: Callable[..., Result],
    results_file: Callable[..., Path],
) -> None:
    before = (folder / "README.md").read_text()
    done = smelt("report", folder, "--card", "--results", results_file(make_result("9" * 64)))
    assert done.code == 2 and "none of the results" in done.err
    assert (folder / "README.md").read_text() == before


def test_the_card_of_changed_weights_holds_no_results_of_the_old_ones(
    ground: Any, folder: Path
) -> None:
    from smelt.checkpoint.card import without_results

    path = folder / "README.md"
    before = path.read_text()
    assert without_results(before) == before
    assert fill(ground, folder).code == 0
    after = without_results(path.read_text())
    card = ModelCard(after)
    assert not card.data.eval_results and "model-index" not in after
    assert "1.200" not in after and "not measured yet" in after
    assert card.text.strip() == ModelCard(before).text.strip()
