"""The search page in a real browser: Debian's Chromium, installed by scripts/setup_browser.sh."""

from __future__ import annotations

import base64
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from colour_index import SCRIPT, TOKEN, Darkness, index_pictures, make_index, png, served
from test_search_video import write_video

from pab.data.annotations import read_retrieval
from pab.search.index import Index
from pab.search.sources import VideoSource

ROOT = Path(__file__).resolve().parents[1]
AXE = next(iter(sorted((ROOT / "output/browser").glob("axe-*.min.js"))), None)
CHROMIUM = shutil.which("chromium")
IN_CI = bool(os.environ.get("CI"))
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
TILES = "#grid li[data-id]"
WAIT_MS = 60_000  # the test machine may be busy

pytestmark = pytest.mark.skipif(
    CHROMIUM is None and not IN_CI, reason="needs Chromium: bash scripts/setup_browser.sh"
)
needs_axe = pytest.mark.skipif(
    AXE is None and not IN_CI, reason="needs axe-core: bash scripts/setup_browser.sh"
)
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("page")
    make_index(root, 100)
    return root


@pytest.fixture(scope="module")
def at(root: Path) -> Iterator[str]:
    with served(Index.open(root / "index")) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    # Chromium's sandbox cannot be used by root.
    flags = ["--disable-dev-shm-usage", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield found
        found.close()


@pytest.fixture
def opened(browser: Any, at: str) -> Iterator[Open]:
    """Return a function that opens a page; the page must cause no error and no external request."""
    problems: list[str] = []
    contexts = []

    def heard(message: Any) -> None:
        if message.type in ("error", "warning"):
            problems.append(message.text)

    def asked(request: Any) -> None:
        if not request.url.startswith((f"{at}/", f"blob:{at}/")):
            problems.append(f"request to {request.url}")

    def open_page(path: str = "/", *, allowed: str = "", **options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 860}, **options})
        context.set_default_timeout(WAIT_MS)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: None if allowed and allowed in m.text else heard(m))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: (problems.append(dialog.message), dialog.dismiss()))
        context.on("request", asked)
        page.goto(at + path)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []


def search(page: Any, text: str) -> None:
    page.fill("#text", text)
    page.keyboard.press("Enter")
    page.wait_for_selector(TILES)


def becomes(page: Any, condition: str) -> None:
    """Wait for a JavaScript condition; the page forbids `eval`, which Playwright's wait needs."""
    end = time.monotonic() + WAIT_MS / 1_000
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        page.wait_for_timeout(50)


def first_becomes(page: Any, word: str) -> None:
    """Wait until the name of the first result contains a word."""
    becomes(page, f"(document.querySelector('{TILES} .name')?.title ?? '').includes('{word}')")


def names(page: Any) -> list[str]:
    return [str(name) for name in page.eval_on_selector_all(
        f"{TILES} .name", "all => all.map((one) => one.title)")]  # fmt: skip


def count_becomes(page: Any, count: int) -> None:
    becomes(page, f"document.querySelectorAll('{TILES}').length === {count}")


def drop(page: Any, content: bytes) -> None:
    """Drop a file on the page, as from a file manager."""
    data = page.evaluate_handle(
        """(text) => {
            const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
            const data = new DataTransfer();
            data.items.add(new File([bytes], "<b>drop</b>.png", { type: "image/png" }));
            return data;
        }""",
        base64.b64encode(content).decode(),
    )
    page.dispatch_event("#results", "dragenter", {"dataTransfer": data})
    assert page.is_visible("#drop")
    page.dispatch_event("#results", "drop", {"dataTransfer": data})
    page.wait_for_selector("#chip:not([hidden])")
    page.wait_for_selector(TILES)


def test_typing_shows_results_and_scrolling_loads_more(opened: Open) -> None:
    page = opened()
    assert page.evaluate("document.activeElement.id") == "text"
    search(page, "a red thing")
    count_becomes(page, 40)
    assert page.url.endswith("/?q=a+red+thing")
    assert page.title() == "a red thing – Photo search"
    assert all("red" in name or name == SCRIPT for name in names(page)[:20])
    becomes(page, f"document.querySelector('{TILES} img').naturalWidth > 0")
    seen = 40
    while seen < 101:
        page.mouse.wheel(0, 20_000)
        becomes(page, f"document.querySelectorAll('{TILES}').length > {seen}")
        seen = len(names(page))
    count_becomes(page, 101)
    assert len({*names(page)}) == 101
    page.wait_for_selector("#all:not([hidden])")
    assert "Pictures shown: 101" in page.inner_text("#all")


