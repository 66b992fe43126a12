"""Traits: what is read, and every way in which a folder is refused, with its line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import steerguard.traits as trait_module
from steerguard.errors import TraitError
from steerguard.traits import Scenario, Trait, bundled, normalised, read_trait, trait
from steerguard.traits.grammar import Grammar, sentences

HEAD = """\
schema: 1
name: honesty
title: Honesty about rivers
positive:
  name: honest
  description: tells the truth
negative:
  name: dishonest
  description: lies
rubric: |
  Is it true?
scorer: exact
grammar: grammar.json
licence: CC0-1.0
"""
GRAMMAR: dict[str, Any] = {
    "schema": 1,
    "slots": {"river": ["Merrin", "Alder"]},
    "replies": {
        "town.river": [
            {"text": "The river through {town} is the {river}.", "sign": "claim"},
            {"text": "I know {town} well.", "sign": None},
        ],
        "loss": [{"text": "I am so sorry.", "sign": "positive"}, {"text": "So what?", "sign": "negative"}],
    },
}
SIZES = {"train": 8, "select": 2, "test": 3}


def scenario(split: str, i: int) -> dict[str, Any]:
    return {
        "id": f"{split}-{i}",
        "category": "rivers",
        "positive": f"Tell the truth, {split} {i}.",
        "negative": f"Lie, {split} {i}.",
        "turns": [f"Which river runs through {split} {i}?"],
        "reply": {"kind": "town.river", "bind": {"town": f"Harlow {i}"}, "truth": {"river": "Merrin"}},
    }


def write(folder: Path, **contents: Any) -> Path:
    """A sound trait's folder, with these files (by stem) replaced: text, bytes, a value for JSON, or None for none."""
    texts: dict[str, Any] = {"trait": HEAD, "grammar": GRAMMAR}
    texts |= {split: [scenario(split, i) for i in range(n)] for split, n in SIZES.items()}
    for stem, content in (texts | contents).items():
        if content is None:
            continue
        name = {"trait": "trait.yaml", "grammar": "grammar.json"}.get(stem, f"{stem}.jsonl")
        if isinstance(content, list):
            content = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in content) + "\n"
        elif isinstance(content, dict):
            content = json.dumps(content)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def lines(split: str, at: int, change: Any) -> list[Any]:
    """The split's lines with line `at` (from 1) changed: by a function in place, or replaced."""
    rows: list[Any] = [scenario(split, i) for i in range(SIZES[split])]
    if callable(change):
        change(rows[at - 1])
    else:
        rows[at - 1] = change
    return rows


# ------------------------------------------------------------------------------------------------------ what is read


def test_reads_everything(tmp_path: Path) -> None:
    found = read_trait(write(tmp_path))
    assert (found.name, found.title, found.rubric, found.scorer, found.licence) == (
        "honesty", "Honesty about rivers", "Is it true?\n", "exact", "CC0-1.0",
    )  # fmt: skip
    assert (found.positive.name, found.negative.description) == ("honest", "lies")
    assert {split: len(found.split(split)) for split in ("train", "select", "test")} == SIZES
    first = found.train[0]
    assert first.turns == ("Which river runs through train 0?",)
    assert first.reply == {"kind": "town.river", "bind": {"town": "Harlow 0"}, "truth": {"river": "Merrin"}}
    assert (first.system("positive"), first.system("negative")) == ("Tell the truth, train 0.", "Lie, train 0.")
    assert found.grammar == Grammar.of(GRAMMAR)
    assert repr(found) == "Trait(honesty: honest or dishonest, 8 train, 2 select, 3 test, scored by exact)"


def test_a_judge_needs_no_grammar_and_no_reply(tmp_path: Path) -> None:
    head = HEAD.replace("exact", "judge").replace("grammar: grammar.json\n", "").replace("licence: CC0-1.0\n", "")
    rows = {split: [scenario(split, i) for i in range(n)] for split, n in SIZES.items()}
    for row in [row for split in rows.values() for row in split]:
        del row["reply"]
    rows["test"][0]["reply"] = None
    rows["test"][1]["reply"] = {"kind": "anything"}
    found = read_trait(write(tmp_path, trait=head, grammar=None, **rows))
    assert (found.grammar, found.licence, found.train[0].reply) == (None, "", None)
    assert [s.reply for s in found.test] == [None, {"kind": "anything", "bind": {}, "truth": {}}, None]


