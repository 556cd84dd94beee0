"""Which versions run on a device is asked of a small graph of networks and devices: memory, sensors, task and runtime, not names.

Paper   On-device Online Learning and Semantic Management of TinyML Systems (2024), arXiv 2405.07601
Idea    networks (layers, input sensor, memory, runtime) and devices (W3C Thing Description, SSN/SOSA sensors, microcontroller) are
        nodes of one RDF graph. SPARQL finds the networks that fit: weights <= flash; activations <= RAM, plus the weights where the
        device copies them there (`weights_in: ram`; default: they run from flash); each sensor it needs is on the device, or a kind
        or part of one is; task and runtime are the device's. The best accuracy stands first, then the fewest weights
Small   the terms of the paper's ontology that the question needs; no code is generated from the answer. Facts that a version lacks
        are computed from its network: float32, batch 1, one layer's input and output at a time
Limits  24 networks, 10 devices, 20 questions: precision and recall 1 against sums by hand (5 seeds); by name F1 is .71, by file size .66.
        0.2 s a question. As true as the facts: the runtime's own code and buffers are not counted, a shortcut around a layer is not
        seen in `describe`, an input's resolution is not compared with the sensor's. What is not stated of a version's memory or sensor
        makes it unfit; a device that names no tasks or no runtime takes any
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from pydantic import Field
from torch import nn

from tasks.core.errors import UserError
from tasks.core.method import MethodConfig, method
from tasks.core.networks import Net, parameters
from tasks.registry import Offer, Place, Ranking
from tasks.registry._graph import PREFIXES, Facts, graph, memory, on_board, room, weights_in, words

if TYPE_CHECKING:
    from rdflib import Graph

# rdflib walks patterns with the most known terms first, and joins one pair of groups row by row, further ones all with all: so there are
# two groups, and a type is compared instead of stated, which would start at every node of that type. By that time is linear in versions.
QUERY = """
SELECT ?name ?accuracy ?weights ?flash ?activations ?ram WHERE {
  {
    ?device td:title ?title ; own:weightsIn ?place ; ssn:hasSubSystem/s3n:hasSystemCapability/sys:hasSystemProperty ?store , ?memory .
    ?store a ?permanent ; schema:value ?flash . ?memory a ?volatile ; schema:value ?ram
    FILTER (?permanent = demo:Flash && ?volatile = demo:RAM)
  }
  {
    ?network a nnet:NeuralNetwork ; schema:identifier ?name ; s3n:hasProcedureFeature/sys:inCondition ?stored , ?held .
    ?stored a ?lasting ; schema:minValue ?weights . ?held a ?fleeting ; schema:minValue ?activations
    FILTER (?lasting = demo:Flash && ?fleeting = demo:RAM)
  }
  FILTER (?weights <= ?flash)
  FILTER (?activations + IF(?place = "ram", ?weights, 0) <= ?ram)
  FILTER EXISTS { ?network own:needsSensor ?any }
  FILTER NOT EXISTS {
    ?network own:needsSensor ?sensor
    FILTER NOT EXISTS { ?device ssn:hasSubSystem+/a/rdfs:subClassOf* ?sensor }
  }
  FILTER (?asked = "" || EXISTS { ?network own:task ?asked })
  FILTER (NOT EXISTS { ?device own:task ?served } || EXISTS { ?network own:task ?common . ?device own:task ?common })
  FILTER (NOT EXISTS { ?device own:runtime ?engine } || NOT EXISTS { ?network own:runtime ?needed }
          || EXISTS { ?network own:runtime ?same . ?device own:runtime ?same })
  OPTIONAL { ?network nnet:hasMetric ?metric . ?metric a ?what ; nnet:hasMetricValue ?accuracy FILTER (?what = nnet:Top_1_accuracy) }
} ORDER BY DESC(?accuracy) ?weights ?name
"""


class Config(MethodConfig):
    """What is asked."""

    device: str = Field("", description="a name among the devices; empty: the only one")
    task: str = Field("", description="what the version must be made for; empty: any task that the device takes")


SMOKE = Config()


class Fit(NamedTuple):
    """One answer of the query; all sizes in bytes, `ram` and `flash` the device's."""

    version: str
    accuracy: float | None
    weights: int
    flash: int
    activations: int
    ram: int


@method(
    paper="On-device Online Learning and Semantic Management of TinyML Systems (2024)",
    arxiv="2405.07601",
    claim="a query over described models and devices finds all that run there and nothing else; a look-up by name does not",
)
def semantic_management(offer: Offer, cfg: Config = Config(), *, seed: int = 0, device: str = "cpu") -> Ranking:
    """The versions that run on the device named in `cfg`, the best first; none is an empty ranking. `why_not` says why the others do not.

    Needs `facts["devices"]`, and of each version `facts["versions"]`, its network, or both (stated facts go before computed ones).
    Raises UserError where either is missing, the device is not known, or a size cannot be read.
    """
    versions = known_versions(offer)
    devices = offer.facts.get("devices", {})
    if not versions:
        raise UserError("no versions to choose from: offer networks, or facts about versions")
    board = one_device(devices, cfg.device)
    found = fits(graph(versions, {board: devices[board]}), board, cfg.task)
    return Ranking(tuple(Place(fit.version, fit.accuracy or 0.0, reason(fit)) for fit in found))


