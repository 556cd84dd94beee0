"""Types of flow parameters: Prefect's page makes its form of their titles, descriptions and bounds, and refuses what does not fit."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

Folders = Annotated[
    tuple[str, ...],
    Field(
        title="Data",
        min_length=1,
        description="Folders of the project: each as it is, one split of it as folder:split, or as it was as folder@revision",
    ),
]
Folder = Annotated[str, Field(title="Data", min_length=1, description="A folder of the project, folder:split or folder@revision")]
Model = Annotated[str, Field(title="Model", description="NAME@alias, NAME/version, or NAME for its newest version; empty: the flow's own")]
Models = Annotated[
    tuple[str, ...],
    Field(title="Models", description="NAME@alias, NAME/version or NAME, each; none: the newest of each model of this data set"),
]
Name = Annotated[str, Field(title="Registered model", min_length=1)]
Version = Annotated[int, Field(title="Version", ge=0, description="0: the newest")]
Stages = Annotated[tuple[str, ...], Field(title="Stages", description="Names of stages in dvc.yaml; none: all")]
Request = Annotated[str, Field(title="Request", description="Id of a stored request, or demonstration")]
Text = Annotated[str, Field(max_length=2000)]
Policy = Annotated[
    Literal["auto", "unlearn", "retrain"],
    Field(title="Policy", description="auto: unlearn, and retrain where the gate refuses; unlearn; retrain"),
]
