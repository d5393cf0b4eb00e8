"""Methods of two players: small matrices, and networks such as distribution matching trains.

As a script, one step of every turn on meshes of eight virtual devices beside those on one device:
`python tests/two_players.py 8x1x1,2x2x2 0 dmd2 float64` prints how far states and metrics are
apart, relatively; in double precision what is left would not be rounding.
"""

import dataclasses
import json
import math
import os
import sys
from typing import NamedTuple

if __name__ == "__main__":
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8"
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from regression import small_config
from tiny_runs import STUDENT, random_parameters, settings

from jax_distill import sampling
from jax_distill.assembly import build
from jax_distill.devices import sharding
from jax_distill.flow import Batch, Network, interpolate, path_velocity, per_sample, straight_step
from jax_distill.objectives.methods import KINDS, OBJECTIVES
from jax_distill.objectives.objective import Method, Player
from jax_distill.objectives.settings import positive
from jax_distill.objectives.teacher import TeacherVelocity
from jax_distill.sampling import Restart, Shifted
from jax_distill.training.step import init_state, jit_step, make_optimizers, turns

EVERY = 3  # the student moves at every third step


class Alternating(Method):
    """The second player, "fake", moves at each step; at every third the student moves first."""

    @property
    def players(self):
        return {
            "student": Player(self.student_loss, averaged=True),
            "fake": Player(self.fake_loss, optimizer="fake"),
        }

    def turn(self, step):
        return ("student", "fake") if step % EVERY == EVERY - 1 else ("fake",)


class DuelDraws(NamedTuple):
    noise: jax.Array


@dataclasses.dataclass(frozen=True)
class Duel(Alternating):
    """Each of two matrices is drawn to the data that the other one makes.

    Losses are infinite at the moves in frozen["bad"], by the player.
    """

    follow: float = 0.0  # of the second player, towards the student

    @property
    def players(self):
        players = super().players
        return {**players, "fake": players["fake"]._replace(follows=self.follow)}

    def init(self, key, params):
        first, second = jax.random.split(key)
        return {
            "student": {"network": params},
            "fake": {"network": params, "head": jax.random.normal(second, (8,))},
        }

    def draw(self, key, batch):
        return DuelDraws(jax.random.normal(key, batch.x.shape))

    def _distance(self, own, other, view, batch, draws, moves, name):
        made = batch.x @ own["network"]["kernel"] + own["network"]["bias"]
        wanted = batch.x @ other["network"]["kernel"] + 0.1 * draws.noise
        factor = jnp.where(jnp.any(view.frozen["bad"][name] == moves + 1), jnp.inf, 1.0)
        return factor * jnp.mean(jnp.square(made - wanted)), {"moves": moves}

    def student_loss(self, own, view, batch, draws, moves):
        return self._distance(own, view.nets["fake"], view, batch, draws, moves, "student")

    def fake_loss(self, own, view, batch, draws, moves):
        loss, metrics = self._distance(
            own, view.averages["student"], view, batch, draws, moves, "fake"
        )
        return loss + jnp.mean(jnp.square(own["head"])), metrics


def duel_config(**changes):
    """Twelve steps; the second player has an optimizer of its own."""
    config = small_config()
    with config.unlocked():
        config.optimizer.warmup_steps = 0
        config.optimizers.fake = {"learning_rate": 0.01, "clip_norm": 0.05, "weight_decay": 0.0}
        changes = {key.replace("__", "."): value for key, value in changes.items()}
        config.update_from_flattened_dict(changes)
    return config


def never_bad(student=(), fake=()):
    def steps(bad):
        return jnp.array([*bad, *[0] * (4 - len(bad))])

    return {"bad": {"student": steps(student), "fake": steps(fake)}}


class MatchingDraws(NamedTuple):
    noise: jax.Array  # (B, N, C), where the rollout begins
    renoise: jax.Array  # (steps - 1, B, N, C)
    count: jax.Array  # (), steps of the rollout before the last
    fake_noise: jax.Array  # (B, N, C)
    t: jax.Array  # (B,)
    guidance: jax.Array  # (B,)


