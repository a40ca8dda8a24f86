"""The HTML report: what it says, that it needs nothing else, that nothing in it is taken for markup, and, in headless
Chromium, that it is drawn without an error and answers to pointing."""

import copy
import html.parser
import json
import math
import re
import shutil

import numpy as np
import pytest
from selenium import webdriver
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from dnc_gpt2.html_report import html_report, script_json, thinned, where_it_helps, write_html_report
from dnc_gpt2.inspection import Inspection

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
in_chromium = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="Debian's packages chromium and chromium-driver are not installed"
)
EVIL = "</script><img src=x onerror=\"document.title='taken'\"><b>&lt;{{plotly}}"
HISTORY = [
    {"step": 1, "loss": 5.0, "lm_loss": 4.9, "top1_acc": 0.1, "write_gate": 0.8},
    {"step": 2, "loss": 3.0, "lm_loss": 2.9, "top1_acc": 0.4, "write_gate": 0.9},
    {"step": 2, "eval_loss": 3.1, "eval_top1_acc": 0.35, "eval_avg_gate": 0.85},
]


def model(ppl: float, gate: float | None = None, **fields) -> dict:
    return {"path": "runs/x", "parameters": 1000, "window": 4, "metrics": {"ppl": ppl, "avg_gate": gate}, **fields}


def comparison(**fields) -> dict:
    difference = {"loss": -0.5, "loss_interval": [-0.6, -0.4], "ppl_ratio": 0.6, "ppl_ratio_interval": [0.55, 0.67]}
    distance = {
        "labels": ["1", "2-3", "4-7", "never"],
        "lowest": [1, 2, 4, None],
        "targets": [10, 20, 30, 5],
        "loss": {"baseline": [2.0, 2.5, 3.0, 4.0], "dnc": [2.0, 2.0, 1.0, 4.5]},
        "gain": {"dnc": [0.0, 0.5, 2.0, -0.5]},
        "gain_interval": {"dnc": [[-0.1, 0.1], [0.4, 0.6], None, [-0.6, -0.4]]},
    }
    position = {**copy.deepcopy(distance), "labels": ["1", "2", "3", "4"], "lowest": [1, 2, 3, 4]}
    baseline = model(10.0)
    dnc = model(6.0, 0.9)
    baseline["metrics"]["recall_by_distance"] = {"1": 0.1, "2": 0.1}
    dnc["metrics"]["recall_by_distance"] = {"1": 0.9, "2": 0.8}
    return {
        "models": {"baseline": baseline, "dnc": dnc},
        "differences": {"dnc": difference},
        "profiles": {"distance": distance, "position": position},
        "data": {"corpus": "a corpus", "bootstrap": "10,000 resamples of 40 documents", "recall_by_guessing": 0.05},
        "seed": 7,
        "versions": {"torch": "2.13.0"},
        **fields,
    }


def inspection(tokens: list[str], slots: int = 3, heads: int = 2) -> Inspection:
    """Token t is written to slot t % slots alone and predicted from a read of token t - 2 alone."""
    count = len(tokens)
    writes = np.eye(slots, dtype=np.float32)[np.arange(count) % slots]
    sources = np.zeros((count, heads, count), dtype=np.float32)
    for t in range(1, count):
        sources[t, :, t - 1] = 1
    unknown = np.array([np.nan])
    return Inspection(
        tokens=tokens,
        window=4,
        write_gates=np.linspace(0, 1, count, dtype=np.float32),
        write_weights=writes,
        read_weights=np.full((count, heads, slots), 1 / slots, dtype=np.float32),
        read_sources=sources,
        held=np.minimum(1, np.cumsum(writes, 0)),
        holders=np.array(
            [[max((s for s in range(t + 1) if s % slots == n), default=-1) for n in range(slots)] for t in range(count)]
        ),
        log_probabilities=np.concatenate([unknown, np.full(count - 1, math.log(0.5))]),
        gains=np.concatenate([unknown, np.linspace(-1, 2, count - 1)]),
    )


LONG = "a text of many words " * 9
INSPECTIONS = {"dnc": {LONG: inspection(["The", " old", " king", "\n", " was", EVIL, " born", " in", " it"])}}


class Reader(html.parser.HTMLParser):
    """Elements of a page with their attributes, and the text outside of scripts."""

    def __init__(self, page: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.text, self.script = "", False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.script = tag in ("script", "style")

    def handle_endtag(self, tag):
        self.script = False

    def handle_data(self, data):
        self.text += "" if self.script else data


def data_of(page: str) -> dict:
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)[1])


