"""The inspector's page in a real browser: it computes the same as Python, and is accessible."""

import dataclasses
import json
import math
import re

import pytest
import torch

from pema.adapter.config import AdapterConfig
from pema.adapter.module import Adapter
from pema.adapter.schedule import Constant, Fitted, GradualUnrolling, Linear, NoAdapter
from pema.errors import ConfigError
from pema.generation.mixture import mix
from pema.pages.inspector import page as inspector
from pema.pages.inspector.inspection import inspect_generation
from pema.pages.inspector.page import SCRIPTS, inspector_page, write_inspection
from pema.pages.page import static
from pema.tasks.registry import Task
from pema.tasks.template import Template
from reproduction.experiments.inspector import EXAMPLE
from reproduction.experiments.inspector import SOURCE as SENTENCE

TASK = Task("test", Template("say {source}\nGerman:"), (), "")
SOURCE = 'the </script><script>document.title="owned"</script> <b>house</b> & بيت'
FITTED = Fitted((0.8, 0.35, 0.1, 0.6), span=1.5)
USED = GradualUnrolling(0.85)
SCHEDULES = [
    *(
        kind(value)
        for kind in (GradualUnrolling, Linear, Constant)
        for value in (0.0, 0.05, 0.333, 0.5, 0.85, 0.97, 1.0)
    ),
    FITTED,
    NoAdapter(),
]
ROWS = "rows => rows.map(row => [...row.cells].map(cell => cell.querySelector('data')?.value ?? cell.textContent))"


@pytest.fixture(scope="module")
def plm(tiny_plm):
    return tiny_plm("llama")


def make_adapter(plm):
    """Near to the PLM, so that another weight changes some tokens and not all; with a vocabulary of its own."""
    head, tokens = plm.head(), torch.arange(1, plm.head().vocabulary_size, 2)
    config = AdapterConfig(
        d=head.d, vocabulary_size=head.vocabulary_size, rank=8, residual=True, vocabulary="seen", plm=plm.description
    )
    adapter = Adapter(config, tokens, seed=1)
    torch.nn.init.normal_(adapter.B_pd, std=0.5, generator=torch.Generator().manual_seed(1))
    return adapter


@pytest.fixture(scope="module")
def adapter(plm):
    return make_adapter(plm)


@pytest.fixture(scope="module")
def flat(tiny_plm):
    """A PLM that hardly prefers one token to another, so that five candidates do not say enough, and an adapter."""
    plm = tiny_plm("granite")
    return plm, make_adapter(plm)


@pytest.fixture(scope="module")
def inspection(plm, adapter):
    return inspect_generation(plm, adapter, SOURCE, TASK, USED, max_new_tokens=40)


@pytest.fixture(scope="module")
def path(inspection, tmp_path_factory):
    path = tmp_path_factory.mktemp("inspector") / "page.html"
    page = inspector_page(inspection, USED, signature={"seed": None}, fitted=FITTED, reference="<i>das</i>")
    path.write_text(page, encoding="utf-8")
    return path


def in_browser(page, expression, *arguments):
    """Evaluate an expression with the page's own mixture.js; `DATA` is the page's data."""
    body = f"const DATA = JSON.parse(document.getElementById('data').textContent); return {expression};"
    return page.evaluate(f"(given) => {{ {static('inspector/mixture.js')}\n{body} }}", *arguments)


def weight(schedule, t, length):
    return float(schedule.weights(torch.tensor([t]), torch.tensor([length])))


def replayed(inspection, schedule):
    """Per step, by pema's own mixture of what is stored: lambda_t, the best candidate, P, P_PEMA, P_LM, and reached."""
    found, reached = [], True
    for t, step in enumerate(inspection.steps):
        value = weight(schedule, t, inspection.source_length)
        plm, pema = torch.tensor(step.plm.log_p), torch.tensor(step.pema.log_p)
        mixed = mix(plm, pema, torch.tensor(value)).exp()
        best = int(mixed.argmax())
        shown = best if reached else step.candidates.index(step.token)
        rest = [(value, step.pema.rest_log_p), (1 - value, step.plm.rest_log_p)]
        certain = float(mixed[best]) > sum(part * torch.tensor(log_p).exp() for part, log_p in rest)
        found.append((value, shown, *(float(p[shown]) for p in (pema.exp(), plm.exp(), mixed)), reached))
        reached = reached and certain and step.candidates[best] == step.token
    return found