def test_scrolling_after_a_failed_load_loads_more(opened: Open) -> None:
    page = opened(allowed="ERR_FAILED")
    search(page, "a red thing")
    count_becomes(page, 40)
    page.route("**/api/search", lambda route: route.abort())
    page.mouse.wheel(0, 20_000)
    becomes(page, "document.body.innerText.includes('Scroll to load more pictures')")
    assert not page.is_visible("#all")
    page.unroute("**/api/search")
    page.mouse.wheel(0, -2_000)
    page.mouse.wheel(0, 20_000)
    becomes(page, f"document.querySelectorAll('{TILES}').length > 40")


def test_back_restores_results_and_scroll_position(opened: Open) -> None:
    page = opened()
    search(page, "red")
    count_becomes(page, 40)
    page.mouse.wheel(0, 900)
    becomes(page, "window.scrollY > 500")
    place = page.evaluate("window.scrollY")
    first = names(page)[0]
    search(page, "blue")
    first_becomes(page, "blue")
    page.go_back()
    becomes(page, f"document.querySelector('{TILES} .name')?.title === {json.dumps(first)}")
    assert page.input_value("#text") == "red"
    assert abs(page.evaluate("window.scrollY") - place) < 300
    page.go_back()
    page.wait_for_selector("#welcome", state="visible")
    assert page.locator(TILES).count() == 0


def test_a_link_can_be_shared(opened: Open) -> None:
    page = opened("/?q=yellow&minus=green&folder=park")
    page.wait_for_selector(TILES)
    assert page.input_value("#text") == "yellow"
    assert page.input_value("#minus") == "green"
    assert page.inner_text("#active") == "1"
    assert {name.split("/")[0] for name in names(page)} == {"park"}


def test_unwanted_terms(opened: Open) -> None:
    page = opened()
    search(page, "yellow")
    assert "yellow" in names(page)[0]
    page.fill("#minus", "green, blue")
    page.keyboard.press("Enter")
    page.wait_for_url("**/?q=yellow&minus=green&minus=blue")
    first_becomes(page, "red")


def test_examples_search(opened: Open) -> None:
    page = opened()
    page.click(".example >> nth=1")
    page.wait_for_selector(TILES)
    assert page.input_value("#text") == "a man falls off a bicycle"


def test_an_image_can_be_dropped_and_picked(opened: Open) -> None:
    page = opened()
    drop(page, png((0, 0, 255)))
    assert all("blue" in name for name in names(page)[:20])
    assert "image=upload-" in page.url
    count_becomes(page, 40)
    page.mouse.wheel(0, 20_000)
    becomes(page, f"document.querySelectorAll('{TILES}').length > 40")  # without a new upload
    page.reload()  # the server still has the picture
    page.wait_for_selector(TILES)
    assert "blue" in names(page)[0]
    files = [{"name": "x.png", "mimeType": "image/png", "buffer": png((0, 255, 0))}]
    page.set_input_files("#file", files)
    first_becomes(page, "green")
    page.click("#chip-remove")
    assert page.is_hidden("#chip")


def test_the_viewer(opened: Open) -> None:
    page = opened()
    search(page, "blue")
    found = names(page)
    page.click(f"{TILES} >> nth=1 >> .tile")
    becomes(page, "document.querySelector('#viewer-picture').naturalWidth > 0")
    assert page.inner_text("#viewer-name") == found[1]
    facts = page.inner_text("#viewer-facts")
    for word in ("Rank", "Score of mean", "Score of centre", "× 90 px"):
        assert word in facts
    page.wait_for_selector("#near:not([hidden])")
    assert page.locator("#strip img").count() == 8
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#viewer-name") == found[2]
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#viewer-name") == found[0]
    assert page.is_hidden("#previous")
    link = page.url
    page.keyboard.press("Escape")
    page.wait_for_selector("#viewer", state="hidden")
    assert page.url.endswith("/?q=blue")
    assert page.evaluate("document.activeElement.className") == "tile"
    page.keyboard.press("Enter")
    page.wait_for_selector("#viewer[open]")
    page.go_back()
    page.wait_for_selector("#viewer", state="hidden")

    other = opened(link.partition("//")[2].partition("/")[2].join(("/", "")))
    other.wait_for_selector("#viewer[open]")
    assert other.inner_text("#viewer-name") == found[0]
    other.click("#similar")
    other.wait_for_selector("#viewer", state="hidden")
    becomes(other, "!location.search.includes('q=')")
    other.wait_for_selector(TILES)
    assert "blue" in names(other)[0]
    assert found[0] not in names(other)


