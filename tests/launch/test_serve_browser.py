"""The page of launch/serve.py in a real browser, if the system has one."""

import re

import pytest

from tests import browser
from tests.browser import CONTROL, ENTER
from tests.launch.served import Painter, served

pytest.importorskip("starlette", reason="needs the extra 'serve'")
pytest.importorskip("uvicorn", reason="needs the extra 'serve'")
pytestmark = pytest.mark.skipif(bool(browser.missing), reason=browser.missing)
PICTURES = "document.querySelectorAll('#history li img').length"


@pytest.fixture(scope="module")
def page():
    with browser.browser() as page:
        yield page


@pytest.fixture(scope="module")
def site():
    with served(Painter(), "--height=32", "--width=32") as client:
        yield client


@pytest.fixture
def opened(page, site):
    page.resize(1280, 1000)
    page.open(site.url)
    page.until("document.title == 'FLUX.1 test: text to image'")
    return page


def complaint(page):
    return page.until("document.getElementById('message').textContent")


def test_a_picture_appears_is_remembered_and_used_again(opened, site):
    before = opened.script(f"return {PICTURES}")
    opened.write("#prompt", "a cat holding a sign")
    opened.write("#width", "64")
    opened.write("#num_images", "2")
    opened.write("#seed", "5")
    top = "return document.getElementById('status').getBoundingClientRect().top"
    place = opened.script(top)
    opened.press("#prompt", CONTROL + ENTER)
    opened.until(f"{PICTURES} == {before + 2}")
    opened.until("document.getElementById('status').textContent.startsWith('Made in')")
    assert opened.script(top) == place  # nothing jumped
    assert opened.script("return document.getElementById('picture').naturalWidth") == 64
    settings = "64 \u00d7 32, 4 steps, seed 5, picture 2 of 2"
    assert opened.text("#shown-settings").startswith(settings)
    href, name = opened.script(
        "const link = document.getElementById('download'); return [link.href, link.download]"
    )
    assert name == f"dit-jax-{href.split('/')[-2]}-1.png"
    assert site.ask(href.removeprefix(site.url))[2].startswith(b"\x89PNG")
    assert opened.value("#seed") != "5"  # another after each
    opened.write("#prompt", "something else")
    opened.click("#turn")
    assert (opened.value("#width"), opened.value("#height")) == ("32", "64")
    opened.click("#history li:nth-child(2) button")
    assert opened.text("#shown-settings").startswith(settings.replace("picture 2", "picture 1"))
    found = [opened.value(f"#{name}") for name in ("prompt", "width", "height", "seed")]
    assert found == ["a cat holding a sign", "64", "32", "5"]
    opened.open(site.url)  # and what was made is there when it is opened anew
    opened.until(f"{PICTURES} == {before + 2}")
    opened.click("#random")
    assert re.fullmatch(r"\d+", opened.value("#seed"))


def test_errors_are_told_in_words_beside_what_is_wrong(opened):
    assert not opened.script("return document.getElementById('guidance_scale').disabled === false")
    assert "this pipeline is not told its scale" in opened.text("#guidance-hint")
    opened.write("#width", "50")
    opened.click("#submit")
    assert "width=50: expected multiples of 16, for instance 32 and 48" in complaint(opened)
    focused = "return [document.activeElement.id, document.activeElement.ariaInvalid]"
    assert opened.script(focused) == ["width", "true"]
    opened.write("#width", "")
    opened.click("#submit")
    opened.until("document.getElementById('message').textContent.includes('nothing is given')")
    opened.write("#width", "32")
    opened.write("#prompt", "a" * 100 + " and the rest")
    opened.click("#submit")
    opened.until("document.getElementById('notes').textContent.includes(\"cut off: ' and the\")")
    assert opened.text("#message") == ""
    unlabelled = (
        "return [...document.querySelectorAll('input, textarea')].filter((f) => !f.labels.length)"
    )
    assert opened.script(unlabelled) == []


def test_others_wait_in_view_and_are_cancelled(page):
    with served(Painter(gate=True, guided=True), "--height=32", "--width=32") as client:
        page.open(client.url)
        page.until("document.title == 'FLUX.1 test: text to image'")
        assert page.value("#guidance_scale") == "3.5"
        for place, prompt in enumerate(("one", "two", "three")):
            page.write("#prompt", prompt)
            page.click("#submit")
            if place == 0:
                assert client.pipeline.began.acquire(timeout=60)
            page.until(f"document.querySelectorAll('#waiting li').length == {place}")
        compiling = "Compiling for 32 wide, 32 high, 28 steps: "
        page.until(f"document.getElementById('status').textContent.startsWith({compiling!r})")
        assert "known after the first time" in page.text("#status")
        page.click("#waiting li:first-child button")
        page.until("document.querySelectorAll('#waiting li').length == 1")
        assert page.text("#waiting").startswith("three")
        client.pipeline.go.release()
        client.pipeline.go.release()
        page.until(f"{PICTURES} == 2")
        prompts = page.script(
            "return [...document.querySelectorAll('#history .text')].map((t) => t.textContent)"
        )
        assert prompts == ["three", "one"]


def test_weights_of_adapters_are_fields(page, opened):
    assert opened.script("return document.getElementById('lora').hidden")
    with served(Painter(lora={"style": 0.8}), "--height=32", "--width=32") as client:
        page.open(client.url)
        page.until("document.title == 'FLUX.1 test: text to image'")
        assert page.value("#adapters input") == "0.8" and "style" in page.text("#adapters")
        page.write("#adapters input", "0.5")
        page.click("#submit")
        page.until(f"{PICTURES} == 1")
        assert "style 0.5" in page.text("#shown-settings")
        page.write("#adapters input", "0")
        page.click("#history button")
        assert page.value("#adapters input") == "0.5"


def test_it_fits_a_phone_and_complains_of_nothing(opened, site):
    opened.resize(360, 740)
    wide = opened.script("return document.documentElement.scrollWidth - window.innerWidth")
    assert wide <= 0
    orders = "return ['form', 'figure', '.made'].map((s) => document.querySelector(s).offsetTop)"
    assert opened.script(orders) == sorted(opened.script(orders))
    opened.log()
    opened.open(site.url)
    opened.until("document.title == 'FLUX.1 test: text to image'")
    assert opened.log() == []


def test_a_server_that_is_gone_is_told(page):
    with served(Painter(), "--height=32", "--width=32") as client:
        page.open(client.url)
        page.until("document.title == 'FLUX.1 test: text to image'")
    page.click("#submit")
    assert "The server does not answer" in complaint(page)