def require_table(page, inspection, schedule):
    """The table of all steps holds what Python computes, to 1e-6."""
    expected = replayed(inspection, schedule)
    rows = page.locator("#all tbody tr").evaluate_all(ROWS)
    assert len(rows) == len(expected)
    for row, (value, _, *probabilities, reached) in zip(rows, expected, strict=True):
        assert [float(cell) for cell in row[2:6]] == pytest.approx([value, *probabilities], abs=1e-6)
        assert (row[6] == "not reached") == (not reached)
    return expected


def slide(page, value):
    """Move the slider for lambda_max."""
    page.get_by_label("λmax").fill(str(value))


def test_schedules_and_mixtures_are_pythons(visit, path, inspection):
    page = visit(path)
    steps, length = len(inspection.steps), inspection.source_length
    for schedule in SCHEDULES:
        places = [*range(steps), length - 1, length, length + 1, 10 * length]
        expression = "given.places.map((t) => weightAt(given.schedule, t, DATA.source_length))"
        found = in_browser(page, expression, {"schedule": schedule.to_dict(), "places": places})
        assert found == [weight(schedule, t, length) for t in places]
        states = in_browser(page, "replay(DATA.steps, given, DATA.source_length)", schedule.to_dict())
        for state, step, value in zip(states, inspection.steps, found, strict=False):
            plm, pema = torch.tensor(step.plm.log_p), torch.tensor(step.pema.log_p)
            expected = mix(plm, pema, torch.tensor(value)).exp()
            torch.testing.assert_close(torch.tensor(state["mixed"]), expected, atol=1e-6, rtol=0)
            share, rest = value * pema.exp()[state["best"]], (1 - value) * plm.exp()[state["best"]]
            assert state["decidedBy"] == ("pema" if share > rest else "plm")
            assert state["alone"] == int(plm.argmax())


def test_with_the_schedule_it_was_made_with_nothing_changes(visit, path, inspection):
    states = in_browser(visit(path), "replay(DATA.steps, DATA.schedule, DATA.source_length)")
    assert all(state["reached"] and state["certain"] and not state["changed"] for state in states)
    chosen = [step.candidates[state["best"]] for step, state in zip(inspection.steps, states, strict=True)]
    assert chosen == [step.token for step in inspection.steps]
    assert {state["decidedBy"] for state in states} == {"pema", "plm"}


@torch.no_grad()
def test_what_is_certain_holds_for_the_whole_vocabulary(visit, flat, tmp_path):
    """With few candidates, at every weight: a token is called certain only where it is the likeliest of all."""
    plm, adapter = flat
    found = inspect_generation(plm, adapter, SOURCE, TASK, USED, max_new_tokens=20, candidates=5)
    (tmp_path / "page.html").write_text(inspector_page(found, USED, signature={}), encoding="utf-8")
    page = visit(tmp_path / "page.html")
    (prompt,) = TASK.template.encode_prompts(plm.tokenizer, [SOURCE])
    tokens = [*prompt.prompt, *(step.token for step in found.steps)]
    (represented,) = plm.represent([tokens], [len(prompt.prompt)])
    f = represented.representations.float()
    log_p_plm, log_p_pema = plm.head().logits(f).log_softmax(-1), adapter.log_probs(f, plm.head())
    counts = {True: 0, False: 0}
    for value in torch.linspace(0, 1, 41).tolist():
        states = in_browser(page, "DATA.steps.map((step) => mixture(step, given))", value)
        mixed = mix(log_p_plm, log_p_pema, torch.full((len(states),), value))
        for state, step, row in zip(states, found.steps, mixed, strict=True):
            best = float(row.max().exp())
            outside = [token for token in range(len(row)) if token not in step.candidates]
            assert float(row[outside].max().exp()) <= state["bound"] + 1e-5
            if state["certain"]:
                assert float(row[step.candidates[state["best"]]].exp()) == pytest.approx(best, abs=1e-5)
            counts[state["certain"]] += 1
    assert min(counts.values()) > 0


def test_a_step_that_is_not_certain_says_so(visit, flat, tmp_path):
    plm, adapter = flat
    found = inspect_generation(plm, adapter, SOURCE, TASK, NoAdapter(), max_new_tokens=20, candidates=5)
    (tmp_path / "page.html").write_text(inspector_page(found, NoAdapter(), signature={}), encoding="utf-8")
    page = visit(tmp_path / "page.html")
    page.get_by_label("Schedule").select_option("constant")
    for value in range(5, 100, 5):
        slide(page, value / 100)
        unsure = page.locator("#tokens .token", has_text="?")
        if unsure.count():
            break
    unsure.first.click()
    assert "Not certain" in page.locator("#detail").inner_text()
    after = page.locator("#tokens .token").evaluate_all("all => all.map(one => one.classList.contains('unreached'))")
    place = page.locator("#tokens .token").evaluate_all("all => all.findIndex(one => one.textContent.includes('?'))")
    assert after == [t > place for t in range(len(after))]
    assert "not stored" in page.locator("#summary").inner_text()


