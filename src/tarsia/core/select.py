"""Which sites: a small language, ``"language.*.{q,v}; vision.-4..; projector"``.

    selection = term { ";" term }
    term      = component [ "." layers [ "." roles ] ]  |  "@" glob over paths
    component = "vision" | "projector" | "language" | "*"
    layers    = "*" (every numbered layer) | number | number ".." [ number ] | ".." number
    roles     = role | "{" role { "," role } "}"

Layer numbers count from 0, negative ones from the component's end; ranges include both ends. A term
without roles takes what the method patches by default. Every part of every term must match.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from tarsia.core.errors import SelectionError
from tarsia.core.site import Component, Kind, Role, Site

_LAYERS = re.compile(r"(?P<first>-?\d+)?(?P<dots>\.\.)?(?P<last>-?\d+)?")


@dataclass(frozen=True, slots=True)
class Term:
    """One term of a selection, parsed. Empty ``roles`` mean the method's default."""

    text: str
    components: tuple[Component, ...] = ()
    layers: str | None = None
    roles: tuple[Role, ...] = ()
    glob: str | None = None


def _names(given: str, allowed: Sequence[str], what: str, text: str) -> str:
    if given in allowed:
        return given
    near = difflib.get_close_matches(given, allowed, 3, 0.4) or sorted(allowed)
    raise SelectionError(
        f"The selection {text!r} names no {what} of this model.",
        given=given or "(nothing)",
        allowed=", ".join(allowed),
        do=f"did you mean {' or '.join(near[:3])}?",
    )


def parse(text: str) -> tuple[Term, ...]:
    """Parse a selection. Raises SelectionError, naming the nearest words, where it is not one."""
    pieces = [piece.strip() for piece in text.split(";")]
    if not all(pieces):
        raise SelectionError("A selection has an empty term.", given=repr(text), do='write "term; term"')
    return tuple(_term(piece) for piece in pieces)


def _term(text: str) -> Term:
    if text.startswith("@"):
        return Term(text, glob=text[1:].strip())
    head, _, rest = text.partition(".")
    component = _names(head, [*Component, "*"], "component", text)
    components = tuple(Component) if component == "*" else (Component(component),)
    match = re.fullmatch(r"(\*|-?\d*(?:\.\.)?-?\d*)(?:\.([^.].*))?", rest)
    if rest and (not match or not match[1]):
        raise SelectionError(
            f"The selection {text!r} has no layers between component and roles.",
            given=rest,
            allowed="* | 3 | -1 | 2..5 | -4..",
            do=f"write {head}.*.{rest.strip('.') or 'q'}",
        )
    layers, roles = (match[1], match[2] or "") if match and rest else (None, "")
    words = [word.strip() for word in roles.strip("{}").split(",")] if roles else []
    return Term(text, components, layers, tuple(Role(_names(w, list(Role), "role", text)) for w in words))


def _in_layers(layers: str | None, site: Site, depth: int) -> bool:
    if layers is None:
        return True
    if site.layer is None:
        return False
    if layers == "*":
        return True
    match = _LAYERS.fullmatch(layers)
    assert match is not None
    first = 0 if match["first"] is None else int(match["first"])
    last = depth - 1 if match["last"] is None else int(match["last"])
    if not match["dots"]:
        last = first
    first, last = (n + depth if n < 0 else n for n in (first, last))
    return first <= site.layer <= last


def select(
    text: str, sites: Sequence[Site], kinds: Collection[Kind], roles: Collection[Role] | None = None
) -> tuple[Site, ...]:
    """The sites that ``text`` names, in model order, without the dead ones.

    ``kinds`` are what the method can patch and ``roles`` what a term without roles means (None: all).
    Raises SelectionError where a term, or a role within it, matches nothing, or only dead sites.
    """
    chosen: dict[str, Site] = {}
    for term in parse(text):
        matched = list(_match(term, sites))
        wanted = [
            s for s in matched if s.kind in kinds and (term.roles or term.glob or roles is None or s.role in roles)
        ]
        _complain(term, sites, matched, wanted, kinds)
        chosen |= {site.path: site for site in wanted if site.dead is None}
    return tuple(site for site in sites if site.path in chosen)


def _match(term: Term, sites: Sequence[Site]) -> Iterator[Site]:
    depth = {
        c: 1 + max((s.layer for s in sites if s.component == c and s.layer is not None), default=-1) for c in Component
    }
    for site in sites:
        if term.glob is not None:
            if fnmatch.fnmatchcase(site.path, term.glob):
                yield site
        elif (
            site.component in term.components
            and (not term.roles or site.role in term.roles)
            and _in_layers(term.layers, site, depth[site.component])
        ):
            yield site


def _complain(
    term: Term, sites: Sequence[Site], matched: Sequence[Site], wanted: Sequence[Site], kinds: Collection[Kind]
) -> None:
    if not matched:
        raise _nothing(term, sites)
    for role in term.roles:
        for component in term.components if len(term.components) == 1 else ():
            if not any(s.role == role for s in matched):
                has = sorted({str(s.role) for s in sites if s.component == component})
                raise SelectionError(
                    f"The selection {term.text!r} is only half matched: {component} has no {role} there.",
                    given=str(role),
                    allowed=", ".join(has),
                    do=f"did you mean {' or '.join(difflib.get_close_matches(role, has, 3, 0.1) or has[:3])}?",
                )
    if not wanted:
        raise SelectionError(
            f"The selection {term.text!r} matches {len(matched)} sites, none of a kind that this method patches.",
            given=", ".join(sorted({str(s.kind) for s in matched})),
            allowed=", ".join(sorted(kinds)),
            do="choose linear layers, or the method `full`, which trains any parameter",
        )
    if all(site.dead for site in wanted):
        raise SelectionError(
            f"The selection {term.text!r} matches only sites that no gradient can reach.",
            given=", ".join(s.path for s in wanted[:3]) + (" ..." if len(wanted) > 3 else ""),
            allowed="; ".join(sorted({str(s.dead) for s in wanted})),
            do="choose earlier layers; `tarsia sites MODEL` prints the dead ones",
        )


def _nothing(term: Term, sites: Sequence[Site]) -> SelectionError:
    if term.glob is not None:
        near = difflib.get_close_matches(term.glob, [s.path for s in sites], 3, 0.0)
        return SelectionError(
            "No path of this model matches.", given=term.glob, do=f"the nearest are {', '.join(near)}"
        )
    inside = [s for s in sites if s.component in term.components]
    layers = sorted({s.layer for s in inside if s.layer is not None})
    roles = sorted({str(s.role) for s in inside})
    span = f"layers 0..{layers[-1]}" if layers else "no numbered layers"
    wanted = term.roles[0] if term.roles else ""
    near = difflib.get_close_matches(wanted, roles, 3, 0.1) or roles[:3]
    return SelectionError(
        f"The selection {term.text!r} matches nothing.",
        given=term.text,
        allowed=f"{span}; roles {', '.join(roles)}" if inside else "this component has no sites",
        do=f"did you mean {' or '.join(near)}? `tarsia sites MODEL` prints every site",
    )