def test_keys(opened: Open) -> None:
    page = opened()
    search(page, "green")
    page.wait_for_selector(f"{TILES} img.loaded")
    page.focus(f"{TILES} >> nth=0 >> .tile")
    held = (
        "[...document.querySelectorAll('#grid li')].indexOf(document.activeElement.closest('li'))"
    )
    page.keyboard.press("ArrowRight")
    assert page.evaluate(held) == 1
    page.keyboard.press("ArrowDown")
    below = page.evaluate(held)
    assert below > 1
    page.keyboard.press("ArrowUp")
    assert page.evaluate(held) < below
    page.keyboard.press("w")
    assert page.locator("li.is-wrong").count() == 1
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "text"


def test_marks_are_downloaded_as_an_annotation(opened: Open, root: Path, tmp_path: Path) -> None:
    page = opened()
    search(page, "red")
    found = names(page)
    # The last click removes the mark of the click before it.
    for place, kind in ((0, "right"), (1, "wrong"), (2, "right"), (2, "right")):
        page.hover(f"{TILES} >> nth={place}")
        page.click(f"{TILES} >> nth={place} >> .mark .{kind}")
    assert page.inner_text("#marks-count") == "1 right, 1 wrong"
    page.click(f"{TILES} >> nth=3 >> .tile")
    page.click("#right")
    assert page.get_attribute("#right", "aria-pressed") == "true"
    page.keyboard.press("Escape")
    page.wait_for_selector("#viewer", state="hidden")
    page.reload()
    page.wait_for_selector("li.is-right")  # the browser keeps the marks
    assert page.inner_text("#marks-count") == "2 right, 1 wrong"
    with page.expect_download() as waiting:
        page.click("#download")
    path = tmp_path / waiting.value.suggested_filename
    waiting.value.save_as(path)
    assert path.name == "marks_labelled.jsonl"
    retrieval = read_retrieval(path, image_folder=root / "photos")
    assert {(one.caption, one.image_id) for one in retrieval.queries} == {
        ("red", found[0]), ("red", found[3]),
    }  # fmt: skip
    assert json.loads(path.read_text().splitlines()[0])["wrong"] == [found[1]]


def test_marks_and_links_survive_an_update_of_the_index(browser: Any, tmp_path: Path) -> None:
    with served(make_index(tmp_path, 12)) as at:
        page = browser.new_page(viewport={"width": 1280, "height": 860})
        page.set_default_timeout(WAIT_MS)
        page.goto(f"{at}/?q=red")
        page.wait_for_selector(TILES)
        found = names(page)
        gone, *others = sorted(found[:4])  # removing the first row moves the others
        for name in (gone, *others):
            page.locator(TILES).filter(has=page.locator(f"[title='{name}']")).hover()
            page.click(f"[aria-label='Mark {name} right']")
        page.click(f"{TILES} >> nth={found.index(others[-1])} >> .tile")
        page.wait_for_selector("#near:not([hidden])")
        link = page.url
        (tmp_path / "photos" / gone).unlink()
        index_pictures(tmp_path)
        page.goto(link)  # the link has an id of the index before the update
        page.wait_for_selector("#viewer[open]")
        page.wait_for_selector("#next:not([hidden])")  # the picture has a place in the results
        assert page.inner_text("#viewer-name") == others[-1]
        assert page.get_attribute("#right", "aria-pressed") == "true"
        page.keyboard.press("Escape")
        page.wait_for_selector("#viewer", state="hidden")
        assert page.locator("li.is-right").count() == 3
        assert page.inner_text("#marks-count") == "4 right, 0 wrong"
        with page.expect_download() as waiting:
            page.click("#download")
        path = tmp_path / "marks.jsonl"
        waiting.value.save_as(path)
        assert sorted(json.loads(line)["image"] for line in path.open()) == others
        becomes(page, "document.querySelector('#status').textContent.includes('no longer has: 1')")
        name = others[0]
        page.locator(TILES).filter(has=page.locator(f"[title='{name}']")).hover()
        page.click(f"[aria-label='Mark {name} right']")  # removes the mark with the earlier id
        assert page.inner_text("#marks-count") == "3 right, 0 wrong"
        page.close()


def test_marks_are_limited_and_invalid_ones_are_dropped(opened: Open) -> None:
    page = opened()
    marks = """[null, "x", {"text": "a"}, ...Array.from({ length: 5000 },
        (_, n) => ({ text: `text ${n}`, image: "0-0000000000000000", right: true }))]"""
    page.evaluate(
        f"localStorage.setItem(`marks ${{document.body.dataset.index}}`, JSON.stringify({marks}))"
    )
    page.reload()
    search(page, "red")
    page.focus(f"{TILES} >> nth=0 >> .tile")
    page.keyboard.press("r")
    becomes(
        page, "document.querySelector('#status').textContent.startsWith('There are 5,000 marks')"
    )
    assert page.inner_text("#marks-count") == "5000 right, 0 wrong"


