"""A directive that lists configuration keys with their defaults and comments, read from the code that defines them."""

import ast
import inspect
import re
import textwrap

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from kd_det import KD_HEAD_REGISTRY, add_kd_config, config
from kd_det.registry import config_key

Key = tuple[str, str, str]  # Its name, its default as Python writes it, and its comment.
HEADING = re.compile(r"\s*# -+ (.+?) -+")


def comment_above(lines: list[str], number: int) -> str:
    """Joins the comment lines directly above a line, whose number counts from 1; without headings."""
    comment = []
    while lines[number - 2].strip().startswith("# "):
        number -= 1
        comment.insert(0, lines[number - 1].strip().removeprefix("# "))
    return " ".join(line for line in comment if not line.startswith("----"))


def source(thing: object) -> tuple[list[str], ast.AST]:
    text = textwrap.dedent(inspect.getsource(thing))
    return text.splitlines(), ast.parse(text)


def general_keys() -> dict[str, list[Key]]:
    """Maps the headings of ``add_kd_config`` to the keys below each, without the heads' keys."""
    lines, tree = source(add_kd_config)
    headings = {number: match[1] for number, line in enumerate(lines, 1) if (match := HEADING.fullmatch(line))}
    sections = {heading: [] for heading in headings.values()}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).startswith("cfg."):
            default = ast.unparse(node.value)
            name = ast.unparse(node.targets[0]).removeprefix("cfg.")
            if default != "CfgNode()" and "[" not in name:
                default = "{}" if default.startswith("CfgNode(new_allowed") else default
                heading = headings[max(number for number in headings if number < node.lineno)]
                sections[heading].append((name, default, comment_above(lines, node.lineno)))
    return {heading: keys for heading, keys in sections.items() if keys}


def keys_of(thing: object, attribute: str) -> list[Key]:
    """Lists the keys of a dict that a class or a module assigns to one of its attributes."""
    lines, tree = source(thing)
    return [
        (ast.literal_eval(key), ast.unparse(value), comment_above(lines, key.lineno))
        for node in ast.walk(tree)
        if isinstance(node, ast.AnnAssign | ast.Assign) and isinstance(node.value, ast.Dict)
        if ast.unparse(node.target if isinstance(node, ast.AnnAssign) else node.targets[0]) == attribute
        for key, value in zip(node.value.keys, node.value.values, strict=True)
    ]


def head_keys() -> dict[str, list[Key]]:
    """Maps a title for all heads, and one for each of kd_det's own, to their keys."""
    common = keys_of(config, "HEAD_KEYS")
    comments = {name: comment for name, _, comment in common}
    sections = {"All heads": [(f"KD.<HEAD>.{name}", default, comment) for name, default, comment in common]}
    for name, head in sorted(KD_HEAD_REGISTRY, key=lambda pair: config_key(pair[0])):
        if head.__module__.startswith("kd_det."):
            node = f"KD.{config_key(name)}"
            sections[f"{node} ({name})"] = [
                (f"{node}.{key}", default, comment or comments.get(key, ""))
                for key, default, comment in keys_of(head, "config")
            ]
    return sections


SECTIONS = {"general": general_keys, "heads": head_keys}


class ConfigKeys(SphinxDirective):
    """``config-keys:: general`` lists the keys of no head, ``config-keys:: heads`` those of all heads."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        return [self.section(title, keys) for title, keys in SECTIONS[self.arguments[0]]().items()]

    def section(self, title: str, keys: list[Key]) -> nodes.section:
        section = nodes.section(ids=[nodes.make_id(title)])
        section += nodes.title(text=title)
        items = nodes.definition_list()
        for name, default, comment in keys:
            term = nodes.term("", "", nodes.literal(text=name), nodes.Text(" = "), nodes.literal(text=default))
            text = nodes.definition()
            self.state.nested_parse(StringList([comment]), 0, text)
            items += nodes.definition_list_item("", term, text)
        section += items
        return section


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("config-keys", ConfigKeys)
    return {"parallel_read_safe": True}
