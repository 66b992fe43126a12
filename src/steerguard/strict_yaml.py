"""YAML, read without trust: every key is text and stands once, nothing refers to anything else.

`on`, `off`, `yes` and `no` are words here, as people who write settings mean them. What a file may hold is its reader's to say;
this module knows only the language.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import yaml

from steerguard.files import BOM, shown

Lines = dict[tuple[str, str], int]
"""Where the keys of the first two levels stand: (parent key, key) -> line; the parent of the first level is ''."""


class NotYaml(ValueError):
    """What is wrong with a text, in words, and where."""

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line
        "counted from 1; None if it is nowhere in particular"

    def at(self, path: object) -> str:
        """The sentence, after the name of the file and the line."""
        return f"{path}: {self}" if self.line is None else f"{path}:{self.line}: {self}"


def read(text: bytes | str) -> Any:
    """The value of one document. Raises NotYaml."""
    return read_with_lines(text)[0]


def read_with_lines(text: bytes | str) -> tuple[Any, Lines]:
    """The value of one document, and where its keys stand. Raises NotYaml."""
    try:
        decoded = text if isinstance(text, str) else text.removeprefix(BOM).decode("utf-8")
        loader = _Strict(decoded)
        try:
            node = loader.get_single_node()
            value = None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
        return value, {(parent, key): line for parent, key, line in _keys(node)}
    except RecursionError as error:
        raise NotYaml("this is nested too deeply") from error
    except UnicodeDecodeError as error:
        raise NotYaml(f"this is not UTF-8: {error.reason} at byte {error.start}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = "" if isinstance(error, _Refused) else "this is not YAML: "
        raise NotYaml(f"{what}{error.problem or error.context}", mark.line + 1 if mark else None) from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none
        raise NotYaml(f"this is not YAML: {' '.join(str(error).split())}") from error


def _keys(node: yaml.Node | None, parent: str = "", depth: int = 0) -> Iterator[tuple[str, str, int]]:
    if isinstance(node, yaml.MappingNode) and depth < 2:
        for key, value in node.value:
            yield parent, str(key.value), key.start_mark.line + 1
            yield from _keys(value, str(key.value), depth + 1)


def assignments(texts: Iterable[str]) -> dict[str, Any]:
    """What settings like `KEY=VALUE` say: keys are words, dotted or not, each given once; values are YAML. Raises NotYaml."""
    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not all(word.isidentifier() for word in key.split(".")):
            raise NotYaml(f"a setting is KEY=VALUE, got {shown(text)}")
        if key in found:
            raise NotYaml(f"{key} is set twice; give it once")
        try:
            found[key] = read(value)
        except NotYaml as error:
            raise NotYaml(f"{shown(text)}: {error}") from error
    return found


class _Refused(yaml.MarkedYAMLError):
    """What is YAML, and is not read all the same."""


class _Strict(yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise _Refused(problem="anchors and aliases are not read", problem_mark=mark)
        return super().compose_node(parent, index)


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[str, Any]:
    found: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        key, mark = loader.construct_object(key_node, deep=True), key_node.start_mark
        if not isinstance(key, str):
            raise _Refused(problem=f"the key {shown(key)} is no text; put it in quotes", problem_mark=mark)
        if key in found:
            raise _Refused(problem=f"the key {shown(key)} stands on line {lines[key]} already", problem_mark=mark)
        found[key], lines[key] = loader.construct_object(value_node, deep=True), mark.line + 1
    return found


_Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_Strict.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if not (tag.endswith(":bool") and first not in "tTfF")]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