def test_the_page_says_verdict_numbers_seed_and_versions():
    text = Reader(html_report(comparison(), {"dnc": HISTORY}, INSPECTIONS)).text.replace("\u00a0", " ")
    for part in (
        "The memory helps: GPT2 + DNC has a perplexity 40.0 % lower than GPT2 Baseline's (95 % interval 33.0 to "
        "45.0 %; 10,000 resamples of 40 documents).",
        "Perplexity ↓",
        "x 0.6000",
        "seed 7",
        "version of torch2.13.0",
        "gains most on GPT2 Baseline where a token was last seen 4-7 tokens before, +2.00 nats a token, and least "
        "where it was not seen before, −0.50.",
    ):
        assert part in text, part


def test_the_page_holds_all_that_it_shows_and_forbids_itself_the_network():
    elements = Reader(html_report(comparison(), {"dnc": HISTORY}, INSPECTIONS)).elements
    for tag, attributes in elements:
        assert tag not in ("iframe", "object", "embed") and "src" not in attributes
        assert tag != "link" or attributes["href"] == "data:,"
    policy = next(a["content"] for t, a in elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'") and "http" not in policy and "connect-src" not in policy


def test_texts_names_and_paths_are_text_wherever_they_come_from():
    evil = comparison(seed=EVIL, versions={EVIL: EVIL})
    evil["models"] = {EVIL: model(10.0, path=EVIL), "dnc": model(6.0, 0.9, scoring={EVIL: EVIL})}
    evil["data"] = {"dataset_name": EVIL, "bootstrap": EVIL}
    for profile in evil["profiles"].values():
        profile["loss"][EVIL] = profile["loss"].pop("baseline")
    page = html_report(evil, {EVIL: HISTORY}, {EVIL: {EVIL: inspection([EVIL, EVIL])}})
    reader = Reader(page)
    assert "img" not in [tag for tag, _ in reader.elements] and "b" not in [tag for tag, _ in reader.elements]
    assert page.count("<script") == page.count("</script") == len([1 for tag, _ in reader.elements if tag == "script"])
    assert EVIL in reader.text
    assert data_of(page)["inspections"][0]["tokens"] == [EVIL, EVIL]


def test_json_in_a_script_cannot_end_it():
    text = script_json({"a": "</script><!--<script>&\u2028"})
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {"a": "</script><!--<script>&\u2028"}


@pytest.mark.parametrize(
    "lacking",
    [
        {"differences": {}},
        {"profiles": {}},
        {"data": {}, "seed": None, "versions": {}},
        {"models": {"dnc": model(6.0, 0.9)}, "differences": {}, "profiles": {}},
        {"models": {"gpt2": model(6.0)}, "differences": {}, "profiles": {}},
        {"models": {"baseline": {"metrics": {}}, "dnc": {"metrics": {}}}},
    ],
    ids=["differences", "profiles", "data", "one model with memory", "one without", "metrics"],
)
def test_what_is_missing_is_left_out(lacking):
    page = html_report(comparison(**lacking))
    assert data_of(page)["inspections"] == []
    minimal = {"models": lacking.get("models") or {"baseline": model(10.0)}}
    assert "</html>" in html_report(minimal, {}, {})


def test_numbers_that_are_not_finite_leave_gaps():
    broken = comparison()
    broken["profiles"]["distance"]["loss"]["dnc"][0] = "NaN"
    broken["profiles"]["distance"]["gain"]["dnc"][0] = "-Infinity"
    broken["differences"]["dnc"] = {
        "loss": "NaN",
        "loss_interval": None,
        "ppl_ratio": "NaN",
        "ppl_ratio_interval": None,
    }
    page = html_report(broken, {"dnc": [{"step": 1, "loss": math.nan}, {"step": 2, "loss": 2.0}]})
    figures = {figure["title"]: figure for figure in data_of(page)["figures"]}
    assert figures["Cross-entropy loss"]["traces"][0]["x"] == [2]
    assert figures["Gain by distance since the last occurrence"]["traces"][0]["y"][0] is None
    assert "not finite" in page


def test_names_are_escaped_once():
    odd = comparison()
    odd["models"] = {'a|b "c"<i>' if name == "baseline" else name: model for name, model in odd["models"].items()}
    page = html_report(odd, {'a|b "c"<i>': [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}]})
    assert 'Changes are in percent of a|b "c"<i>.' in Reader(page).text
    (curve, *_) = data_of(page)["figures"][0]["traces"]
    assert curve["name"].startswith('a|b "c"&lt;i&gt;')


def test_more_models_have_a_curve_and_a_sentence_each():
    three = comparison()
    three["models"]["widened"] = model(9.9)
    three["differences"]["widened"] = {
        "loss": -0.01,
        "loss_interval": [-0.03, 0.01],
        "ppl_ratio": 0.99,
        "ppl_ratio_interval": [0.97, 1.01],
    }
    text = Reader(html_report(three)).text.replace("\u00a0", " ")
    assert "The memory helps" in text
    assert "No difference is shown: GPT2 widened has a perplexity 1.0 % lower than GPT2 Baseline's" in text


