"""The numbers that a network embeds beside its tokens: time, interval and guidance scale."""

from typing import NamedTuple


class Input(NamedTuple):
    """A number that a network embeds.

    Attributes:
      embedder: name of its embedder.
      factor: of `MMDiTConfig`, which multiplies the number before it is embedded.
      upper: the largest value that embedders are refitted for; the smallest is 0.
    """

    embedder: str
    factor: str
    upper: float


TIME = Input("time_embedder", "time_scale", 1.0)
INTERVAL = Input("interval_embedder", "time_scale", 1.0)
GUIDANCE = Input("guidance_embedder", "guidance_factor", 10.0)
INPUTS = (TIME, INTERVAL, GUIDANCE)
