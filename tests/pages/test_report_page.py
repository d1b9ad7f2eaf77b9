"""The report in a real browser: sorting, plots, samples, signatures; narrow, by keyboard, without scripts."""

import json
import random

import pytest

from made_results import METHODS, SENTENCES, make_comparison, make_sweep, write
from pema.pages.page import html_page, static
from pema.pages.report.document import report

LABELS = [label for label, *_ in METHODS]
HOSTILE = '</script><script>document.title="owned"</script><img src=x onerror="document.title=1">'


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page of a comparison and of a sweep without its examples."""
    folder = tmp_path_factory.mktemp("report")
    make_comparison(folder / "results" / "a", count=23)
    make_sweep(folder / "results" / "b", count=23, examples=False)
    (folder / "page.html").write_text(report(folder / "results"), encoding="utf-8")
    return folder / "page.html"


def column(page, number):
    return page.locator(f"#e0 tbody tr > :nth-child({number})").evaluate_all("cells => cells.map(c => c.dataset.value)")


def test_the_table_sorts_by_click_and_by_keyboard(visit, page):
    page = visit(page)
    heads = page.locator("#e0 thead tr:last-child th")
    assert heads.count() == 12
    assert heads.evaluate_all("all => all.map(h => h.ariaSort)") == ["ascending"] + ["none"] * 11
    heads.nth(1).get_by_role("button").click()
    assert heads.nth(1).get_attribute("aria-sort") == "descending"
    values = [float(value) for value in column(page, 2)]
    assert values == sorted(values, reverse=True)
    assert page.locator("body > [role=status]").text_content() == "sorted by BLEU, descending"
    page.keyboard.press("Enter")
    assert [float(value) for value in column(page, 2)] == sorted(values)
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    assert heads.nth(3).get_attribute("aria-sort") == "descending"
    assert heads.nth(1).get_attribute("aria-sort") == "none"
    for number in range(12):
        heads.nth(number).get_by_role("button").click()
        values = [float(value) for value in column(page, number + 1)]
        falls = heads.nth(number).get_attribute("aria-sort") == "descending"
        assert values == sorted(values, reverse=falls)


def test_what_was_not_measured_sorts_last(visit, tmp_path):
    folder = make_comparison(tmp_path / "a", count=3)
    run = json.loads((folder / "plm-alone-seed0.json").read_text(encoding="utf-8"))
    run["costs"]["train_peak_bytes"] = None
    write(folder / "plm-alone-seed0.json", run)
    (tmp_path / "page.html").write_text(report(folder), encoding="utf-8")
    page = visit(tmp_path / "page.html")
    button = page.get_by_role("button", name="Peak training memory", exact=True)
    for _ in range(2):
        button.click()
        assert column(page, 6)[-1] == ""
    assert page.locator("#e0-cost .chart").first.locator(".point").count() == len(LABELS) - 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_telephones_width_needs_no_sideways_scrolling(visit, page, scheme):
    page = visit(page, width=360, height=740, color_scheme=scheme, has_touch=True, is_mobile=True)
    width = "[document.documentElement.scrollWidth, innerWidth]"
    assert page.evaluate(width) == [360, 360]
    for details in page.locator("#e0 details").all()[:2]:
        details.evaluate("d => { d.open = true; }")
    assert page.evaluate(width) == [360, 360]
    box = page.locator("#e0 .scroll")
    assert box.evaluate("b => b.scrollWidth > b.clientWidth")
    box.evaluate("b => { b.scrollLeft = 400; }")
    # The method's name stays in sight while the rest scrolls under it.
    left = page.locator("#e0 tbody th").first.evaluate("c => c.getBoundingClientRect().left")
    assert left == pytest.approx(box.evaluate("b => b.getBoundingClientRect().left"), abs=2)
    page.locator("#e0 tbody th a").nth(2).tap()
    dialog = page.get_by_role("dialog")
    assert dialog.bounding_box()["width"] <= 360
    assert dialog.evaluate("d => d.scrollWidth <= d.clientWidth")


def test_a_number_leads_to_its_runs_and_signatures(visit, page):
    page = visit(page)
    page.locator("#e0 tbody tr").nth(2).locator("td").nth(6).click()
    dialog = page.get_by_role("dialog", name="LoRA")
    assert dialog.locator("details.run").count() == 3
    opened = dialog.locator("details[open]")
    assert opened.count() == 1
    for said in ("lora-seed0", "BLEU|nrefs:1", '"method": "lora"', "2.13.0+cpu", "0" * 40, "a made-up processor"):
        assert said in opened.inner_text()
    dialog.locator("summary").nth(1).press("Enter")
    assert "seed 1" in dialog.locator("details[open]").nth(1).inner_text()
    page.keyboard.press("Escape")
    assert page.get_by_role("dialog").count() == 0
    link = page.locator("#e0 tbody tr").nth(8).locator("td a").first
    link.press("Enter")
    assert page.get_by_role("dialog", name="PEMA, best").is_visible()
    page.get_by_role("button", name="Close").press("Enter")
    assert link.evaluate("l => l === document.activeElement")


def test_points_carry_names_bars_and_signatures(visit, page):
    page = visit(page)
    for chart in page.locator("#e0-cost .chart").all():
        assert chart.locator(".point").count() == len(LABELS)
        assert chart.locator("text.label").all_text_contents() == LABELS
        assert chart.locator(".bar").count() >= len(LABELS)
    memory, seconds = page.locator("#e0-cost .chart").all()
    assert "Peak training memory, logarithmic" in memory.text_content()
    assert "Training time" in seconds.text_content()
    assert memory.locator(".gap").count() == 1
    point = memory.get_by_role("button", name="LoRA: BLEU")
    point.focus()
    assert memory.locator(".tip").is_visible()
    assert "peak training memory 1.3" in memory.locator(".tip").text_content()
    page.keyboard.press("Escape")
    assert memory.locator(".tip").is_hidden()
    page.keyboard.press("Enter")
    assert page.get_by_role("dialog", name="LoRA").is_visible()


def overlaps(page, selector):
    return page.locator(selector).evaluate_all(
        """charts => charts.flatMap((chart) => {
          const boxes = [...chart.querySelectorAll("text.label")].map((text) => text.getBoundingClientRect());
          const points = [...chart.querySelectorAll(".point .mark")].map((mark) => mark.getBoundingClientRect());
          const meet = (a, b) => a.left < b.right - 1 && b.left < a.right - 1
            && a.top < b.bottom - 3 && b.top < a.bottom - 3;
          return boxes.flatMap((box, n) => [...boxes.slice(n + 1), ...points].filter((other) => meet(box, other)));
        }).length"""
    )


@pytest.mark.parametrize("width", [360, 800, 1280])
def test_labels_cover_neither_each_other_nor_points(visit, page, width):
    page = visit(page, width=width)
    assert page.locator(".chart text.label").count() > 30
    assert overlaps(page, ".chart") == 0


def test_points_lie_where_their_numbers_say(visit, page):
    """On the linear axis of seconds, places are proportional to the means in the page's data."""
    page = visit(page)
    data = json.loads(page.locator("#data").text_content())["e0"]["methods"]
    seconds = [method["costs"]["train_seconds"]["mean"] for method in data]
    chart = page.locator("#e0-cost .chart").nth(1)
    places = chart.locator(".reach").evaluate_all("all => all.map(c => Number(c.getAttribute('cx')))")
    heights = chart.locator(".reach").evaluate_all("all => all.map(c => Number(c.getAttribute('cy')))")
    quality = [method["metrics"]["bleu"]["mean"] for method in data]
    for values, found in ((seconds, places), (quality, heights)):
        slope = (found[5] - found[0]) / (values[5] - values[0])
        assert found == pytest.approx([found[0] + slope * (value - values[0]) for value in values], abs=0.01)


