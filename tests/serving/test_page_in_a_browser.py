"""The page in a real Chromium, against a real server process with the shipped model.

Everything is waited for by what shows on the page, never by the clock. Screenshots are kept under $MMDLM_SCREENSHOTS if
that is set, else in pytest's temporary directory.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright
from typer.testing import CliRunner

from mmdlm.cli import app

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARGUMENTS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
             "--disable-component-update --disable-sync")
PATIENCE = 240_000  # milliseconds: a busy machine is slow, and that is no fault of the page
TABS = ("generate", "caption", "ask", "fill", "compare", "history")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the path")
expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server with the shipped model."""
    directory = tmp_path_factory.mktemp("page")
    command = [sys.executable, "-c", "from mmdlm.cli import main; main()", "serve", "--device", "cpu", "--port", "0"]
    with (directory / "out").open("wb") as out, (directory / "err").open("wb") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err)
    try:
        while not _answers(address := (directory / "out").read_text().strip()):
            assert process.poll() is None, (directory / "err").read_text()
            time.sleep(0.1)
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
    lines = [json.loads(line) for line in (directory / "err").read_text().splitlines()]
    assert [line for line in lines if line["level"] == "error"] == []


@pytest.fixture(scope="module")
def apple(origin: str) -> bytes:
    """A picture that the model drew, as anybody would upload it."""
    body = {"prompt": "a red apple", "seed": 7, "num_inference_steps": 8}
    answer = httpx.post(f"{origin}/v1/images/generations", json=body, timeout=PATIENCE, trust_env=False)
    return base64.b64decode(answer.json()["data"][0]["b64_json"])


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS.split())
        yield launched
        launched.close()


class Watched:
    """A page, what went wrong on it and whom it asked."""

    def __init__(self, browser: Browser, origin: str, shots: Path, width: int, height: int, scheme: str) -> None:
        size = {"width": width, "height": height}
        touch = width < 500
        self.context = browser.new_context(viewport=size, color_scheme=scheme, has_touch=touch)  # type: ignore[arg-type]
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.origin, self.shots = origin, shots
        self.wrong: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda said: said.type in ("error", "warning") and self.wrong.append(said.text))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(f"{origin}/")
        expect(self.page.locator("#model")).to_contain_text("pictures")

    def go(self, tab: str) -> None:
        self.page.locator(f"#tab-{tab}").click()

    def submit(self, tab: str, cards: int = 1) -> Locator:
        """Send a tab's form and wait until it has its answers."""
        self.page.locator(f"#{tab} [type=submit]").click()
        return self.answers(tab, cards)

    def answers(self, tab: str, cards: int = 1) -> Locator:
        done = self.page.locator(f".results[data-of={tab}] figure[data-done]")
        expect(done.or_(self.page.locator("#problem:not(:empty)")).first).to_be_visible()
        assert self.page.locator("#problem").inner_text() == ""
        expect(done).to_have_count(cards)
        expect(self.page.locator(f"#{tab} form")).not_to_have_attribute("data-running", "yes")
        return done

    def choose(self, content: bytes, name: str = "apple.png") -> None:
        file = {"name": name, "mimeType": "image/png", "buffer": content}
        self.page.locator("#file").set_input_files(files=[file])  # type: ignore[list-item]
        expect(self.page.locator("#picture-name")).to_contain_text(name)

    def entry(self, number: int = 0) -> tuple[list[str], dict[str, bytes]]:
        """The commands of an entry of the history, the newest first, and the files that can be saved there."""
        item = self.page.locator("#entries > li").nth(number)
        links = item.locator("a[download]").all()
        files = {str(link.get_attribute("download")): decoded(str(link.get_attribute("href"))) for link in links}
        return item.locator("pre").all_text_contents(), files

    def shot(self, name: str) -> None:
        self.page.screenshot(path=self.shots / f"{name}.png", full_page=True)

    def leaves_nothing(self, *expected: str) -> None:
        """No request left the origin, nothing went wrong but `expected`."""
        assert [url for url in self.asked if not url.startswith((self.origin, "data:", "blob:"))] == []
        assert [said for said in self.wrong if not any(words in said for words in expected)] == []
        self.context.close()


@pytest.fixture
def open_page(browser, origin, tmp_path):
    shots = Path(os.environ.get("MMDLM_SCREENSHOTS") or tmp_path)
    shots.mkdir(parents=True, exist_ok=True)
    return lambda width=1280, height=900, scheme="light": Watched(browser, origin, shots, width, height, scheme)


