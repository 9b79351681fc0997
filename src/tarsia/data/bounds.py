"""Chat templates whose work could grow without measure are refused before they run.

The sandbox that renders templates keeps them from the machine, not from its time: two loops over
``range(99999)`` inside each other, a macro that calls itself twice, ``10 ** 10 ** 8``, or a text that is
doubled in a loop do not end. What published templates do is bounded by the conversation: they loop over
messages, parts and tools, over a range at most once, and their macros call themselves for parts of what
they were given. This is a check against accidents and the plain bombs; it proves no more than it says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from tarsia.core.errors import DataError

_LONGEST: Final = 200_000
"""Characters of a template; published ones have below 30,000."""
_DEEPEST: Final = 4
"""Loops inside each other; published templates have three: messages, parts, pieces of a part."""
_LARGEST: Final = 10_000
"""A number written in a template."""
# They make a text or a list as long as their argument says, or as another text times another.
_GROWING: Final = frozenset({"center", "format", "slice", "batch", "indent", "wordwrap", "xmlattr"})
_MADE: Final = frozenset({"ljust", "rjust", "center", "zfill", "format", "format_map", "expandtabs"})


class _Generation(Extension):
    """{% generation %}, as transformers has it; here only its body matters."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def check_bounded(template: str) -> None:
    """Raise DataError where a template is none, or where its work is not bounded by what it is given."""
    if len(template) > _LONGEST:
        raise _unbounded("it is too long to be one", f"{len(template)} characters")
    environment = jinja2.Environment(extensions=[_Generation, loopcontrols])
    try:
        tree = environment.parse(template)
        _check_nodes(tree)
        macros = {macro.name: macro for macro in tree.find_all(nodes.Macro)}
        _check_loops(tree, macros, _Walk())
    except RecursionError:
        raise _unbounded("it is nested too deeply", template[:60]) from None
    except (jinja2.TemplateError, ValueError, OverflowError) as error:
        raise DataError(f"The chat template is not one: {error}.", given=template[:60]) from None


def _check_nodes(tree: nodes.Template) -> None:
    for node in tree.find_all((nodes.Pow, nodes.Mul, nodes.Mod, nodes.Const, nodes.Filter, nodes.Getattr)):
        if isinstance(node, nodes.Pow):
            raise _unbounded("it raises to a power", f"line {node.lineno}")
        if isinstance(node, nodes.Mul) and not (_small(node.left) and _small(node.right)):
            raise _unbounded("it multiplies what may be a text", f"line {node.lineno}")
        if isinstance(node, nodes.Mod) and not _small(node.right):
            raise _unbounded("it may format a text with %", f"line {node.lineno}")
        if isinstance(node, nodes.Const) and isinstance(node.value, int | float) and abs(node.value) > _LARGEST:
            raise _unbounded("it has a large number in it", str(node.value)[:40])
        if isinstance(node, nodes.Filter) and node.name in _GROWING:
            raise _unbounded("it uses a filter that can make anything long", node.name)
        if isinstance(node, nodes.Getattr) and node.attr in _MADE:
            raise _unbounded("it uses a method that can make anything long", node.attr)
    for loop in tree.find_all(nodes.For):
        if loop.recursive:
            raise _unbounded("it has a recursive loop", f"line {loop.lineno}")
        _check_growth(loop)


def _small(node: nodes.Expr) -> bool:
    return isinstance(node, nodes.Const) and isinstance(node.value, int | float)


def _check_growth(loop: nodes.For) -> None:
    """In a loop nothing is made of itself twice, which would double it each time."""
    for told in loop.find_all(nodes.Assign):
        names = {_spelt(name) for name in (told.target, *told.target.find_all((nodes.Name, nodes.NSRef)))}
        used = [_spelt(node) for node in told.node.find_all((nodes.Name, nodes.Getattr))]
        used += [_spelt(told.node)]
        if any(used.count(name) > 1 for name in names if name):
            raise _unbounded("it makes something of itself twice in a loop", f"line {told.lineno}")


def _spelt(node: nodes.Node) -> str:
    if isinstance(node, nodes.Name):
        return node.name
    if isinstance(node, nodes.NSRef):
        return f"{node.name}.{node.attr}"
    if isinstance(node, nodes.Getattr) and isinstance(node.node, nodes.Name):
        return f"{node.node.name}.{node.attr}"
    return ""


@dataclass(frozen=True, slots=True)
class _Walk:
    """How deep a walk is: ``inside`` which macros, loops, loops over ranges; ``parts`` are names of what loops give."""

    inside: tuple[str, ...] = ()
    loops: int = 0
    ranges: int = 0
    parts: frozenset[str] = frozenset()


def _check_loops(node: nodes.Node, macros: Mapping[str, nodes.Macro], walk: _Walk) -> None:
    """Walk the template as it would run, macros where they are called."""
    if isinstance(node, nodes.Macro):
        return  # it runs where it is called
    if isinstance(node, nodes.For):
        calls = [call for call in (node.iter, *node.iter.find_all(nodes.Call)) if isinstance(call, nodes.Call)]
        ranged = any(_spelt(call.node) in ("range", "lipsum", "cycler") for call in calls)
        # What a loop over a part gives is smaller than the part; what it makes itself need not be.
        gives = set() if ranged or isinstance(node.iter, nodes.List) else {
            name.name for name in (node.target, *node.target.find_all(nodes.Name)) if isinstance(name, nodes.Name)
        }  # fmt: skip
        walk = replace(walk, loops=walk.loops + 1, ranges=walk.ranges + ranged, parts=walk.parts | gives)
        if walk.loops > _DEEPEST or walk.ranges > 1:
            raise _unbounded("its loops stand too deeply inside each other", f"line {node.lineno}")
    if isinstance(node, nodes.Call) and (name := _spelt(node.node)) in macros:
        if name not in walk.inside:
            for child in macros[name].body:
                _check_loops(child, macros, replace(walk, inside=(*walk.inside, name)))
        elif not any(_is_part(argument, walk) for argument in node.args):
            raise _unbounded("a macro calls itself, and not with a part of what it was given", name)
    for child in node.iter_child_nodes():
        _check_loops(child, macros, walk)


def _is_part(argument: nodes.Expr, walk: _Walk) -> bool:
    part = isinstance(argument, nodes.Getattr | nodes.Getitem)
    return part or (isinstance(argument, nodes.Name) and argument.name in walk.parts)


def _unbounded(what: str, given: str) -> DataError:
    return DataError(
        f"The chat template could run without end: {what}.",
        given=given,
        do="use the template that was published with the model",
    )
