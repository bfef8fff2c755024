"""A directive that lists configuration keys with their defaults and comments, read from the code that defines them."""

import ast
import inspect
import textwrap
from collections.abc import Iterator

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from kd_det import KD_HEAD_REGISTRY, add_kd_config
from kd_det.config import head_node
from kd_det.registry import config_key

Key = tuple[str, str, str]  # Its name, its default as Python writes it, and its comment.


def comment_above(lines: list[str], number: int) -> str:
    """Join the comment lines directly above a line, whose number counts from 1; without headings."""
    comment = []
    while lines[number - 2].strip().startswith("# "):
        number -= 1
        comment.insert(0, lines[number - 1].strip().removeprefix("# "))
    return " ".join(line for line in comment if not line.startswith("----"))


def source(thing: object) -> tuple[list[str], ast.AST]:
    text = textwrap.dedent(inspect.getsource(thing))
    return text.splitlines(), ast.parse(text)


def assigned_keys(function: object) -> Iterator[Key]:
    """Yield the keys that a function assigns to its ``cfg``."""
    lines, tree = source(function)
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).startswith("cfg."):
            default = ast.unparse(node.value)
            name = ast.unparse(node.targets[0]).removeprefix("cfg.")
            if default != "CfgNode()" and "[" not in name:
                default = "{}" if default.startswith("CfgNode(new_allowed") else default
                yield name, default, comment_above(lines, node.lineno)


def head_keys(head: type) -> Iterator[Key]:
    """Yield the keys of a head's class attribute ``config``."""
    lines, tree = source(head)
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign | ast.Assign) and isinstance(node.value, ast.Dict):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            if ast.unparse(target) == "config":
                for key, value in zip(node.value.keys, node.value.values, strict=True):
                    yield ast.literal_eval(key), ast.unparse(value), comment_above(lines, key.lineno)


def schedule_keys() -> Iterator[Key]:
    lines, tree = source(head_node)
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "node.SCHEDULE":
            yield "SCHEDULE", ast.unparse(node.value.args[0]), comment_above(lines, node.lineno)


class ConfigKeys(SphinxDirective):
    """``config-keys:: general`` lists the keys of no head, ``config-keys:: heads`` those of all heads."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        if self.arguments[0] == "general":
            return [self.table("", assigned_keys(add_kd_config))]
        found = []
        for name, head in sorted(KD_HEAD_REGISTRY, key=lambda pair: config_key(pair[0])):
            if head.__module__.startswith("kd_det."):
                section = nodes.section(ids=[f"kd-{config_key(name).lower().replace('_', '-')}"])
                section += nodes.title(text=f"KD.{config_key(name)} ({name})")
                section += self.table(f"KD.{config_key(name)}.", head_keys(head))
                found.append(section)
        return [self.table("KD.<HEAD>.", schedule_keys()), *found]

    def table(self, prefix: str, keys: Iterator[Key]) -> nodes.definition_list:
        items = nodes.definition_list()
        for name, default, comment in keys:
            term = nodes.term("", "", nodes.literal(text=prefix + name), nodes.Text(" = "), nodes.literal(text=default))
            text = nodes.definition()
            self.state.nested_parse(StringList([comment or "See above."]), 0, text)
            items += nodes.definition_list_item("", term, text)
        return items


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("config-keys", ConfigKeys)
    return {"parallel_read_safe": True}