def _answers(address: str) -> bool:
    try:
        return address != "" and httpx.get(f"{address}/ready", trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def decoded(url: str) -> bytes:
    return base64.b64decode(url.partition(",")[2])


def levels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def picture_of(card: Locator) -> np.ndarray:
    return levels(decoded(str(card.locator("img.frame").get_attribute("src"))))


def again(line: str, directory: Path, output: str) -> np.ndarray:
    """Run a command of the history here, in this process, and open what it wrote."""
    words = shlex.split(line)
    assert words[0] == "mmdlm" and words[words.index("-o") + 1] == output
    here = Path.cwd()
    os.chdir(directory)
    try:
        result = CliRunner().invoke(app, [*words[1:], "--quiet", "--device", "cpu"])
    finally:
        os.chdir(here)
    assert result.exit_code == 0, result.output
    return levels((directory / output).read_bytes())


def test_drawing_shows_every_step_and_the_history_does_it_again(open_page, tmp_path):
    watched = open_page()
    page = watched.page
    page.evaluate("""() => {
        window.seen = new Set();
        new MutationObserver((all) => all.forEach((one) => window.seen.add(one.target.src)))
            .observe(document.querySelector(".results"), { subtree: true, attributeFilter: ["src"] });
    }""")
    for name, value in {"seed": "7", "n": "2", "steps": "8", "guidance": "2"}.items():
        page.locator(f"#generate [name={name}]").fill(value)
    cards = watched.submit("generate", cards=2)
    assert page.evaluate("window.seen.size") > 2, "the frames were not shown one by one"
    assert [cards.nth(row).get_attribute("data-done") for row in (0, 1)] == ["7", "8"]
    finished = picture_of(cards.first)
    assert finished.shape == (64, 64, 3)
    assert "percent on average" in cards.first.locator("canvas").get_attribute("aria-label")
    colours = cards.first.locator("canvas").evaluate(
        "(map) => new Set(map.getContext('2d').getImageData(0, 0, map.width, map.height).data).size"
    )
    assert colours > 4, "the confidence map is empty"
    watched.shot("generate")
    scrub = cards.first.locator("input[type=range]")
    scrub.focus()
    scrub.press("Home")  # back to the first frame
    assert (picture_of(cards.first) != finished).any()
    scrub.press("End")
    assert (picture_of(cards.first) == finished).all()

    watched.go("history")
    expect(page.locator("#entries > li")).to_have_count(1)
    (command, request), _ = watched.entry()
    watched.shot("history")
    again(command.replace("-n 2 ", ""), tmp_path, "picture-7.png")
    assert (levels((tmp_path / "picture-7.png").read_bytes()) == finished).all()
    words = shlex.split(request)
    sent = httpx.post(words[1], content=words[words.index("-d") + 1], headers={"content-type": "application/json"},
                      timeout=PATIENCE, trust_env=False).json()
    assert (levels(base64.b64decode(sent["data"][0]["b64_json"])) == finished).all()
    page.reload()
    watched.go("history")
    expect(page.locator("#entries > li")).to_have_count(1)  # kept for this tab of the browser
    page.get_by_role("button", name="Take these settings").click()
    assert page.locator("#generate [name=guidance]").input_value() == "2"
    watched.leaves_nothing()


def test_an_uploaded_picture_is_described_asked_about_filled_and_extended(open_page, apple, origin, tmp_path):
    watched = open_page()
    page = watched.page
    watched.go("caption")
    watched.choose(apple)
    card = watched.submit("caption").first
    answer = httpx.post(f"{origin}/v1/caption", files={"image": apple}, timeout=PATIENCE, trust_env=False).json()
    expected = answer["data"][0]["captions"][0]
    assert card.locator(".said p").inner_text() == expected["text"]
    assert f"{round(expected['confidence'] * 100)} % sure" in card.inner_text()
    assert int(card.get_attribute("data-frames")) > 1
    page.locator("#caption [name=n]").fill("3")
    watched.submit("caption", cards=3)
    watched.shot("caption")

    watched.go("ask")
    page.locator("#ask [name=question]").fill("what color is it?")
    assert watched.submit("ask").first.locator(".said p").inner_text() == "red"
    watched.shot("ask")

    watched.go("fill")
    page.locator("#fill [name=prompt]").fill("a red apple")
    page.locator("#fill [name=seed]").fill("3")
    canvas = page.locator("#paint")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    at = [(box["x"] + box["width"] * x, box["y"] + box["height"] * y) for x, y in ((0.3, 0.4), (0.6, 0.5), (0.7, 0.7))]
    page.mouse.move(*at[0])
    page.mouse.down()
    for place in at[1:]:
        page.mouse.move(*place, steps=4)
    page.mouse.up()
    expect(page.locator("#masked")).to_have_text(re.compile(r"^\d+ % of the picture is masked"))
    filled = picture_of(watched.submit("fill").first)
    watched.shot("fill")
    (command, _), files = watched.entry()
    hole = levels(files["apple-mask.png"])[..., 0] == 255
    assert 0.02 < hole.mean() < 0.5 and files["apple.png"] == apple
    assert (filled == levels(apple))[~hole].all(), "a pixel outside the mask changed"
    assert (filled != levels(apple))[hole].any()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert (again(command, tmp_path, "filled-3.png") == filled).all()

    page.get_by_label("a border around it").check()
    watched.shot("border")
    extended = picture_of(watched.submit("fill").first)
    watched.shot("extend")
    (command, request), files = watched.entry()
    inner = levels(files["apple-48x48.png"])
    assert inner.shape == (48, 48, 3) and extended.shape == (64, 64, 3)
    assert (extended[8:56, 8:56] == inner).all()
    (tmp_path / "apple-48x48.png").write_bytes(files["apple-48x48.png"])
    assert (again(command, tmp_path, "filled-3.png") == extended).all()
    assert "--form-string extend=8,8,8,8" in request
    watched.leaves_nothing()


def test_two_settings_side_by_side(open_page):
    watched = open_page()
    watched.go("compare")
    for name, value in {"seed": "5", "a-steps": "2", "b-steps": "6", "b-guidance": "3"}.items():
        watched.page.locator(f"#compare [name={name}]").fill(value)
    cards = watched.submit("compare", cards=2)
    assert [cards.nth(side).locator("h2").inner_text() for side in (0, 1)] == [
        "A: 2 steps, guidance preset", "B: 6 steps, guidance 3",
    ]
    assert [cards.nth(side).get_attribute("data-done") for side in (0, 1)] == ["5", "5"]
    left, right = (cards.nth(side).bounding_box() for side in (0, 1))
    assert left["y"] == right["y"] and left["x"] + left["width"] <= right["x"]
    assert (picture_of(cards.first) != picture_of(cards.last)).any()
    watched.shot("compare")
    lines, _ = watched.entry()
    assert [shlex.split(line)[0] for line in lines] == ["mmdlm", "curl"] * 2
    assert "--seed 5 --steps 6 --guidance 3" in lines[2]
    watched.leaves_nothing()


def test_what_goes_wrong_is_a_sentence(open_page, apple):
    watched = open_page()
    page, problem = watched.page, watched.page.get_by_role("alert")
    page.locator("#generate [name=steps]").fill("5000")
    page.locator("#generate [type=submit]").click()
    expect(problem).to_have_text("num_inference_steps is 5000, expected a whole number from 1 to 1024.")
    watched.shot("error")
    page.locator("#generate [name=steps]").fill("")
    page.locator("#generate [name=prompt]").fill("")
    page.locator("#generate [type=submit]").click()
    expect(problem).to_contain_text("The prompt is empty, expected what to draw")
    watched.go("ask")
    page.locator("#ask [type=submit]").click()
    expect(problem).to_have_text("There is no picture yet: choose a file, or draw one under Generate.")
    watched.choose(apple[: len(apple) // 2], "torn.png")
    page.locator("#ask [type=submit]").click()
    expect(problem).to_contain_text("is broken or cut short")
    watched.choose(apple)
    watched.go("fill")
    page.locator("#fill [type=submit]").click()
    expect(problem).to_contain_text("Nothing is masked yet")
    page.get_by_label("a border around it").check()
    page.locator("#fill [name=left]").fill("7")
    page.locator("#fill [type=submit]").click()
    expect(problem).to_contain_text("expected four multiples of 4 pixels")
    watched.go("generate")
    page.locator("#generate [name=prompt]").fill("a red apple")
    page.locator("#generate [name=steps]").fill("256")
    page.locator("#generate [type=submit]").click()
    expect(page.locator("#generate .stop")).to_be_enabled()
    page.locator("#generate .stop").click()
    expect(problem).to_have_text("Stopped.")
    watched.go("fill")
    page.route("**/v1/**", lambda route: route.abort())
    page.locator("#fill [type=submit]").click()
    expect(problem).to_contain_text("The server does not answer")
    watched.leaves_nothing("the server responded with a status of 400", "net::ERR_FAILED")


def test_with_the_keyboard_alone(open_page, apple):
    """Tab, arrow keys, Space and Enter reach everything: draw, then take the picture to Fill, mask it and fill."""
    watched = open_page()
    page = watched.page

    def focus(target: Locator, key: str = "Tab") -> None:
        for _ in range(60):
            if target.evaluate("(node) => node === document.activeElement"):
                return
            page.keyboard.press(key)
        raise AssertionError("the focus does not get there")

    focus(page.locator("#tab-generate"))
    page.keyboard.press("End")
    expect(page.locator("#no-history")).to_be_visible()
    page.keyboard.press("ArrowRight")  # round to the first
    focus(page.locator("#generate [name=prompt]"))
    page.keyboard.press("Control+A")
    page.keyboard.type("a yellow star")
    focus(page.locator("#generate [name=steps]"))
    page.keyboard.type("4")
    page.keyboard.press("Enter")
    card = watched.answers("generate").first
    focus(card.get_by_role("button", name="Fill: take this picture there"))
    page.keyboard.press("Enter")
    expect(page.locator("#tab-fill")).to_be_focused()
    expect(page.locator("#picture-name")).to_contain_text("picture-")
    focus(page.locator("#paint"))
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Space")
    expect(page.locator("#masked")).not_to_have_text("Nothing is masked yet.")
    watched.shot("keyboard")
    focus(page.locator("#clear"))
    page.keyboard.press("Enter")
    expect(page.locator("#masked")).to_have_text("Nothing is masked yet.")
    focus(page.locator("#fill summary"))
    page.keyboard.press("Enter")
    focus(page.locator("#rect-add"))
    page.keyboard.press("Enter")
    expect(page.locator("#masked")).to_have_text("25 % of the picture is masked.")
    focus(page.locator("#fill [name=steps]"))
    page.keyboard.type("4")
    page.keyboard.press("Enter")
    watched.answers("fill")
    watched.leaves_nothing()


def test_a_phone_shows_all_of_it_without_scrolling_sideways(open_page, apple):
    watched = open_page(360, 740, "dark")
    page = watched.page
    page.locator("#generate [name=steps]").fill("4")
    page.locator("#generate [name=prompt]").fill("a red apple on a " + "very " * 12 + "blue background")
    watched.submit("generate")
    watched.go("fill")
    watched.choose(apple, "a-name-as-long-as-those-that-cameras-and-messengers-give-to-their-pictures.png")
    page.locator("#paint").tap()
    expect(page.locator("#masked")).to_contain_text("% of the picture is masked")
    for tab in TABS:
        watched.go(tab)
        watched.shot(f"phone-{tab}")
        wide = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
        assert wide == [360, 360], tab
        assert page.locator(f"#tab-{tab}").evaluate("(node) => node.getBoundingClientRect().right <= 360")
    watched.leaves_nothing()


def test_a_server_with_keys_is_asked_with_one(browser, guarded, tmp_path):
    page = browser.new_page()
    page.goto(guarded.url)
    expect(page.locator("#model")).to_have_text("No API key: send the header 'Authorization: Bearer KEY'.")
    key = page.get_by_label("Key, if the server wants one")  # opened by the refusal
    key.fill("anna-0123456789abcdef")
    key.press("Tab")
    expect(page.locator("#model")).to_contain_text("16 × 16")
    page.locator("#generate [name=steps]").fill("2")
    page.locator("#generate [type=submit]").click()
    expect(page.locator("figure[data-done]")).to_have_count(1)
    page.locator("#tab-history").click()
    lines = page.locator("#entries pre").all_text_contents()
    assert '-H "Authorization: Bearer $MMDLM_KEY"' in lines[1] and "0123456789abcdef" not in "".join(lines)
    assert "--model MODEL_DIRECTORY" in lines[0]  # the server runs another model than the command would
    page.close()