def test_behind_a_step_that_is_not_certain_nothing_is_reached(visit, path):
    """A known answer: at lambda 1/2 the stored token has (0.3 + 0.2) / 2, another one up to (0.25 + 0.3) / 2."""

    def distribution(p, q, rest):
        return {"log_p": [math.log(p), math.log(q)], "rest_mass": 1 - p - q, "rest_log_p": math.log(rest)}

    step = {"token": 7, "candidates": [7, 9], "weight": 0.0}
    step |= {"plm": distribution(0.3, 0.2, 0.25), "pema": distribution(0.2, 0.1, 0.3)}
    page = visit(path)
    for value, certain in ((0.1, True), (0.5, False), (0.0, True)):
        given = {"steps": [step] * 3, "schedule": Constant(value).to_dict()}
        states = in_browser(page, "replay(given.steps, given.schedule, 4)", given)
        assert [state["certain"] for state in states] == [certain] * 3
        assert not any(state["changed"] for state in states)
        assert [state["reached"] for state in states] == [True, certain, certain]
        assert states[0]["bound"] == pytest.approx(0.25 + 0.05 * value, abs=1e-6)


def test_the_slider_recomputes_the_page(visit, path, inspection):
    page = visit(path)
    require_table(page, inspection, USED)
    assert page.get_by_role("button", name="Reset").is_disabled()
    changed = 0
    for value in (0.8, 0.6, 0.3, 0.0, 1.0):
        slide(page, value)
        expected = require_table(page, inspection, GradualUnrolling(value))
        tokens = page.locator("#tokens .token").evaluate_all("all => all.map(one => [...one.classList])")
        assert ["unreached" in classes for classes in tokens] == [not row[-1] for row in expected]
        last = sum(row[-1] for row in expected) - 1
        if inspection.steps[last].candidates[expected[last][1]] != inspection.steps[last].token:
            changed += 1
            assert "changed" in tokens[last]
            assert f"At step {last}, " in page.locator("#summary").inner_text()
            assert "unknown" in page.locator("#summary").inner_text()
    assert changed
    page.get_by_role("button", name="Reset").click()
    require_table(page, inspection, USED)
    assert page.get_by_label("λmax").input_value() == "0.85"
    page.get_by_label("λmax").focus()
    for _ in range(3):
        page.keyboard.press("ArrowLeft")
    require_table(page, inspection, GradualUnrolling(0.82))


@pytest.mark.parametrize("schedule", [Linear(0.85), Constant(0.85), FITTED, NoAdapter()], ids=lambda s: s.name)
def test_another_schedule_recomputes_the_page(visit, path, inspection, schedule):
    page = visit(path)
    page.get_by_label("Schedule").select_option(schedule.name)
    require_table(page, inspection, schedule)
    assert page.get_by_label("λmax").is_disabled() == (schedule.name in ("fitted", "none"))
    page.get_by_label("Schedule").select_option("unrolling")
    require_table(page, inspection, USED)


def test_the_details_are_the_top_five_of_all_three(visit, path, inspection):
    page = visit(path)
    for t in (0, 7):
        page.locator("#tokens .token").nth(t).click()
        step = inspection.steps[t]
        plm, pema = torch.tensor(step.plm.log_p), torch.tensor(step.pema.log_p)
        mixed = mix(plm, pema, torch.tensor(step.weight))
        for which, log_p in (("plm", plm), ("pema", pema), ("mixed", mixed)):
            cells = page.locator(f".top.{which} tbody data").evaluate_all("all => all.map(one => Number(one.value))")
            best = log_p.exp().topk(5).values.tolist()
            assert cells[:5] == pytest.approx(best, abs=1e-6)
            rest = float(page.locator(f".top.{which} tfoot data").get_attribute("value"))
            assert rest == pytest.approx(1 - sum(best), abs=1e-5)
            # The chosen token stands among them, or below them with its rank.
            assert page.locator(f".top.{which} tr.chosen").count() == 1
        assert page.locator("#detail h3").inner_text().startswith(f"Step {t}: ")


