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
        guided=any(map(build.takes_guidance, (pipe.config for pipe in networks.values()))),
        guidance=first.config.evaluation.guidance,
    )


def _facts(name: str, pipe: Pipeline) -> dict[str, Any]:
    return {
        "steps": parameters.default_steps(name, pipe),
        "most_steps": _most_steps(pipe),
        "guided": build.takes_guidance(pipe.config),
    }


def _most_steps(pipe: Pipeline) -> int:
    schedule = build.without_networks(pipe.config).sampled_by.schedule
    return min(schedule.most_steps, parameters.MOST_STEPS)
