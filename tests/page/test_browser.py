"""The page in a real browser: ``bash scripts/test_page.sh``. Left out where Gradio, Playwright or Chromium is not."""

import json
import tempfile
from pathlib import Path

import pytest
from convert_to_transformers import convert

from llava.mm_utils import load_image, process_images, tokenizer_image_token
from llava.model.builder import DEFAULT_CHECKPOINT, TOY_FOLDER, load_pretrained_model
from llava.pruning import get_pruner
from llava.serve.page.__main__ import BUNDLED
from llava.serve.page.user import Relay
from page_pictures import WAIT, browser_path, compare, launch, opened, serve_toy

pytest.importorskip("gradio")
sync_api = pytest.importorskip("playwright.sync_api")
if browser_path() is None:
    pytest.skip("no Chromium", allow_module_level=True)


ROOT = Path(__file__).resolve().parents[2]
PICTURE = TOY_FOLDER.parent / BUNDLED["toy scene with a fish"]
QUESTION = "What color is the star?"


@pytest.fixture(scope="module")
def address():
    return serve_toy()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = launch(playwright)
        yield browser
        browser.close()


@pytest.fixture
def tab(browser, address):
    tab = opened(browser, address)
    tab.faults = []
    tab.on("pageerror", lambda error: tab.faults.append(str(error)))
    yield tab
    assert not tab.faults
    tab.context.close()


def ask(tab):
    before = tab.locator("#result .sv").get_attribute("id") if tab.locator("#result .sv").count() else ""
    tab.click("#ask")
    tab.wait_for_function(
        "b => { const one = document.querySelector('#result .sv[data-ready]'); return one && one.id !== b; }",
        arg=before,
    )
    tab.wait_for_selector("#live >> text=done")
    return shown(tab)


def shown(tab):
    """What the page holds of what it shows, as it saves it."""
    return json.loads(tab.locator("#result .sv-data").text_content())


def kept(look):
    return look["pictures"][0]["views"][0]["kept"]


def test_kept_sets_and_answer_equal_those_of_the_library(tab):
    (look,) = shown_looks = ask(tab)["looks"]
    assert len(shown_looks) == 1
    tokenizer, model, processor, _ = load_pretrained_model(DEFAULT_CHECKPOINT, device="cpu")
    picture = load_image(TOY_FOLDER.parent / BUNDLED["toy scene"])
    pixels = process_images([picture], processor, model.config)
    ids = tokenizer_image_token(f"USER: <image>\n{QUESTION} ASSISTANT:", tokenizer, return_tensors="pt")[None]
    with get_pruner("script", keep_tokens=16)(model) as handle:
        answer = model.generate(ids, images=pixels, image_sizes=[picture.size], max_new_tokens=4, query=QUESTION)
    assert kept(look) == handle.kept[0].mask()[0].nonzero().flatten().tolist()
    assert tokenizer.decode(answer[0], skip_special_tokens=True).strip().startswith(look["answer"])
    assert tab.locator(".sv-answer").inner_text().startswith(look["answer"])


def test_a_second_question_takes_the_features_that_are_there_and_the_slider_asks_again(tab):
    assert ask(tab)["looks"][0]["milliseconds"]["vision"] > 0
    tab.fill("#question textarea", "What color is the cup?")
    second = ask(tab)["looks"][0]
    assert second["milliseconds"]["vision"] == 0
    slider = tab.locator("#count input[type=range]")
    slider.focus()
    before = tab.locator("#result .sv").get_attribute("id")
    slider.press("ArrowRight")
    slider.dispatch_event("pointerup")
    tab.wait_for_function("b => document.querySelector('#result .sv[data-ready]')?.id !== b", arg=before)
    tab.wait_for_selector("#live >> text=done")
    assert len(kept(shown(tab)["looks"][0])) == 17


def test_four_methods_the_order_played_and_what_is_saved(tab, tmp_path):
    compare(tab)
    said = shown(tab)
    assert [look["method"] for look in said["looks"]] == ["script", "divprune", "trim", "random"]
    assert tab.locator("table caption >> text=Overlap").count() == 1
    dark = tab.locator(".sv-look:nth-child(1) .sv-dim path")
    whole = dark.get_attribute("d")
    tab.click("text=Play the order")
    tab.wait_for_function("d => document.querySelector('.sv-dim path').getAttribute('d').length > d", arg=len(whole))
    tab.wait_for_selector(".sv-bar >> text=16 of 16")
    assert dark.get_attribute("d").count("M") == 576 - 16  # cell by cell, the same set
    tab.select_option(".sv-bar select", "relevance")
    assert not tab.locator(".sv-look:nth-child(1) canvas").get_attribute("hidden")
    assert "computes none" in tab.locator(".sv-look:nth-child(4) .sv-stage").get_attribute("data-missing")
    stage = tab.locator(".sv-look:nth-child(1) .sv-stage")
    stage.focus()
    stage.press("ArrowRight")
    stage.press("ArrowRight")
    words = tab.locator(".sv-cell").inner_text()
    assert "relevance" in words
    assert "kept token at" in words
    for button, ending in (("Save PNG", ".png"), ("Save JSON", ".json"), ("Save as an HTML file", ".html")):
        with tab.expect_download() as download:
            tab.click(f"button >> text={button}")
        file = tmp_path / f"saved{ending}"
        download.value.save_as(file)
        assert file.stat().st_size > 1000
    assert json.loads((tmp_path / "saved.json").read_text()) == said
    assert (tmp_path / "saved.png").read_bytes()[:4] == b"\x89PNG"
    tab.goto((tmp_path / "saved.html").as_uri())  # without the server
    tab.wait_for_selector(".sv[data-ready]")
    assert json.loads(tab.locator(".sv-data").text_content()) == said


