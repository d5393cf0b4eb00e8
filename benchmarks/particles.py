"""What a critic of a student is worth: its samples themselves are moved, then the network.

    python benchmarks/particles.py --student=WORKDIR [--steps=1] [--prompts=300] [--draws=4]
        [--critic_steps=200] [--moves=10] [--size=0.1] [--low=0.3 --high=0.8]
        [--updates=10] [--optimizer=muon] [--learning_rate=3e-4] [--batch_size=64]

A fake score, which begins as the student, learns the student's samples for some steps. Then:

1. The samples of held-out prompts descend along the gradient of distribution matching, in moves of
   a size, and are scored after each; the fake score stays. Beside that, of the gradient at the
   samples: the cosine of two independent means of 16 draws, that of one draw with their mean, and
   the share of its square that all samples have in common.
2. The student's network makes some updates by that fake score, on captions of training. Of what
   they do to the held-out samples: the cosine with the descent, with and without the mean over the
   samples, the share of that mean (the drift), and the score.

Figures from before this was a tool, which it has not repeated yet: the default student of
configs/scm.py goes from 0.40 to 0.67 in ten moves, so the direction is right.
The network's change has a cosine of 0.17 (Muon, 3e-4) to 0.19 (AdamW, 3e-5) with it, for batches
of 64 and of 256 alike: that is no noise of the gradient but the tangent kernel of the network,
which amplifies what samples have in common. `ratio` is the score after the moves over that before.
"""

import importlib.util
import json
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict

from jax_distill.assembly import build
from jax_distill.config import load, overrides
from jax_distill.data.loader import batches
from jax_distill.evaluation import scoring
from jax_distill.evaluation.benchmarks import shapes
from jax_distill.flow import Batch
from jax_distill.objectives.dmd2 import DMD2, Made
from jax_distill.objectives.matching import FAKE
from jax_distill.objectives.objective import STUDENT, View
from jax_distill.runs import experiment
from jax_distill.training.step import init_state, make_optimizers, make_step
from jax_distill.worlds import World

_STUDENT = flags.DEFINE_string("student", None, "A workdir of jax_distill.main.", required=True)
_STEPS = flags.DEFINE_integer("steps", 1, "Of the student's sampler.", 1)
_PROMPTS = flags.DEFINE_integer("prompts", 300, "Held-out captions.", 2)
_DRAWS = flags.DEFINE_integer("draws", 4, "Of the gradient, for a move.", 1)
_CRITIC_STEPS = flags.DEFINE_integer("critic_steps", 200, "Of the fake score.", 0)
_MOVES = flags.DEFINE_integer("moves", 10, "Of the samples.", 0)
_SIZE = flags.DEFINE_float("size", 0.1, "Of a move, in gradients.")
_LOW = flags.DEFINE_float("low", 0.3, "The least time of the scores.", 0, 1)
_HIGH = flags.DEFINE_float("high", 0.8, "The largest.", 0, 1)
_GUIDANCE = flags.DEFINE_float("guidance", 2.5, "Scale of the teacher and the student.")
_UPDATES = flags.DEFINE_integer("updates", 10, "Of the network; 0: none.", 0)
_OPTIMIZER = flags.DEFINE_enum("optimizer", "muon", ["muon", "adamw"], "Of the student.")
_RATE = flags.DEFINE_float("learning_rate", 3e-4, "Of the student.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Of both players.", 1)

CONFIG = Path(__file__).parents[1] / "configs" / "dmd2.py"
CONVERGED = 16  # draws in each of the two means


def configuration(student: ConfigDict) -> ConfigDict:
    """That of configs/dmd2.py for a run that starts from the student, with the flags' settings."""
    spec = importlib.util.spec_from_file_location("dmd2_config", CONFIG)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config().copy_and_resolve_references().unlock()
    config.start.checkpoint = _STUDENT.value
    config.teacher.checkpoint = student.teacher.checkpoint
    config.model, config.batch_size = student.model.to_dict(), _BATCH_SIZE.value
    config.total_steps = 2 * max(_CRITIC_STEPS.value, _UPDATES.value, 1)  # the players alternate
    config.objective = build.objective_settings(
        "dmd2",
        steps=_STEPS.value,
        guidance_scales=(_GUIDANCE.value,),
        time_shift=0.0,
        score_from=_LOW.value,
        score_to=_HIGH.value,
        student_every=2,
    )
    fake = {"name": "adamw", "learning_rate": 1e-3, "schedule": "cosine"}
    config.optimizers.fake = overrides(config.optimizer, **fake)
    config.optimizer.name, config.optimizer.learning_rate = _OPTIMIZER.value, _RATE.value
    config.optimizer.schedule, config.optimizer.warmup_steps = "constant", 0
    config.data.examples = max(2048, _BATCH_SIZE.value)
    return config


def length(x: jax.Array) -> float:
    return float(jnp.sqrt(jnp.mean(jnp.square(x))))


def cosine(a: jax.Array, b: jax.Array) -> float:
    return float(jnp.mean(a * b)) / max(length(a) * length(b), 1e-30)


def common(x: jax.Array) -> float:
    """The share of the square of x (B, ...) that its mean over B has."""
    return (length(jnp.mean(x, 0)) / max(length(x), 1e-30)) ** 2


def own(x: jax.Array) -> jax.Array:
    return x - jnp.mean(x, 0)


