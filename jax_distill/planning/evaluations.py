"""The cost of training in network evaluations: what methods are compared at.

One evaluation is the arithmetic of a forward of the student's network for one example. A step
costs that of the gradients of its players' losses for its batch, teachers and rollouts included;
what optimizers and averages compute beside them counts nothing.
"""

import bisect
import json
import statistics
from collections.abc import Mapping
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from jax_distill import config as configuration
from jax_distill.assembly import build, resolution, stages
from jax_distill.config import ConfigError
from jax_distill.interop import ported_folder
from jax_distill.objectives.methods import FROM_SCRATCH
from jax_distill.objectives.objective import Method
from jax_distill.planning.flops import count_flops
from jax_distill.planning.program import example_flops, run_stages
from jax_distill.training.step import COUNTED, moves_of


class Moves(NamedTuple):
    """The cost of a player's moves, in evaluations.

    Attributes:
      early: of each up to `switch` moves, such as those of a warm-up.
      late: of each that follows.
      switch: zero where all moves cost the same.
    """

    early: float
    late: float
    switch: int

    def of(self, moves: int) -> float:
        """All of the first `moves` together."""
        first = min(moves, self.switch)
        return first * self.early + (moves - first) * self.late


class Costs(NamedTuple):
    """The cost of a run, in evaluations.

    Attributes:
      method: of the run.
      before: of what the student starts from: a time rescale, and other students.
      players: by name.
    """

    method: Method
    before: float
    players: Mapping[str, Moves]

    def at(self, steps: int) -> float:
        """The cost up to a step of the student's own stage, with all before it."""
        moves = moves_of(self.method, steps)
        return self.before + sum(cost.of(moves[name]) for name, cost in self.players.items())

    def a_step(self, steps: int) -> float:
        """The mean over the steps of a run of so many."""
        return (self.at(steps) - self.before) / steps

    def steps_within(self, evaluations: float) -> int:
        """The most steps that a run may take.

        Raises:
          ConfigError: not one.
        """
        least = min(min(cost.early, cost.late) for cost in self.players.values())
        most = int((evaluations - self.before) / least) + 2
        steps = bisect.bisect_right(range(max(most, 1)), evaluations, key=self.at) - 1
        if steps < 1:
            raise ConfigError(
                f"evaluations: {evaluations} are not enough for one step; what comes before it"
                f" takes {self.before:.0f}"
            )
        return steps


def of_run(config: ConfigDict) -> Costs:
    """The costs of a run, with all that its student starts from, each run counted once.

    That is its own time rescale; the run that `start.checkpoint` names; a teacher that is a time
    rescale of its own; and whatever those need in turn.

    Raises:
      ConfigError: the configuration, or one of a run before, cannot be resolved.
    """
    resolved = resolution.resolve(config)
    costs = of_stages(resolved.stages)
    before = sum(_total(of_stages(resolution.resolve(run).stages), run) for run in _needed(config))
    return costs._replace(before=costs.before + before / example_flops(resolved.config))


def summary(config: ConfigDict) -> dict[str, float]:
    """The evaluations of a planned run's last stage a step, and of its stages together."""
    every = run_stages(config)
    costs, steps = of_stages(every), every[-1].config.total_steps
    return {"evaluations_per_step": costs.a_step(steps), "evaluations": costs.at(steps)}


def of_stages(every: list[stages.Stage]) -> Costs:
    """The costs of a run's own stages; the last is the student's."""
    *before, last = every
    spent = sum(_total(of_stages([stage]), stage.config) for stage in before)
    method = build.objective(last.config, last.teacher)
    players = {name: _moves(last, name) for name in method.players}
    return Costs(method, spent / example_flops(last.config), players)


def _total(costs: Costs, config: ConfigDict) -> float:
    """The operations of a whole run."""
    return costs.at(config.total_steps) * example_flops(config)


def _needed(config: ConfigDict) -> list[ConfigDict]:
    """The configurations of the runs whose students or rescaled teachers a run starts from."""
    found: dict[str, ConfigDict] = {}
    waiting = [config]
    while waiting:
        run = waiting.pop()
        for source in (run.start.checkpoint, run.teacher.checkpoint):
            name = resolution.absolute(source)
            if name in ("", resolution.EMBEDDED, *found) or ported_folder.is_ported(name):
                continue
            other = configuration.load(name)
            if other.objective.name not in FROM_SCRATCH:
                found[name] = other
                waiting.append(other)
    return list(found.values())


_KNOWN: dict[tuple, Moves] = {}
"""Costs that were counted: the cells of a study differ in little that costs."""
_FREE = ("name", "seed", "start", "total_steps", "samples", "checkpoint", "evaluation", "log_every")


def _moves(stage: stages.Stage, player: str) -> Moves:
    """The cost of a player's moves, counted once for runs that cost the same."""
    kept = {key: value for key, value in stage.config.to_dict().items() if key not in _FREE}
    teacher = stage.teacher and stage.teacher.to_json_best_effort()
    key = (json.dumps(kept, sort_keys=True, default=str), teacher, stage.adapted, player, COUNTED)
    if key not in _KNOWN:
        _KNOWN[key] = _counted(stage, player)
    return _KNOWN[key]


def _counted(stage: stages.Stage, player: str) -> Moves:
    """The cost of a player's moves, which changes once in a run at most."""
    config, forward = stage.config, example_flops(stage.config)

    def cost(moves: int) -> float:
        every = build.abstract_losses(config, stage.teacher, moves)
        loss, arguments = next((loss, x) for name, loss, x in every if name == player)
        # Where draws decide, as in a rollout of a drawn length, branches are equally likely.
        flops = count_flops(jax.grad(loss), *arguments, undecided=statistics.mean)
        return config.accumulate * flops / forward

    early, late = cost(0), cost(COUNTED)
    if early == late:
        return Moves(early, late, 0)
    switch = bisect.bisect_left(range(COUNTED), True, key=lambda moves: cost(moves) == late)
    return Moves(early, late, switch)
