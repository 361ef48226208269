"""Parses YAML, of which JSON is a part, and refuses a mapping that has a key twice: PyYAML takes the last one."""

from typing import Any

import yaml


def parse_yaml(text: str, loader: type[yaml.BaseLoader | yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """Returns the content of a text.

    Raises:
        yaml.YAMLError: it is no YAML, or a mapping has a key twice.
    """
    nodes = [yaml.compose(text, loader)]
    seen: set[int] = set()  # an anchor may be inside itself
    while nodes:
        node = nodes.pop()
        if id(node) in seen or not isinstance(node, yaml.CollectionNode):
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            _require_unique_keys(node)
            nodes += [value for _, value in node.value]
        else:
            nodes += node.value
    return yaml.load(text, loader)


def _require_unique_keys(node: yaml.MappingNode) -> None:
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            line = key.start_mark.line + 1
            if key.value in lines:
                raise yaml.YAMLError(f"{key.value} is set on line {lines[key.value]} and again on line {line}")
            lines[key.value] = line