class HeldOut:
    """Held-out prompts: a student's samples of them, their scores and gradients."""

    def __init__(self, method: DMD2, config: ConfigDict, world: World, frozen: dict):
        self._method, self._world, self._frozen = method, world, frozen
        self._prompts = scoring.held_out(_PROMPTS.value)
        text = world.encode([prompt.caption for prompt in self._prompts])
        self._shape = (len(self._prompts), *build.token_shape(config))
        self._batch = Batch(jnp.zeros(self._shape), jax.tree.map(jnp.asarray, text))
        self.samples, self._gradient = jax.jit(self._sampled), jax.jit(self._one)

    def _sampled(self, params: dict) -> jax.Array:
        """Of a tree, always from the same noise: (B, N, C)."""
        key_noise, key = jax.random.split(jax.random.key(5))
        noise = jax.random.normal(key_noise, self._shape)
        guidance = jnp.full(len(noise), _GUIDANCE.value)
        text, null = self._batch.text, self._frozen["null"]
        return self._method.sample(params, noise, text, null, guidance, key, _STEPS.value)

    def _one(self, x: jax.Array, fake: dict, key: jax.Array) -> jax.Array:
        draws = self._method.draw(key, self._batch)
        made = Made(x, jnp.ones(len(x)))
        return self._method.gradient(made, View(self._frozen, {FAKE: fake}), self._batch, draws)

    def gradient(self, x: jax.Array, fake: dict, seed: int, draws: int) -> jax.Array:
        """The mean of some draws of the gradient at x (B, N, C)."""
        keys = jax.random.split(jax.random.key(seed), draws)
        return sum(self._gradient(x, fake, key) for key in keys) / draws

    def score(self, x: jax.Array) -> float:
        pictures = self._world.codec.decode(np.asarray(x), *self._world.resolution)
        return round(shapes.score(pictures, self._prompts)["score"], 3)


def moved(held_out: HeldOut, x: jax.Array, fake: dict) -> list[float]:
    """Scores of the samples before the moves and after each."""
    scores = [held_out.score(x)]
    for move in range(_MOVES.value):
        x = x - _SIZE.value * held_out.gradient(x, fake, 100 + move, _DRAWS.value)
        scores.append(held_out.score(x))
        print(f"move {move + 1:3}: score {scores[-1]:.3f}", file=sys.stderr, flush=True)
    return scores


def main(argv):
    del argv
    config = configuration(load(Path(_STUDENT.value)))
    (config, _, (stage,)), teacher = experiment.with_teacher(config)
    frozen = {"teacher": teacher.params["network"], "null": teacher.world.null}
    frozen = jax.tree.map(jnp.asarray, frozen)
    method = build.objective(config, stage.teacher)
    optimizers = make_optimizers(method, config)
    network = experiment.started_network(config, teacher)()
    state = init_state(method, optimizers, network, config.seed)
    state = jax.tree.map(jnp.array, state)  # the players' own arrays, which steps give away
    with tempfile.TemporaryDirectory() as folder:
        source = teacher.world.source(Path(folder))
        stream = batches(source, config.batch_size, config.seed)
        learn, update = (
            jax.jit(make_step(method, optimizers, config, (player,)), donate_argnums=0)
            for player in (FAKE, STUDENT)
        )
        losses = []
        for _ in range(_CRITIC_STEPS.value):
            state, metrics = learn(state, frozen, next(stream))
            losses.append(float(metrics["fake/loss"]))
        held_out = HeldOut(method, config, teacher.world, frozen)
        fake = jax.tree.map(jnp.copy, state.players[FAKE].params)
        x = held_out.samples(state.players[STUDENT].params)
        first, second = (held_out.gradient(x, fake, seed, CONVERGED) for seed in (0, 9))
        descent = -(first + second) / 2
        found = {
            "cosine_of_halves": cosine(first, second),
            "cosine_of_a_draw": cosine(held_out.gradient(x, fake, 77, 1), -descent),
            "common_share": common(descent),
        }
        scores = moved(held_out, x, fake)
        updates = []
        for number in range(1, _UPDATES.value + 1):
            state, _ = update(state, frozen, next(stream))
            if number in (1, 3, _UPDATES.value):
                now = held_out.samples(state.players[STUDENT].params)
                change = now - x
                line = {
                    "updates": number,
                    "cosine": cosine(change, descent),
                    "own_cosine": cosine(own(change), own(descent)),
                    "length": length(change),
                    "drift": common(change),
                    "score": held_out.score(now),
                }
                updates.append(rounded(line))
                print(f"network: {updates[-1]}", file=sys.stderr, flush=True)
    line = {
        "benchmark": "particles",
        "ratio": scores[-1] / max(scores[0], 1e-9),
        "reference": "the score of the samples before they are moved",
        "scores": scores,
        **found,
        "updates": updates,
        "optimizer": _OPTIMIZER.value,
        "learning_rate": _RATE.value,
        "batch_size": config.batch_size,
        "critic_steps": _CRITIC_STEPS.value,
        "critic_loss": float(np.mean(losses[-50:])) if losses else None,
        "steps": _STEPS.value,
        "device": jax.devices()[0].device_kind,
    }
    print(json.dumps(rounded(line)))


def rounded(line: dict) -> dict:
    return {key: round(x, 4) if isinstance(x, float) else x for key, x in line.items()}


if __name__ == "__main__":
    app.run(main)