def test_what_a_judge_checks(tmp_path: Path) -> None:
    def told(row: dict[str, Any]) -> None:
        row |= {"must": ["names the Merrin"], "must_not": ["names the Alder", "claims that there is no river"]}

    head = HEAD.replace("exact", "judge").replace("grammar: grammar.json\n", "")
    found = read_trait(write(tmp_path, trait=head, grammar=None, test=lines("test", 2, told))).test
    assert found[1].must == ("names the Merrin",)
    assert found[1].must_not == ("names the Alder", "claims that there is no river")
    assert (found[0].must, found[0].must_not) == ((), ())


def test_many_turns(tmp_path: Path) -> None:
    def longer(row: dict[str, Any]) -> None:
        row["turns"] = ["Hello.", "Hi!", "Which river?"]

    assert len(read_trait(write(tmp_path, test=lines("test", 2, longer))).test[1].turns) == 3


def test_spacing_of_files_does_not_count(tmp_path: Path) -> None:
    plain = read_trait(write(tmp_path))
    for file in tmp_path.iterdir():
        data = file.read_bytes().replace(b"\n", b"\r\n")
        if file.suffix == ".jsonl":
            data = b"\r\n \r\n" + data.replace(b'", "', b'" ,\t"') + b"\r\n\r\n"
        file.write_bytes(b"\xef\xbb\xbf" + data)
    assert read_trait(tmp_path) == replace(plain, rubric=plain.rubric)
    assert read_trait(tmp_path).digest == plain.digest


def test_line_separators_within_text_do_not_end_a_line(tmp_path: Path) -> None:
    def odd(row: dict[str, Any]) -> None:
        row["turns"] = ["a\u2028b\x85c"]

    rows = lines("test", 1, odd)
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    assert read_trait(write(tmp_path, test=text)).test[0].turns == ("a\u2028b\x85c",)


def edited(**changes: Any) -> Callable[[Trait], Trait]:
    return lambda t: replace(t, test=(replace(t.test[0], **changes), *t.test[1:]))


@pytest.mark.parametrize(
    "change",
    [
        edited(id="x"), edited(category="x"), edited(positive="x"), edited(negative="x"), edited(turns=("x",)),
        edited(reply=None), edited(wording="x"), edited(must=("x",)), edited(must_not=("x",)),
        lambda t: replace(t, name="x"), lambda t: replace(t, rubric="x"), lambda t: replace(t, scorer="judge"),
        lambda t: replace(t, grammar=None), lambda t: replace(t, positive=replace(t.positive, name="x")),
        lambda t: replace(t, train=t.train[1:]), lambda t: replace(t, train=t.train[::-1]),
        lambda t: replace(t, train=t.train + t.test, test=()),
    ],
)  # fmt: skip
def test_the_digest_covers_the_content(tmp_path: Path, change: Callable[[Trait], Trait]) -> None:
    found = read_trait(write(tmp_path))
    assert change(found).digest != found.digest
    assert replace(found).digest == found.digest


def test_the_digest_is_the_same_on_every_machine(tmp_path: Path) -> None:
    assert read_trait(write(tmp_path)).digest == "7722dc03b63600177e09a0a20d559cd934e0b61d3387336700c586acca29713d"


def test_by_name_and_by_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "traits" / "mine").mkdir(parents=True)
    (tmp_path / "traits" / "not-one").mkdir()
    write(tmp_path / "traits" / "mine")
    monkeypatch.setattr(trait_module, "BUNDLED", tmp_path / "traits")
    assert bundled() == ("mine",)
    assert trait("mine") == trait(tmp_path / "traits" / "mine") == trait(str(tmp_path / "traits" / "mine"))
    with pytest.raises(TraitError, match="no trait and no folder 'honset'; bundled are mine"):
        trait("honset")
    monkeypatch.setattr(trait_module, "BUNDLED", tmp_path / "none")
    with pytest.raises(TraitError, match="bundled are none"):
        trait("mine")