def test_the_keyboard_is_enough(visit, path, inspection):
    page = visit(path)
    last = len(inspection.steps) - 1
    current = "[...document.querySelectorAll('#tokens .token')].indexOf(document.activeElement)"
    page.get_by_label("λmax").focus()
    page.keyboard.press("Tab")
    first = page.evaluate(current)
    assert first >= 0
    page.keyboard.press("Home")
    assert page.evaluate(current) == 0
    for t in (1, 2, 3):
        page.keyboard.press("ArrowRight")
        assert page.evaluate(current) == t
        assert page.locator("#detail h3").inner_text().startswith(f"Step {t}: ")
        pressed = page.locator("#tokens .token[aria-pressed=true]")
        assert pressed.count() == page.locator("#tokens .token[tabindex='0']").count() == 1
    page.keyboard.press("ArrowLeft")
    assert page.evaluate(current) == 2
    page.keyboard.press("End")
    page.keyboard.press("ArrowRight")
    assert page.evaluate(current) == last
    page.keyboard.press("Tab")
    assert page.evaluate(current) == -1
    page.keyboard.press("Shift+Tab")
    assert page.evaluate(current) == last


def test_the_curve_can_be_clicked_and_marks_the_input_length(visit, path, inspection):
    page = visit(path)
    curve = page.locator("#curve svg")
    curve.scroll_into_view_if_needed()
    assert f"SL = {inspection.source_length}" in curve.text_content()
    points = curve.locator(".point")
    assert points.count() == len(inspection.steps)
    box = points.nth(5).bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert page.locator("#detail h3").inner_text().startswith("Step 5: ")
    assert curve.locator(".before").count() == 0
    page.get_by_label("Schedule").select_option("linear")
    assert page.locator("#curve svg .before").count() == 1
    assert page.locator("#curve svg .length").count() == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scrolling(visit, path, scheme):
    page = visit(path, width=360, height=740, color_scheme=scheme)
    page.get_by_label("Schedule").select_option("constant")
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.locator("#curve svg").bounding_box()["width"] <= 360
    page.set_viewport_size({"width": 700, "height": 740})
    # A script that waits in the page is refused by its content security policy, so waiting is done from here.
    for _ in range(100):
        if page.evaluate("document.querySelector('#curve svg').clientWidth > 500"):
            break
        page.wait_for_timeout(50)
    else:
        pytest.fail("the curve does not grow with the page")


CONTRAST = """(selector) => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const luminance = (colour) => colour.slice(0, 3).map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  return [...document.querySelectorAll(selector)].map((one) => {
    let behind = one;
    while (behind && rgba(getComputedStyle(behind).backgroundColor)[3] < 255) behind = behind.parentElement;
    const style = getComputedStyle(one);
    const front = luminance(rgba(one instanceof SVGElement ? style.fill : style.color));
    const back = luminance(rgba(behind ? getComputedStyle(behind).backgroundColor : "white"));
    return (Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05);
  });
}"""
TEXTS = (
    ".token .word, .token .tag, .token s, .token .blank, .token .name, .legend li, .swatch, .texts dt, #summary, "
    ".settings label, .top caption, .top th, .top td, .top small, .figures dt, #detail .note, #all th, #all td, "
    "figcaption, .tick"
)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_stand_out(visit, path, scheme):
    """WCAG AA: 4.5 to 1 for every text, greyed ones too; 3 to 1 for the marks of who decided."""
    page = visit(path, color_scheme=scheme)
    for schedule in ("unrolling", "none"):
        page.get_by_label("Schedule").select_option(schedule)
        page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        ratios = page.evaluate(CONTRAST, TEXTS)
        assert len(ratios) > 100
        assert min(ratios) >= 4.5
        assert min(page.evaluate(CONTRAST, "#curve .point.pema, #curve .point.plm")) >= 3


def test_colour_is_not_all_there_is(visit, path):
    """A letter on every token, another shape in the curve, and words for who listens."""
    page = visit(path)
    for classes, letter, words in (("pema", "A", "the adapter"), ("plm", "P", "the PLM")):
        tokens = page.locator(f"#tokens .token.{classes}")
        assert tokens.count()
        assert {text[0] for text in tokens.locator(".tag").all_inner_texts()} == {letter}
        assert all(f"decided by {words}" in one.get_attribute("aria-label") for one in tokens.all())
    assert page.locator("#curve rect.point.pema").count() == page.locator("#tokens .token.pema").count()
    assert page.locator("#curve circle.point.plm").count() == page.locator("#tokens .token.plm").count()
    others = page.locator("#tokens .token.other")
    assert others.count()
    assert all("≠" in text for text in others.locator(".tag").all_inner_texts())


