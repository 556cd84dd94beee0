"""What was made from what, as one drawing: lineage trees joined into a graph, laid out from the source to the champions.

The layout is that of Sugiyama: columns by the longest way from a source, places within a column by their neighbours' mean, long edges
led through the columns that they cross.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from markupsafe import Markup

from tasks.core.page_charts import fit, mean, svg, tag, words

WIDE, TALL, THIN = 142.0, 60.0, 8.0  # a node, and an edge where it passes a column
ACROSS, BETWEEN = 30.0, 18.0  # room between columns, and within one
TURNS = 8
Edge = tuple[str, str]


@dataclass(frozen=True)
class Box:
    """One node. `kind` is source, data, model or alias; `id` tells it from others and is not shown."""

    id: str
    kind: str
    title: str
    by: str = ""
    foot: str = ""


@dataclass
class Graph:
    """Nodes by id, and edges with what they carry: nothing where it is the whole, else words such as `rejected rows`."""

    boxes: dict[str, Box] = field(default_factory=dict)
    edges: dict[Edge, list[str]] = field(default_factory=dict)


def join(trees: Iterable[Mapping[str, Any]], titles: Mapping[str, str], aliases: Mapping[str, Sequence[str]]) -> Graph:
    """One graph of the trees of `core.lineage`: what has one id is one node, however it was seen.

    titles   name and version of registered models, by model id
    aliases  `NAME@alias` by model id; each becomes a node of its own
    """
    graph = Graph()

    def add(node: Mapping[str, Any]) -> str:
        id_ = str(node["id"])
        if id_ not in graph.boxes:
            graph.boxes[id_] = _box(node, titles.get(id_, ""))
            for child in node["inputs"]:
                views = graph.edges.setdefault((add(child), id_), [])
                view = str(child["name"]).partition(" (")[2].removesuffix(")") if child["kind"] == "data" else ""
                if view not in views:
                    views.append(view)
        return id_

    for tree in trees:
        add(tree)
    for model, names in aliases.items():
        for name in names if model in graph.boxes else ():
            title, _, alias = name.partition("@")
            graph.boxes[f"alias:{name}"] = Box(f"alias:{name}", "alias", alias, title)
            graph.edges[model, f"alias:{name}"] = [""]
    return graph


def _box(node: Mapping[str, Any], title: str) -> Box:
    kind, name, id_ = str(node["kind"]), str(node["name"]), str(node["id"])
    if kind == "model":
        name, version = title.rsplit(" ", 1) if title else (name, "")
        foot = f"version {version}" if version else "not registered"
    else:
        name, foot = name.partition(" (")[0].removeprefix("data/"), id_[:8] if kind == "data" else ""
    return Box(id_, kind, name, str(node["made_by"]), foot)


def columns(graph: Graph) -> dict[str, int]:
    """Column of each node: the length of the longest way to it; aliases all stand in the last. Raises ValueError for a cycle."""
    before: dict[str, list[str]] = {id_: [] for id_ in graph.boxes}
    for start, end in graph.edges:
        before[end].append(start)
    found: dict[str, int] = {}
    waiting = list(graph.boxes)
    while waiting:
        ready = [id_ for id_ in waiting if all(b in found for b in before[id_])]
        if not ready:
            raise ValueError("what was made from itself cannot be drawn")
        for id_ in ready:
            found[id_] = max((found[b] + 1 for b in before[id_]), default=0)
        waiting = [id_ for id_ in waiting if id_ not in found]
    last = max(found.values(), default=0)
    return {id_: last if graph.boxes[id_].kind == "alias" else column for id_, column in found.items()}


def routes(graph: Graph, column: Mapping[str, int]) -> dict[Edge, list[str]]:
    """The places that each edge passes: its ends, and between them one in every column that it crosses."""
    return {
        (a, b): [a, *(f"{a}\0{b}\0{k}" for k in range(column[a] + 1, column[b])), b]
        for a, b in graph.edges
    }  # fmt: skip


def place(graph: Graph) -> tuple[dict[str, tuple[float, float]], dict[Edge, list[str]]]:
    """Middle (x, y) of every place, and the places that each edge passes."""
    column = columns(graph)
    ways = routes(graph, column)
    levels: list[list[str]] = [[] for _ in range(max(column.values(), default=-1) + 1)]
    near: dict[str, list[str]] = {}
    for id_, k in column.items():
        levels[k].append(id_)
        near[id_] = []
    for (a, _), way in ways.items():
        for k, spot in enumerate(way[1:-1], start=column[a] + 1):
            levels[k].append(spot)
            near[spot] = []
        for one, other in pairwise(way):
            near[one].append(other)
            near[other].append(one)
    level_of = {spot: k for k, level in enumerate(levels) for spot in level}
    for turn in range(TURNS):
        forth = turn % 2 == 0
        at = {spot: i / max(len(level), 1) for level in levels for i, spot in enumerate(level)}
        for k in range(1, len(levels)) if forth else range(len(levels) - 2, -1, -1):
            side = k - 1 if forth else k + 1
            levels[k].sort(key=lambda s, side=side: mean([at[n] for n in near[s] if level_of[n] == side] or [at[s]]))  # type: ignore[misc]
            at.update({spot: i / len(levels[k]) for i, spot in enumerate(levels[k])})
    y = {spot: v for level in levels for spot, v in zip(level, apart(level, [0.0] * len(level), graph), strict=True)}
    for turn in range(4 * TURNS):
        for level in levels if turn % 2 else reversed(levels):
            wanted = [mean([y[n] for n in near[spot]] or [y[spot]]) for spot in level]
            y.update(zip(level, apart(level, wanted, graph), strict=True))
    lowest = min((y[s] - _tall(s, graph) / 2 for s in y), default=0.0)
    x = {spot: WIDE / 2 + k * (WIDE + ACROSS) for k, level in enumerate(levels) for spot in level}
    return {spot: (x[spot], y[spot] - lowest) for spot in y}, ways


def apart(level: Sequence[str], wanted: Sequence[float], graph: Graph) -> list[float]:
    """Heights as near to the wanted ones as the order and the room between neighbours allow."""
    if not level:
        return []
    room = [0.0] + [(_tall(a, graph) + _tall(b, graph)) / 2 + BETWEEN for a, b in pairwise(level)]
    down, up = [wanted[0]], [wanted[-1]]
    for gap, want in zip(room[1:], wanted[1:], strict=True):
        down.append(max(want, down[-1] + gap))
    for gap, want in zip(reversed(room[1:]), reversed(wanted[:-1]), strict=True):
        up.append(min(want, up[-1] - gap))
    return [(a + b) / 2 for a, b in zip(down, reversed(up), strict=True)]


def draw(graph: Graph) -> Markup:
    """The graph as SVG, from left to right."""
    spots, ways = place(graph)
    width = max((x + WIDE / 2 for x, _ in spots.values()), default=1.0) + 2
    height = max((y + _tall(s, graph) / 2 for s, (_, y) in spots.items()), default=1.0) + 2
    lines = [_edge(graph, edge, [spots[s] for s in way]) for edge, way in ways.items()]
    nodes = [_node(box, *spots[id_]) for id_, box in graph.boxes.items()]
    said = "; ".join(f"{graph.boxes[b].title} from {graph.boxes[a].title}" for a, b in graph.edges)
    return svg(width, height, f"What was made from what: {said}", tag("g", *lines, *nodes, transform="translate(1 1)"), class_="graph")


def _tall(spot: str, graph: Graph) -> float:
    return TALL if spot in graph.boxes else THIN


def _edge(graph: Graph, edge: Edge, points: Sequence[tuple[float, float]]) -> Markup:
    views = [view for view in graph.edges[edge] if view]
    path = []
    for k, (x, y) in enumerate(points):
        inner = 0 < k < len(points) - 1
        if k:
            start = points[k - 1][0] + WIDE / 2
            end, before = x - WIDE / 2, points[k - 1][1]
            middle = (start + end) / 2
            path.append(f"C {middle:.1f} {before:.1f} {middle:.1f} {y:.1f} {end:.1f} {y:.1f}")
        else:
            path.append(f"M {x + WIDE / 2:.1f} {y:.1f}")
        if inner:
            path.append(f"L {x + WIDE / 2:.1f} {y:.1f}")
    start_box, end_box = graph.boxes[edge[0]], graph.boxes[edge[1]]
    whole = "" in graph.edges[edge]
    said = f"{end_box.title} from {start_box.title}" + (f": {', '.join(['all', *views] if whole else views)}" if views else "")
    return tag("path", tag("title", said), d=" ".join(path), class_="edge" if whole else "edge part")


def _node(box: Box, x: float, y: float) -> Markup:
    left, top = x - WIDE / 2, y - TALL / 2
    parts: list[str] = [
        tag("title", " · ".join(part for part in (box.title, box.by, box.foot) if part)),
        tag("rect", x=left, y=top, width=WIDE, height=TALL, rx=8, class_="box"),
        tag("rect", x=left, y=top + 10, width=3, height=TALL - 20, rx=1.5, class_="edge-mark"),
        words(left + 13, top + 23, fit(box.title, WIDE - 18), "t strong"),
        words(left + 13, top + 39, fit(box.by or box.kind, WIDE - 15, 11.5, bold=False), "t small"),
    ]
    if box.foot:
        parts.append(
            words(left + 13, top + 53, fit(box.foot, WIDE - 17, 11, bold=False), "t tiny mono-t" if box.kind == "data" else "t tiny")
        )
    return tag("g", *parts, class_=f"node n-{box.kind}")
