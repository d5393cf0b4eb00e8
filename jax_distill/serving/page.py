"""The page, rendered from `templates/`."""

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from jax_distill import streams
from jax_distill.assembly import build
from jax_distill.config.rules import PATCH
from jax_distill.pipeline import Pipeline
from jax_distill.serving import parameters

_TEMPLATES = Environment(
    loader=PackageLoader("jax_distill.serving"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
GRID = (1, 2, 4)  # steps


def render(networks: Mapping[str, Pipeline], title: str) -> str:
    """The page's HTML.

    Args:
      networks: by name, the default first.
      title: what draws.
    """
    first = next(iter(networks.values()))
    height, width = first.world.resolution
    example = first.world.examples(1)
    return _TEMPLATES.get_template("page.html").render(
        title=title,
        networks={name: _facts(name, pipe) for name, pipe in networks.items()},
        grid=[steps for steps in GRID if steps <= _most_steps(first)],
        prompt=example[0] if example else "",
        most_letters=parameters.MOST_LETTERS,
        most_seed=streams.MOST_SEED,
        height=height,
        width=width,
        largest=parameters.largest_side(first),
        patch=PATCH,
        guidance=_guidance(networks),
    )


def _guidance(networks: Mapping[str, Pipeline]) -> str:
    """The scales that networks have where none is given; "" where none takes any."""
    scales = {
        name: f"{pipe.config.evaluation.guidance:g}"
        for name, pipe in networks.items()
        if build.takes_guidance(pipe.config)
    }
    if len(set(scales.values())) < 2:
        return next(iter(scales.values()), "")
    return ", ".join(f"{name} {scale}" for name, scale in scales.items())


def _facts(name: str, pipe: Pipeline) -> dict[str, Any]:
    return {
        "steps": parameters.default_steps(name, pipe),
        "most_steps": _most_steps(pipe),
        "guided": build.takes_guidance(pipe.config),
    }


def _most_steps(pipe: Pipeline) -> int:
    schedule = build.without_networks(pipe.config).sampled_by.schedule
    return min(schedule.most_steps, parameters.MOST_STEPS)