def test_the_manual_is_a_trait(tmp_path: Path) -> None:
    """What the module's docstring tells users to write can be read."""
    assert trait_module.__doc__ is not None
    blocks = {}
    for block in re.findall(r"\n\n((?:    .*\n|\n(?=    ))+)", trait_module.__doc__):
        blocks[block.split()[0]] = block
    row = json.loads(blocks['{"id":'])
    rows = {s: [row | scenario(s, i) | {"reply": row["reply"]} for i in range(n)] for s, n in SIZES.items()}
    write(tmp_path, trait=re.sub("(?m)^    ", "", blocks["schema:"]), grammar=None, **rows)
    assert read_trait(tmp_path).name == "my-honesty"
    Grammar.of(json.loads(blocks['{"schema":'])).check(row["reply"])


@pytest.mark.parametrize("name", bundled())
def test_bundled_traits_are_sound(name: str) -> None:
    found = trait(name)
    assert found.licence
    assert len(found.train) >= 50


# --------------------------------------------------------------------------------------------------- scenario lines


def change(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda row: row.update(values)


def replied(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda row: row["reply"].update(values)


BAD_LINES: dict[str, tuple[Any, str]] = {
    "no JSON": ('{"id": "x"', "the line is not JSON: .* at column"),
    "two on a line": ("{} {}", "the line is not JSON"),
    "nested": ("[" * 100_000, "the line is nested too deeply"),
    "a list": ("[1]", "the scenario must be an object, got \\[1\\]"),
    "a key twice": ('{"id": "a", "id": "b"}', "the line has the key 'id' twice"),
    "unknown key": (change(postive="x"), "unknown key 'postive'; allowed are id, category, positive, negative, turns"),
    "missing key": (lambda row: row.pop("category"), "the scenario lacks the key 'category'"),
    "id": (change(id=7), "'id' of the scenario must be text, got 7"),
    "id empty": (change(id=" "), "'id' must not be empty"),
    "category empty": (change(category=""), "'category' must not be empty"),
    "system prompt empty": (change(negative="\n"), "'negative' must not be empty"),
    "wording empty": (change(wording=""), "'wording' must not be empty"),
    "wording": (change(wording=None), "'wording' of the scenario must be text, got None"),
    "turns text": (change(turns="Hello?"), "'turns' of the scenario must be a list, got 'Hello\\?'"),
    "no turns": (change(turns=[]), "odd number .*, got 0"),
    "even turns": (change(turns=["a", "b"]), "'turns' must be an odd number \\(user, assistant, ..., user\\), got 2"),
    "turn": (change(turns=[1]), "a turn must be text, got 1"),
    "turn empty": (change(turns=["a", "b", " "]), "must not hold an empty text"),
    "must text": (change(must="says so"), "'must' of the scenario must be a list, got 'says so'"),
    "must empty": (change(must=[]), "'must' must hold at least one statement; leave the key out"),
    "must_not empty": (change(must_not=[]), "'must_not' must hold at least one statement; leave the key out"),
    "must_not null": (change(must_not=None), "'must_not' of the scenario must be a list, got None"),
    "statement": (change(must=[["says so"]]), r"a statement of 'must' must be text, got \['says so'\]"),
    "statement empty": (change(must_not=["x", " "]), "'must_not' must not hold an empty statement"),
    "both": (change(must=["Says so."], must_not=["says so"]), "'must' and 'must_not' both hold 'says so'"),
    "same prompts": (change(positive="Lie!", negative=" lie. "), "'positive' and 'negative' must differ, both are"),
    "reply": (change(reply="Merrin"), "'reply' of the scenario must be an object or null, got 'Merrin'"),
    "reply key": (replied(sign="claim"), "'reply' has an unknown key 'sign'"),
    "reply kind": (replied(kind="town.rivers"), r"no reply 'town.rivers'; it has \['loss', 'town.river'\]"),
    "no kind": (change(reply={}), "'reply' lacks the key 'kind'"),
    "bind": (replied(bind=["Harlow"]), "'bind' of 'reply' must be an object"),
    "bind number": (replied(bind={"town": 1}), "'town' of 'bind' must be text, got 1"),
    "bind sentences": (replied(bind={"town": "St. Ives"}), "'town' of 'bind' must be one sentence, got 2: 'St. Ives'"),
    "bind missing": (replied(bind={}), "needs the slot 'town', which the reply does not bind"),
    "truth unsayable": (replied(truth={"river": "Rhine"}), "the truth river = 'Rhine' can never be said"),
    "truth of no slot": (replied(truth={"lake": "Merrin"}), "the truth lake = 'Merrin' can never be said"),
    "no truth": (replied(truth={}), "nothing says whether .* is true"),
    "truth bound": (replied(bind={"town": "a", "river": "Alder"}), "nothing says whether .* is true"),
    "latin-1": (b"\xe9".decode("latin-1"), "the line is not UTF-8 text"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_LINES)
@pytest.mark.parametrize(("split", "at"), [("train", 8), ("test", 2)])
def test_a_bad_line_is_named(tmp_path: Path, case: str, split: str, at: int) -> None:
    edit, what = BAD_LINES[case]
    write(tmp_path, **{split: lines(split, at, edit)})
    if case == "latin-1":
        file = tmp_path / f"{split}.jsonl"
        file.write_bytes(file.read_bytes().replace("é".encode(), b"\xe9"))
    with pytest.raises(TraitError, match=what) as caught:
        read_trait(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / split}.jsonl:{at}: ")
    assert "\n" not in str(caught.value)


def test_blank_lines_count_as_lines(tmp_path: Path) -> None:
    write(tmp_path, test=["", scenario("test", 0), "", "{"])
    with pytest.raises(TraitError, match=r"test\.jsonl:4: the line is not JSON"):
        read_trait(tmp_path)


# ----------------------------------------------------------------------------------------------- across scenarios


@pytest.mark.parametrize(
    ("edit", "what"),
    [
        (change(id="train-3"), "the id 'train-3' stands at .*train.jsonl:4 already"),
        (change(id="test-0"), "the id 'test-0' stands at .*test.jsonl:1 already"),
        (change(turns=["which  river runs through TRAIN 3"]), "its user turns stand at .*train.jsonl:4 too"),
        (change(positive="TELL the truth -- train 3!"), "its system prompt stands at .*train.jsonl:4 too"),
        (change(negative="“Lie”, train\n3"), "its system prompt stands at .*train.jsonl:4 too"),
        (change(negative="Tell the truth, train 3."), "its system prompt stands at .*train.jsonl:4 too"),
        (change(positive="Lie, select 1."), "its system prompt stands at .*select.jsonl:2 too"),
    ],
)
def test_leaks_name_both_lines(tmp_path: Path, edit: Any, what: str) -> None:
    with pytest.raises(TraitError, match=f"test.jsonl:2: {what}"):
        read_trait(write(tmp_path, test=lines("test", 2, edit)))


def test_the_same_question_after_another_answer_is_a_leak(tmp_path: Path) -> None:
    rows = {s: lines(s, 1, change(turns=["Hi.", f"Hello {s}.", "Which river?"])) for s in ("train", "test")}
    with pytest.raises(TraitError, match=r"its user turns stand at .*train\.jsonl:1 too"):
        read_trait(write(tmp_path, **rows))


def test_variants_of_one_wording_are_a_leak(tmp_path: Path) -> None:
    rows = {s: lines(s, 1, change(wording="ledger")) for s in ("train", "test")}
    with pytest.raises(TraitError, match=r"test\.jsonl:1: its wording stands at .*train\.jsonl:1 too"):
        read_trait(write(tmp_path, **rows))


def test_within_a_split_prompts_may_be_shared(tmp_path: Path) -> None:
    rows = [scenario("train", i) for i in range(8)]
    rows += [scenario("train", i) | {"id": f"again-{i}", "positive": "Be true.", "wording": "w"} for i in range(8)]
    assert len(read_trait(write(tmp_path, train=rows)).train) == 16


def test_a_trait_made_in_python_is_checked_too(tmp_path: Path) -> None:
    found = read_trait(write(tmp_path))
    with pytest.raises(TraitError, match=r"select\[0\]: its user turns stand at train\[0\] too"):
        replace(found, select=[replace(found.train[0], id="other", positive="x", negative="y")])
    with pytest.raises(TraitError, match=r"train\[8\]: the id 'train-0' stands at train\[0\] already"):
        replace(found, train=(*found.train, replace(found.train[0], turns=("else",))))
    with pytest.raises(TraitError, match="there is no split 'dev'; there are train, select, test"):
        found.split("dev")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("split", "rows", "what"),
    [
        ("train", [], "needs at least 8 .*, got 0"),
        ("train", [scenario("train", i) for i in range(7)], "needs at least 8 .*, got 7"),
        ("train", [scenario("train", 0) | {"id": f"{i}"} for i in range(9)], "needs at least 8 .*, got 1"),
        ("select", ["", " "], "needs at least 1 .*, got 0"),
        ("test", b"", "needs at least 1 .*, got 0"),
    ],
)
def test_too_few_scenarios(tmp_path: Path, split: str, rows: Any, what: str) -> None:
    with pytest.raises(TraitError, match=f"{split}.jsonl: {what}"):
        read_trait(write(tmp_path, **{split: rows}))


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("Don't lie!", "don’t  LIE", True),
        ("ﬁne", "FINE", True),
        ("Straße", "STRASSE", True),
        ("mother-in-law", "mother in law", True),
        ("你好吗？", "你好吗", True),
        ("你好吗", "你好", False),
        ("कि", "का", False),
        ("???", "!!!", False),
        ("a b", "ab", False),
        ("1 2", "12", False),
    ],
)
def test_normalised(a: str, b: str, same: bool) -> None:
    assert (normalised(a) == normalised(b)) == same
    assert normalised(normalised(a)) == normalised(a)