def test_texts_are_texts(visit, path):
    page = visit(path)
    assert page.title() == "PEMA token by token"
    assert page.locator(".texts dd").all_inner_texts()[0] == SOURCE
    assert "<i>das</i>" in page.locator(".texts").inner_text()
    assert page.locator("#main b").count() == 0
    page.get_by_text("Prompt and signature").click()
    assert page.locator(".record pre").first.inner_text() == f"<s>say {SOURCE}\nGerman:"


@pytest.mark.parametrize(
    ("surface", "text"),
    [
        (" Haus", "·Haus"),
        ("\n\t", "↵⇥"),
        ("a\u202eb", "aU+202Eb"),
        ("\u0301", "◌\u0301"),
        ({"name": "0xC3"}, "0xC3"),
        ("<b>&", "<b>&"),
    ],
    ids=repr,
)
def test_what_cannot_be_seen_is_shown(visit, path, surface, text):
    page = visit(path)
    scripts = static("page.js").split("{\n  const root")[0].partition("textContent);")[2] + static(
        "inspector/format.js"
    )
    assert page.evaluate(f"(surface) => {{ {scripts}\nreturn tokenElement(surface).textContent; }}", surface) == text


def test_the_same_run_makes_the_same_bytes(inspection):
    pages = [inspector_page(inspection, USED, signature={"seed": None}, fitted=FITTED) for _ in range(2)]
    assert pages[0] == pages[1]


class Own:
    """A schedule of the user's."""

    def weights(self, step, input_length):
        return torch.full_like(step, 0.5, dtype=torch.float32)


def test_a_schedule_without_a_formula_is_refused(plm, adapter, inspection, tmp_path):
    with pytest.raises(ConfigError, match="no formula for the schedule Own: use one of pema's schedules"):
        inspector_page(inspection, Own(), signature={})
    with pytest.raises(ConfigError, match="no formula for the schedule Own"):
        write_inspection(tmp_path / "page.html", plm, adapter, SOURCE, TASK, Own())
    assert not any(tmp_path.iterdir())


def data_of(path):
    return json.loads(re.search(r'id="data">(.*?)</script>', path.read_text(encoding="utf-8"), re.DOTALL)[1])


def test_a_written_page_has_the_adapters_fitted_schedule_and_a_signature(plm, adapter, tmp_path, monkeypatch):
    adapter.save_pretrained(tmp_path / "adapter")
    loaded = Adapter.from_pretrained(tmp_path / "adapter")
    path, short = tmp_path / "page.html", {"max_new_tokens": 3}
    write_inspection(path, plm, loaded, SOURCE, TASK, USED, **short)
    assert data_of(path)["fitted"] is None
    loaded.config = dataclasses.replace(loaded.config, fitted=FITTED)
    configs = []
    monkeypatch.setattr(
        inspector, "signature", lambda config, seed: configs.append((config, seed)) or {"config": config}
    )
    found = write_inspection(path, plm, loaded, SOURCE, TASK, USED, **short)
    data = data_of(path)
    assert (data["fitted"], data["schedule"]) == (FITTED.to_dict(), USED.to_dict())
    assert [step["token"] for step in data["steps"]] == [step.token for step in found.steps]
    ((config, seed),) = configs
    assert seed is None
    assert config["adapter"]["name"] == "adapter"
    assert len(config["adapter"]["sha256"]) == 64
    assert config["plm"] == plm.description.to_dict()
    assert (config["source"], config["schedule"], config["max_new_tokens"]) == (SOURCE, USED.to_dict(), 3)
    written = path.read_bytes()
    write_inspection(path, plm, loaded, SOURCE, TASK, USED, **short)
    assert path.read_bytes() == written


def test_the_example_in_the_documentation_is_of_this_page(visit):
    text = EXAMPLE.read_text(encoding="utf-8")
    assert len(text.encode()) < 300_000
    for name in ("inspector.css", *SCRIPTS):
        assert static(f"inspector/{name}") in text, "run python -m reproduction.experiments.inspector"
    page = visit(EXAMPLE)
    states = in_browser(page, "replay(DATA.steps, DATA.schedule, DATA.source_length)")
    assert all(state["reached"] and not state["changed"] for state in states)
    assert {state["decidedBy"] for state in states} == {"pema", "plm"}
    assert in_browser(page, "DATA.source") == SENTENCE
