"""The facts of an export that its scheduler, programs and card are made from."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jax_distill.interop.time_scale import Refitted
from jax_distill.sampling import Listed, Sampler
from jax_distill.storage.quoting import literal


@dataclasses.dataclass(frozen=True)
class Base:
    """The network beside which exported adapters belong.

    Attributes:
      where: to get it, in Markdown of this program's own.
      rank: of the adapters.
      int8: whether they were trained beside its kernels in int8.
      same_inputs: whether it takes guidance and interval as the student does.
    """

    where: str
    rank: int
    int8: bool
    same_inputs: bool


@dataclasses.dataclass(frozen=True)
class Card:
    """An export.

    Attributes:
      name: of the run.
      method: of the objective, its name.
      summary: the objective's, in a few words.
      layout: one of `layouts.LAYOUTS`.
      dtype: of the network's tensors, in words.
      time_scale, guidance_factor: by which the exported network multiplies t and the guidance
        scale before it embeds them.
      refits: the refitted embedders, by name.
      guidance: scale to draw with.
      guidance_embeds: whether the network takes the scale as an input.
      guided: whether it is guided away from the empty caption by a second evaluation.
      interval_embeds: whether it has the second time embedder.
      steps: of the sampler.
      resolution: height and width in pixels.
      patch: pixels that a token spans along each axis.
      channels: of a token.
      sampler: of the method; the shift of its schedule is a number, that of this resolution.
      captions: whose embeddings are in examples.safetensors; none where there are text encoders.
      text_length: of T5's sequences.
      has_autoencoder: whether it is exported too.
      has_text: whether the text encoders are.
      scheduler: the config of diffusers' scheduler, where the schedule is the world's.
      scores: of the run's evaluation, by steps.
      base: of adapters, the layout "lora".
      assumed: sentences about facts that a ported network's source did not state.
    """

    name: str
    method: str
    summary: str
    layout: str
    dtype: str
    time_scale: float
    guidance_factor: float
    refits: Mapping[str, Refitted]
    guidance: float
    guidance_embeds: bool
    guided: bool
    interval_embeds: bool
    steps: int
    resolution: tuple[int, int]
    patch: int
    channels: int
    sampler: Sampler
    captions: Sequence[str] = ()
    text_length: int = 0
    has_autoencoder: bool = True
    has_text: bool = False
    scheduler: Mapping[str, Any] | None = None
    scores: Mapping[int, float] = dataclasses.field(default_factory=dict)
    base: Base | None = None
    assumed: Sequence[str] = ()

    def __post_init__(self):
        """Raises ValueError when a value that programs or sentences show is not a number."""
        names = ("time_scale", "guidance_factor", "guidance", "steps", "patch", "channels")
        numbers = {name: getattr(self, name) for name in (*names, "text_length")}
        numbers |= {"height": self.resolution[0], "width": self.resolution[1]}
        schedule = self.sampler.schedule
        if isinstance(schedule, Listed):
            numbers |= {f"listed[{index}]": time for index, time in enumerate(schedule.listed)}
        else:
            numbers |= schedule._asdict()
        numbers |= {f"score in {steps} steps": score for steps, score in self.scores.items()}
        for name, value in numbers.items():
            literal(name, value)