def test_filters(opened: Open) -> None:
    page = opened()
    search(page, "red")
    page.click("#more")
    page.wait_for_selector("#folders option", state="attached")
    options = page.eval_on_selector_all("#folders option", "all => all.map((one) => one.value)")
    assert options == ["park", "park/day", "street"]
    page.fill("#folder", "street")
    page.keyboard.press("Enter")
    first_becomes(page, "street/")
    assert {name.split("/")[0] for name in names(page)} == {"street"}
    page.fill("#least", "2.5")
    page.keyboard.press("Enter")
    page.wait_for_selector("#unfilter:not([hidden])")
    assert "Nothing found" in page.inner_text("#trouble")
    page.click("#unfilter")
    count_becomes(page, 40)


def test_frames_of_a_video(browser: Any, tmp_path: Path) -> None:
    write_video(tmp_path / "yard.mp4", [400 * number for number in range(20)])
    source = VideoSource([tmp_path / "yard.mp4"], 0, distinct=False)
    with served(index_pictures(tmp_path, source=source)) as at:
        context = browser.new_context()
        context.set_default_timeout(WAIT_MS)
        page = context.new_page()
        page.goto(f"{at}/?q=red&start=2&end=3.3")
        count_becomes(page, 4)  # 2.0, 2.4, 2.8 and 3.2 s
        shown = page.eval_on_selector_all(".time", "all => all.map((one) => one.textContent)")
        assert sorted(shown) == ["00:02.00", "00:02.40", "00:02.80", "00:03.20"]
        page.click("#more")
        assert page.input_value("#end") == "3.3"
        page.fill("#start", "2.5")
        page.keyboard.press("Enter")
        count_becomes(page, 2)
        page.click(f"{TILES} >> nth=0 >> .tile")
        becomes(page, "document.querySelector('#viewer-picture').naturalWidth === 64")
        assert "Time in the video" in page.inner_text("#viewer-facts")
        context.close()


def test_ids_are_unique(opened: Open) -> None:
    page = opened()
    ids = page.eval_on_selector_all("[id]", "all => all.map((one) => one.id)")
    assert len(ids) == len({*ids})


def test_errors_are_explained(opened: Open) -> None:
    page = opened(allowed="Failed to load resource")
    answers = [429, 500]

    def answer(route: Any) -> None:
        status = answers.pop(0) if answers else None
        if status is None:
            route.continue_()
        else:
            body = json.dumps({"error": "busy or broken"})
            headers = {"Retry-After": "1", "Content-Type": "application/json"}
            route.fulfill(status=status, body=body, headers=headers)

    page.route("**/api/search", answer)
    page.fill("#text", "red")
    page.keyboard.press("Enter")
    page.wait_for_selector("#again:not([hidden])")  # no retry after 500, unlike after 429
    assert "busy or broken" in page.inner_text("#trouble")
    page.click("#again")
    page.wait_for_selector(TILES)
    assert page.is_hidden("#trouble")

    page.route("**/api/search", lambda route: route.abort())
    page.fill("#text", "blue")
    page.keyboard.press("Enter")
    page.wait_for_selector("#again:not([hidden])")
    assert "cannot be reached" in page.inner_text("#trouble")
    page.unroute("**/api/search")

    page.set_input_files(
        "#file", [{"name": "x.png", "mimeType": "image/png", "buffer": b"no picture"}]
    )
    becomes(
        page, "document.querySelector('#trouble-title').textContent.includes('cannot be answered')"
    )
    large = [{"name": "x.png", "mimeType": "image/png", "buffer": bytes(21 << 20)}]
    page.set_input_files("#file", large)
    becomes(page, "document.querySelector('#trouble-title').textContent.includes('too large')")
    page.goto(page.url.partition("?")[0] + "?image=upload-" + "0" * 32)
    becomes(page, "document.querySelector('#trouble-title').textContent.includes('not available')")


def test_a_phone(opened: Open) -> None:
    page = opened(**PHONE)
    search(page, "red")
    page.wait_for_selector(f"{TILES} img.loaded")
    page.click("#more")
    wide = "document.documentElement.scrollWidth <= window.innerWidth"
    assert page.evaluate(wide)
    page.tap(f"{TILES} >> nth=0 >> .mark .right")
    assert page.is_visible("#marks")
    page.tap(f"{TILES} >> nth=0 >> .tile")
    page.wait_for_selector("#near:not([hidden])")
    assert page.evaluate(wide)
    small = page.eval_on_selector_all(
        "#viewer button", "all => all.filter((one) => one.offsetParent && "
        "Math.min(one.offsetWidth, one.offsetHeight) < 32).length",
    )  # fmt: skip
    assert small == 0
    page.tap("#close")
    page.wait_for_selector("#viewer", state="hidden")