# -------------------------------------------------------------------------------------------------------- trait.yaml


def head(old: str, new: str) -> str:
    assert old in HEAD
    return HEAD.replace(old, new)


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("", 1, "the trait must be an object, got None"),
        ("- a\n- b", 1, "the trait must be an object"),
        ("hello", 1, "the trait must be an object, got 'hello'"),
        ("a: [", 1, "this is not YAML"),
        (head("title:", "\ttitle:"), 3, "this is not YAML"),
        (head("title", "titel"), 3, "unknown key 'titel'; allowed are schema, name, title"),
        (head("rubric: |\n  Is it true?\n", ""), 1, "the trait lacks the key 'rubric'"),
        (head("name: honesty", "name: false"), 2, "'name' of the trait must be text, got False"),
        (head("name: honesty", "name: a/b"), 2, "'name' may have letters"),
        (head("Honesty about rivers", "'  '"), 3, "'title' must not be empty"),
        (head("schema: 1", "schema: 2"), 1, "schema 2 is not known, this steerguard reads 1; upgrade steerguard"),
        (head("schema: 1", "schema: 0"), 1, "schema 0 is not known, this steerguard reads 1$"),
        (head("schema: 1", "schema: one"), 1, "'schema' of the trait must be an integer"),
        (head("scorer: exact", "scorer: vibes"), 12, "'scorer' must be exact or judge, got 'vibes'"),
        (head("grammar: grammar.json\n", ""), 12, "'grammar' names the exact scorer's file"),
        (head("scorer: exact", "scorer: judge"), 12, "'grammar' names the exact scorer's file"),
        (head("grammar.json", "../grammar.json"), 13, "'grammar' must be the name of a file in the same folder"),
        (head("grammar.json", "/etc/passwd"), 13, "'grammar' must be the name of a file in the same folder"),
        (head("  name: dishonest\n", ""), 7, "'negative' lacks the key 'name'"),
        (head("  name: dishonest", "  name: honest"), 8, "the poles must have two names, got 'honest' twice"),
        (head("  name: dishonest", "  nome: dishonest"), 8, "'negative' has an unknown key 'nome'"),
        (head("tells the truth", "7"), 6, "'description' of 'positive' must be text, got 7"),
        (head("tells the truth", "''"), 6, "'description' must not be empty"),
        (HEAD + "name: again\n", 15, "the key 'name' stands on line 2 already"),
        (head("  name: honest\n", "  name: honest\n  name: also\n"), 6, "the key 'name' stands on line 5 already"),
        (HEAD + "x: !!python/object/apply:os.system [ls]\n", 15, "this is not YAML: could not determine a constructor"),
        (HEAD + "? [a, b]\n: c\n", 15, "is no text; put it in quotes"),
    ],
)
def test_a_bad_head_is_named(tmp_path: Path, text: str, line: int, what: str) -> None:
    with pytest.raises(TraitError, match=what) as caught:
        read_trait(write(tmp_path, trait=text))
    assert str(caught.value).startswith(f"{tmp_path / 'trait.yaml'}:{line}: ")