@dataclasses.dataclass(frozen=True)
class Matching(Alternating):
    """Distribution matching on rollouts, with heads on features of the frozen teacher.

    The student jumps to data after a drawn number of steps; its gradient is the fake's velocity
    less the teacher's, and the heads'. The fake learns the velocity of what the student makes, and
    its heads to tell that from data.
    """

    name = "matching"
    summary = "A student of a test"
    card_steps = 2

    network: Network
    teacher: TeacherVelocity
    guidance_scale: float = positive(2.0)
    steps: int = positive(3)

    @property
    def sampled_by(self):
        return Restart(Shifted())

    def init(self, key, params):
        width = params["pooled_embedder"]["linear_2"]["bias"].shape[0]
        head = jax.random.normal(key, (width, 1)) / width**0.5
        return {
            "student": {"network": params},
            "fake": {"network": params, "heads": {"kernel": head, "bias": jnp.zeros(1)}},
        }

    def draw(self, key, batch):
        keys = jax.random.split(key, 5)
        shape = batch.x.shape
        return MatchingDraws(
            jax.random.normal(keys[0], shape),
            jax.random.normal(keys[1], (self.steps - 1, *shape)),
            jax.random.randint(keys[2], (), 0, self.steps),
            jax.random.normal(keys[3], shape),
            jax.random.uniform(keys[4], shape[:1], minval=0.1, maxval=0.9),
            jnp.full(shape[:1], self.guidance_scale),
        )

    def motion(self, params, null=None):
        del null

        def jump(x, t, s, text, guidance):
            return straight_step(x, t, s, self.velocity(params, x, t, text, guidance))

        return jump

    def velocity(self, params, x, t, text, guidance):
        return self.network.velocity(params["network"], x, t, text, guidance)

    def made(self, params, batch, draws):
        """Data that the student makes, differentiable in its last step."""
        jump = self.motion(params)
        times = self.sampled_by.schedule.times(self.steps, batch.x.shape[1])
        walk = jax.lax.stop_gradient(params)
        x, t = sampling.rollout(
            self.motion(walk),
            draws.noise,
            times,
            draws.count,
            draws.renoise,
            batch.text,
            draws.guidance,
        )
        return jump(x, t, jnp.zeros_like(t), batch.text, draws.guidance)

    def logits(self, heads, view, x, batch, draws):
        """Real or made, by the heads on features of the frozen teacher."""
        teacher = view.frozen["teacher"]
        x_t = interpolate(x, draws.fake_noise, draws.t)
        features = self.network.features(
            teacher, x_t, draws.t, batch.text, draws.guidance, blocks=(0, 2)
        )
        pooled = sum(jnp.mean(f, axis=1) for f in features)
        return (pooled @ heads["kernel"] + heads["bias"])[:, 0]

    def student_loss(self, own, view, batch, draws, moves):
        del moves
        x = self.made(own, batch, draws)
        x_t = interpolate(jax.lax.stop_gradient(x), draws.fake_noise, draws.t)
        fake = self.velocity(view.nets["fake"], x_t, draws.t, batch.text, draws.guidance)
        real = self.teacher(view.frozen, x_t, draws.t, batch.text, draws.guidance)
        pull = jax.lax.stop_gradient(per_sample(draws.t, x) * (real - fake))
        matched = jnp.mean(jnp.square(x - jax.lax.stop_gradient(x) + pull)) / 2
        logits = self.logits(view.nets["fake"]["heads"], view, x, batch, draws)
        fooled = jnp.mean(jax.nn.softplus(-logits))
        return matched + fooled, {"fooled": fooled}

    def fake_loss(self, own, view, batch, draws, moves):
        del moves
        x = jax.lax.stop_gradient(self.made(view.nets["student"], batch, draws))
        x_t = interpolate(x, draws.fake_noise, draws.t)
        error = self.velocity(own, x_t, draws.t, batch.text, draws.guidance) - path_velocity(
            x, draws.fake_noise
        )
        made, real = (self.logits(own["heads"], view, y, batch, draws) for y in (x, batch.x))
        told = jnp.mean(jax.nn.softplus(made) + jax.nn.softplus(-real))
        return jnp.mean(jnp.square(error)) + told, {"told": told}


