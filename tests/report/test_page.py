"""The page as text: what it says, that it is well formed, that it loads nothing."""

import json
import re
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from commands import smelt
from smelt.evaluate.item_files import Answers, save_answers
from smelt.evaluate.outcomes import Outcome
from smelt.evaluate.results import save

HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6")


class Outline(HTMLParser):
    """Headings, ids, header cells and addresses of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.levels: list[int] = []
        self.ids: list[str] = []
        self.tags: Counter[str] = Counter()
        self.cells: list[dict[str, Any]] = []
        self.addresses: list[str] = []
        self.references: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        held = dict(attrs)
        self.tags[tag] += 1
        if tag in HEADINGS:
            self.levels.append(int(tag[1]))
        if tag == "th":
            self.cells.append(held)
        self.ids += [str(held["id"])] if "id" in held else []
        self.addresses += [str(held[n]) for n in ("src", "href") if n in held]
        names = ("aria-labelledby", "aria-describedby")
        self.references += [str(held[n]) for n in names if n in held]


def data_of(text: str) -> dict[str, Any]:
    found = re.search(r'id="report-data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    value: dict[str, Any] = json.loads(found[1])
    return value


@pytest.fixture(scope="module")
def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def outline(text: str) -> Outline:
    return Outline(text)


def test_headings_go_down_one_level_at_a_time(outline: Outline) -> None:
    assert outline.levels[0] == 1 and outline.levels.count(1) == 1
    pairs = zip(outline.levels, outline.levels[1:], strict=False)
    assert all(after <= before + 1 for before, after in pairs)


def test_every_id_is_one_of_a_kind_and_every_reference_has_its_target(outline: Outline) -> None:
    assert not [name for name, times in Counter(outline.ids).items() if times > 1]
    links = [a.removeprefix("#") for a in outline.addresses]
    assert not {*links, *outline.references} - set(outline.ids)


def test_every_table_has_a_caption_and_every_head_its_scope(outline: Outline) -> None:
    assert outline.tags["caption"] == outline.tags["table"] > 5
    assert {cell.get("scope") for cell in outline.cells} == {"col", "row"}


def test_the_page_names_no_address_of_the_network(text: str, outline: Outline) -> None:
    assert all(address.startswith("#") for address in outline.addresses)
    assert "http:" not in text and "https:" not in text and "//cdn" not in text
    assert "default-src 'none'" in text


def test_every_figure_has_a_sentence_and_its_numbers_or_a_view(text: str) -> None:
    figures = re.findall(r"<figure.*?</figure>", text, re.DOTALL)
    assert len(figures) > 12
    for figure in figures:
        said = re.search(r"<figcaption[^>]*>(.*?)</figcaption>", figure, re.DOTALL)
        assert said is not None and len(said[1].split()) > 4
        assert "<table>" in figure or "members" in figure


def test_plotly_accepts_every_figure(text: str) -> None:
    from plotly.graph_objects import Figure

    plain = json.dumps(data_of(text)["figures"])
    plain = plain.replace('"@seq"', '"Blues"').replace('"@div"', '"RdBu"')
    for name, spec in json.loads(re.sub(r'"@\w+"', '"#123456"', plain)).items():
        Figure(spec)  # raises for what it does not know
        assert spec["data"], name


def test_the_views_hold_the_plan_as_it_is(text: str, ground: Any) -> None:
    plan = json.loads((ground.merged / "smelt" / "plan.json").read_text())
    usage = json.loads((ground.merged / "smelt" / "usage.json").read_text())
    held = data_of(text)["plans"]["merged"]["layers"]
    for own, layer in zip(held, plan["layers"], strict=True):
        assert own["labels"] == layer["labels"] and own["dominants"] == layer["dominants"]
        assert own["count"] == usage["layers"][layer["name"]]["count"]
        assert own["weights"] == pytest.approx(layer["weights"], rel=1e-3)


def test_a_number_of_the_page_is_the_number_of_the_file(text: str) -> None:
    assert "1.200 ± 0.050" in text  # of merged
    assert "0.2000" in text or "0.2" in text  # its error in the second layer


def test_names_are_text_and_never_markup(ground: Any, tmp_path: Path) -> None:
    from smelt.report.make import make_report

    place = tmp_path / "p.html"
    make_report([ground.dropped], place, title="<script>alert(1)</script> & co")
    found = place.read_text(encoding="utf-8")
    assert "<script>alert" not in found and "&lt;script&gt;alert(1)" in found


def test_names_cannot_end_the_script_that_holds_the_data(
    make_bench: Callable[..., Path], tmp_path: Path
) -> None:
    from smelt.report.make import make_report

    name = "</script><i>"
    bench = make_bench(tmp_path / "b.json", {name: "1" * 64, "other": "2" * 64})
    make_report([bench], tmp_path / "p.html")
    found = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert name not in found
    assert data_of(found)["figures"]["decode"]["data"][0]["name"] == name


def test_what_is_not_measured_is_named_with_its_command(ground: Any, tmp_path: Path) -> None:
    done = smelt("report", ground.dropped, "-o", tmp_path / "p.html", "--json")
    assert done.code == 0, done.err
    assert "quality" in done.json["not_measured"] and "stable rank" in done.json["not_measured"]
    text = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert "smelt inspect RUN --stable-rank" in text and 'id="quality"' not in text


def test_statistics_beside_a_plan_give_its_usage(ground: Any, tmp_path: Path) -> None:
    text = ground.folder / "text.txt"
    quick = ("--set", "sequence_length=32", "--tokens", "600", "--text", text)
    assert smelt("calibrate", ground.source, tmp_path / "stats", *quick).code == 0
    words = ("--stats", tmp_path / "stats", "--keep", 0.5, "-o", tmp_path / "p.json")
    assert smelt("plan", ground.source, *words).code == 0
    done = smelt("report", tmp_path / "p.json", tmp_path / "stats", "-o", tmp_path / "p.html")
    assert done.code == 0, done.err
    held = data_of((tmp_path / "p.html").read_text(encoding="utf-8"))["plans"]["p"]["layers"]
    assert all(sum(layer["count"]) > 0 for layer in held)


def test_stable_ranks_of_inspect_are_drawn_by_matrix(ground: Any, tmp_path: Path) -> None:
    done = smelt("inspect", ground.merged, "--stable-rank", "--beside", ground.source, "--json")
    (tmp_path / "ranks.json").write_text(done.out)
    page = tmp_path / "p.html"
    assert smelt("report", ground.merged, tmp_path / "ranks.json", "-o", page).code == 0
    figures = data_of(page.read_text(encoding="utf-8"))["figures"]
    drawn = figures["stable-rank-down"]["data"]
    means = [
        sum(one["down"]) / len(one["down"])
        for one in json.loads(done.out)["stable_rank"]["layers"].values()
    ]
    assert drawn[0]["y"] == pytest.approx(means, rel=1e-3)
    assert [line["name"] for line in drawn] == ["merged", "the original"]


def test_accuracies_differ_by_pairs_where_the_items_are_named(
    make_result: Any, make_bench: Any, tmp_path: Path
) -> None:
    """The larger of two models is wrong about one item more; a page without the items, and with."""
    right = {"big": [1, 0] * 7 + [0, 0], "small": [1, 0] * 8}
    marks = {"big": "1" * 64, "small": "2" * 64}
    found, told = [], []
    for name, own in right.items():
        columns = np.array(own, dtype=np.float64)[:, None]
        names = tuple(map(str, range(16)))
        one = Outcome("copa", "acc", "mean", columns, names, "copa", "a" * 64)
        told.append(Answers(name, marks[name], "float32", "cpu", (one,)))
        score = one.score()
        values = {"value": score.value, "standard_error": score.standard_error}
        found.append(make_result(marks[name], checkpoint=name, task="copa", metric="acc", **values))
    save(found, tmp_path / "scores.json")
    save_answers(told, tmp_path / "items.json")
    bench = make_bench(tmp_path / "bench.json", marks)

    def page(name: str, *more: Path) -> str:
        words = (*more, "--results", tmp_path / "scores.json", "--bench", bench)
        assert smelt("report", *words, "-o", tmp_path / name).code == 0
        return (tmp_path / name).read_text(encoding="utf-8")

    assert "is better by 0.06 ± 0.18: within two" in page("a.html")
    paired = page("b.html", tmp_path / "items.json")
    assert "is better by 0.062 ± 0.062: within two" in paired and "items.json" in paired
