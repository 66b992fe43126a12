"""A page as elements, for assertions on what stands where."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

from steerguard.report.sweep_page import page
from steerguard.sweeping.result_file import of

VOID = {"meta", "link", "br"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str | None]
    children: list[Element | str] = field(default_factory=list)

    @property
    def classes(self) -> set[str]:
        return set((self.attributes.get("class") or "").split())

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def all(self, tag: str = "", class_: str = "") -> list[Element]:
        found = [self] if (not tag or self.tag == tag) and (not class_ or class_ in self.classes) else []
        return found + [one for child in self.children if isinstance(child, Element) for one in child.all(tag, class_)]

    def section(self, name: str) -> Element:
        return next(one for one in self.all("section") if one.attributes.get("id") == name)


class Tree(HTMLParser):
    """A page as elements; every one must be closed, and in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.root = Element("", {})
        self._open = [self.root]
        self.tags: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        one = Element(tag, dict(attrs))
        self._open[-1].children.append(one)
        if tag not in VOID:
            self._open.append(one)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open[-1].tag == tag, f"</{tag}> closes <{self._open[-1].tag}>"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        self._open[-1].children.append(data)


def tree(record: dict[str, Any]) -> Element:
    return Tree(page(of(record))).root


def squeezed(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def about(mark: Element) -> str:
    return mark.all("title")[0].text