def test_a_broken_file_is_refused_and_a_good_one_is_read(tab):
    tab.set_input_files("#file", {"name": "broken.png", "mimeType": "image/png", "buffer": b"no picture"})
    tab.wait_for_selector("#live .error >> text=broken.png is not an image")
    tab.set_input_files("#file", {"name": "cut.jpg", "mimeType": "image/jpeg", "buffer": PICTURE.read_bytes()[:900]})
    tab.wait_for_selector("#live .error >> text=cut.jpg")
    tab.set_input_files("#file", PICTURE)
    tab.wait_for_selector(f"#preview >> text={PICTURE.name}")
    assert ask(tab)["picture"] == PICTURE.name
    assert "picture=" not in tab.url  # an own picture is in no address


def test_pasting_and_the_camera(tab):
    tab.evaluate(
        """async () => {
            const canvas = Object.assign(document.createElement("canvas"), { width: 50, height: 40 });
            const blob = await new Promise((done) => canvas.toBlob(done));
            const data = new DataTransfer();
            data.items.add(new File([blob], "pasted.png", { type: "image/png" }));
            document.dispatchEvent(new ClipboardEvent("paste", { clipboardData: data, bubbles: true }));
        }"""
    )
    tab.wait_for_selector("#preview >> text=pasted.png")
    tab.context.grant_permissions(["camera"])
    tab.click("#open-camera")
    tab.wait_for_function("() => document.querySelector('#camera video').videoWidth > 0")
    tab.click("#take-photo")
    tab.wait_for_selector("#preview >> text=photo.png")


def test_two_tabs_at_once_see_their_own_pictures_alone(browser, address):
    first, second = opened(browser, address), opened(browser, address)
    first.set_input_files("#file", PICTURE)
    first.wait_for_selector(f"#preview >> text={PICTURE.name}")
    assert PICTURE.name not in second.content()
    for tab in (first, second):
        tab.click("#ask")
    said = []
    for tab in (first, second):
        tab.wait_for_selector("#result .sv[data-ready]")
        tab.wait_for_selector("#live >> text=done")
        said.append(shown(tab))
        tab.context.close()
    assert [one["picture"] for one in said] == [PICTURE.name, "toy scene"]
    assert kept(said[0]["looks"][0]) != kept(said[1]["looks"][0])


@pytest.fixture
def held(monkeypatch):
    """The first run that comes to its answer waits there until it is stopped; the later ones do not."""
    first, words = [], Relay.text

    def text(relay, piece, end):
        if not first:
            first.append(relay)
        if relay is first[0] and not end:
            relay.stop.wait(WAIT / 1000)
        words(relay, piece, end)

    monkeypatch.setattr(Relay, "text", text)


def test_a_run_is_stopped_and_the_next_one_runs(tab, held):
    tab.click("#compare-part button >> nth=0")
    tab.click("button#compare")
    tab.wait_for_selector("#live >> text=/1 of 4.*answering/")
    tab.click("#stop")
    tab.wait_for_selector("#live >> text=stopped")
    (look,) = shown(tab)["looks"]
    assert look["stopped"]
    assert len(ask(tab)["looks"]) == 1


def test_a_new_question_takes_the_place_of_the_one_under_way(tab, held):
    tab.click("#ask")
    tab.wait_for_selector("#live >> text=answering")
    tab.fill("#question textarea", "What color is the cup?")
    tab.press("#question textarea", "Enter")
    tab.wait_for_selector("#live >> text=done")
    (look,) = shown(tab)["looks"]
    assert look["question"] == "What color is the cup?"
    assert not look["stopped"]


def test_others_wait_for_the_model_are_told_so_and_need_not(browser, address, held):
    first, second = opened(browser, address), opened(browser, address)
    first.click("#ask")
    first.wait_for_selector("#live >> text=answering")
    second.click("#ask")
    second.wait_for_selector("#live >> text=waiting for the model, 1 before this one")
    second.click("#stop")
    second.wait_for_selector("#live >> text=stopped")
    assert first.locator("#live >> text=answering").count() == 1
    second.click("#ask")
    second.wait_for_selector("#live >> text=1 before this one")
    first.click("#stop")
    second.wait_for_selector("#live >> text=done")
    for one in (first, second):
        one.context.close()


