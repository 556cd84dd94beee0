"""Networks and devices as an RDF graph: the vocabulary, how facts become nodes, and how sizes and names are read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

from tasks.core.errors import UserError

if TYPE_CHECKING:
    from rdflib import Graph, URIRef

Facts = Mapping[str, Any]
UNITS = {"": 1, "B": 1, "kB": 1000, "MB": 1000**2, "GB": 1000**3, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}
# a sensor is also of its wider kind, and brings its parts along
KIND_OF = {"rgb camera": "camera", "grey camera": "camera", "thermal camera": "infrared sensor", "pdm microphone": "microphone"}
PARTS_OF = {"imu": ("accelerometer", "gyroscope"), "marg": ("imu", "magnetometer")}
PREFIXES = {
    "nnet": "http://tinyml-schema.org/networkschema/",
    "demo": "http://tinyml-schema.org/tinyml-demo#",
    "s3n": "http://w3id.org/s3n/",
    "ssn": "http://www.w3.org/ns/ssn/",
    "sys": "http://www.w3.org/ns/ssn/systems/",
    "sosa": "http://www.w3.org/ns/sosa/",
    "td": "https://www.w3.org/2019/wot/td#",
    "schema": "https://schema.org/",
    "om": "http://www.ontology-of-units-of-measure.org/resource/om-2/",
    "rdfs": "http://www.w3.org/2000/01/rdf-schema#",
    "own": "urn:retort:term:",  # what those lack: needsSensor, task, runtime, weightsIn
}


def size(value: Any, what: str) -> int:
    """A size in bytes, from a number or from text such as `256 KiB` (1,024 each) or `256 kB` (1,000). Raises UserError for any other."""
    if isinstance(value, int | float) and not isinstance(value, bool) and value >= 0 and value == int(value):
        return int(value)
    read = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value) if isinstance(value, str) else None
    if read is None or read[2] not in UNITS:
        raise UserError(f"{what} is {value!r}: write a number of bytes or one with a unit: kB, MB, GB (1,000) or KiB, MiB, GiB (1,024)")
    return round(float(read[1]) * UNITS[read[2]])


def memory(facts: Facts, key: str, owner: str) -> int | None:
    """Bytes of `<key>_bytes` or, as text with a unit, of `<key>`; None where neither is stated. Raises UserError where both disagree."""
    stated = {size(facts[name], f"{name} of {owner}") for name in (f"{key}_bytes", key) if facts.get(name) is not None}
    if len(stated) > 1:
        raise UserError(f"{owner} states {key} and {key}_bytes, and they differ; keep one")
    return stated.pop() if stated else None


def room(facts: Facts, key: str, owner: str) -> int:
    """`memory` of a device, which must be stated: raises UserError where it is not."""
    amount = memory(facts, key, owner)
    if amount is None:
        raise UserError(f"{owner} states no {key}: give {key}_bytes, or {key} with a unit such as 256 KiB")
    return amount


def words(value: Any) -> list[str]:
    """One or several names as a list, in lower case with single spaces: `RGB-Camera` is `rgb camera`."""
    several = [value] if isinstance(value, str) else list(value or [])
    found = [" ".join(re.findall(r"[^\W_]+", str(name).lower())) for name in several]
    return [name for name in found if name]


def graph(versions: Mapping[str, Facts], devices: Mapping[str, Facts]) -> Graph:
    """Networks and devices as one RDF graph.

    versions  name -> weight_bytes, activation_bytes, sensor (one or several), task, runtime, accuracy, shape, dtype, classes, layers
    devices   name -> flash, ram (or `flash_bytes`, `ram_bytes`), sensors, tasks, runtime, weights_in (`flash` or `ram`)
    Raises UserError for a size that cannot be read, or a device without flash or RAM.
    """
    from rdflib import Graph

    made = Graph()
    for prefix, address in PREFIXES.items():
        made.bind(prefix, address)
    for kind, wider in KIND_OF.items():
        _add(made, _sensor(kind), {"rdfs:subClassOf": _sensor(wider)})
    for name, facts in versions.items():
        _add(made, _node("version", name), network(name, facts))
    for name, facts in devices.items():
        _add(made, _node("device", name), thing(name, facts))
    return made


def network(name: str, facts: Facts) -> dict[str, Any]:
    """A version's properties by term; what is not known is left out. A mapping is a node of its own, a list several values."""
    needs = {kind: memory(facts, key, f"version {name}") for key, kind in (("weight", "demo:Flash"), ("activation", "demo:RAM"))}
    layers = [
        {"nnet:hasIndex": at, "nnet:hasType": _term(f"nnet:{kind}"), "nnet:shapeOut": str(list(shape))}
        for at, (kind, shape) in enumerate(facts.get("layers", ()))
    ]
    said = {
        "a": _term("nnet:NeuralNetwork"),
        "schema:identifier": name,
        "s3n:hasProcedureFeature": [
            {"sys:inCondition": {"a": _term(kind), "schema:minValue": amount, "schema:unitCode": _term("om:byte")}}
            for kind, amount in needs.items()
            if amount is not None
        ],
        "own:needsSensor": [_sensor(sensor) for sensor in words(facts.get("sensor"))],
        "own:task": words(facts.get("task")),
        "own:runtime": words(facts.get("runtime")),
        "nnet:shapeIn": str(list(facts["shape"])) if facts.get("shape") else None,
        "nnet:shapeOut": facts.get("classes"),
        "nnet:hasQuantization": _term(f"nnet:{str(facts['dtype']).capitalize()}") if facts.get("dtype") else None,
        "nnet:middleLayer": layers,
    }
    if facts.get("accuracy") is not None:
        said["nnet:hasMetric"] = {"a": _term("nnet:Top_1_accuracy"), "nnet:hasMetricValue": float(facts["accuracy"])}
    return {term: value for term, value in said.items() if value is not None}