def test_the_metric_and_the_methods_are_chosen_for_all_plots_and_samples(visit, page):
    page = visit(page)
    page.locator("#e0").get_by_label("Metric in the plots").select_option("chrF")
    chart = page.locator("#e0-cost .chart").first
    assert chart.locator("svg").get_attribute("aria-label") == "chrF against peak training memory"
    chip = page.locator("#e0").get_by_role("button", name="kNN-LM", exact=True)
    chip.press("Space")
    assert chip.get_attribute("aria-pressed") == "false"
    assert "kNN-LM" not in chart.locator("text.label").all_text_contents()
    assert "kNN-LM" not in page.locator("#e0-samples dl").first.inner_text()
    for other in page.locator("#e0 .chip").all():
        if other.get_attribute("aria-pressed") == "true":
            other.click()
    assert chart.text_content() == "No visible method has these values."
    chip.click()
    assert chart.locator("text.label").all_text_contents() == ["kNN-LM"]


def test_learning_curves_have_a_line_a_method_and_faint_ones_a_seed(visit, page):
    page = visit(page)
    curves = page.locator("#e0-curves")
    assert curves.locator(".line:not(.faint)").count() == 7
    assert curves.locator(".line.faint").count() == 21
    assert "Seconds of training" in curves.text_content()
    curves.get_by_label("Over", exact=True).select_option("epochs")
    assert "Epoch" in curves.locator(".chart").text_content()


