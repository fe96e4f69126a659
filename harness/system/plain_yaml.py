"""YAML for files of settings: text keys, each once; plain values; bounded in size and depth.

`vipbench.harness.system.files.read_yaml` reads a file of it. Dates stay text, and so does 4:00:00, which YAML 1.1 counts in base
60.
"""

import re
from typing import Any

import yaml

from vipbench.harness.errors import UserError, shortened

MOST_NODES = 100_000  # with what aliases repeat
DEEPEST = 50
PLAIN = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null")}
MERGE = "tag:yaml.org,2002:merge"
SIXTIES = re.compile(r"[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?")


# libyaml's parser, which PyYAML's wheels hold, is ten times as fast; a table of a large sweep reads thousands of configs.
class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Safe YAML in which only numbers, booleans and null are not text."""


Loader.yaml_implicit_resolvers = {
    character: [("tag:yaml.org,2002:str", SIXTIES)] * (character in "+-0123456789")
    + [(tag, pattern) for tag, pattern in resolvers if tag in PLAIN or tag == MERGE]
    for character, resolvers in Loader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML into dicts with text keys, lists, text, numbers, booleans and None.

    Args:
        where: names the text in an error.

    Raises:
        UserError: not YAML, a key twice or one that is no text, a tag (!!python/object, !!set, ...), a value that does
            not fit its tag, nesting deeper than 50, or more than 100,000 values.
    """
    try:
        loader = Loader(text)
        try:
            node = loader.get_single_node()
            return None if node is None else _Builder(loader, where).build(node, ())
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}: " if mark else ""
        reason = ", ".join(part for part in (error.problem, error.context) if part)
        raise UserError(f"{where}: not YAML: {place}{reason}") from error
    except (yaml.YAMLError, UnicodeError, RecursionError) as error:
        raise UserError(f"{where}: not YAML: {shortened(' '.join(str(error).split()), 160)}") from error


class _Builder:
    """Builds plain values from YAML's nodes; an alias is built anew wherever it stands, so that its size counts each time."""

    def __init__(self, loader: Loader, where: str) -> None:
        self.loader, self.where, self.count = loader, where, 0

    def build(self, node: yaml.Node, path: tuple[str, ...]) -> Any:
        self.count += 1
        if self.count > MOST_NODES:
            raise self._error(node, path, f"more than {MOST_NODES} values; do its aliases repeat each other?")
        if len(path) > DEEPEST:
            raise self._error(node, path, f"nested deeper than {DEEPEST}; does it hold itself?")
        if isinstance(node, yaml.MappingNode) and node.tag == self.loader.DEFAULT_MAPPING_TAG:
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag == self.loader.DEFAULT_SEQUENCE_TAG:
            return [self.build(item, (*path, str(place))) for place, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode) and node.tag in PLAIN:
            return self._scalar(node, path)
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        raise self._error(node, path, f"the tag {shortened(tag)} is not for settings; write the value without it")

    def _mapping(self, node: yaml.MappingNode, path: tuple[str, ...]) -> dict[str, Any]:
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == MERGE:
                merged = {**self._merged(value_node, path), **merged}
                continue
            key = self.build(key_node, path)
            if not isinstance(key, str):
                found = shortened(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "a " + key_node.id
                raise self._error(key_node, path, f"the key {found} is no text; put it in quotes")
            if key in own:
                raise self._error(key_node, path, f"the key {shortened(key)} stands here twice; keep one")
            own[key] = self.build(value_node, (*path, key))
        return {**merged, **own}

    def _merged(self, node: yaml.Node, path: tuple[str, ...]) -> dict[str, Any]:
        """Return the pairs that `<<: *name` or `<<: [*name, *other]` brings in; of a key in several the first counts."""
        merged: dict[str, Any] = {}
        for part in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            mapping = self.build(part, (*path, "<<"))
            if not isinstance(mapping, dict):
                raise self._error(node, path, "<< takes a mapping, or a list of them")
            merged = {**mapping, **merged}
        return merged

    def _scalar(self, node: yaml.ScalarNode, path: tuple[str, ...]) -> Any:
        try:
            return self.loader.construct_object(node)
        except (ValueError, KeyError) as error:  # !!int soon, !!bool perhaps, 0b_
            kind = node.tag.rpartition(":")[2]
            raise self._error(node, path, f"{shortened(node.value)} is no {kind}; put text in quotes") from error

    def _error(self, node: yaml.Node, path: tuple[str, ...], problem: str) -> UserError:
        key = f"{shortened('.'.join(path))}: " if path else ""
        return UserError(f"{self.where}: line {node.start_mark.line + 1}: {key}{problem}")
