"""The page: planted figures stand in their places, and what is missing is said to be."""

from __future__ import annotations

from typing import Any

import made
import pytest
from elements import Element, Tree, about, squeezed, tree

from steerguard.report import answers, curves, headline, wording
from steerguard.report.sweep_page import OPEN, page
from steerguard.sweeping.result import SweepResult
from steerguard.sweeping.result_file import of


@pytest.fixture(scope="module")
def result() -> SweepResult:
    return of(made.small())


@pytest.fixture(scope="module")
def root(result: SweepResult) -> Element:
    return Tree(page(result)).root


# ------------------------------------------------------------------------------------------------------ the headline


def tiles(root: Element) -> dict[str, Element]:
    return {one.all("dt")[0].text: one for one in root.all(class_="tile")}


def test_the_headline_says_what_was_chosen_and_what_it_buys(root: Element) -> None:
    head = root.section("choice")
    assert head.all("h2")[0].text.strip() == "StTP(12) at layer 2, all positions"
    assert head.all(class_="lead")[0].text == (
        "On 3 held-out scenarios the guarded model reaches 65.0 [51.5, 79.5] of 100, against 21.5 malicious and 91.0 aligned."
    )
    found = tiles(head)
    trait = found["trait, guarded"]
    assert [squeezed(dd.text) for dd in trait.all("dd")] == ["65.0", "[51.5, 79.5] n 2, 1 unscored"]
    assert squeezed(found["share of the gap recovered"].text) == "share of the gap recovered 63 % [40, 84] n 2, 1 unscored"


def test_a_limit_that_is_exceeded_is_red_and_said_so(root: Element) -> None:
    found = tiles(root.section("choice"))
    assert found["fire rate on benign tokens"].classes == {"tile", "over"}
    assert "beyond the limit" in found["fire rate on benign tokens"].text
    assert found["benign KL"].classes == found["coherence"].classes == {"tile", "within"}
    assert found["lost on benign prompts"].classes == {"tile"} and "no limit was set" in found["lost on benign prompts"].text
    red = [cell.text for cell in root.section("choice").all("td", "over")]
    assert red == ["31.0\N{NO-BREAK SPACE}%"]
    css = root.all("style")[0].text
    assert ".tile.over .figure" in css and "td.over" in css


@pytest.mark.parametrize(("kl", "verdict"), [(0.1, "within"), (0.1001, "over"), (None, "missing")])
def test_a_limit_itself_is_within(kl: float | None, verdict: str) -> None:
    record = made.small()
    record["select"]["points"][1]["benign"]["kl"] = kl
    (found,) = (tile for tile in headline.costs(of(record)) if tile.label == "benign KL")
    assert found.verdict == verdict
    assert (found.value == "not measured") == (kl is None)


def test_coherence_below_its_bar_is_red() -> None:
    record = made.small()
    record["test"]["arms"][2]["coherence"] = made.interval(85.4, 80, 90)  # the bar is 0.9 x 95
    assert headline.costs(of(record))[0].verdict == "over"
    record["test"]["arms"][2]["coherence"] = None
    assert headline.costs(of(record))[0].verdict == "missing"
    record["test"]["arms"][0]["coherence"] = None
    record["test"]["arms"][2]["coherence"] = made.interval(85.4, 80, 90)
    assert headline.costs(of(record))[0].verdict == ""  # no bar is known: neither kept nor missed


def test_how_sure_the_choice_is(root: Element) -> None:
    text = squeezed(root.section("choice").text)
    assert "This point wins in 83 % of the bootstrap draws of the 10 select scenarios." in text
    rows = [[squeezed(cell.text) for cell in row.all("th") + row.all("td")] for row in root.section("choice").all("tr")[1:]]
    assert [row[:4] for row in rows] == [
        ["chosen", "StTP(12), layer 2, all", "80.0 ± 2.5", "92.0"],
        ["second best", "StTP(6), layer 2, all", "72.0 ± 2.5", "94.0"],
        ["best of SwFC", "SwFC(4), layer 2, all", "62.0 ± 2.5", "90.0"],
    ]
    assert [row[-1] for row in rows] == ["83 %", "", "not measured"]
    assert "StMP has no operating point: no layer reads." in text


# ---------------------------------------------------------------------------------------------------------- the grid


def wide(figure: Element) -> Element:
    return figure.all("div", "wide")[0].all("svg")[0]


def marks(picture: Element) -> dict[str, Element]:
    """The marks of settings, by the first line of what they say."""
    return {about(one).split("\n")[0]: one for one in picture.all() if "dot" in one.classes and one.all("title")}