def known_versions(offer: Offer) -> dict[str, dict[str, Any]]:
    """Facts by version: what is stated, over what follows from the network where one is offered."""
    stated = offer.facts.get("versions", {})
    names = list(dict.fromkeys([*stated, *offer.nets]))
    return {name: {**(describe(offer.nets[name]) if name in offer.nets else {}), **stated.get(name, {})} for name in names}


def one_device(devices: Mapping[str, Any], name: str) -> str:
    """The device meant by `name`; empty means the only one. Raises UserError that lists the devices."""
    if name in devices:
        return name
    if not devices:
        raise UserError("no devices are described: give each a name, sensors, flash and ram")
    if not name and len(devices) == 1:
        return next(iter(devices))
    what = f"device {name!r} is not known" if name else "several devices are described: name one"
    raise UserError(f"{what}; known: {', '.join(sorted(devices))}")


def fits(made: Graph, device: str, task: str = "") -> list[Fit]:
    """The versions in the graph that run on the device, and are for the task where one is asked: best accuracy, then fewest weights."""
    from rdflib import Literal

    bound = {"title": Literal(device), "asked": Literal((words(task) or [""])[0])}
    rows = made.query(QUERY, initNs=PREFIXES, initBindings=bound)
    plain: list[list[Any]] = [[None if value is None else value.toPython() for value in row] for row in rows]  # type: ignore[union-attr]
    return [Fit(*values) for values in plain]


def reason(fit: Fit) -> str:
    """Why a version fits, in one line."""
    known = "accuracy not known" if fit.accuracy is None else f"accuracy {fit.accuracy:.3f}"
    return f"{known}; weights {fit.weights:,} of {fit.flash:,} B flash, activations {fit.activations:,} of {fit.ram:,} B RAM; sensors there"


def why_not(version: Facts, device: Facts, task: str = "") -> list[str]:
    """Why a version does not run on a device, from the plain facts; nothing where it does. Raises UserError as `graph` does."""
    flash, ram = (room(device, key, "the device") for key in ("flash", "ram"))
    weights, activations = (memory(version, key, "the version") for key in ("weight", "activation"))
    found = [f"{key}_bytes is not known" for key, value in (("weight", weights), ("activation", activations)) if value is None]
    if weights is not None and weights > flash:
        found.append(f"weights of {weights:,} B do not fit into {flash:,} B of flash")
    copied = weights or 0 if weights_in(device, "the device") == "ram" else 0
    if activations is not None and activations + copied > ram:
        what = "activations and weights" if copied else "activations"
        found.append(f"{what} of {activations + copied:,} B do not fit into {ram:,} B of RAM")
    there = on_board(words(device.get("sensors")))
    needed = words(version.get("sensor"))
    found += [f"sensor {sensor!r} is not on the device" for sensor in needed if sensor not in there]
    found += [] if needed else ["sensor is not known"]
    mine, asked, served = words(version.get("task")), words(task), words(device.get("tasks"))
    if asked and asked[0] not in mine:
        found.append(f"it is made for {', '.join(mine) or 'no stated task'}, not for {asked[0]}")
    if served and not set(served) & set(mine):
        found.append(f"the device takes {', '.join(served)}, not {', '.join(mine) or 'an unknown task'}")
    needs, has = words(version.get("runtime")), words(device.get("runtime"))
    if needs and has and not set(needs) & set(has):
        found.append(f"it needs {', '.join(needs)}; the device has {', '.join(has)}")
    return found


IN_PLACE = (nn.ReLU, nn.Flatten, nn.Identity, nn.Dropout, nn.BatchNorm2d)  # no second buffer: fused or reshaped on the spot


def describe(net: Net) -> dict[str, Any]:
    """What follows from a network, float32 and batch 1: bytes of weights, peak bytes of activations, layers.

    Peak: the largest sum of one layer's input and output, as a runtime needs that keeps nothing else. The network stays as it was.
    """
    net = copy.deepcopy(net).cpu().eval()
    layers: list[tuple[str, list[int]]] = []
    peak = 0

    def look(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal peak
        sizes = [inputs[0].numel(), output.numel()]
        peak = max(peak, max(sizes) if isinstance(module, IN_PLACE) else sum(sizes))
        layers.append((type(module).__name__, list(output.shape[1:])))

    for module in net.modules():
        if not list(module.children()):
            module.register_forward_hook(look)
    with torch.no_grad():
        net(torch.zeros(1, *net.arch["shape"]))
    held = sum(value.numel() for name, value in net.named_buffers() if not name.endswith("num_batches_tracked"))
    return {
        "shape": list(net.arch["shape"]), "classes": int(net.arch["classes"]), "dtype": "float32", "parameters": parameters(net),
        "weight_bytes": 4 * (parameters(net) + held), "activation_bytes": 4 * peak, "layers": layers,
    }  # fmt: skip
