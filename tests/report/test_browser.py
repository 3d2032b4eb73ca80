"""The page in a real browser: it draws, loads nothing, fits a phone, and keys get everywhere."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.browser

ARGUMENTS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
).split()
WANTED = "apt-get install chromium, and pip install playwright"


def lacking(what: str) -> None:
    """Skip, or fail where a browser is required (CI)."""
    words = f"{what} is missing: {WANTED}"
    if os.environ.get("SMELT_BROWSER") == "required":
        pytest.fail(words)
    pytest.skip(words)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        lacking("chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        lacking("playwright")
    with sync_playwright() as play:
        found = play.chromium.launch(executable_path=program, args=ARGUMENTS)
        yield found
        found.close()


@contextmanager
def seen(browser: Any, page: Path, width: int, scheme: str = "light") -> Iterator[Any]:
    """A page of that width, and after it: nothing was said on the console, nothing was loaded."""
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    view = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    view.on("console", lambda message: said.append(message.text))
    view.on("pageerror", lambda error: said.append(str(error)))
    view.on("request", lambda request: asked.append(request.url))
    view.goto(page.as_uri())
    yield view
    assert not said, said
    assert [url for url in asked if not url.startswith(("data:", "blob:"))] == [page.as_uri()]
    context.close()


def waited(view: Any, condition: Callable[[], bool]) -> None:
    for _ in range(400):
        if condition():
            return
        view.wait_for_timeout(50)
    raise AssertionError("it did not happen within 20 s")


DRAWN = "[...document.querySelectorAll('.plot')].filter((p) => p.querySelector('.main-svg')).length"


def draw_all(view: Any) -> int:
    """Scroll to every figure until it is drawn; how many there are."""
    number: int = view.evaluate("document.querySelectorAll('figure').length")
    for index in range(number):
        where = f"document.querySelectorAll('figure')[{index}]"
        view.evaluate(f"{where}.scrollIntoView({{behavior: 'instant'}})")
        waited(view, lambda w=where: view.evaluate(f"!!{w}.querySelector('.main-svg')"))
    return number


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1440])
def test_every_figure_is_drawn_and_nothing_overflows(
    browser: Any, page: Path, width: int, scheme: str
) -> None:
    with seen(browser, page, width, scheme) as view:
        number = draw_all(view)
        assert view.evaluate(DRAWN) == number > 12
        view.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
        widths = view.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert widths[0] <= widths[1]
        outside = view.evaluate(
            "[...document.querySelectorAll('main *')].filter((e) => !e.closest('.scroll, pre, svg')"
            " && e.getBoundingClientRect().right > innerWidth + 1 && getComputedStyle(e).position"
            " !== 'absolute').map((e) => e.tagName + '.' + e.className)"
        )
        assert not outside


def test_figures_wait_until_they_are_near(browser: Any, page: Path) -> None:
    with seen(browser, page, 1440) as view:
        view.wait_for_timeout(1500)
        number = view.evaluate("document.querySelectorAll('figure').length")
        assert view.evaluate(DRAWN) < number
        draw_all(view)


def contrast(view: Any, selector: str) -> float:
    """Of an element's text against the page, by WCAG's formula."""
    ink, ground = (
        view.evaluate(
            f"getComputedStyle(document.querySelector({where!r})).{name}".replace('"', "'")
        )
        for where, name in ((selector, "color"), ("body", "backgroundColor"))
    )

    def light(colour: str) -> float:
        parts = [int(p) / 255 for p in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((light(ink), light(ground)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_in_either_scheme(browser: Any, page: Path, scheme: str) -> None:
    with seen(browser, page, 1440, scheme) as view:
        for selector in ("main p", ".small", "summary", "nav a", ".cards dt"):
            assert contrast(view, selector) >= 4.5, selector
        ground = view.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (ground == "rgb(255, 255, 255)") == (scheme == "light")


def test_a_change_of_scheme_recolours_what_is_drawn(browser: Any, page: Path) -> None:
    with seen(browser, page, 1440) as view:
        draw_all(view)
        ink = "document.querySelector('#layer-errors .xtitle').style.fill"
        before = view.evaluate(ink)
        view.emulate_media(color_scheme="dark")
        waited(view, lambda: view.evaluate(ink) != before)


def test_the_keyboard_reaches_everything_in_reading_order(browser: Any, page: Path) -> None:
    with seen(browser, page, 1440) as view:
        draw_all(view)
        view.focus(".skip")
        order: list[list[Any]] = []
        for _ in range(400):
            here = view.evaluate(
                "(() => { const e = document.activeElement; const all ="
                " [...document.querySelectorAll('*')]; return e === document.body ? null"
                " : [all.indexOf(e), e.tagName, e.className]; })()"
            )
            if here is None or (order and here == order[0]):
                break
            order.append(here)
            view.keyboard.press("Tab")
        places = [place for place, _, _ in order]
        assert places == sorted(places) and len(order) > 50
        kinds = {tag for _, tag, _ in order}
        assert {"A", "SELECT", "BUTTON", "SUMMARY"} <= kinds
        plots = sum(name == "plot" or "plot" in name.split() for _, _, name in order)
        assert plots == view.evaluate("document.querySelectorAll('.plot').length")


def test_the_reader_chooses_a_layer_by_keys(browser: Any, page: Path, ground: Any) -> None:
    with seen(browser, page, 1440) as view:
        draw_all(view)
        figure = "#members-merged"
        assert ground.layers[0] in view.inner_text(f"{figure} .now")
        view.focus(f"{figure} select")
        view.keyboard.press("ArrowDown")
        waited(view, lambda: ground.layers[1] in view.inner_text(f"{figure} .now"))
        view.evaluate(f"document.querySelector('{figure} details').open = true")
        assert ground.layers[1] in view.inner_text(f"{figure} caption")
        assert view.evaluate(f"document.querySelectorAll('{figure} tbody tr').length") == 8


def test_a_press_on_a_key_of_the_legend_hides_its_line(browser: Any, page: Path) -> None:
    with seen(browser, page, 1440) as view:
        draw_all(view)
        lines = "document.querySelectorAll('#decode .scatterlayer .trace').length"
        assert view.evaluate(lines) == 3
        button = view.locator("#decode .legend button").first
        button.focus()
        view.keyboard.press("Enter")
        waited(view, lambda: view.evaluate(lines) == 2)
        assert button.get_attribute("aria-pressed") == "false"


def test_print_is_light_and_has_every_figure(browser: Any, page: Path) -> None:
    with seen(browser, page, 1440, "dark") as view:
        view.wait_for_timeout(300)
        view.emulate_media(media="print", color_scheme="dark")
        number = view.evaluate("document.querySelectorAll('figure').length")
        waited(view, lambda: view.evaluate(DRAWN) == number)
        assert view.evaluate("getComputedStyle(document.body).backgroundColor") == (
            "rgb(255, 255, 255)"
        )
        assert view.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
        waited(
            view, lambda: view.evaluate("document.querySelector('.main-svg').clientWidth <= 660")
        )


def test_without_scripts_the_numbers_are_there(browser: Any, page: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    view = context.new_page()
    view.goto(page.as_uri())
    assert "which this reader does not run" in view.locator("noscript").inner_text()
    assert view.locator("#layer-errors details table").count() == 1
    context.close()