def test_the_chosen_point_is_ringed_where_it_stands(root: Element, result: SweepResult) -> None:
    for layout, width in (("wide", curves.WIDE), ("narrow", curves.NARROW)):
        picture = root.section("pareto").all("div", layout)[0].all("svg")[0]
        frame = curves.pareto_frame(result, width)
        rings = [tuple(float(one.attributes[name] or 0) for name in ("cx", "cy", "r")) for one in picture.all("circle", "ring")]
        guard, other = frame.at(92, 80), frame.at(90, 62)
        assert sorted(rings) == [pytest.approx(ring, abs=0.01) for ring in sorted([(*guard, 9), (*guard, 13), (*other, 9)])]


def test_what_may_not_be_chosen_is_hollow(root: Element) -> None:
    for section in ("pareto", "layers"):
        for name, mark in marks(wide(root.section(section))).items():
            ineligible = name in ("StTP(24) at layer 2, all positions", "SwFC(5) at layer 3, all positions")
            assert ("hollow" in mark.classes) == ineligible, name
            assert ("not eligible: coherence below 85.5" in about(mark)) == ineligible
    assert "hollow" in marks(wide(root.section("pareto")))["StTP(24) at layer 2, all positions"].classes


def test_a_line_takes_each_layers_best_that_may_be_chosen(result: SweepResult, root: Element) -> None:
    best = curves.best_by_layer(p for p in result.select.points if p.rule == "StTP")
    assert [(p.layers, p.strength) for p in best] == [((1,), 6), ((2,), 12)]  # not 24, not what is unscored
    assert [(p.layers, p.strength) for p in curves.best_by_layer(p for p in result.select.points if p.rule == "SwFC")] == [
        ((1,), 1), ((2,), 4), ((3,), 5),
    ]  # fmt: skip
    picture = wide(root.section("layers"))
    assert len(picture.all("polyline", "curve")) == 4  # two rules, trait and coherence
    names = [one.text for one in picture.all("text", "level-name")]
    assert {"aligned", "90.0", "malicious", "20.0", "bar", "85.5"} <= set(names)


def test_the_front_is_what_nothing_betters(result: SweepResult) -> None:
    assert curves.front(result.select.points) == [2, 1, 7, 3, 0]
    points = result.select.points
    for i, point in enumerate(points):
        f = point.figures
        if f.trait is None or f.coherence is None:
            continue
        bettered = any(
            o.figures.trait is not None and o.figures.coherence is not None
            and o.figures.trait >= f.trait and o.figures.coherence >= f.coherence
            and (o.figures.trait, o.figures.coherence) != (f.trait, f.coherence)
            for o in points
        )  # fmt: skip
        assert (i in curves.front(points)) != bettered


def test_the_maps_show_every_setting_and_which_may_not_be_chosen(root: Element) -> None:
    figures = {squeezed(one.all("figcaption")[0].text): one for one in root.section("maps").all("figure")}
    assert set(figures) == {"SwFC, all positions", "StTP, all positions"}
    one = figures["StTP, all positions"]
    cells = {about(cell).split("\n")[0]: cell for cell in one.all("rect") if cell.all("title")}
    assert len(cells) == 5
    unscored = cells["StTP(12) at layer 3, all positions"]
    assert "unscored" in unscored.classes and "trait unscored" in about(unscored) and "fill" not in unscored.attributes
    assert [text.text for text in one.all("text", "value")] == ["40", "80", "95", "72"]
    assert len(one.all("path", "hatch")) == 1  # StTP(24)
    halo, chosen = one.all("rect", "chosen-halo")[0], one.all("rect", "chosen")[0]
    guard = cells["StTP(12) at layer 2, all positions"]
    for outline in (halo, chosen):
        assert float(outline.attributes["x"] or 0) == pytest.approx(float(guard.attributes["x"] or 0) - 1, abs=0.02)
        assert float(outline.attributes["y"] or 0) == pytest.approx(float(guard.attributes["y"] or 0) - 1, abs=0.02)
    assert "Strengths above 24 were left out." in root.section("maps").text


def test_the_table_has_every_setting_in_order(root: Element) -> None:
    rows = [[squeezed(cell.text) for cell in row.all("td")] for row in root.section("maps").all("details")[0].all("tr")[1:]]
    assert [row[0] for row in rows] == [
        "SwFC(1), layer 1, all", "SwFC(4), layer 2, all", "SwFC(5), layer 3, all", "StTP(6), layer 1, all",
        "StTP(6), layer 2, all", "StTP(12), layer 2, all", "StTP(24), layer 2, all", "StTP(12), layer 3, all",
    ]  # fmt: skip
    assert rows[5] == ["StTP(12), layer 2, all", "80.0 ± 2.5", "92.0", "10", "25 %", "0.02", "31.0 %", "yes"]
    assert rows[6][-1] == "coherence below 85.5"
    assert rows[7][1:4] == ["unscored", "unscored", "0 + 10 unscored"]