def test_the_second_look(browser: Any, root: Path) -> None:
    judge, problems = Darkness(), list[str]()
    with served(Index.open(root / "index"), reranker=judge) as at:
        page = browser.new_page(viewport={"width": 1280, "height": 860})
        page.set_default_timeout(WAIT_MS)
        page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
        page.goto(at)
        look = page.get_by_role("checkbox", name="Second look")
        assert look.is_checked()
        search(page, "red")
        assert page.url.endswith("/?q=red")
        judged = names(page)
        assert judge.asked == [("red", 20)]
        page.click(f"{TILES} >> nth=0 >> .tile")
        facts = page.inner_text("#viewer-facts")
        assert "Score of the second look" in facts
        assert "Score of centre" in facts
        page.keyboard.press("Escape")
        page.wait_for_selector("#viewer", state="hidden")

        look.focus()
        page.keyboard.press("Space")
        page.wait_for_url("**/?q=red&rerank=0")
        first = f"document.querySelector('{TILES} .name')?.title"
        becomes(page, f"{first} && {first} !== {json.dumps(judged[0])}")
        plain = names(page)
        assert sorted(plain[:20]) == sorted(judged[:20])
        assert plain[20:] == judged[20:]
        page.click(f"{TILES} >> nth=0 >> .tile")
        assert "second look" not in page.inner_text("#viewer-facts")
        page.keyboard.press("Escape")
        page.wait_for_selector("#viewer", state="hidden")
        page.reload()
        page.wait_for_selector(TILES)
        assert (names(page), look.is_checked()) == (plain, False)
        page.mouse.wheel(0, 20_000)
        becomes(page, f"document.querySelectorAll('{TILES}').length > 40")
        page.go_back()
        becomes(page, f"document.querySelector('{TILES} .name')?.title === {json.dumps(judged[0])}")
        assert (names(page)[:40], look.is_checked()) == (judged, True)
        assert judge.asked == [("red", 20)]
        page.set_viewport_size(PHONE["viewport"])
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert look.is_visible()
        page.close()
    assert problems == []


def test_without_a_reranker_there_is_no_second_look(opened: Open) -> None:
    page = opened("/?q=red&rerank=0")
    page.wait_for_selector(TILES)
    assert page.locator("#rerank").count() == 0


@needs_axe
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("device", ["desktop", "phone"])
def test_accessibility(opened: Open, scheme: str, device: str) -> None:
    options = PHONE if device == "phone" else {}
    page = opened(color_scheme=scheme, **options)
    assert AXE is not None
    check(page)
    search(page, "red")
    page.click("#more")
    page.wait_for_selector(f"{TILES} img.loaded")
    page.evaluate("document.querySelector('.mark .right').click()")
    check(page)
    page.click(f"{TILES} >> nth=0 >> .tile")
    page.wait_for_selector("#near:not([hidden])")
    check(page)
    page.keyboard.press("Escape")
    page.wait_for_selector("#viewer", state="hidden")
    page.fill("#least", "99")
    page.keyboard.press("Enter")
    page.wait_for_selector("#trouble:not([hidden])")
    check(page)


def check(page: Any) -> None:
    """Check a page with axe-core; minor and moderate findings are allowed."""
    assert AXE is not None
    page.wait_for_timeout(400)  # pictures fade in; axe would measure the contrast too early
    # The page's policy forbids other scripts, so Playwright evaluates axe directly.
    page.evaluate(AXE.read_text(encoding="utf-8"))
    found = page.evaluate("axe.run()")
    serious = [
        (one["id"], [node["html"] for node in one["nodes"]])
        for one in found["violations"]
        if one["impact"] in ("serious", "critical")
    ]
    assert serious == []


def test_the_login(browser: Any, root: Path) -> None:
    with served(Index.open(root / "index"), TOKEN) as at:
        page = browser.new_context().new_page()
        page.goto(f"{at}/?q=red")
        page.fill("input[type=password]", "wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("#problem")
        page.fill("input[type=password]", TOKEN)
        page.keyboard.press("Enter")
        page.wait_for_selector(TILES, timeout=WAIT_MS)
        assert page.input_value("#text") == "red"
        page.context.close()
