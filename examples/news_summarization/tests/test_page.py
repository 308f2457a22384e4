"""The page in a browser: headless Chromium on the real server for what a reader does, on a stub for what goes wrong."""

import asyncio
import contextlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from functools import cached_property
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

HERE = Path(__file__).parent.parent
PAGE = HERE / "page"
POLICY = (  # the server's; the page must do with it
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
ASK = "3b0f7f3c-6a55-4c7e-9b1e-0d9a7f6f8a11"
QUERY = "Why did the Velmore harbour tunnel open late?"
HEALTH = {"status": "ok", "model": "extractive", "articles": 1234, "passages": 5678, "embedding_model": "MiniLM"}
IMPROVE = {
    "choices": 12,
    "ratings": 3,
    "needed": 50,
    "model": "extractive",
    "questions": [QUERY, "What do the new ferry timetables change?", "How much did the autumn storms cost farmers?"],
}


def passage(number: int, title: str, text: str, **values) -> dict:
    """A passage of an answer."""
    values = {"source": "Velmore Gazette", "published": "2026-03-12T06:30:00+00:00", "used": True, **values}
    url = values.pop("url", f"https://news.example/{number}")
    return {"number": number, "title": title, "url": url, "text": text, "score": 0.0325, "similarity": 0.7134, **values}


def summary(*sentences: tuple[str, list[int]], model: str = "extractive") -> dict:
    """A summary of an answer."""
    sentences = [{"text": text, "citations": citations} for text, citations in sentences]
    return {"text": " ".join(sentence["text"] for sentence in sentences), "sentences": sentences, "model": model}


LATE = (
    "The Velmore harbour tunnel opened to traffic on Thursday, fourteen months after the date that the council had "
    "promised."
)
WRECKS = (
    "Divers found two wrecks from the eighteenth century in the path of the third segment, and work stopped while "
    "archaeologists raised what could be raised."
)
COST = "The delay added 41 million to a budget of 380 million, the city's treasurer said."
FINE = (
    "A court fined the supplier of the tunnel's concrete 2.3 million after tests found that eleven of 96 segments had "
    "cured too fast."
)
PASSAGES = [
    passage(
        1,
        "Harbour tunnel opens fourteen months late",
        f"{LATE} {WRECKS} {COST}\n\nTolls will not be charged before July. Cyclists have a lane of their own, which "
        "the council says is the longest of its kind under water.",
    ),
    passage(
        2,
        "Wrecks under the harbour are older than thought",
        "Tree rings date the larger of the two wrecks to 1741, the museum of Velmore said. Its timbers lie in fresh "
        "water now and will be shown when they are dry, which takes about six years.",
        source="Coast Weekly",
        published="2025-11-02T18:00:00Z",
    ),
    passage(
        3,
        "Concrete supplier fined over tunnel segments",
        f"{FINE} They were cast again in the spring of last year, and the supplier paid for them.",
        published=None,
        url=None,
        used=False,  # but cited, as the extractive summariser may
    ),
    passage(4, "Ferries keep their timetable", "The ferry goes on running.", used=False, similarity=0.4),
]
ANSWER = {
    "ask": ASK,
    "query": QUERY,
    "answered": True,
    "message": "",
    "summaries": [
        summary((WRECKS, [1]), (FINE, [3])),
        summary((LATE, [1]), ("Two wrecks lay in its path, and segments had to be cast again.", [2, 3]), (COST, [1])),
    ],
    "passages": PASSAGES,
    "seconds": 1.234,
}
UNANSWERED = {"ask": None, "answered": False, "message": "The collection has nothing about this.", "summaries": []}
NOTHING = {**ANSWER, **UNANSWERED}


class Stub:
    """The page under the server's header, and an API that answers as a test says.

    replies: what each path answers: an object, a status and an object, a response, or a function of what was sent.
    seen: what was sent, as (path, body). left: the paths of requests that the page gave up.
    """

    def __init__(self):
        app = FastAPI(openapi_url=None)
        app.get("/")(lambda: FileResponse(PAGE / "index.html", headers={"Content-Security-Policy": POLICY}))
        app.get("/page/{name}")(lambda name: FileResponse(PAGE / name, headers={"Content-Security-Policy": POLICY}))
        app.api_route("/api/{path}", methods=["GET", "POST"])(self.api)
        self.server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.url = "http://127.0.0.1:%d" % self.server.servers[0].sockets[0].getsockname()[1]
        self.reset()

    def reset(self):
        """Answer as a server in good order does."""
        self.replies = {
            "health": HEALTH,
            "improve": IMPROVE,
            "ask": lambda sent: {**ANSWER, "query": sent["query"]},
            "choices": lambda sent: {"choices": 13},
            "ratings": lambda sent: {"ratings": 4},
        }
        self.seen, self.left = [], []
        self.gate = threading.Event()
        self.gate.set()

    async def api(self, path: str, request: Request) -> Response:
        sent = await request.json() if request.method == "POST" else None
        self.seen.append((path, sent))
        reply, gate = self.replies[path], self.gate
        while not gate.is_set():
            if await request.is_disconnected():
                self.left.append(path)
                return Response()
            await asyncio.sleep(0.01)
        reply = reply(sent) if callable(reply) and not isinstance(reply, Response) else reply
        status, reply = reply if isinstance(reply, tuple) else (200, reply)
        return reply if isinstance(reply, Response) else JSONResponse(reply, status)

    def sent(self, path: str) -> list:
        """The bodies that a path got."""
        return [body for to, body in self.seen if to == path]

    @contextlib.contextmanager
    def held(self):
        """Requests that come meanwhile are answered only afterwards."""
        gate = self.gate = threading.Event()
        try:
            yield gate
        finally:
            gate.set()
            self.gate = gate

    def close(self):
        self.server.should_exit = True
        self.thread.join()


class News:
    """The real server, as a command, on an embedded database with our own articles."""

    def __init__(self, folder: str):
        self.folder, self.log = folder, Path(folder, "log")
        with open(self.log, "w") as log:
            command = [sys.executable, "news.py", "serve", "--port", "0", "--data", folder]
            self.process = subprocess.Popen(command, cwd=HERE, stdout=log, stderr=subprocess.STDOUT)

    @cached_property
    def url(self) -> str:
        """Where it is, as soon as it is there."""
        found, until = None, time.monotonic() + 120
        while not found:
            time.sleep(0.05)
            found = re.search(r"serving on (http://\S+)\n", self.log.read_text())
            assert self.process.poll() is None and time.monotonic() < until, self.log.read_text()
        return found[1]

    def export(self) -> list[dict]:
        """The preference pairs."""
        out = Path(self.folder, "pairs.jsonl")
        command = [sys.executable, "news.py", "export", "--data", self.folder, "--out", out]
        done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in out.read_text().splitlines()]

    def close(self):
        self.process.terminate()
        self.process.wait(30)