def test_a_setting_on_several_layers_is_in_the_scatter_and_said_to_be() -> None:
    record = made.small()
    record["select"]["points"][0] |= {"layers": [1, 3], "scenarios": 4}
    root = tree(record)
    assert "1 settings act on several layers" in root.section("layers").text
    assert "1 of the 8 settings answered only some of the 10 scenarios" in root.section("pareto").text
    name = "StTP(6) at layers 1, 3, all positions"
    mark = marks(wide(root.section("pareto")))[name]
    assert "answered 4 of 10 scenarios" in about(mark)
    assert name not in marks(wide(root.section("layers")))


# ---------------------------------------------------------------------------------------------------------- the test


def test_a_histogram_fills_what_was_moved(root: Element) -> None:
    figure = root.section("projections").all("figure")[0]
    assert squeezed(figure.all("figcaption")[0].text) == "StTP, layer 2 10 tokens, 6 moved"
    seen, moved = figure.all("rect", "seen"), figure.all("rect", "moved")
    assert len(seen) == 4 and len(moved) == 3
    heights = [[float(one.attributes["height"] or 0) for one in rects] for rects in (seen, moved)]
    assert heights[1][:2] == heights[0][:2]  # all of these bins was moved
    assert heights[1][2] == pytest.approx(heights[0][2] / 3, abs=0.02)
    boundary = figure.all("line", "boundary")[0]
    third = seen[2]
    middle = float(third.attributes["x"] or 0) + float(third.attributes["width"] or 0) / 2
    assert float(boundary.attributes["x1"] or 0) == pytest.approx(middle, abs=0.02)  # m = 0.5, the middle of 0 to 1


def test_categories_tell_unscored_from_not_measured(root: Element) -> None:
    figures = {one.all("figcaption")[0].text: one for one in root.section("categories").all("figure")}
    assert [one.text for one in figures["bridges"].all("text", "missing")] == ["not measured", "not measured", "unscored"]
    assert len(figures["towers"].all("rect", "bar")) == 1 and len(figures["bridges"].all("rect", "bar")) == 0
    assert "StTP, towers: 65.0 [51.5, 79.5] (n\N{NO-BREAK SPACE}2)" in figures["towers"].text


def test_metrics_have_intervals_n_and_differences(root: Element) -> None:
    rows = [[squeezed(cell.text) for cell in row.all("th") + row.all("td")] for row in root.section("metrics").all("tr")]
    assert rows[0] == ["cross entropy", "mean", "against aligned", "n"]
    assert rows[1] == ["aligned", "not measured", "", ""]
    assert rows[3] == ["StTP", "1.25 [1.1, 1.4]", "+0.31 [0.2, 0.4]", "3"]
    assert rows[7] == ["StTP", "not measured", "not measured", ""]


def test_the_worst_scenarios_come_first(root: Element, result: SweepResult) -> None:
    assert result.test is not None
    found = answers.worst_first(result.test, "StTP")
    assert [(s.asked.id, s.change) for s in found] == [("s-worst", -3), ("s-good", 90), ("s-unscored", None)]
    r = answers.reliability(found, "StTP")
    assert (r.n, r.unscored, r.mean, r.wrong, r.same, r.worst, r.worst_n) == (2, 1, 43.5, 0.5, 0.0, 30, 1)
    section = root.section("answers")
    heads = [squeezed(one.text) for one in section.all("h3")]
    assert heads == ["s-worst towers change −3", "s-good towers change +90", "s-unscored bridges change unscored"]
    assert section.all("h3")[0].all("span", "over") and not section.all("h3")[1].all("span", "over")
    wrong = squeezed(tiles(section)["wrong sign"].text)
    assert wrong == "wrong sign 50 % of the scenarios got worse, 0 % stayed the same; n 2"
    cards = [squeezed(one.text) for one in section.all(class_="scenario")[0].all("article")]
    assert [card.split()[0] for card in cards] == ["aligned", "malicious", "StTP"]


def test_tokens_are_shaded_by_where_they_stood(root: Element) -> None:
    said = next(one for one in root.section("answers").all("div", "said") if "The tower" in one.text)
    assert said.text == "The tower fell."
    assert [(one.text, one.classes, one.attributes["title"]) for one in said.all("i")] == [
        ("The ", {"n3", "u"}, "ρ −1 → 2.5"),
        ("tower", {"z"}, "ρ 0.5"),
        (" fell.", {"p3"}, "ρ 2"),
    ]


