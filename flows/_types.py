"""Types of flow parameters: Prefect's page makes its form of their titles, descriptions and bounds, and refuses what does not fit."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

Folders = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...],
    Field(
        title="Data",
        description="Folders of the project: each as it is, one split as folder:split, or as it was as folder@revision; none: the usual",
    ),
]
Folder = Annotated[str, Field(title="Data", min_length=1, description="A folder of the project, folder:split or folder@revision")]
Model = Annotated[str, Field(title="Model", description="NAME@alias, NAME/version, or NAME for its newest version; empty: the flow's own")]
Models = Annotated[
    tuple[str, ...],
    Field(title="Models", description="NAME@alias, NAME/version or NAME, each; none: the newest of each model of this data set"),
]
Teachers = Annotated[
    tuple[str, ...],
    Field(title="Teachers", description="NAME@alias, NAME/version or NAME, each; none: the newest teacher"),
]
Budget = Annotated[str, Field(title="Budget", max_length=200, description="What the student must keep to, such as latency_ms <= 2")]
Generator = Annotated[bool, Field(title="Generator", description="A network that draws images, by the section generator of params.yaml")]
Erasing = Annotated[bool, Field(title="Erasing", description="By the rules for a version that takes the place of one that must go")]
Name = Annotated[str, Field(title="Registered model", min_length=1)]
Version = Annotated[int, Field(title="Version", ge=0, description="0: the newest")]
Stages = Annotated[tuple[str, ...], Field(title="Stages", description="Names of stages in dvc.yaml; none: all")]
Request = Annotated[str, Field(title="Request", description="Id of a stored request, or demonstration")]
Text = Annotated[str, Field(max_length=2000)]
Policy = Annotated[
    Literal["auto", "unlearn", "retrain"],
    Field(title="Policy", description="auto: unlearn, and retrain where the gate refuses; unlearn; retrain"),
]
Path = Annotated[str, Field(title="Samples", description="A file on the machine of the worker, with one sample id a line")]
Condition = Annotated[str, Field(title="Condition", description="On label, class, caption, split and source, as in SQL; never an id")]
Class = Annotated[str, Field(title="Class", description="The name of a class: all of its samples, and new ones that come")]
Concept = Annotated[str, Field(title="Concept", description="Words of a caption: all samples that have them, and new ones that come")]
Reason = Annotated[
    str, Field(title="Reason", max_length=500, description="Kept with the request and shown on the certificate: never a name")
]