def register() -> None:
    """Makes `Matching` known, as a file among the objectives would be."""
    KINDS["matching"] = OBJECTIVES["matching"] = Matching


SIZES = {"attention_head_dim": 8, "num_attention_heads": 4, "axes_dims_rope": (2, 2, 4)}
TEACHER = settings({"name": "time_rescale"}, **SIZES, **STUDENT)


# The settings of a method, and the name of its second player's optimizer.
METHODS = {
    "matching": ({"name": "matching"}, "fake"),
    "dmd2": (
        {"name": "dmd2", "student_every": 3, "gan_weight": 0.5, "gan_blocks": (0, 2)},
        "fake",
    ),
    "rcm": ({"name": "rcm", "scm_steps": 0, "student_every": 2}, "fake"),
    "ladd": ({"name": "ladd", "blocks": (0, 2), "head_width": 16, "r1_weight": 1.0}, "heads"),
}


def matching_config(rank: int = 0, method: str = "matching", **changes):
    objective, second = METHODS[method]
    config = settings(objective, **SIZES, **STUDENT)
    with config.unlocked():
        config.total_steps, config.batch_size = 6, 8
        config.optimizer.epsilon = 1e-4  # Adam's first step is the gradient's sign, else
        config.optimizers[second] = {"learning_rate": 2e-3, "clip_norm": 10.0}
        config.lora.rank = rank
        config.update_from_flattened_dict(changes)
    return config


def prepared(config):
    """The objective, the student's parameters, what is frozen and a batch, all random.

    In the precision of the configuration, as its teacher is.
    """
    of_teacher = TEACHER.copy_and_resolve_references()
    of_teacher.unlock().dtype = config.dtype
    rng = np.random.default_rng(0)
    rows = config.batch_size
    text = jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32),
        build.text_like(config, rows),
    )
    x = rng.standard_normal((rows, *build.token_shape(config))).astype(np.float32)
    teacher = random_parameters(TEACHER, 1)
    frozen = {"teacher": teacher, "null": jax.tree.map(lambda leaf: leaf[:1], text)}
    params = teacher if config.lora.rank else random_parameters(config)
    arrays = cast((params, frozen, Batch(x, text)), config.dtype)
    return build.objective(config, of_teacher), *arrays


def cast(tree, dtype):
    """Its numbers, but whole ones, as another type."""

    def as_type(leaf):
        return jnp.asarray(leaf, dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(as_type, tree)


def take(sizes, config, objective, params, frozen, batch):
    """The state and the metrics after the first step of each turn on a mesh."""
    devices = jax.devices()[: math.prod(sizes)]
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes)), devices)
    optimizers = make_optimizers(objective, config)
    state = cast(init_state(objective, optimizers, params, 0), config.dtype)
    places = sharding.shard_state(state, mesh)
    state = jax.tree.map(jnp.copy, jax.device_put(state, places))
    frozen = sharding.put(frozen, sharding.shard_state(frozen, mesh))
    batch = sharding.shard_batch(batch, mesh)
    metrics = {}
    for turn in turns(objective, config.total_steps):
        step = jit_step(objective, optimizers, config, places, turn)
        program = step.lower(state, frozen, batch).compile({"xla_backend_optimization_level": 0})
        state, found = program(state, frozen, batch)
        metrics |= found
    return jax.device_get((state, metrics))


def apart(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(a), 1e-6))


def main(meshes: str, rank: str, method: str = "matching", dtype: str = "float32") -> None:
    register()
    jax.config.update("jax_enable_x64", dtype == "float64")
    config = matching_config(int(rank), method, dtype=dtype)
    start = config, *prepared(config)
    expected, reference = take((1, 1, 1), *start)
    report = {}
    for name in meshes.split(","):
        state, metrics = take(tuple(map(int, name.split("x"))), *start)
        leaves = jax.tree.leaves_with_path(expected)
        states = {
            jax.tree_util.keystr(path): apart(leaf, other)
            for (path, leaf), other in zip(leaves, jax.tree.leaves(state), strict=True)
        }
        report[name] = {
            "metrics": max(apart(reference[key], metrics[key]) for key in reference),
            "states": max(states.values()),
            "farthest": max(states, key=states.get),
        }
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