def test_a_sweep_has_a_line_for_every_value_of_the_other_axis(visit, page):
    page = visit(page)
    sweep = page.locator("#e1-sweep")
    assert sweep.locator(".line:not(.level)").count() == 3
    assert sweep.locator(".bar").count() == 12
    assert sweep.locator(".line.level").count() == 1
    assert {"learning rate 0.0003", "PLM alone"} <= set(sweep.locator("text.label").all_text_contents())
    assert sweep.locator(".axes text").all_text_contents()[-6:-2] == ["16", "64", "256", "1,024"]
    sweep.get_by_label("Swept setting").select_option("learning rate")
    assert sweep.locator(".line:not(.level)").count() == 4
    assert "rank 1024" in sweep.locator("text.label").all_text_contents()


def test_a_sweep_whose_methods_have_no_grid_is_shown_as_a_comparison(visit, tmp_path):
    folder = make_comparison(tmp_path / "a", count=3)
    about = json.loads((folder / "experiment.json").read_text(encoding="utf-8"))
    write(folder / "experiment.json", about | {"kind": "sweep", "axes": {}})
    (tmp_path / "page.html").write_text(report(folder), encoding="utf-8")
    page = visit(tmp_path / "page.html")
    assert page.locator("#e0-cost svg").count() > 0
    assert page.locator("#e0-sweep").count() == 0


def test_two_entries_of_a_sweep_have_lines_of_their_own(visit, tmp_path):
    """Of one method, under two labels; a setting of only one of them is a level line for the other."""
    folder = make_sweep(tmp_path / "a", count=3)
    for path in (*folder.glob("*rank-1024*.json"), folder / "experiment.json", folder / "comparison.json"):
        text = path.read_text(encoding="utf-8")
        for rate in ("0.0001", "0.0003", "0.001"):
            text = text.replace(f"PEMA, rank=1024, learning_rate={rate}", f"Wide, learning_rate={rate}")
        value = json.loads(text)
        value.get("settings", {}).pop("rank", None)
        write(path, value)
    (tmp_path / "page.html").write_text(report(folder), encoding="utf-8")
    page = visit(tmp_path / "page.html")
    sweep = page.locator("#e0-sweep")
    labels = sweep.locator("text.label").all_text_contents()
    assert sum(label.startswith("PEMA, learning rate") for label in labels) == 3
    assert sum(label.startswith("Wide, learning") for label in labels) == 3
    assert sweep.locator(".line.level").count() == 4
    sweep.get_by_label("Swept setting").select_option("learning rate")
    assert {"PEMA, rank 16", "Wide"} <= set(sweep.locator("text.label").all_text_contents())
    assert sweep.locator(".line.level").count() == 1


def test_settings_that_are_no_numbers_have_places(visit, tmp_path):
    folder = make_sweep(tmp_path / "a", count=3)
    for path in folder.glob("*seed*.json"):
        run = json.loads(path.read_text(encoding="utf-8"))
        if "rank" in run["settings"]:
            run["settings"]["rank"] = f"r{run['settings']['rank']}"
        write(path, run)
    (tmp_path / "page.html").write_text(report(folder), encoding="utf-8")
    sweep = visit(tmp_path / "page.html").locator("#e0-sweep")
    assert set(sweep.locator(".axes text").all_text_contents()) >= {"r16", "r64", "r256", "r1024"}
    assert sweep.locator(".bar").count() == 12


def test_memory_that_is_next_to_nothing_does_not_stretch_the_axis(visit, tmp_path):
    folder = make_comparison(tmp_path / "a", count=3)
    run = json.loads((folder / "plm-alone-seed0.json").read_text(encoding="utf-8"))
    run["costs"]["train_peak_bytes"] = 8192
    write(folder / "plm-alone-seed0.json", run)
    (tmp_path / "page.html").write_text(report(folder), encoding="utf-8")
    ticks = visit(tmp_path / "page.html").locator("#e0-cost .chart").first.locator(".axes text").all_text_contents()
    assert "≈ 0" in ticks
    assert {"100 MB", "1 GB"} <= set(ticks)


def shown(page):
    return page.locator("#e0-samples .sample > p").all_text_contents()