def test_an_address_shows_the_same_again(tab, browser):
    compare(tab)
    tab.wait_for_function("() => location.search.includes('look=')")
    again = opened(browser, tab.url)
    again.wait_for_selector("#live >> text=done")
    before, after = ([{**look, "milliseconds": 0} for look in shown(one)["looks"]] for one in (tab, again))
    assert before == after
    wrong = opened(
        browser, tab.url.partition("?")[0] + "?question=q&method=nope", viewport={"width": 800, "height": 600}
    )
    wrong.wait_for_selector("#live .error >> text=unknown pruner")
    wrong.wait_for_selector("#preview >> text=toy scene")  # the page works all the same
    for one in (again, wrong):
        one.context.close()


def test_options_are_fields_with_their_help(tab, browser):
    tab.click("button >> text=Options of the method")
    tab.wait_for_selector("text=the share of tokens that GSP discards")
    tab.uncheck("label:has-text('gsp') input[type=checkbox] >> nth=0")
    tab.wait_for_function("() => document.querySelector('#options textarea, #options input').value === 'gsp=false'")
    assert ask(tab)["looks"][0]["options"] == ["gsp=false"]
    tab.wait_for_function("() => location.search.includes('option=')")
    again = opened(browser, tab.url)  # the fields of an address show what it sets
    again.click("button >> text=Options of the method")
    again.wait_for_selector("text=the share of tokens that GSP discards")
    assert not again.locator("label:has-text('gsp') input[type=checkbox] >> nth=0").is_checked()
    again.context.close()


def test_a_phone_sized_window_needs_no_sideways_scrolling(browser, address):
    tab = opened(browser, address, viewport={"width": 390, "height": 844}, color_scheme="dark")
    ask(tab)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    tab.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_serious_is_found_by_axe(browser, address, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    tab = opened(browser, address, color_scheme=scheme)
    tab.click("button >> text=Options of the method")
    compare(tab)
    tab.select_option(".sv-bar select", "relevance")
    found = [
        (one["id"], one["impact"], [node["html"][:200] for node in one["nodes"]])
        for one in axe.run(tab).response["violations"]
        if one["impact"] in ("serious", "critical")
    ]
    tab.context.close()
    assert not found


RECORD = """
window.received = [];
const plain = window.fetch;
window.fetch = async (...given) => {
  const response = await plain(...given), decoder = new TextDecoder();
  const reader = response.clone().body?.getReader();
  const read = async () => {
    for (let part = await reader.read(); !part.done; part = await reader.read())
      window.received.push(decoder.decode(part.value, { stream: true }));
  };
  if (reader) read().catch(() => {});
  return response;
};
"""  # what comes, streams among it that do not end


def test_nothing_comes_from_elsewhere_and_no_path_of_the_server_is_sent(browser, address):
    tab = browser.new_context().new_page()
    asked = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.add_init_script(RECORD)
    document = tab.goto(address).text()
    tab.wait_for_selector("#preview img", timeout=WAIT)
    tab.set_input_files("#file", {"name": "cut.jpg", "mimeType": "image/jpeg", "buffer": PICTURE.read_bytes()[:900]})
    tab.wait_for_selector("#live .error", timeout=WAIT)
    tab.set_input_files("#file", PICTURE)
    tab.wait_for_selector(f"#preview >> text={PICTURE.name}", timeout=WAIT)
    ask(tab)
    foreign = [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    assert not foreign
    received = "".join(tab.evaluate("window.received"))
    assert "process_completed" in received
    assert PICTURE.name in received
    for place in (str(ROOT), tempfile.gettempdir() + "/", str(Path.home())):
        assert place not in document + received + tab.content(), place
    status = tab.evaluate(
        "async () => (await fetch('gradio_api/upload', { method: 'POST', body: new FormData() })).status"
    )
    assert status == 404
    tab.context.close()


def test_a_model_of_the_library(browser, tmp_path):
    convert(str(DEFAULT_CHECKPOINT), tmp_path / "toy")
    tab = opened(browser, serve_toy("--hf", "--model-path", str(tmp_path / "toy")))
    assert tab.locator("#count input[type=range]").get_attribute("max") == "576"
    (look,) = ask(tab)["looks"]
    assert len(kept(look)) == 16
    assert {"vision", "selection", "prefill"} <= set(look["milliseconds"])
    stage = tab.locator(".sv-stage")
    stage.focus()
    stage.press("ArrowRight")
    stage.press("ArrowRight")
    assert "kept token at" in tab.locator(".sv-cell").inner_text()
    tab.context.close()