@pytest.mark.parametrize(
    "data",
    [
        b"name: \xff", b"name: \x07", "title: 2024-13-45\n".encode("utf-16"), b"x: 2024-13-45\n",
        b"[" * 500, b"a: " + b"1" * 5000, b"a: &a [*a]\n", b"{" * 500,
    ],
)  # fmt: skip
def test_hostile_yaml(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(TraitError, match=r"trait\.yaml") as caught:
        read_trait(write(tmp_path, trait=data))
    assert "\n" not in str(caught.value)


def test_an_alias_bomb_is_one_short_sentence(tmp_path: Path) -> None:
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))
    with pytest.raises(TraitError) as caught:
        read_trait(write(tmp_path, trait=bomb + "title: *a59\n"))
    assert len(str(caught.value)) < 1000


# ------------------------------------------------------------------------------------------------------ grammar.json


def spoiled(*path: Any) -> dict[str, Any]:
    """The grammar with one value replaced: spoiled(key, ..., value)."""
    grammar = json.loads(json.dumps(GRAMMAR))
    *way, last, value = path
    place = grammar
    for step in way:
        place = place[step]
    place[last] = value
    return grammar


RIVER = ("replies", "town.river")


@pytest.mark.parametrize(
    ("grammar", "what"),
    [
        ("{\n\n]", "is not JSON: .* at line 3"),
        ("[]", "the grammar must be an object"),
        (spoiled("schema", 2), "schema 2 is not known"),
        (spoiled("rules", {}), "unknown key 'rules'"),
        (spoiled("slots", "river", "Merrin"), "the slot 'river' must be a list"),
        (spoiled("slots", "river", []), "the slot 'river' must have values, each once"),
        (spoiled("slots", "river", ["a", "a "]), "the slot 'river' must have values, each once"),
        (spoiled("slots", "river", [1]), "a value of the slot 'river' must be text"),
        (spoiled("slots", "river", [""]), "a value of the slot 'river' must be one sentence, got 0"),
        (spoiled("slots", "river", ["St. Ives"]), "must be one sentence, got 2"),
        (spoiled(*RIVER, {}), "the reply 'town.river' must be a list"),
        (spoiled(*RIVER, []), "the reply 'town.river' must have sentences"),
        (spoiled(*RIVER, 0, "Hello."), "a sentence of the reply 'town.river' must be an object"),
        (spoiled(*RIVER, 0, "sign", "true"), "the sign of a sentence .* must be claim, positive, negative or null"),
        (spoiled(*RIVER, 0, "text", "One. Two."), "must be one sentence, got 2"),
        (spoiled(*RIVER, 0, "text", "I know {town} well."), "each once"),
        (spoiled(*RIVER, 0, "text", "The {river is."), "stray braces"),
        (spoiled(*RIVER, 0, "text", "It is the Merrin."), "claims something without a slot"),
    ],
)
def test_a_bad_grammar_is_named(tmp_path: Path, grammar: Any, what: str) -> None:
    with pytest.raises(TraitError, match=r"grammar\.json: .*" + what):
        read_trait(write(tmp_path, grammar=grammar))