def test_samples_are_paged_and_searched_through_the_whole_test_set(visit, page):
    page = visit(page)
    samples = page.locator("#e0-samples")
    status = samples.get_by_role("status")
    assert status.text_content() == "Page 1 of 5, 23 examples"
    assert shown(page) == [f"Example {n}" for n in range(1, 6)]
    first = samples.locator(".sample").first
    assert first.locator("dt").all_text_contents() == ["Source", "Reference", *LABELS]
    assert first.locator("dd").nth(0).text_content() == SENTENCES[0][0]
    assert first.locator("dd").nth(1).text_content() == SENTENCES[0][1]
    samples.get_by_role("button", name="Next").press("Enter")
    assert shown(page)[0] == "Example 6"
    samples.get_by_role("button", name="Last").click()
    assert shown(page) == ["Example 21", "Example 22", "Example 23"]
    page.keyboard.press("Enter")
    assert status.text_content() == "Page 5 of 5, 23 examples"
    samples.get_by_role("button", name="Previous").click()
    assert shown(page)[0] == "Example 16"
    samples.get_by_label("Search all texts").fill(SENTENCES[21][0].upper())
    assert shown(page) == ["Example 22"]
    assert status.text_content() == "Page 1 of 1, 1 of 23 examples"
    samples.get_by_label("Search all texts").fill("no text has this")
    assert samples.get_by_text("No text matches.").is_visible()
    samples.get_by_label("Search all texts").fill("")
    assert shown(page)[0] == "Example 1"


def test_differences_are_marked_against_the_reference_or_the_plm_alone(visit, page):
    page = visit(page)
    samples = page.locator("#e0-samples")
    outputs = [method["output"] for method in json.loads(page.locator("#data").text_content())["e0"]["methods"]]
    lora = samples.locator(".sample").first.locator("dd").nth(2 + LABELS.index("LoRA"))

    def without(kind):
        kept = f"d => [...d.childNodes].filter(n => n.nodeName !== '{kind}').map(n => n.textContent).join('')"
        return lora.evaluate(kept)

    base = samples.get_by_label("Mark differences from")
    for name, text in (("the reference text", SENTENCES[0][1]), ("PLM alone", outputs[0][0])):
        base.select_option(name)
        # Without what is missing it is the output, without what is new it is the base.
        assert without("DEL") == outputs[LABELS.index("LoRA")][0]
        assert "".join(without("MARK").split()) == "".join(text.split())
        assert lora.locator("mark").count() > 0
    missing = samples.locator("del").first
    assert missing.evaluate("d => getComputedStyle(d).fontSize") == "0px"
    samples.get_by_label("show missing words").press("Space")
    assert missing.evaluate("d => parseFloat(getComputedStyle(d).fontSize) > 10")
    base.select_option("nothing")
    assert samples.locator("mark, del").count() == 0


def test_results_without_examples_say_so_and_show_outputs(visit, page):
    page = visit(page)
    samples = page.locator("#e1-samples")
    assert "sources and reference texts are not part of these results" in samples.locator(".note").text_content()
    assert "Source" not in samples.locator("dt").all_text_contents()
    assert samples.locator(".sample").first.locator("dd").count() == 13
    assert samples.get_by_label("Mark differences from").locator("option").first.text_content() == "PLM alone"
    assert samples.locator("mark").count() > 0


