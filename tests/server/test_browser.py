"""The page in headless Chromium: needs selenium, Chromium and its driver, or is skipped."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator

import pytest

pytest.importorskip("selenium")

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.remote.webelement import WebElement

from tests.cli import fake
from tests.server.live import Live, until
from tests.server.scripted import scripted_model

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="Chromium or its driver is missing"),
]

HOSTILE = """<img src=x onerror="document.title='owned'">
<script>document.title='owned'</script>

[click](javascript:alert(1)) [data](data:text/html,x) [ok](https://example.org/a?b=1&c=2)

**bold** `a < b` *it*

```html
<b>code</b>
```

- one
- two

| a | b |
|---|--:|
| 1 | 2 |
"""


def script(prompt: str) -> str:
    if "hostile" in prompt.rpartition("<|im_user|>")[2]:
        return "<think>Let me think.</think>" + HOSTILE
    return fake.script(prompt)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory) -> Iterator[WebDriver]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in (
        "headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
        "disable-background-networking", "disable-component-update", "disable-sync",
        "disable-dev-shm-usage", "window-size=1200,800",
        f"user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):  # fmt: skip
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(DRIVER)))
    yield driver
    driver.quit()


class Page:
    """The page as somebody uses it."""

    def __init__(self, driver: WebDriver, live: Live) -> None:
        self.driver = driver
        self.live = live
        driver.get(live.url)
        driver.execute_script("localStorage.clear(); sessionStorage.clear()")
        self.reload()

    def reload(self) -> None:
        self.driver.get(self.live.url)
        until(lambda: self.one("#state").text != "Connecting")

    def one(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        return [one.text for one in self.all(selector)]

    def type(self, text: str) -> None:
        self.one("#prompt").send_keys(text, Keys.ENTER)

    def say(self, text: str) -> None:
        """Send a message and wait for the whole reply."""
        self.type(text)
        self.wait()

    def wait(self) -> None:
        until(lambda: self.one("#log").get_attribute("aria-busy") == "false")

    def press(self, label: str, within: str = "body") -> None:
        for button in self.all(f"{within} button"):
            if button.is_displayed() and label in (button.text, button.get_attribute("aria-label")):
                button.click()
                return
        raise AssertionError(f"no button {label!r}")

    def alt(self, letter: str) -> None:
        webdriver.ActionChains(self.driver).key_down(Keys.ALT).send_keys(letter).key_up(
            Keys.ALT
        ).perform()

    def stored(self) -> list[dict]:
        found = self.driver.execute_script(
            "return Object.keys(localStorage).filter(k => k.startsWith('kimi-cpu.chat.'))"
            ".map(k => localStorage.getItem(k))"
        )
        return [json.loads(text) for text in found]

    def complaints(self) -> list[str]:
        """What the browser has complained of since the last time, its policy's refusals too."""
        entries = self.driver.get_log("browser")
        return [one["message"] for one in entries if one["level"] in ("SEVERE", "WARNING")]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return scripted_model(tmp_path_factory.mktemp("browser"), script, step_s=0.004)


@pytest.fixture(scope="module")
def live(model) -> Iterator[Live]:
    live = Live(lambda phase: model).ready()
    yield live
    live.stop()


@pytest.fixture
def page(chromium, live) -> Iterator[Page]:
    page = Page(chromium, live)
    page.complaints()
    yield page
    assert page.complaints() == []


def test_a_conversation(page):
    page.say("hello")
    (reply,) = page.all(".reply")
    assert reply.find_element(By.TAG_NAME, "strong").text == "hello"
    assert "tokens/s" in reply.find_element(By.CSS_SELECTOR, ".figures").text
    assert "context" in page.one("#figures").text
    thoughts = reply.find_element(By.CSS_SELECTOR, "details.reasoning")
    assert thoughts.get_attribute("open") is None
    thoughts.find_element(By.TAG_NAME, "summary").click()
    until(lambda: "Let me think." in thoughts.text)
    page.say("count")
    assert "There are 2 user turns." in page.texts(".reply .prose")[-1]
    assert "cached" in page.texts(".reply .figures")[-1]  # the first turn was not computed again
    assert "hello" in page.texts("#chats .name")


def test_conversations_outlive_a_reload(page):
    page.say("hello")
    page.alt("n")
    page.say("another one")
    page.reload()
    assert page.one("#title").text == "another one"
    assert page.texts("#chats .name") == ["another one", "hello"]
    page.all("#chats button")[1].click()
    assert "You said hello." in page.one(".reply").text
    page.say("count")
    assert "There are 2 user turns." in page.texts(".reply .prose")[-1]


def test_rename_delete_undo(page):
    page.say("hello")
    page.press("Rename this conversation")
    page.one("#rename-value").send_keys("Greetings", Keys.ENTER)
    assert page.one("#title").text == "Greetings"
    page.press("Delete this conversation")
    assert page.texts("#chats .name") == [] and page.stored() == []
    page.press("Undo")
    assert page.texts("#chats .name") == ["Greetings"]
    assert page.stored()[0]["title"] == "Greetings"


def test_stop_and_retry(page, model):
    page.type("slow")
    until(lambda: "word word word" in page.one(".reply").text)
    page.press("Stop")
    page.wait()
    assert "Stopped." in page.one(".reply").text
    until(lambda: page.live.client.get("/metrics").text.count("kimi_cpu_active 0.0"))
    computed = model.engine.computed
    time.sleep(0.1)
    assert model.engine.computed == computed  # the server works no more
    page.press("Retry")
    page.wait()
    assert page.one(".reply > .prose").text.count("word") == 200
    assert len(page.all(".turn")) == 2


def test_escape_stops(page):
    page.type("slow")
    until(lambda: "word" in page.one(".reply").text)
    page.one("#prompt").send_keys(Keys.ESCAPE)
    page.wait()
    assert page.one(".reply").text.count("word") < 200


def test_edit(page):
    page.say("hello")
    page.say("second")
    page.driver.execute_script("document.querySelector('.turn.user button').click()")
    field = page.one(".turn.user textarea")
    assert field == page.driver.switch_to.active_element
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys("goodbye", Keys.ENTER)
    page.wait()
    assert [turn["content"] for turn in page.stored()[0]["turns"]] == [
        "goodbye",
        "You said **goodbye**.",
    ]


def test_an_edit_stops_the_reply(page):
    page.type("slow")
    until(lambda: "word" in page.one(".reply").text)
    page.alt("m")
    field = page.driver.switch_to.active_element
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys("goodbye", Keys.ENTER)
    until(lambda: "You said goodbye." in page.one(".reply").text)
    page.wait()
    assert len(page.all(".turn")) == 2 and len(page.stored()[0]["turns"]) == 2


def test_a_reply_goes_on_while_another_conversation_is_open(page):
    page.type("slow")
    until(lambda: "word" in page.one(".reply").text)
    page.alt("n")
    page.say("hello")
    assert len(page.all("#chats .dot")) == 1
    page.all("#chats button")[1].click()
    until(lambda: page.one(".reply").text.count("word") > 5)
    page.wait()
    assert page.one(".reply > .prose").text.count("word") == 200
    assert not page.all("#chats .dot")
    contents = sorted(turn["content"] for chat in page.stored() for turn in chat["turns"])
    assert contents[1:3] == ["hello", "slow"] and contents[3].count("word") == 200


def test_a_deleted_conversation_does_not_come_back(page):
    page.type("slow")
    until(lambda: "word" in page.one(".reply").text)
    page.press("Delete this conversation")
    until(lambda: "kimi_cpu_active 0.0" in page.live.client.get("/metrics").text)
    page.reload()
    assert page.stored() == [] and not page.all(".turn")


def test_a_reload_in_the_middle_keeps_what_was_said(page):
    page.type("slow")
    until(lambda: page.one(".reply").text.count("word") > 5)
    page.reload()
    assert page.one(".reply").text.count("word") > 5
    until(lambda: "kimi_cpu_active 0.0" in page.live.client.get("/metrics").text)


def test_markup_of_a_model_is_text(page):
    page.say("hostile")
    answer = page.one(".reply > .prose")
    assert page.driver.title != "owned"
    assert not answer.find_elements(By.CSS_SELECTOR, "img, script, b")
    assert '<img src=x onerror="document' in answer.text and "<b>code</b>" in answer.text
    links = answer.find_elements(By.TAG_NAME, "a")
    assert [a.get_attribute("href") for a in links] == ["https://example.org/a?b=1&c=2"]
    assert "noopener" in links[0].get_attribute("rel")
    tags = [e.tag_name for e in answer.find_elements(By.CSS_SELECTOR, "*")]
    assert {"strong", "em", "code", "pre", "ul", "li", "table", "th", "td"} <= set(tags)


def test_tools(page):
    page.press("Settings")
    page.press("Insert an example")
    page.press("Save")
    page.say("calc 6*7")
    call = page.one(".call")
    assert "calculator" in call.text and '"expression": "6*7"' in call.text
    field = call.find_element(By.TAG_NAME, "textarea")
    until(lambda: field == page.driver.switch_to.active_element)
    field.send_keys("42", Keys.ENTER)
    page.wait()
    assert "The tool says 42." in page.texts(".reply")[-1]
    page.reload()
    assert "42" in page.one(".call").text and not page.all(".call textarea")


def test_tools_that_are_no_json(page):
    page.press("Settings")
    page.one("#tools").send_keys("[{")
    page.press("Save")
    assert "not JSON" in page.one("#tools-error").text
    page.press("Cancel")


def test_an_error_is_one_line_and_can_be_tried_again(page, model):
    model.engine.broken = RuntimeError("for the test")
    page.say("hello")
    assert "An internal error ended this request" in page.one(".reply .error").text
    page.press("Try again")
    page.wait()
    assert "You said hello." in page.one(".reply").text
    assert not page.all(".reply .error")


def test_a_refused_request(page):
    page.press("Settings")
    page.one("#max-tokens").send_keys("5")
    page.press("Save")
    page.say("slow")
    assert "most tokens" in page.one(".reply").text
    page.driver.execute_script(
        "localStorage.setItem('kimi-cpu.chat.x', JSON.stringify({v: 1, title: 'odd', updated: 9e12,"
        "options: {thinking: 'nonsense'}, turns: []}))"
    )
    page.reload()
    page.driver.execute_script("document.querySelector('#chats button').click()")
    page.say("hello")
    assert "reasoning_effort" in page.one(".reply .error").text
    page.complaints()  # the browser logs the answer 400


def test_damaged_storage_is_left_alone(page):
    page.say("hello")
    page.driver.execute_script(
        """
        localStorage.setItem("kimi-cpu.chat.a", "{");
        localStorage.setItem("kimi-cpu.chat.b", "[1]");
        localStorage.setItem("kimi-cpu.chat.c", JSON.stringify(
          {title: 5, turns: [null, {role: "x"}, {role: "user"}, {role: "assistant", content: 7,
           tool_calls: [{id: 1}]}]}));
        localStorage.setItem("kimi-cpu.options", "5");
        localStorage.setItem("kimi-cpu.open", "c");
        """
    )
    page.reload()
    assert sorted(page.texts("#chats .name")) == ["Untitled", "hello"]
    page.say("count")
    assert "user turns" in page.texts(".reply")[-1]


def test_a_full_storage_lets_the_oldest_go(page):
    page.driver.execute_script(
        """
        for (let i = 0; i < 4; i++) localStorage.setItem(`kimi-cpu.chat.old${i}`, JSON.stringify(
          {v: 1, title: `old ${i}`, updated: i + 1, turns: [
            {role: "user", content: "x".repeat(999_890)}]}));
        """
    )
    page.reload()
    page.say("hello")
    assert "old 0" not in page.texts("#chats .name") and "old 3" in page.texts("#chats .name")
    assert "oldest conversation was deleted" in page.one("#toast").text


def test_two_tabs(page):
    page.say("hello")
    first = page.driver.current_window_handle
    page.driver.switch_to.new_window("tab")
    page.driver.get(page.live.url)
    page.say("from the other")
    page.driver.close()
    page.driver.switch_to.window(first)
    until(lambda: len(page.all(".turn")) == 4)
    assert "You said from the other." in page.texts(".reply")[-1]


def test_the_keyboard_alone(page):
    body = page.one("body")
    body.send_keys(Keys.TAB)
    page.one("#prompt").click()
    page.say("hello")
    page.alt("j")
    assert "You said hello." in page.driver.switch_to.active_element.text
    webdriver.ActionChains(page.driver).send_keys("/").perform()
    assert page.driver.switch_to.active_element == page.one("#prompt")
    assert page.one("#prompt").get_attribute("value") == ""
    page.alt("m")
    assert page.driver.switch_to.active_element.get_attribute("value") == "hello"
    page.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert page.driver.switch_to.active_element.text == "Edit"
    page.alt("k")
    assert page.one("#help").is_displayed()
    page.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not page.one("#help").is_displayed()
    page.alt("g")
    assert not page.one("#routing").is_displayed()


def contrast(page: Page, selector: str) -> float:
    """The contrast ratio of an element's text with what is behind it (WCAG 2)."""
    return page.driver.execute_script(
        """
        const parse = c => c.match(/[\\d.]+/g).map(Number);
        const light = c => parse(c).slice(0, 3).map(v => v / 255)
          .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
          .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
        const element = document.querySelector(arguments[0]);
        let behind = element;
        while ((parse(getComputedStyle(behind).backgroundColor)[3] ?? 1) === 0)
          behind = behind.parentElement;
        const [a, b] = [getComputedStyle(element).color, getComputedStyle(behind).backgroundColor]
          .map(light).sort((x, y) => y - x);
        return (a + 0.05) / (b + 0.05);
        """,
        selector,
    )


def test_light_and_dark(page):
    page.say("hello")
    seen = set()
    for theme in ("light", "dark"):
        page.alt("l")
        assert page.one("#theme").text == f"Theme: {theme}"
        seen.add(page.one("body").value_of_css_property("background-color"))
        for selector in (
            ".reply .prose:last-of-type", ".turn.user .text", ".figures", ".status", "#send",
            "#chats time", ".reasoning summary", "#map-text", ".keys", "#settings-open", "#title",
        ):  # fmt: skip
            assert contrast(page, selector) >= 4.5, (theme, selector)
    assert len(seen) == 2
    page.reload()
    assert page.one("#theme").text == "Theme: dark"
    assert page.one("body").value_of_css_property("background-color") in seen


def test_every_control_has_a_name(page):
    page.say("hello")
    unnamed = page.driver.execute_script(
        """
        const all = document.querySelectorAll("button, input, textarea, select, a[href]");
        return [...all].filter(e => !e.getAttribute("aria-label") && !e.labels?.length
          && !(["BUTTON", "A"].includes(e.tagName) && e.textContent.trim())).map(e => e.outerHTML)
        """
    )
    assert unnamed == []
    for landmark in ("main", "header", "footer", "nav", "aside", "section"):
        assert page.all(landmark)
    assert len(page.all("h1")) == 1


def test_the_width_of_a_phone(page):
    page.say("hello")
    page.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True},
    )
    try:
        page.reload()
        page.say("hostile")
        wide = page.driver.execute_script(
            "const log = document.querySelector('#log');"
            "return [document.documentElement.scrollWidth, log.scrollWidth - log.clientWidth]"
        )
        assert wide == [360, 0]
        assert not page.one("#new").is_displayed()
        page.press("Conversations and settings")
        until(lambda: page.one("#new").rect["x"] >= 0)
        assert page.driver.switch_to.active_element == page.one("#new")
        webdriver.ActionChains(page.driver).send_keys(Keys.ESCAPE).perform()
        until(lambda: not page.one("#new").is_displayed())
        assert page.driver.switch_to.active_element == page.one("#menu")
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_key_is_asked_for(chromium, model):
    live = Live(lambda phase: model, api_key="right").ready()
    try:
        page = Page(chromium, live)
        until(lambda: page.one("#key").is_displayed())
        page.one("#key-value").send_keys("wrong", Keys.ENTER)
        until(lambda: "not accepted" in page.one("#key-hint").text)
        page.one("#key-value").send_keys("right", Keys.ENTER)
        until(lambda: not page.one("#key").is_displayed())
        page.say("hello")
        assert "You said hello." in page.one(".reply").text
        until(lambda: "2 layers of 8 experts" in page.one("#map-text").text)
    finally:
        live.stop()
        chromium.get_log("browser")


