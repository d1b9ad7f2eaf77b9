"""The shell of a page: embedded data cannot break out."""

import json
import re

import pytest

from pema.errors import ConfigError
from pema.pages.page import html_page, json_block, static

HOSTILE = '</script><script>document.title="owned"</script><!-- <img src=x onerror=alert(1)> & "\'\u2028\u2029'


def data_of(document):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', document, re.DOTALL)[1])


def test_data_come_back_as_they_went_in_and_cannot_end_their_script():
    data = {HOSTILE: [HOSTILE, 1, 0.5, None, True]}
    text = json_block(data)
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == data
    assert data_of(html_page("t", "", data=data)) == data


def test_numbers_that_are_not_finite_become_null():
    assert json.loads(json_block({"a": [float("nan"), float("inf"), (1.5,)]})) == {"a": [None, None, [1.5]]}


def test_title_and_description_are_text():
    document = html_page(HOSTILE, "", data={}, description=HOSTILE)
    assert document.count("<script") == 2
    assert "<img" not in document


def test_a_lone_surrogate_is_replaced():
    assert "a?b" in html_page("a\ud800b", "", data={"a": "\udfff"})


@pytest.mark.parametrize(("given", "kind"), [({"css": ["</STYLE >"]}, "style"), ({"js": ["'</script>'"]}, "script")])
def test_styles_and_scripts_that_would_end_their_element_are_refused(given, kind):
    with pytest.raises(ConfigError, match=f"a {kind} contains '</{kind}'"):
        html_page("t", "", data={}, **given)


def test_the_same_input_makes_the_same_page():
    assert html_page("t", "<p>b</p>", data={"a": 1}) == html_page("t", "<p>b</p>", data={"a": 1})


def test_scripts_that_were_not_given_do_not_run(browser, tmp_path):
    path = tmp_path / "page.html"
    injected = (
        "<p id=p>text</p><script>document.getElementById('p').textContent = 'owned'</script><img src=http://a.b/c>"
    )
    path.write_text(html_page("t", injected, data={}), encoding="utf-8")
    page, refused = browser.new_page(), []
    page.on("console", lambda message: refused.append(message.text))
    page.goto(path.as_uri())
    assert page.locator("#p").text_content() == "text"
    assert len([text for text in refused if "Content Security Policy" in text]) == 2
    page.close()


def test_scripts_see_the_data_and_the_theme_can_be_switched(visit, tmp_path):
    path = tmp_path / "page.html"
    js = ["document.getElementById('out').textContent = DATA.said;"]
    path.write_text(html_page("t", "<p id=out></p>", js=js, data={"said": HOSTILE}), encoding="utf-8")
    page = visit(path, color_scheme="dark")
    assert page.locator("#out").text_content() == HOSTILE
    background = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(background)
    page.get_by_role("button", name="Light colours").click()
    light = page.evaluate(background)
    assert sum(map(int, re.findall(r"\d+", dark))) < 150 < 700 < sum(map(int, re.findall(r"\d+", light)))
    page.reload()
    assert page.evaluate(background) == light
    page.get_by_role("button", name="Dark colours").press("Enter")
    assert page.evaluate(background) == dark


def test_the_shared_parts_ask_for_nothing():
    shared = static("page.css") + static("page.js")
    assert not re.search(r"https?://|@import|url\(", shared.replace('"http://www.w3.org/2000/svg"', ""))