def test_further_references_are_folded_and_searched(visit, tmp_path):
    folder = make_comparison(tmp_path / "a", count=3)
    targets = (["the first", "another one", HOSTILE], ["two", "second"], ["alone"])
    rows = [{"source": f"source {number}", "targets": each} for number, each in enumerate(targets)]
    (folder / "examples.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    (tmp_path / "page.html").write_text(report(folder), encoding="utf-8")
    page = visit(tmp_path / "page.html")
    samples = page.locator(".sample")
    folded = page.locator(".sample details")
    assert folded.locator("summary").all_text_contents() == ["2 further references", "1 further reference"]
    assert [samples.nth(n).locator("details").count() for n in range(3)] == [1, 1, 0]
    assert not samples.first.get_by_text("another one").is_visible()
    folded.first.locator("summary").press("Enter")
    assert samples.first.get_by_text("another one").is_visible()
    assert folded.first.locator("p").all_text_contents() == targets[0][1:]
    page.get_by_label("Search all texts").fill("SECOND")
    assert samples.count() == 1
    assert samples.first.get_by_text("second", exact=True).is_visible()
    page.get_by_label("Search all texts").fill("source 0")
    assert not samples.first.get_by_text("another one").is_visible()


def test_text_of_results_is_shown_and_never_run(visit, tmp_path):
    folder = make_comparison(tmp_path / "a", count=3)
    for path in folder.glob("*.txt"):
        path.write_text(f"{HOSTILE}\n\n{HOSTILE}\n", encoding="utf-8")
    for path in folder.glob("*.json"):
        text = path.read_text(encoding="utf-8").replace('"LoRA"', json.dumps(f"LoRA{HOSTILE}"))
        path.write_text(text, encoding="utf-8")
    (tmp_path / "page.html").write_text(report(folder), encoding="utf-8")
    page = visit(tmp_path / "page.html")
    assert page.title() == "Made-up comparison (test data)"
    page.get_by_label("Mark differences from").select_option("nothing")
    shown = page.locator(".sample").first.locator("dd")
    assert shown.nth(2).text_content() == HOSTILE
    assert page.locator(".sample").nth(1).locator("dd").nth(2).text_content() == "(empty)"
    assert page.locator("#e0 tbody th a").nth(2).text_content() == f"LoRA{HOSTILE}"
    assert page.locator("img").count() == 0


def test_the_keyboard_reaches_everything_and_the_focus_shows(visit, page):
    page = visit(page)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    seen = set()
    for _ in range(70):
        page.keyboard.press("Tab")
        found = page.evaluate(
            """() => {
              const at = document.activeElement;
              const drawn = at.matches(".point") ? getComputedStyle(at.querySelector(".reach")).strokeWidth
                : getComputedStyle(at).outlineWidth;
              return [at.matches(".point") ? "point" : at.className || at.tagName, parseFloat(drawn) >= 2];
            }"""
        )
        assert found[1], f"no focus ring on {found[0]}"
        seen.add(found[0])
    assert {"button", "A", "scroll", "BUTTON", "SELECT", "chip", "point"} <= seen
    unnamed = """[...document.querySelectorAll("button, a, select, input, [role=button]")].filter(
      (e) => !(e.ariaLabel || e.textContent.trim() || e.labels?.length)).length"""
    assert page.evaluate(unnamed) == 0


def test_reduced_motion_is_respected(visit, page):
    behaviour = "getComputedStyle(document.documentElement).scrollBehavior"
    assert visit(page, reduced_motion="reduce").evaluate(behaviour) == "auto"
    assert visit(page).evaluate(behaviour) == "smooth"


def test_without_scripts_the_table_and_the_signatures_are_there(visit, page):
    page = visit(page, java_script_enabled=False)
    assert page.locator("#e0 tbody tr").count() == len(LABELS)
    assert page.locator("#e0 noscript").is_visible()
    page.locator("#e0 tbody th a").nth(2).click()
    assert page.url.endswith("#e0-m2")
    page.locator("#e0-m2 > summary").click()
    assert page.locator("#e0-m2 .run").first.is_visible()


def longest_common(a, b):
    """Length of the longest common subsequence, by the textbook's recursion."""
    rows = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, left in enumerate(a):
        for j, right in enumerate(b):
            rows[i + 1][j + 1] = rows[i][j] + 1 if left == right else max(rows[i][j + 1], rows[i + 1][j])
    return rows[-1][-1]


def test_compared_words_are_a_longest_common_subsequence(visit, tmp_path):
    """With the words of both texts in order on their sides."""
    path = tmp_path / "difference.html"
    js = [static("report/difference.js"), "window.compare = compareWords; window.marked = marked;"]
    path.write_text(html_page("t", "", js=js, data={}), encoding="utf-8")
    page = visit(path)
    dice = random.Random(0)
    pairs = [("", ""), ("a b", ""), ("", "a b"), ("Ja, gut.", "Ja gut!"), ("你好世界", "你好"), ("a  b", "a b")]
    pairs += [tuple(" ".join(dice.choices("abcd", k=dice.randint(0, 9))) for _ in "xy") for _ in range(60)]
    for (a, b), found in zip(pairs, page.evaluate("pairs => pairs.map(([a, b]) => compare(a, b))", pairs), strict=True):
        before = [word for kind, word in found if kind != "new"]
        after = [word for kind, word in found if kind != "missing"]
        assert "".join(before) == "".join(a.split())
        assert "".join(after) == "".join(b.split())
        assert sum(kind == "same" for kind, _ in found) == longest_common(before, after)
    without = """([kind, pairs]) => pairs.map(([a, b]) => marked(a, b)
      .filter((node) => node.nodeName !== kind).map((node) => node.textContent ?? node).join(""))"""
    assert page.evaluate(without, ["DEL", pairs]) == [b for _, b in pairs]
    bases = page.evaluate(without, ["MARK", pairs])
    assert ["".join(found.split()) for found in bases] == ["".join(a.split()) for a, _ in pairs]