def test_where_it_helps_is_not_said_where_it_is_not_known():
    assert where_it_helps({"models": {"dnc": model(2.0)}}) == ""


def test_long_curves_are_thinned_and_keep_their_end():
    points = [(float(i), 0.0) for i in range(1001)]
    assert len(thinned(points)) <= 400 and thinned(points)[-1] == points[-1]
    assert thinned(points[:3]) == points[:3] and thinned([]) == []


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (
        *("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-dev-shm-usage"),
        *("disable-background-networking", "disable-component-update", "disable-sync"),
        f"user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(browser, tmp_path_factory):
    """The page, opened at a desktop's width."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_html_report(comparison(), path, {"baseline": HISTORY, "dnc": HISTORY}, INSPECTIONS)
    emulate(browser, 1280, "light")
    browser.get_log("browser"), browser.get_log("performance")
    browser.get(path.as_uri())
    return browser


def emulate(browser, width: int, scheme: str) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)


def ask(browser, script: str):
    return browser.execute_script(f"return {script}")


@in_chromium
def test_the_page_is_drawn_without_an_error_or_a_request(page):
    assert ask(page, "document.body.dataset.ready") == "yes"
    assert page.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert {url.split(":")[0] for url in urls} <= {"file", "data"} and [u for u in urls if u.startswith("file")]
    sizes = ask(page, "[...document.querySelectorAll('.chart .main-svg')].map((x) => x.getBoundingClientRect().width)")
    assert len(ask(page, "[...document.querySelectorAll('.chart')]")) == 10 and min(sizes) > 300
    assert ask(page, "document.querySelectorAll('section[hidden]').length") == 0
    assert ask(page, "document.title") == "GPT2 Baseline vs GPT2 + DNC"


@in_chromium
def test_pointing_at_a_token_shows_where_its_read_came_from(page):
    token = page.find_element("css selector", "[data-token='4']")
    webdriver.ActionChains(page).move_to_element(token).perform()
    sources = ask(page, "[...document.querySelectorAll('.token.source')].map((x) => x.dataset.token)")
    assert sources == ["2"]
    told = page.find_element("id", "told").text
    assert "Token 4 was" in told and "write gate 0.50, mostly to slot 1" in told
    assert "probability 50 %" in told and "100 %" in told and "2 tokens back" in told
    webdriver.ActionChains(page).move_to_element(page.find_element("css selector", "[data-token='7']")).perform()
    assert ask(page, "[...document.querySelectorAll('.token.source')].map((x) => x.dataset.token)") == ["5"]


@in_chromium
def test_the_arrow_keys_go_through_the_text(page):
    page.find_element("css selector", "[data-token='1']").click()
    page.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert "Token 2 king" in page.find_element("id", "told").text
    page.switch_to.active_element.send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    assert "The first token is not predicted" in page.find_element("id", "told").text


@in_chromium
def test_colours_are_the_gain_or_the_write_gate(page):
    colours = "[...document.querySelectorAll('.token')].map((x) => x.style.background)"
    gains = ask(page, colours)
    page.find_element("css selector", "[value=gate]").click()
    gates = ask(page, colours)
    page.find_element("css selector", "[value=gain]").click()
    assert "--loss" in gains[1] and "--gain" in gains[8] and ask(page, colours) == gains
    assert all("--write" in colour for colour in gates) and gates[1] != gates[8]


@in_chromium
def test_a_text_with_markup_is_shown_as_text(page):
    assert page.find_element("css selector", "[data-token='5']").text == EVIL
    assert ask(page, "document.querySelectorAll('main img').length") == 0 and page.title != "taken"


@in_chromium
def test_hovering_over_a_curve_shows_its_values(page):
    chart = page.find_element("css selector", "#help .chart")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", chart)
    plot = chart.find_element("css selector", ".nsewdrag")
    webdriver.ActionChains(page).move_to_element(plot).move_by_offset(9, 9).perform()
    shown = WebDriverWait(page, 60).until(
        lambda _: ask(page, "document.querySelector('#help .chart .hoverlayer').textContent")
    )
    assert "nats" in shown and "tokens" in shown


@in_chromium
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")])
def test_the_page_fits_the_screen_in_either_scheme(page, width, scheme):
    emulate(page, width, scheme)
    page.refresh()
    assert ask(page, "document.documentElement.scrollWidth") <= width
    back = ask(page, "getComputedStyle(document.body).backgroundColor")
    light = sum(map(int, re.findall(r"\d+", back)[:3])) > 3 * 128
    assert light == (scheme == "light")
    ink = ask(page, "document.querySelector('.chart text.xtitle').style.fill")
    assert (sum(map(int, re.findall(r"\d+", ink)[:3])) > 3 * 128) == (scheme == "dark")
    assert page.get_log("browser") == []