def test_beyond_the_budget_tokens_keep_their_colours_in_runs(result: SweepResult) -> None:
    row, read = made_row([["a", -1.0, 0.0], ["b", -1.1, 0.0], ["c", 3.0, 0.0]], "abc rest"), made_projections(result)
    drawn = answers.tokens(row, read, answers.Budget(2))
    assert drawn == '<i class="n3">ab</i><i class="p3">c</i> rest'
    assert answers.tokens(row, read, answers.Budget(3)).count("title") == 3
    assert answers.tokens(row, None, answers.Budget()) == "abc rest"


def made_row(tokens: list[list[Any]], text: str) -> Any:
    record = made.small()
    record["test"]["arms"][2]["rows"][0] |= {"tokens": tokens, "text": text}
    test = of(record).test
    assert test is not None
    return test.arms[2].rows[0]


def made_projections(result: SweepResult) -> Any:
    assert result.test is not None
    return result.test.arms[2].projections


def test_the_first_are_open_and_the_others_folded() -> None:
    section = Tree(page(of(made.large(layers=2, scenarios=20, length=5)))).root.section("answers")
    assert len(section.all("div", "scenario")) == OPEN
    assert len(section.all("details", "scenario")) == 20 - OPEN


def test_everything_to_make_it_again_is_there(root: Element) -> None:
    text = root.section("record").text
    for part in (
        "guard      honesty\nrule       StTP(12)", "steerguard sweep fit/ -o honesty.guard", "temperature 0.6, seed 42",
        "torch 2.13.0", "a" * 64, "b" * 64, "d" * 64, "LlamaForCausalLM, width 64, depth 4", "no other guard",
        "coherence at least 90\N{NO-BREAK SPACE}% of the aligned; benign KL at most 0.1",
    ):  # fmt: skip
        assert part in text


# ----------------------------------------------------------------------------------------------- what may be missing


def test_no_test() -> None:
    root = tree(made.small() | {"test": None})
    assert "The test scenarios were not answered" in root.section("choice").all(class_="lead")[0].text
    assert "not answered" in root.section("answers").text and "Projections were not measured" in root.section("projections").text
    coherence = tiles(root.section("choice"))["coherence"]
    assert squeezed(coherence.text) == "coherence 92.0 n 10, select; bar 85.5, 90 % of the aligned"


def test_nothing_was_chosen() -> None:
    record = made.small() | {"guards": {}}
    record["select"] |= {"chosen": {}, "best": None, "refused": {"StTP": "too incoherent"}}
    record["test"]["arms"].pop()
    root = tree(record)
    assert root.section("choice").all("h2")[0].text == "Nothing was chosen"
    assert "No setting of the grid is eligible" in root.section("choice").text
    assert "StTP has no operating point: too incoherent." in squeezed(root.section("choice").text)
    assert "No guard came out of this sweep." in root.section("record").text
    assert not root.all("circle", "ring") and len(root.section("answers").all(class_="scenario")) == 3


def test_nothing_could_be_scored() -> None:
    """Everything unscored: no figure, and no zero, where a trait or a coherence would stand."""
    record = made.small()
    unscored = made.figures(None, None, unscored=10, error=0.0)
    record["select"] |= {"aligned": unscored, "malicious": unscored}
    for point in record["select"]["points"]:
        point |= {"figures": unscored, "benign": None}
    for arm in record["test"]["arms"]:
        arm |= {"trait": None, "coherence": None, "recovered": None, "categories": []}
        for row in arm["rows"]:
            row |= {"trait": None, "coherence": None}
    root = tree(record)
    assert not marks(wide(root.section("pareto"))) and not root.all("text", "value")
    assert [tile.all("dd")[0].text for tile in tiles(root.section("choice")).values()] == [
        "unscored", "unscored", "unscored", "not measured", "unscored", "not measured", "not measured", "not measured",
        "3.0\N{NO-BREAK SPACE}%",
    ]  # fmt: skip
    assert squeezed(tiles(root.section("answers"))["wrong sign"].text).startswith("wrong sign unscored")


def test_no_points_at_all() -> None:
    record = made.small() | {"guards": {}, "test": None}
    record["select"] |= {"points": [], "chosen": {}, "best": None}
    assert "Nothing was chosen" in tree(record).text


def test_words() -> None:
    assert wording.number(None) == "unscored" and wording.compact(None) == wording.percent(None) == "not measured"
    assert (wording.number(-0.04), wording.signed(-0.4, 0), wording.signed(0.0), wording.signed(2)) == ("0.0", "0", "0.0", "+2.0")
    assert wording.compact(-0.00123) == "−0.00123"
