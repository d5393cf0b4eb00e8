"""All objectives by their names, and their settings."""

import dataclasses
from typing import Any

from jax_distill.objectives.autoencoder import AutoencoderObjective
from jax_distill.objectives.flow_matching import FlowMatching
from jax_distill.objectives.imm import IMM
from jax_distill.objectives.meanflow import MeanFlow
from jax_distill.objectives.objective import Objective
from jax_distill.objectives.scm import SCM
from jax_distill.objectives.time_rescale import TimeRescale

OBJECTIVES = {
    "flow_matching": FlowMatching,
    "time_rescale": TimeRescale,
    "scm": SCM,
    "meanflow": MeanFlow,
    "imm": IMM,
}
"""Those that train velocity networks."""

KINDS = {"autoencoder": AutoencoderObjective, **OBJECTIVES}
"""What `objective.name` may be."""


def settings_of(kind: type[Objective]) -> dict[str, Any]:
    """The settings of an objective and their defaults; networks and encoders are not settings."""
    fields = dataclasses.fields(kind)
    return {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
