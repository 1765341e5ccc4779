"""The playground in a real Chromium, against the api process's own parts and a scripted coordinator."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Browser, Page, async_playwright, expect

from tests.support.api.deployment import END, deployment, ids
from tests.support.api.fake_coordinator import Script, failure
from tests.support.api.in_process import Served, served
from tests.support.browser import CHROMIUM, FLAGS, needs_chromium

PATIENCE = 20_000  # milliseconds: the machine may be busy

pytestmark = needs_chromium


@pytest_asyncio.fixture(scope="module")
async def browser() -> AsyncIterator[Browser]:
    async with async_playwright() as driver:
        browser = await driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        await browser.close()


async def opened(browser: Browser, url: str, **options: Any) -> Page:
    """The page at `url` in a profile of its own; an error in its scripts fails the test."""
    context = await browser.new_context(**options)
    page = await context.new_page()
    page.set_default_timeout(PATIENCE)
    expect.set_options(timeout=PATIENCE)
    page.on("pageerror", lambda error: pytest.fail(f"script error: {error}"))
    await page.goto(url)
    return page


@pytest_asyncio.fixture
async def page(browser: Browser, api: Served) -> AsyncIterator[Page]:
    page = await opened(browser, api.url)
    await expect(page.locator("#state")).to_have_text("ready")
    yield page
    await page.context.close()


def says(text: str, **more: Any) -> Script:
    """Answers `text`; digits are the work of `math`, everything else of `text`."""
    return Script(
        tokens=lambda _: [*ids(text), END],
        weigh=lambda token: [0.9, 0.1] if chr(token % 256).isdigit() else [0.25, 0.75],
        **more,
    )


async def ask(page: Page, prompt: str = "Hi") -> None:
    await page.fill("#prompt", prompt)
    await page.press("#prompt", "Enter")


async def answered(page: Page) -> None:
    await expect(page.locator(".turn").last).to_have_attribute("data-done", "")


async def test_answer_token_by_token(api: Served, page: Page) -> None:
    api.fake.script = says("85, no")
    await ask(page, "Add 27 and 58.")
    await answered(page)
    tokens = page.locator(".token")
    assert await tokens.all_inner_texts() == ["8", "5", ",", " ", "n", "o", "end"]
    assert "colour-0 line-0" in str(await tokens.nth(0).get_attribute("class"))
    assert "colour-1 line-1" in str(await tokens.nth(4).get_attribute("class"))
    assert "unsaid" in str(await tokens.nth(6).get_attribute("class"))
    assert await page.locator(".figures li").all_inner_texts() == ["math 44 %", "text 56 %"]
    assert await page.locator("#spoken").inner_text() == "duo (uniform): 85, no"
    sent = api.fake.submitted[0]
    assert sent.sampling.temperature == 0 and sent.expert_weights and sent.max_tokens == 256


async def test_tokens_differ_without_colour(api: Served, page: Page) -> None:
    api.fake.script = says("8n")
    await ask(page)
    await answered(page)
    images = [
        await page.locator(".token").nth(place).evaluate("node => getComputedStyle(node).backgroundImage")
        for place in (0, 1)
    ]
    assert "repeating" not in images[0] and "repeating" in images[1]


async def test_weights_under_the_pointer(api: Served, page: Page) -> None:
    api.fake.script = says("85, no")
    await ask(page)
    await answered(page)
    panel = page.locator("#inspector")
    await expect(panel).to_be_hidden()
    await page.locator(".token").nth(1).hover()
    await expect(panel).to_be_visible()
    shown = (await panel.inner_text()).split("\n")
    assert [line for line in shown if line] == [
        *("5", "60.7 %", "math", "0.900", "text", "0.100", "entropy of the weights", "0.47 bit"),
        *("Most probable after fusion", "5", "60.7 %", "4", "36.8 %", "3", "13.5 %", "2", "5.0 %", "1", "1.8 %"),
    ]
    await page.mouse.move(0, 0)
    await expect(panel).to_be_hidden()


async def test_weights_by_keyboard(api: Served, page: Page) -> None:
    api.fake.script = says("85, no")
    await ask(page)
    await answered(page)
    for _ in range(4):  # from the prompt back to the answer
        if await page.evaluate("document.activeElement.className") == "text":
            break
        await page.keyboard.press("Shift+Tab")
    panel = page.locator("#inspector")
    await expect(panel.locator(".head code")).to_have_text("8")
    await page.keyboard.press("ArrowRight")
    await expect(panel.locator(".head code")).to_have_text("5")
    await expect(page.locator("#spoken")).to_have_text("5: math 90 %, text 10 %")
    await page.keyboard.press("End")
    await expect(panel.locator(".head code")).to_have_text("<|end|>")
    await page.keyboard.press("Escape")
    await expect(panel).to_be_hidden()


async def test_characters_of_several_tokens(api: Served, page: Page) -> None:
    api.fake.script = says("a€ b")
    await ask(page)
    await answered(page)
    assert await page.locator(".token:not(.unsaid)").all_inner_texts() == ["a", "€", " ", "b"]
    await page.locator(".token").nth(1).hover()
    await expect(page.locator("#inspector")).to_contain_text("tokens in this character\n3", use_inner_text=True)


async def test_side_by_side(api: Served, page: Page) -> None:
    api.fake.script = Script(
        tokens=lambda request: [*ids("fused" if all(request.prompts) else "alone"), END],
    )
    await page.select_option("#beside", "duo:math")
    await ask(page)
    await answered(page)
    assert await page.locator(".answer h2").all_inner_texts() == ["duo (uniform)", "math alone"]
    assert [text.removesuffix("end") for text in await page.locator(".text").all_inner_texts()] == ["fused", "alone"]
    await ask(page, "Again")
    await answered(page)
    own = [bytes(token for token in request.prompts[0] if token < 256).decode() for request in api.fake.submitted[2:]]
    assert own == ["HifusedAgain", "HialoneAgain"]  # each goes on with what it said itself
    await page.click("#fresh")
    assert not await page.locator(".turn").count()


async def test_settings_are_sent(api: Served, page: Page) -> None:
    await page.select_option("#model", "duo:text")
    await page.fill("#temperature", "0.7")
    await page.fill("#max-tokens", "3")
    await page.fill("#seed", "11")
    await page.fill("#system", "Be kind.")
    await ask(page)
    await answered(page)
    (sent,) = api.fake.submitted
    assert (sent.sampling.temperature, sent.sampling.seed, sent.max_tokens) == (0.7, 11, 3)
    assert not sent.prompts[0] and b"Be kind." in bytes(token for token in sent.prompts[1] if token < 256)
    await expect(page.locator(".foot")).to_contain_text("cut off at max tokens")


async def test_stop(api: Served, page: Page) -> None:
    api.fake.script = says("endless " * 50, pause=0.05)
    await ask(page)
    await expect(page.locator(".token").nth(5)).to_be_visible()
    await page.click("#stop")
    await answered(page)
    await api.fake.aborted()
    await expect(page.locator(".foot")).to_contain_text("stopped")
    await expect(page.locator("#send")).to_be_visible()
    assert 5 < await page.locator(".token").count() < 400


async def test_refused_request(api: Served, page: Page) -> None:
    await page.fill("#system", "x" * 600)
    await ask(page)
    await answered(page)
    await expect(page.locator(".answer .notice")).to_contain_text("context")
    await page.fill("#system", "")
    await ask(page, "Shorter")
    await answered(page)
    (sent,) = api.fake.submitted
    assert bytes(token for token in sent.prompts[0] if token < 256) == b"Shorter"  # what was refused is no turn


async def test_error_in_the_middle(api: Served, page: Page) -> None:
    api.fake.script = Script(tokens=lambda _: ids("half"), ended=failure(message="expert <b>text</b> was lost"))
    await ask(page)
    await answered(page)
    await expect(page.locator(".answer .notice")).to_have_text("expert <b>text</b> was lost")
    assert (await page.locator(".text").inner_text()) == "half"


async def test_markup_stays_text(api: Served, page: Page) -> None:
    evil = "<img src=x onerror=alert(1)>"
    api.fake.script = says(evil)
    await ask(page, evil)
    await answered(page)
    await expect(page.locator(".question")).to_have_text(f"You: {evil}")
    assert not await page.locator("#conversation img").count()


async def test_draining(api: Served, page: Page) -> None:
    await api.fake.status(ready=False, draining=True)
    try:
        await ask(page)
        await expect(page.locator(".answer .notice")).to_have_text("the server is shutting down")
        await page.reload()
        await expect(page.locator("#state")).to_have_text("shutting down")
    finally:
        await api.wait_ready()
    await expect(page.locator("#state")).to_have_text("ready")


async def test_key(browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYLOGIT_API_KEYS", "secret")
    async with served(deployment(tmp_path)) as server:
        await server.fake.status()
        page = await opened(browser, server.url)
        await expect(page.locator("#notice")).to_contain_text("needs an API key")
        await page.fill("#key", "wrong")
        await page.press("#key", "Tab")
        await expect(page.locator("#notice")).to_contain_text("needs an API key")
        await page.fill("#key", "secret")
        await page.press("#key", "Tab")
        await expect(page.locator("#deployment")).to_have_text("duo")
        await ask(page)
        await answered(page)
        assert "Hello, world!" in await page.locator(".text").inner_text()
        assert "secret" not in page.url
        assert await page.evaluate("localStorage.length + sessionStorage.length") == 0
        await page.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_accessible(api: Served, browser: Browser, scheme: str) -> None:
    """Empty, answered side by side with the weights shown, and with an error: axe finds nothing."""
    page = await opened(browser, api.url, color_scheme=scheme)
    await expect(page.locator("#examples button")).to_be_visible()
    background = await page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert (background == "rgb(251, 250, 248)") == (scheme == "light")
    await check_accessible(page)
    api.fake.script = says("85, no")
    await page.select_option("#beside", "duo:math")
    await ask(page)
    await answered(page)
    await page.locator(".token").nth(1).hover()
    await check_accessible(page)
    await page.fill("#system", "x" * 600)
    await ask(page)
    await answered(page)
    await check_accessible(page)
    await page.context.close()


async def check_accessible(page: Page) -> None:
    found = await Axe().run(page)
    faults = [(fault["id"], fault["impact"], fault["nodes"][0]["html"]) for fault in found.response["violations"]]
    assert not faults


async def test_narrow_screen(api: Served, browser: Browser) -> None:
    page = await opened(browser, api.url, viewport={"width": 340, "height": 640}, has_touch=True)
    api.fake.script = says("a longer answer " * 8)
    await page.click("summary")
    await page.select_option("#beside", "duo:math")
    await ask(page, "word " * 40)
    await answered(page)
    assert await page.evaluate("document.documentElement.scrollWidth") <= 340
    await page.locator(".token").last.tap()
    box = await page.locator("#inspector").bounding_box()
    assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= 340 and box["y"] + box["height"] <= 640
    await page.context.close()