@pytest.fixture(scope="module", autouse=True)
def news(request):
    """The real server, where a test of this run uses it: it starts while others use the stub.

    Not in pytest's tmp_path, which is closed to the user as whom PostgreSQL runs for root.
    """
    if not any("server" in test.fixturenames for test in request.session.items):
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="plainrl-page-") as folder:
        news = News(folder)
        yield news
        news.close()


@pytest.fixture
def server(news):
    return news


@pytest.fixture(scope="module")
def stubs():
    stub = Stub()
    yield stub
    stub.close()


@pytest.fixture
def stub(stubs):
    stubs.reset()
    return stubs


class Browser:
    """Chromium, and short names for what the tests do with it."""

    def __init__(self, profile: Path):
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium")
        quiet = "disable-quic no-first-run disable-background-networking disable-component-update disable-sync".split()
        for option in ("headless=new", "no-sandbox", "disable-gpu", *quiet, f"user-data-dir={profile}"):
            options.add_argument(f"--{option}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
        self.expected = None  # what a console may say of a request that a test lets fail

    def open(self, url: str):
        """A page with nothing left of the one before."""
        self.driver.get(url)

    def device(self, width: int = 1200, height: int = 900, **features: str):
        """The size of the window, and media features by name, an underscore for a hyphen; nothing else moves."""
        features = {"prefers_reduced_motion": "reduce", "prefers_color_scheme": "light", **features}
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        found = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": found})

    def offline(self, off: bool = True):
        """Cut the network, or mend it."""
        conditions = {"offline": off, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        self.driver.execute_cdp_cmd("Network.enable", {})
        self.driver.execute_cdp_cmd("Network.emulateNetworkConditions", conditions)

    def js(self, code: str, *arguments):
        return self.driver.execute_script(code, *arguments)

    def all(self, selector: str) -> list:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def wait(self, condition, what: str = "in vain"):
        return WebDriverWait(self.driver, 30, poll_frequency=0.03).until(lambda _: condition(), what)

    def find(self, selector: str, text: str = "", at: int = 0):
        """A visible element, waited for, that has a text in it."""

        def found():
            # in one go: the page may change between finding elements and asking them
            code = "return [...document.querySelectorAll(arguments[0])].filter(e => e.checkVisibility() && "
            return self.js(code + "e.textContent.includes(arguments[1]))[arguments[2]]", selector, text, at)

        return self.wait(found, f"no {selector} with {text!r}")

    def click(self, selector: str, text: str = "", at: int = 0):
        self.find(selector, text, at).click()

    def text(self, selector: str) -> str:
        return self.find(selector).text

    def keys(self, *keys: str):
        """Press keys, wherever the focus is."""
        ActionChains(self.driver).send_keys(*keys).perform()

    def focused(self):
        return self.driver.switch_to.active_element

    def tab(self, selector: str, text: str = ""):
        """Go by tab to an element; what is passed must show that it has the focus."""
        code = (
            "const e = document.activeElement; return [getComputedStyle(e).outlineStyle, e.outerHTML.slice(0, 80), "
            "e.matches(arguments[0]) && e.textContent.includes(arguments[1])]"
        )
        for _ in range(40):
            self.keys(Keys.TAB)
            outline, passed, there = self.js(code, selector, text)
            assert outline != "none", passed
            if there:
                return
        raise AssertionError(f"no way to {selector} by tab")

    def ask(self, query: str):
        field = self.find("#q")
        field.clear()
        field.send_keys(query, Keys.ENTER)

    def date(self, name: str, day: str):
        """Give a day to the filter; how days are typed depends on the language."""
        code = "const e = document.getElementById(arguments[0]); e.value = arguments[1]; "
        self.js(code + "e.dispatchEvent(new Event('input', { bubbles: true }))", name, day)

    def asked(self, stub: Stub, query: str = QUERY):
        """Open the page, ask, and wait for the answer."""
        self.open(stub.url)
        self.ask(query)
        self.find(".question", query)

    def address(self) -> dict:
        """What the address asks for."""
        return {name: values[0] for name, values in parse_qs(urlsplit(self.driver.current_url).query).items()}

    def complaints(self) -> list[str]:
        """What the console says since it was last asked."""
        lines = [entry["message"] for entry in self.driver.get_log("browser")]
        return [line for line in lines if not (self.expected and re.search(self.expected, line))]


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    if not shutil.which("chromium") or not shutil.which("chromedriver"):
        pytest.fail("these tests need Chromium and its driver: apt-get install chromium chromium-driver", pytrace=False)
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.driver.quit()


@pytest.fixture
def browser(chromium):
    """The browser; a console that complains of anything, such as of a breach of the policy, fails the test."""
    chromium.expected = None
    chromium.device()
    yield chromium
    chromium.offline(False)
    complaints = chromium.complaints()
    chromium.open("about:blank")
    assert not complaints


# What a reader does


def test_before_the_first_question_the_page_says_what_can_be_asked(stub, browser):
    browser.open(stub.url)
    assert browser.text("#collection") == "There are 1,234 articles, in 5,678 passages."
    assert browser.text("#tally") == "12 of 50 choices that a training needs"
    assert browser.js("return document.querySelector('#progress').position") == 12 / 50
    assert "the extractive summariser" in browser.text("#writer")
    assert browser.text("#examples") == "\n".join(["For example", *IMPROVE["questions"]])
    assert not stub.sent("ask")
    browser.click("#examples button", IMPROVE["questions"][1])
    browser.find(".question", IMPROVE["questions"][1])
    assert stub.sent("ask") == [{"query": IMPROVE["questions"][1], "from": None, "to": None}]
    assert browser.find("#q").get_property("value") == browser.address()["q"] == IMPROVE["questions"][1]
    assert browser.focused() == browser.find("#results")  # what had the focus is hidden
    assert not browser.js("return document.querySelector('#examples').checkVisibility()")


def test_an_empty_collection_and_enough_choices(stub, browser):
    stub.replies["health"] = {**HEALTH, "articles": 0, "passages": 0}
    stub.replies["improve"] = {**IMPROVE, "choices": 62, "model": "version 3", "questions": []}
    browser.open(stub.url)
    assert browser.text("#collection") == "The collection is empty: put articles in with “python news.py ingest”."
    assert browser.text("#tally") == "62 of 50 choices: enough to train"
    assert browser.text("#writer") == "Summaries are written by a language model (version 3)."
    assert not browser.js("return document.querySelector('#examples').checkVisibility()")


def test_an_answer_with_its_passages(stub, browser):
    browser.asked(stub)
    assert browser.text(".message") == "Two summaries of 3 passages, in 1.2 seconds."
    assert browser.text("#status") == browser.text(".message")  # read out
    assert browser.driver.title.startswith(QUERY)
    assert [card.text for card in browser.all(".summary .text")] == [
        f"{WRECKS}[1] {FINE}[3]",
        f"{LATE}[1] Two wrecks lay in its path, and segments had to be cast again.[2][3] {COST}[1]",
    ]
    about = ["Velmore Gazette", "12 March 2026", "similarity 0.71", "score 0.033"]
    found = browser.all(".passages li")
    assert [node.find_element(By.CSS_SELECTOR, ".about").text.split("\n") for node in found] == [
        about,
        ["Coast Weekly", "2 November 2025", *about[2:]],
        ["Velmore Gazette", "undated", *about[2:]],
        [*about[:2], "similarity 0.40", "score 0.033", "not used"],
    ]
    for node, entry in zip(found, PASSAGES, strict=True):
        assert node.find_element(By.CSS_SELECTOR, ".title").text == f"[{entry['number']}] {entry['title']}"
        links = [
            [link.text, *map(link.get_attribute, ("href", "target", "rel"))]
            for link in node.find_elements(By.CSS_SELECTOR, ".title a")
        ]
        wanted = [entry["title"], entry["url"], "_blank", "noopener noreferrer nofollow"]
        assert links == ([wanted] if entry["url"] else [])
    assert browser.find("time").get_attribute("datetime") == PASSAGES[0]["published"]
    (text, *others) = [node.find_element(By.CSS_SELECTOR, ".text") for node in found]
    assert [other.text for other in others] == [entry["text"] for entry in PASSAGES[1:]]
    short = text.text
    assert short.endswith(" …") and PASSAGES[0]["text"].startswith(short[:-2]) and 250 < len(short) < 330
    (more,) = [more for more in browser.all(".more") if more.is_displayed()]
    told = lambda: (more.get_attribute("aria-expanded"), more.get_property("textContent"))
    assert told() == ("false", "Show more of passage 1")
    more.click()
    assert text.text == PASSAGES[0]["text"] and told() == ("true", "Show less of passage 1")
    more.click()
    assert text.text == short and told() == ("false", "Show more of passage 1")


def test_the_way_to_a_passage_and_back(stub, browser):
    browser.device(height=500)  # so that it has to scroll
    browser.asked(stub)
    assert not browser.all("[aria-current]")
    marks = browser.all(".sentence a")
    assert [mark.text for mark in marks] == ["[1]", "[3]", "[1]", "[2]", "[3]", "[1]"]
    address = browser.driver.current_url
    visible = "const box = arguments[0].getBoundingClientRect(); return box.top >= 0 && box.bottom <= innerHeight"
    for mark, number, marked in ((marks[3], 2, []), (marks[1], 3, [FINE])):
        mark.click()
        (node,) = browser.all("[aria-current]")  # one at a time
        assert node == browser.focused() == browser.find(f"#passage-{number}")
        assert browser.js(visible, node)
        assert [part.text for part in browser.all("mark")] == marked  # where the passage has the sentence word for word
        assert browser.driver.current_url == address
        (back,) = [back for back in browser.all(".back") if back.is_displayed()]
        back.click()
        assert browser.focused() == mark and browser.js(visible, mark)
        assert not browser.all("[aria-current]") and not browser.all("mark")
        assert not any(back.is_displayed() for back in browser.all(".back"))
    marks[2].click()
    assert browser.text("#passage-1 .text") == PASSAGES[0]["text"]  # the sentence may be where it was cut off
    marks[4].click()
    assert browser.focused() == browser.find("[aria-current]") == browser.find("#passage-3")
    browser.find("#passage-1").send_keys(Keys.ESCAPE)  # no citation led there last
    browser.find("#passage-3").send_keys(Keys.ESCAPE)
    assert browser.focused() == marks[4]


def test_choosing_and_another_mind(stub, browser):
    browser.asked(stub)
    choosers = browser.all(".choose")
    pressed = lambda: [chooser.get_attribute("aria-pressed") for chooser in choosers]
    assert [chooser.text for chooser in choosers] == ["A is better", "B is better"] and pressed() == ["false", "false"]
    assert not browser.js("return document.body.innerText.includes('Written by')")  # the text alone is judged
    with stub.held() as gate:
        choosers[1].click()
        browser.find(".choice > .notice", "Saving …")
        assert pressed() == ["false", "false"]  # not before it is saved
        gate.set()
        browser.find(".choice > .notice", "Thank you. Saved: summary B is better. You can still change your mind.")
    assert pressed() == ["false", "true"]
    assert browser.text("#tally") == "13 of 50 choices that a training needs"
    with stub.held() as gate:
        choosers[0].click()
        browser.wait(lambda: len(stub.sent("choices")) == 2)
        choosers[1].click()
        choosers[0].click()
        choosers[1].click()
        time.sleep(0.1)
        assert len(stub.sent("choices")) == 2  # the next only when this one is through: they could pass each other
        gate.set()
        browser.find(".choice > .notice", "Saved: summary B is better")
    assert stub.sent("choices") == [{"ask": ASK, "chosen": chosen} for chosen in (1, 0, 1)]
    assert pressed() == ["false", "true"]


def test_rating(stub, browser):
    browser.asked(stub)
    cards = browser.all(".summary")
    up, down = (cards[1].find_element(By.CSS_SELECTOR, name) for name in (".up", ".down"))
    pressed = lambda: [thumb.get_attribute("aria-pressed") for thumb in browser.all(".thumbs button")]
    up.click()
    browser.find(".summary .notice", "Saved: a good summary.")
    assert pressed() == ["false", "false", "true", "false"]
    down.click()
    browser.find(".summary .notice", "Saved: a poor summary.")
    assert pressed() == ["false", "false", "false", "true"]
    assert stub.sent("ratings") == [{"ask": ASK, "summary": 1, "rating": rating} for rating in (1, -1)]
    assert not stub.sent("choices")


def test_one_summary_is_not_chosen_but_rated(stub, browser):
    one = [summary(("It rained.", [2, 9]), model="version 3")]
    stub.replies["ask"] = {**ANSWER, "summaries": one, "passages": PASSAGES[:2]}
    browser.asked(stub)
    assert browser.text(".choice h3") == "Summary" and not browser.all(".choose")
    assert browser.text(".message") == "A summary of 2 passages, in 1.2 seconds."
    assert "not used" not in browser.text(".passages")  # read, if not cited
    assert browser.text(".summary .text") == "It rained.[2] [9]"
    assert [mark.text for mark in browser.all(".sentence a")] == ["[2]"]  # there is no passage 9 to go to
    assert browser.text(".model") == "Written by a language model (version 3)."
    browser.click(".down")
    browser.find(".summary .notice", "Saved: a poor summary.")
    assert stub.sent("ratings") == [{"ask": ASK, "summary": 0, "rating": -1}]


def test_an_answer_that_was_not_recorded_cannot_be_judged(stub, browser):
    stub.replies["ask"] = {**ANSWER, "ask": None}
    browser.asked(stub)
    assert not browser.all(".choose") and not browser.all(".thumbs")
    assert browser.text(".choice > .notice") == "This answer could not be recorded, so that it cannot be judged."


def test_nothing_relevant(stub, browser):
    stub.replies["ask"] = lambda sent: {**NOTHING, "query": sent["query"]}
    browser.asked(stub, "Who is chess champion of Mars?")
    assert browser.text(".message") == browser.text("#status") == NOTHING["message"]
    assert not browser.all(".summary")
    assert browser.text(".nearest") == "Nearest, but not enough to answer"
    assert len(browser.all(".passages li")) == 4 and "not used" not in browser.text(".passages")
    browser.find("#examples button")
    stub.replies["ask"] = {**NOTHING, "answered": True, "passages": [], "message": ""}
    browser.ask("And of Venus?")
    browser.find(".message", "The collection has nothing that answers this.")
    assert not browser.js("return document.querySelector('.nearest').checkVisibility()")


def test_with_the_keyboard_alone(stub, browser):
    browser.open(stub.url)
    browser.find("#examples button")
    browser.tab("#q")
    browser.keys(QUERY, Keys.ENTER)
    browser.find(".question", QUERY)
    assert browser.focused() == browser.find("#q")  # not taken away from who goes on typing
    browser.tab(".sentence a", "[3]")
    mark = browser.focused()
    browser.keys(Keys.ENTER)
    assert browser.focused() == browser.find("#passage-3[aria-current]")
    browser.tab("#passage-3 .back")
    browser.keys(Keys.SPACE)
    assert browser.focused() == mark
    browser.tab(".choose", "A is better")
    browser.keys(Keys.SPACE)
    browser.find(".notice", "Saved: summary A is better")
    browser.tab(".up")
    browser.keys(Keys.ENTER)
    browser.find(".notice", "Saved: a good summary")
    browser.tab(".more")
    browser.keys(Keys.ENTER)
    browser.find("#passage-1 .text", PASSAGES[0]["text"])
    browser.tab("#passage-4 a")
    browser.open(stub.url)
    browser.tab(".skip")
    assert browser.find(".skip").size["width"] > 50  # seen while it has the focus
    browser.keys(Keys.ENTER)
    browser.tab("#examples button", IMPROVE["questions"][0])
    browser.keys(Keys.SPACE)
    browser.find(".question", QUERY)
    browser.tab(".sentence a", "[1]")  # on from the answer


# Waiting, and what goes wrong


def test_while_waiting(stub, browser):
    browser.open(stub.url)
    busy = lambda: browser.find("#results").get_attribute("aria-busy")
    with stub.held() as first:
        browser.ask("First?")
        browser.find(".loading", "Searching")
        assert busy() == "true" and browser.text("#status") == "Searching and summarising"
        browser.click("form button")
        browser.find("#q").send_keys(Keys.ENTER, Keys.ENTER)  # the same again is not sent again
        browser.wait(lambda: len(stub.sent("ask")) == 1)
        with stub.held() as second:
            browser.ask("Second?")
            browser.wait(lambda: stub.left == ["ask"], "the first question was not given up")
            first.set()
            time.sleep(0.2)
            assert busy() == "true"
            second.set()
            browser.find(".question", "Second?")
    assert busy() == "false"
    assert [body["query"] for body in stub.sent("ask")] == ["First?", "Second?"]
    browser.click("form button")  # after the answer the same can be asked anew
    browser.wait(lambda: len(stub.sent("ask")) == 3)


def test_a_late_answer_is_never_shown(stub, browser):
    """Also where it had come before it was given up, and is read only then."""
    browser.open(stub.url)
    browser.find("#examples button")
    browser.js(
        "const fetched = window.fetch; window.fetch = async (path, request) => {"
        "  const { signal, ...rest } = request; const response = await fetched(path, rest);"  # deaf to being given up
        "  if (request.body?.includes('First')) await new Promise(done => { window.letIn = done; });"
        "  return response; }"
    )
    browser.ask("First?")
    browser.wait(lambda: browser.js("return !!window.letIn"))
    browser.ask("Second?")
    browser.find(".question", "Second?")
    browser.js("window.letIn()")
    time.sleep(0.2)
    assert browser.text(".question") == "Second?" and browser.driver.title.startswith("Second?")
    browser.ask("First again?")
    browser.wait(lambda: browser.js("return location.search.includes('again')"))
    browser.driver.back()
    browser.find(".question", "Second?")
    browser.js("window.letIn()")
    time.sleep(0.2)
    assert browser.text(".question") == "Second?"


FAILURES = {
    "busy": ((503, {"error": "the server is busy"}), "No answer: the server is busy.", True),
    "fault": ((500, {"error": "a fault"}), "No answer: a fault.", True),
    "proxy": ((502, Response("<h1>Bad gateway</h1>", 502)), "No answer: the server answered with 502.", True),
    "garbled": (Response("{"), "No answer: the answer of the server cannot be read.", True),
    "wrong": ((422, {"error": "'from' is no date"}), "No answer: 'from' is no date.", False),
    "offline": (None, "No answer: the server cannot be reached.", True),
    "silent": (None, "No answer: no answer within 120 seconds.", True),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_a_question_that_fails(kind, stub, browser):
    reply, said, again = FAILURES[kind]
    browser.expected = r"/api/ask .*(status of|ERR_INTERNET_DISCONNECTED)"
    browser.open(stub.url)
    browser.find("#examples button")
    if kind == "silent":
        stub.gate.clear()
        code = "const limit = AbortSignal.timeout.bind(AbortSignal); "
        browser.js(code + "AbortSignal.timeout = time => limit(time / 1000)")
    browser.offline(kind == "offline")
    stub.replies["ask"], good = reply, stub.replies["ask"]
    browser.ask(QUERY)
    assert browser.text(".problem[role=alert]").split("\n")[0] == said
    assert browser.find("#results").get_attribute("aria-busy") == "false"
    assert len([node for node in browser.all(".problem button") if node.text == "Try again"]) == again
    assert ("It may work in a moment." in browser.text(".problem")) == again
    browser.offline(False)
    stub.replies["ask"] = good
    stub.gate.set()
    if again:
        browser.click(".problem button")
        assert browser.focused() == browser.find("#results")  # the button is gone
    else:
        browser.click("form button")
    browser.find(".question", QUERY)
    assert not browser.all(".problem")


def test_a_collection_that_is_away_can_be_tried_again(stub, browser):
    browser.expected = "/api/health .*status of 503"
    stub.replies["health"] = (503, {"error": "the database cannot be reached"})
    browser.open(stub.url)
    assert "The collection cannot be looked into: the database cannot be reached." in browser.text(".problem")
    stub.reset()
    browser.click(".problem button", "Try again")
    browser.find("#collection", "1,234 articles")
    browser.find("#examples button")


def test_a_choice_that_fails_is_said_not_to_be_saved_and_sent_again(stub, browser):
    browser.expected = "/api/(choices|ratings) .*status of 503"
    browser.asked(stub)
    browser.click(".choose", "A is better")
    browser.find(".notice", "Saved: summary A is better")
    good = dict(stub.replies)
    stub.replies["choices"] = stub.replies["ratings"] = (503, {"error": "the database is away"})
    browser.click(".choose", "B is better")
    browser.find(".notice", "Your choice was not saved: the database is away.")
    # as it is on the server
    assert [chooser.get_attribute("aria-pressed") for chooser in browser.all(".choose")] == ["true", "false"]
    browser.click(".up")
    browser.find(".summary .notice", "Your rating was not saved: the database is away.")
    stub.replies.update(good)
    browser.click(".choice > .notice button", "Send it again")
    browser.find(".notice", "Saved: summary B is better")
    assert browser.focused() == browser.find(".choose", "B is better")
    assert [chooser.get_attribute("aria-pressed") for chooser in browser.all(".choose")] == ["false", "true"]
    assert [body["chosen"] for body in stub.sent("choices")] == [0, 1, 1]
    browser.click(".summary .notice button")
    browser.find(".summary .notice", "Saved: a good summary")


def test_a_choice_that_fails_after_its_answer_is_gone(stub, browser):
    browser.expected = "/api/choices .*status of 503"
    browser.asked(stub)
    stub.replies["choices"], good = (503, {"error": "busy"}), stub.replies["choices"]
    with stub.held() as gate:
        browser.click(".choose")
        browser.wait(lambda: stub.sent("choices"))
        with stub.held():
            browser.ask("Another?")
            gate.set()
            browser.find("#elsewhere p", f"“{QUERY}”: Your choice was not saved: busy.")
    browser.find(".question", "Another?")
    stub.replies["choices"] = good
    browser.click("#elsewhere button", "Send it again")
    browser.find("#elsewhere p", "Saved: summary A is better")
    browser.driver.back()
    browser.find(".choice > .notice", "Saved: summary A is better")


# Addresses


def test_back_forward_and_reload(stub, browser):
    browser.open(stub.url)
    browser.ask("First & last?")
    browser.find(".question", "First & last?")
    assert browser.address() == {"q": "First & last?"}
    browser.click(".choose", "B is better")
    browser.find(".notice", "Saved")
    browser.click(".more")
    browser.date("from", "2026-01-31")
    browser.date("to", "2026-03-01")
    browser.ask("Second?")
    browser.find(".question", "Second?")
    assert browser.address() == {"q": "Second?", "from": "2026-01-31", "to": "2026-03-01"}
    assert stub.sent("ask")[-1] == {"query": "Second?", "from": "2026-01-31", "to": "2026-03-01"}
    values = lambda: [browser.find(f"#{name}").get_property("value") for name in ("q", "from", "to")]

    browser.driver.back()
    browser.find(".question", "First & last?")
    assert values() == ["First & last?", "", ""]
    assert browser.find(".choose", "B").get_attribute("aria-pressed") == "true"  # as it was left
    assert browser.text("#passage-1 .text") == PASSAGES[0]["text"]
    browser.driver.back()
    browser.find(".welcome")
    browser.find("#examples button")
    assert values() == ["", "", ""] and browser.driver.title == "Ask the news"
    browser.driver.forward()
    browser.driver.forward()
    browser.find(".question", "Second?")
    assert values() == ["Second?", "2026-01-31", "2026-03-01"]
    assert len(stub.sent("ask")) == 2  # nothing was asked anew

    browser.driver.refresh()
    browser.find(".question", "Second?")
    assert values() == ["Second?", "2026-01-31", "2026-03-01"]
    assert len(stub.sent("ask")) == 3 and stub.sent("ask")[1] == stub.sent("ask")[2]
    browser.driver.back()
    browser.find(".question", "First & last?")
    assert len(stub.sent("ask")) == 4


def test_addresses_that_are_typed(stub, browser):
    browser.expected = "does not conform to the required format"  # "yesterday"
    browser.open(f"{stub.url}/?q=%20{'x' * 600}&from=yesterday&to=2026-03-01&k=9")
    browser.find(".question", "x" * 500)
    assert stub.sent("ask") == [{"query": "x" * 500, "from": None, "to": "2026-03-01"}]
    assert browser.address() == {"q": "x" * 500, "to": "2026-03-01"}
    browser.find("#q").send_keys(Keys.CONTROL, "a", Keys.NULL, "What next")
    browser.js("location.hash = 'improve'")  # a place in the page, no other question
    time.sleep(0.1)
    assert len(stub.sent("ask")) == 1 and browser.find("#q").get_property("value") == "What next"
    browser.open(f"{stub.url}/?q=+&from=2026-03-01")
    browser.find(".welcome")
    browser.open(f"{stub.url}/?q=Why&from=2026-03-02&to=2026-03-01")
    browser.find(".welcome")
    assert len(stub.sent("ask")) == 1


def test_what_is_no_question_is_not_asked(stub, browser):
    browser.open(stub.url)
    browser.find("#examples button")
    browser.ask("")
    browser.ask("   ")
    assert browser.find("#q").get_attribute("maxlength") == "500"
    for days in (("2026-03-02", "2026-03-01"), ("2026-03-01", "2026-03-01")):
        browser.date("from", days[0])
        browser.date("to", days[1])
        assert not stub.sent("ask")
        browser.ask("  Why? ")
    browser.find(".question", "Why?")
    assert stub.sent("ask") == [{"query": "Why?", "from": "2026-03-01", "to": "2026-03-01"}]


# Text by strangers


def test_hostile_text_stays_text(stub, browser):
    hostile = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>&lt;b&gt;\u202e</p>'
    script = "javascript:window.hacked=1"
    urls = [
        script,
        f" {script}",
        f"{script}//http://",
        "data:text/html,x",
        "//x.example",
        "httpx:",
        "HTTPS://x.example",
    ]
    stub.replies["ask"] = lambda sent: {
        **ANSWER,
        "query": sent["query"],
        "message": hostile,
        "summaries": [summary((hostile, [1]), model=hostile)],
        "passages": [
            passage(at, hostile, hostile, source=hostile, published=hostile, url=url) for at, url in enumerate(urls, 1)
        ],
    }
    stub.replies["improve"] = {**IMPROVE, "model": hostile, "questions": [hostile]}
    browser.open(stub.url)
    assert browser.find("#examples button").get_property("textContent") == hostile
    browser.click("#examples button")
    for selector in (".question", ".message", ".sentence", ".model", "#writer", ".title", ".passages .text", ".about"):
        assert hostile in browser.find(selector).get_property("textContent")
    assert "undated" in browser.text(".about")
    browser.click(".sentence a")
    assert browser.find("mark").get_property("textContent") == hostile
    (link,) = browser.all(".title a")
    assert link.get_property("textContent") == hostile and link.get_property("protocol") == "https:"
    assert not browser.all("#results :is(img, b), script:not([src])")
    browser.driver.refresh()  # from the address
    browser.find(".question", hostile)
    stub.replies["ask"] = (400, {"error": hostile})
    browser.expected = "status of 400"
    browser.ask("Why?")
    assert hostile in browser.find(".problem").get_property("textContent")
    assert not browser.js("return window.hacked") and not browser.all("#results :is(img, b)")


# How it looks

STATES = ("empty", "loading", "answer", "chosen", "one", "nothing", "problem", "away", "elsewhere")


@contextlib.contextmanager
def bring(state: str, stub: Stub, browser: Browser, word: str = "word "):
    """Bring the page into a state, with a word where text by strangers is."""
    stub.reset()
    away = (503, {"error": word * 9})
    there = [passage(at, word * 9, word * 90, source=word * 3) for at in (1, 2)]
    full = {**ANSWER, "query": word * 9, "passages": there, "summaries": [summary((word * 60, [1, 2]))] * 2}
    one, nothing = {**full, "summaries": full["summaries"][:1]}, {**full, "answered": False}
    stub.replies["ask"] = {"one": one, "nothing": nothing, "problem": away}.get(state, full)
    stub.replies["improve"] = {**IMPROVE, "questions": [word * 9], "model": word * 9}
    if state == "away":
        stub.replies["health"] = away
    if state in ("chosen", "elsewhere"):
        stub.replies["ratings"] = away
    with stub.held() if state == "loading" else contextlib.nullcontext():
        browser.open(stub.url if state in ("empty", "away") else f"{stub.url}/?q={word * 9}")
        signs = {"empty": "#examples button", "loading": ".loading", "away": ".problem", "problem": ".problem"}
        browser.find(signs.get(state, ".question"))
        if state in ("chosen", "elsewhere"):
            browser.click(".choose")
            browser.find(".notice", "Saved")
            browser.click(".up")
            browser.find(".summary .failed")
            browser.click(".sentence a")
            browser.find("[aria-current]")
        if state == "elsewhere":
            code = "const again = document.querySelector('.notice button'); "
            browser.js(code + "document.querySelector('article').remove(); again.click()")
            browser.find("#elsewhere button")
        yield


CONTRASTS = """
const parse = colour => colour.match(/[\\d.]+/g).map(Number);
const light = colour => {
  const [r, g, b] = colour.map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = node => {
  for (; node; node = node.parentElement) {
    const colour = parse(getComputedStyle(node).backgroundColor);
    if (colour.length === 3) return colour;  // not see-through
  }
  return [255, 255, 255];
};
const contrast = (one, other) => {
  const [low, high] = [light(one), light(other)].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
};
const found = [];
for (const node of document.body.querySelectorAll("*")) {
  const style = getComputedStyle(node), name = node.outerHTML.slice(0, 80);
  if (!node.checkVisibility() || node.matches("noscript")) continue;
  const text = [...node.childNodes].some(child => child.nodeType === 3 && child.data.trim()) || node.matches("input");
  if (text) found.push([contrast(parse(style.color), behind(node)) / 4.5, name]);
  const border = parse(style.borderTopColor);
  if (node.matches("button, input")) found.push([contrast(border, behind(node.parentElement)) / 3, `border: ${name}`]);
}
return [light(behind(document.body)), found];
"""
WIDE = """
return [...document.querySelectorAll("html, body *")]
  .filter(e => e.checkVisibility() && !e.matches("input, .unseen, .skip"))
  .filter(e => e.clientWidth && e.scrollWidth > e.clientWidth + 1 || e.getBoundingClientRect().right > innerWidth)
  .map(e => e.outerHTML.slice(0, 80));
"""


@pytest.mark.parametrize("state", STATES)
def test_a_state_on_a_phone_in_both_schemes_and_to_a_screen_reader(state, stub, browser):
    browser.expected = "status of 503"
    with bring(state, stub, browser, "Donaudampfschifffahrtselektrizitaetenhauptbetriebswerk"):
        for scheme in ("light", "dark"):
            browser.device(360, 700, prefers_color_scheme=scheme)
            ground, found = browser.js(CONTRASTS)
            assert (ground < 0.5) == (scheme == "dark")
            assert len(found) > 10 and not [(ratio, what) for ratio, what in found if ratio < 1]
        assert not browser.js(WIDE)

        tree = browser.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
        tree = [node for node in tree if not node["ignored"]]
        nodes = [(node["role"]["value"], node.get("name", {}).get("value", "").strip()) for node in tree]
        roles = [role for role, _ in nodes]
        assert [roles.count(landmark) for landmark in ("banner", "search", "main", "contentinfo")] == [1, 1, 1, 1]
        assert ("region", "Answer") in nodes and "status" in roles
        controls = ("button", "link", "textbox", "Date", "group", "progressbar")
        assert not [role for role, name in nodes if role in controls and not name]
        assert {("textbox", "Your question"), ("Date", "from"), ("Date", "to")} <= set(nodes)
        if state == "chosen":
            names = {name.split(" of ")[0] for role, name in nodes if role in ("button", "group")}
            assert names >= {"Only articles published", "Rate Summary A", "Rate Summary B", "Good", "Poor"}
            assert names >= {"A is better", "B is better", "Back to the summary", "Show less", "Send it again"}
        code = "return [...document.querySelectorAll('h1, h2, h3, h4')].filter(e => e.checkVisibility())"
        levels = browser.js(code + ".map(e => +e.localName[1])")
        assert levels[0] == 1 and levels.count(1) == 1
        assert all(after <= before + 1 for before, after in zip(levels, levels[1:]))  # none left out


def test_two_summaries_stand_side_by_side_or_one_above_the_other(stub, browser):
    browser.asked(stub)
    first, second = (card.rect for card in browser.all(".summary"))
    assert first["y"] == second["y"] and second["x"] >= first["x"] + first["width"]
    browser.device(360)
    first, second = (card.rect for card in browser.all(".summary"))
    assert second["y"] >= first["y"] + first["height"] and second["width"] == first["width"] > 300


def test_a_mark_stands_with_its_sentence(stub, browser):
    browser.asked(stub)
    code = (
        "return [...document.querySelectorAll('.sentence')].map(sentence => { const range = new Range(); "
        "range.setStart(sentence.firstChild, sentence.firstChild.length - 1); range.setEndAfter(sentence.firstChild); "
        "return sentence.querySelector('a').getBoundingClientRect().top - range.getBoundingClientRect().top; })"
    )
    for width in range(340, 560, 20):
        browser.device(width)
        assert all(abs(down) < 15 for down in browser.js(code)), width


def test_nothing_moves_for_who_wants_that(stub, browser):
    browser.device()
    with bring("loading", stub, browser):
        for motion in ("reduce", "no-preference"):
            browser.device(prefers_reduced_motion=motion)
            moving = browser.js("return document.getAnimations().length > 0")
            scrolling = browser.js("return getComputedStyle(document.documentElement).scrollBehavior")
            assert (moving, scrolling) == ((False, "auto") if motion == "reduce" else (True, "smooth"))


# All of it, last: the server is there by now


def test_a_choice_of_a_reader_becomes_a_preference_pair(server, browser):
    browser.open(server.url)
    articles = len((HERE / "articles.jsonl").read_text().splitlines())
    browser.find("#collection", f"There are {articles} articles")
    question = browser.text("#examples button")
    browser.ask(question)
    browser.find("h3", "Which is better?")
    code = "return [...arguments[0].querySelectorAll('.sentence')].map(e => e.firstChild.data)"
    first, second = [browser.js(code, card) for card in browser.all(".summary")]
    assert first and second and first != second

    mark = browser.find(".summary .sentence a")
    number = mark.text.strip("[]")
    mark.click()
    assert browser.find("[aria-current]") == browser.find(f"#passage-{number}") == browser.focused()
    assert browser.text("[aria-current] mark") == first[0]

    browser.click(".choose", "B is better")
    browser.find(".notice", "Saved: summary B is better")
    browser.find("#tally", "1 of ")
    browser.click(".choose", "A is better")  # another mind
    browser.find(".notice", "Saved: summary A is better")
    browser.click(".thumbs .down")
    browser.find(".notice", "Saved: a poor summary")
    browser.driver.refresh()  # asks again
    browser.find("#tally", "1 of ")
    browser.click(".choose", "B is better")
    browser.find("#tally", "2 of ")
    pairs = server.export()
    assert [question in pair["prompt"] for pair in pairs] == [True, True]
    sides = [(pair["chosen"], pair["rejected"]) for pair in pairs]
    unmarked = [[re.sub(r"( \[\d+\])+ ?", "\n", text).strip().split("\n") for text in pair] for pair in sides]
    assert unmarked == [[first, second], [second, first]]

    browser.ask("Which grandmaster won the chess championship on Mars?")
    assert "nothing" in browser.text(".nothing .message")