def thing(name: str, facts: Facts) -> dict[str, Any]:
    """A device's properties by term, likewise. Raises UserError where flash or RAM is not stated."""
    stores = [
        {"a": _term(kind), "schema:value": room(facts, key, f"device {name}"), "schema:unitCode": _term("om:byte")}
        for key, kind in (("flash", "demo:Flash"), ("ram", "demo:RAM"))
    ]
    board = {"a": _term("s3n:MicroController"), "s3n:hasSystemCapability": {"sys:hasSystemProperty": stores}}
    return {
        "a": [_term("td:Thing"), _term("s3n:SmartSensor")],
        "td:title": name,
        "ssn:hasSubSystem": [board, *(_part(sensor) for sensor in words(facts.get("sensors")))],
        "own:weightsIn": weights_in(facts, f"device {name}"),
        "own:task": words(facts.get("tasks")),
        "own:runtime": words(facts.get("runtime")),
    }


def on_board(sensors: list[str]) -> set[str]:
    """The sensors, their parts and all their wider kinds."""
    found: set[str] = set()
    waiting = list(sensors)
    while waiting:
        sensor = waiting.pop()
        if sensor not in found:
            found.add(sensor)
            waiting += [*PARTS_OF.get(sensor, ()), *([KIND_OF[sensor]] if sensor in KIND_OF else [])]
    return found


def turtle(made: Graph) -> str:
    """The graph as Turtle."""
    return str(made.serialize(format="turtle"))


def weights_in(device: Facts, owner: str) -> Literal["flash", "ram"]:
    place = device.get("weights_in", "flash")
    if place not in ("flash", "ram"):
        raise UserError(f"weights_in of {owner} is {place!r}; valid: flash (run from there), ram (copied there)")
    return place  # type: ignore[no-any-return]


def _term(name: str) -> URIRef:
    from rdflib import RDF, URIRef

    prefix, _, rest = name.partition(":")
    return RDF.type if name == "a" else URIRef(PREFIXES[prefix] + rest)


def _node(kind: str, name: str) -> URIRef:
    from rdflib import URIRef

    return URIRef(f"urn:retort:{kind}:{quote(name, safe='')}")


def _sensor(name: str) -> URIRef:
    return _term("demo:" + quote("_".join(word.capitalize() for word in name.split())))


def _part(sensor: str) -> dict[str, Any]:
    return {"a": [_term("sosa:Sensor"), _sensor(sensor)], "ssn:hasSubSystem": [_part(inner) for inner in PARTS_OF.get(sensor, ())]}


def _add(made: Graph, subject: Any, properties: Mapping[str, Any]) -> None:
    from rdflib import BNode, Literal, URIRef

    for term, values in properties.items():
        for value in values if isinstance(values, list) else [values]:
            node = BNode() if isinstance(value, dict) else value if isinstance(value, URIRef) else Literal(value)
            made.add((subject, _term(term), node))
            if isinstance(value, dict):
                _add(made, node, value)
