"""Task files: which items are for what, and what is wrong in which line."""

import pytest

from benchmarks import MAKERS, squad, sst2, wikiqa, write_split
from smelt.errors import RecipeError, SmeltError
from smelt.text2text.files import is_held_out, read_items, read_split
from smelt.text2text.tasks import TASKS


def sources(items):
    return {one.source or one.name for one in items.items}


@pytest.mark.parametrize("task", TASKS)
def test_parts_share_no_source(task, files):
    parts = [read_items(task, part, data=files) for part in ("train", "choose", "report")]
    assert all(one.items for one in parts)
    assert parts[0].split == "train"
    assert parts[2].split == TASKS[task].report
    known = [{f"{one.split}:{source}" for source in sources(one)} for one in parts]
    assert not known[0] & known[1]
    assert not known[2] & (known[0] | known[1])
    names = [item.name for one in parts for item in one.items]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("task", ["multirc", "winogrande", "squad", "hotpotqa"])
def test_without_a_labelled_test_one_source_in_ten_is_kept_to_choose_on(task, files):
    whole = read_split(task, "train", data=files)
    train, chosen = (read_items(task, part, data=files) for part in ("train", "choose"))
    assert {*train.items, *chosen.items} == set(whole.items)
    assert all(map(is_held_out, chosen.items))
    assert "one source in ten" in str(chosen)


def test_twins_of_winogrande_are_on_one_side(files):
    for part in ("train", "choose"):
        items = read_items("winogrande", part, data=files).items
        assert all(sum(one.source == other.source for other in items) == 2 for one in items)


@pytest.mark.parametrize("task", TASKS)
def test_the_target_is_the_right_choice_or_a_reference(task, files):
    for item in read_split(task, "train", data=files).items:
        if item.choices:
            assert item.target == item.choices[item.label]
            assert not item.references
        else:
            assert item.target in item.references
            assert item.label is None
        if item.answer_at is not None:
            assert item.context[item.answer_at :].startswith(item.target)


def test_an_answer_is_where_it_was_after_spare_blanks_went(tmp_path):
    context = "The  house\n\nis red.  A house."
    record = {"context": context, "question": "What is a house?"}
    record["answers"] = {"text": ["house"], "answer_start": [context.rindex("house")]}
    write_split(tmp_path, "squad", "train", [record])
    (item,) = read_split("squad", "train", data=tmp_path).items
    assert item.context == "The house is red. A house."
    assert item.answer_at == item.context.rindex("house")


def test_paragraphs_are_ordered_by_the_question_and_not_by_the_answer(files):
    for item in read_split("hotpotqa", "train", data=files).items:
        assert item.context.startswith("Paint: ")
    assert {one.answer_at is None for one in read_split("hotpotqa", "train", data=files).items} == {
        True,  # yes is no span
        False,
    }


def test_candidates_of_wikiqa_say_their_place(files):
    cues = [one.cue for one in read_split("wikiqa", "test", data=files).items[:6]]
    assert cues == ["sentence 1:", "sentence 2:", "sentence 3:"] * 2


def test_a_limit_takes_whole_groups_evenly(files):
    whole = read_items("wikiqa", "report", data=files)
    some = read_items("wikiqa", "report", data=files, limit=2)
    groups = list(dict.fromkeys(one.group for one in whole.items))
    assert [one.group for one in some.items] == [groups[0]] * 3 + [groups[3]] * 3
    assert "2 of 6 groups" in str(some)
    assert read_items("sst2", "report", data=files, limit=1000).items == whole_of(files, "sst2")


def whole_of(files, task):
    return read_items(task, "report", data=files).items


def test_a_subset_is_named(files):
    assert str(read_items("sst2", "report", data=files)) == (
        "sst2/test (subset: 18 of 1,821 records)"
    )


BAD = {
    "field": ("sst2", {"sentence": "a"}, "the field 'label' is missing. SST-2 needs"),
    "label": ("sst2", {"sentence": "a", "label": -1}, "label is -1: the labels are 0, 1"),
    "true is no label": ("sst2", {"sentence": "a", "label": True}, "label is True"),
    "empty sentence": ("sst2", {"sentence": " ", "label": 1}, "sentence is ' '"),
    "letter": ("winogrande", MAKERS["winogrande"](0) | {"answer": "3"}, "labels are '1', '2'"),
    "no gap": ("winogrande", MAKERS["winogrande"](0) | {"sentence": "A b."}, "0 gaps"),
    "empty answer": (
        "squad",
        squad(0) | {"answers": {"text": [""], "answer_start": [0]}},
        "answer is ''",
    ),
    "no answers": ("squad", squad(0) | {"answers": {"text": [], "answer_start": []}}, "text is"),
    "elsewhere": (
        "squad",
        squad(0) | {"answers": {"text": ["house"], "answer_start": [3]}},
        "the context does not say 'house' there",
    ),
    "no span": ("hotpotqa", MAKERS["hotpotqa"](0) | {"answer": ""}, "answer is ''"),
    "no paragraphs": ("hotpotqa", MAKERS["hotpotqa"](0) | {"context": [{"text": "a"}]}, "title"),
    "no questions": ("multirc", {"passage": {"text": "a"}}, "text and questions"),
    "empty right answer": (
        "multirc",
        {
            "passage": {
                "text": "a",
                "questions": [{"question": "b", "answers": [{"text": "", "label": 1}]}],
            }
        },
        "text is ''",
    ),
    "which": ("copa", MAKERS["copa"](0) | {"question": "why"}, "'cause', 'effect'"),
    "no JSON": ("copa", "{", "is no JSON"),
    "no record": ("copa", "[1]", "is no record"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_record_is_named_by_file_and_line(case, tmp_path):
    task, record, message = BAD[case]
    path = write_split(tmp_path, task, "train", [MAKERS[task](1), record])
    with pytest.raises(SmeltError) as error:
        read_split(task, "train", data=tmp_path)
    assert f"{path}, line 2: " in str(error.value)
    assert message in str(error.value)


def test_bad_files_and_names_are_errors(files, tmp_path, monkeypatch):
    with pytest.raises(RecipeError, match="no task 'sst3'. The tasks are: sst2, mrpc"):
        read_items("sst3", "train", data=files)
    with pytest.raises(RecipeError, match="at least one item"):
        read_items("sst2", "train", data=files, limit=0)
    with pytest.raises(SmeltError, match="no such task file"):
        read_items("sst2", "train", data=tmp_path)
    write_split(tmp_path, "sst2", "train", [])
    with pytest.raises(SmeltError, match="holds no record"):
        read_split("sst2", "train", data=tmp_path)
    (tmp_path / "sst2" / "test.jsonl.gz").write_bytes(b"plain")
    with pytest.raises(SmeltError, match="cannot be read"):
        read_split("sst2", "test", data=tmp_path)
    monkeypatch.delenv("SMELT_DATA", raising=False)
    with pytest.raises(RecipeError, match="Set SMELT_DATA"):
        read_items("sst2", "train")


def test_files_are_found_by_the_environment(files, monkeypatch):
    monkeypatch.setenv("SMELT_DATA", str(files))
    assert read_split("sst2", "test").items[0].question == f"sentence: {sst2(2016)['sentence']}"
    assert read_split("wikiqa", "test").num_records == len([wikiqa(i) for i in range(18)])


@pytest.mark.data
@pytest.mark.parametrize("task", TASKS)
def test_published_files_are_read_whole(task):
    for part in ("train", "choose", "report"):
        found = read_items(task, part)
        assert found.items
        assert found.num_records <= TASKS[task].published[found.split]