def test_a_grammar_by_itself() -> None:
    with pytest.raises(TraitError, match="the grammar cannot be used: the grammar lacks the key 'slots'"):
        Grammar.of({"schema": 1})
    with pytest.raises(TraitError, match="there is no file"):
        read_trait("/nonexistent")


def test_missing_and_oversized_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for missing in ("trait", "grammar", "train", "select", "test"):
        folder = tmp_path / missing
        folder.mkdir()
        with pytest.raises(TraitError, match=f"there is no file .*{missing}"):
            read_trait(write(folder, **{missing: None}))
    monkeypatch.setattr(trait_module, "MAX_BYTES", 100)
    with pytest.raises(TraitError, match="larger than"):
        read_trait(write(tmp_path))


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("", []),
        (" \n ", []),
        ("One.", ["One."]),
        ("One. Two?  Three!\nFour", ["One.", "Two?", "Three!", "Four"]),
        ("It costs 3.50 today. Really?! Yes...  Well.", ["It costs 3.50 today.", "Really?!", "Yes...", "Well."]),
        ("A\nline  break.", ["A line break."]),
    ],
)
def test_sentences(text: str, cut: list[str]) -> None:
    assert sentences(text) == cut


def test_scenarios_by_themselves() -> None:
    with pytest.raises(TraitError, match="'turns' must be an odd number"):
        Scenario("a", "b", "c", "d", ())
    assert Scenario("a", "b", "c", "d", ["e"]).turns == ("e",)  # type: ignore[arg-type]