def test_while_the_model_loads(chromium, tmp_path):
    model = scripted_model(tmp_path)
    go_on = time.monotonic() + 4

    def load(phase):
        phase("weights")
        while time.monotonic() < go_on:
            time.sleep(0.05)
        return model

    live = Live(load)
    try:
        page = Page(chromium, live)
        assert page.one("#state").text.startswith("Loading the model: weights")
        page.type("hello")
        assert "Waiting for the model" in page.one(".reply").text
        page.wait()
        assert "You said hello." in page.one(".reply").text
    finally:
        live.stop()
        chromium.get_log("browser")


def test_the_server_goes_away(chromium, model):
    live = Live(lambda phase: model).ready()
    page = Page(chromium, live)
    page.type("slow")
    until(lambda: "word" in page.one(".reply").text)
    live.worker.abort()
    live.stop()
    page.wait()
    assert page.one(".reply .error").text.endswith("Try again")
    until(lambda: "does not answer" in page.one("#state").text)
    chromium.get_log("browser")


def lit(page: Page) -> int:
    """Pixels of the map that differ from an expert's that nobody chose."""
    return page.driver.execute_script(
        """
        const map = document.querySelector("#map");
        const p = map.getContext("2d").getImageData(0, 0, map.width, map.height).data;
        let lit = 0;
        for (let i = 0; i < p.length; i += 4) lit += p[i + 3] === 255 && p[i] - p[i + 2] > 12;
        return lit;
        """
    )


def test_the_picture_of_the_routing(chromium, nano):
    page = Page(chromium, nano)
    page.complaints()
    until(lambda: "4 layers of 48 experts" in page.one("#map-text").text)
    assert lit(page) == 0
    page.type("What is 17 + 25?")
    until(lambda: lit(page) > 100)
    page.wait()
    assert "= 42." in page.one(".reply > .prose").text
    assert "% in memory" in page.one("#map-text").text
    until(lambda: lit(page) == 0)  # it fades
    page.press("Show the routing")
    until(lambda: nano.app.state.routing_streams.open == 0)
    assert [one for one in page.complaints() if "getImageData" not in one] == []
