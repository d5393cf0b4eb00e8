"""rCM against its equations, written out in NumPy in its own coordinates, and on a mixture."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_mixture

from jax_distill.flow import Batch, Network
from jax_distill.objectives.objective import View
from jax_distill.objectives.rcm import RCM
from jax_distill.objectives.scm import SCM
from jax_distill.objectives.teacher import TeacherVelocity

ROOT = Path(__file__).parents[1]
SHAPE = 5, 3, 2
TREES = {
    "student": {"a": 0.7, "b": 0.2, "c": 0.05},
    "fake": {"a": 0.4, "b": -0.3, "c": 0.02},
    "teacher": {"a": 0.9, "b": 0.5, "c": 0.3},
}
BOTH, STUDENT, FAKE = ("student", "fake"), ("student",), ("fake",)


def velocity(params, x, t, text=None, guidance=None, interval=None):
    """tanh(a x) + b t + c w, by the element."""
    t, w = (jnp.reshape(value, (-1, 1, 1)) for value in (t, guidance))
    return jnp.tanh(params["a"] * x) + params["b"] * t + params["c"] * w


NETWORK = Network(velocity, lambda *_: None)


def rcm(**settings):
    settings = {"tangent_warmup": 10, "scm_steps": 0, **settings}
    return RCM(NETWORK, TeacherVelocity(NETWORK, "embedded"), **settings)


def given_in(dtype):
    trees = {
        name: {"network": {k: jnp.asarray(v, dtype) for k, v in tree.items()}}
        for name, tree in TREES.items()
    }
    view = View({"teacher": trees.pop("teacher")["network"], "null": None}, trees, {})
    return view, Batch(jax.random.normal(jax.random.key(1), SHAPE, dtype))


@pytest.fixture
def given():
    """(view, batch) in double precision."""
    with jax.enable_x64(True):
        yield given_in(jnp.float64)


class Written:
    """The equations in TrigFlow's angles, of networks of the linear path."""

    def __init__(self, batch, draws, moves, warmup=10):
        self.d = jax.tree.map(lambda x: np.asarray(x, np.float64), draws)
        self.x, self.moves, self.warmup = np.asarray(batch.x, np.float64), moves, warmup

    def network(self, name, z, a):
        p, w, q = TREES[name], self.d.scm.guidance[:, None, None], np.cos(a) + np.sin(a)
        return np.tanh(p["a"] * z / q) + p["b"] * np.sin(a) / q + p["c"] * w

    def data(self, name, z, a):
        return (z - np.sin(a) * self.network(name, z, a)) / (np.cos(a) + np.sin(a))

    def output(self, name, z, a):
        return (np.cos(a) * z - self.data(name, z, a)) / np.sin(a)

    def tangent(self):
        a = self.d.scm.angle[:, None, None]
        c, s, p = np.cos(a), np.sin(a), TREES["student"]
        q, slope = c + s, c - s
        z = c * self.x + s * self.d.scm.noise
        teacher, now = self.output("teacher", z, a), self.output("student", z, a)
        dz, da = c * s * teacher, c * s
        v, x0 = self.network("student", z, a), self.data("student", z, a)
        dv = p["a"] / np.cosh(p["a"] * z / q) ** 2 * (dz / q - z * slope / q**2 * da)
        dv = dv + p["b"] / q**2 * da
        dx0 = (dz - c * v * da - s * dv) / q - x0 * slope / q * da
        change = (-s * z * da + c * dz - dx0) / s - (c * z - x0) * c / s**2 * da
        r = min(1, self.moves / self.warmup)
        pull = c * np.sqrt(1 - r**2 * s**2)
        return -pull * (now - teacher) - r * (c * s * z + change)

    def scm(self):
        """The loss, and its derivative by the student's output."""
        g = self.tangent()
        g = g / (np.sqrt((g**2).sum((1, 2), keepdims=True)) + 0.1)
        return 100 * (g**2).sum((1, 2)).mean(), -200 * g / len(g)

    def rollout(self):
        """The input of the last jump and its angle."""
        x, angle = self.d.rollout.noise, np.full((len(self.x), 1, 1), np.pi / 2)
        for k in range(self.moves % 4):
            made = self.data("student", x, angle)
            drawn = np.arctan(self.d.later[k] / (1 - self.d.later[k]))[:, None, None]
            angle = np.minimum(drawn, angle)
            x = np.cos(angle) * made + np.sin(angle) * self.d.rollout.renoise[k]
        return x, angle

    def scores(self):
        x, angle = self.data("student", *self.rollout()), self.scores_angle()
        return x, np.cos(angle) * x + np.sin(angle) * self.d.noise, angle

    def scores_angle(self):
        return np.arctan(self.d.t / (1 - self.d.t))[:, None, None]

    def gradient(self):
        x, z, angle = self.scores()
        real = self.data("teacher", z, angle)
        mean = np.abs(x - real).mean((1, 2), keepdims=True)
        return (self.data("fake", z, angle) - real) / np.maximum(mean, 1e-5)

    def critic(self):
        x, z, angle = self.scores()
        return ((x - self.data("fake", z, angle)) ** 2 / np.sin(angle) ** 2).sum((1, 2)).mean()


def slopes(z, angle, guidance):
    """Derivatives of the velocity by the student's parameters."""
    q = np.cos(angle) + np.sin(angle)
    return {
        "a": z / q / np.cosh(TREES["student"]["a"] * z / q) ** 2,
        "b": np.sin(angle) / q + 0 * z,
        "c": guidance[:, None, None] + 0 * z,
    }


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("moves", [0, 3, 25])
@pytest.mark.parametrize("kind", ["rcm", "scm"])
def test_the_consistency_loss_is_rcms(dtype, moves, kind):
    """Warm-up, norm, sum and gradient, for SCM with rCM's settings as for RCM itself."""
    with jax.enable_x64(dtype is np.float64):
        view, batch = given_in(dtype)
        objective = rcm()
        draws = jax.tree.map(lambda x: x.astype(dtype), objective.draw(jax.random.key(7), batch))
        if kind == "scm":
            settings = {"data_scale": 1.0, "warmup": "rcm", "weighting": "sum"}
            objective = SCM(
                NETWORK, objective.teacher, drop_nonfinite=True, tangent_warmup=10, **settings
            )
        written = Written(batch, draws, moves)
        loss, by_output = written.scm()
        (value, _), gradient = jax.value_and_grad(objective.loss, has_aux=True)(
            view.nets["student"], view, batch, draws.scm, jnp.asarray(moves)
        )
        tangent = objective.tangent(view.nets["student"], view, batch, draws.scm, moves).tangent
    rtol = 1e-5 if dtype is np.float32 else 1e-9
    np.testing.assert_allclose(tangent, written.tangent(), rtol=rtol, atol=rtol)
    np.testing.assert_allclose(value, loss, rtol=rtol)
    a = written.d.scm.angle[:, None, None]
    z = np.cos(a) * written.x + np.sin(a) * written.d.scm.noise
    for name, slope in slopes(z, a, written.d.scm.guidance).items():
        # F = (cos z - x0) / sin, whose derivative by the velocity is 1 / (cos + sin).
        expected = by_output * slope / (np.cos(a) + np.sin(a))
        scale = np.abs(expected).sum()
        np.testing.assert_allclose(
            gradient["network"][name], expected.sum(), rtol=0, atol=rtol * scale
        )


@pytest.mark.parametrize("moves", [0, 1, 2, 3, 6])
def test_distribution_matching_is_rcms(given, moves):
    """Rollouts of 1 + moves mod 4 jumps, their falling times, the gradient, and a sum's scale."""
    view, batch = given
    objective = rcm()
    draws = objective.draw(jax.random.key(7), batch)
    written = Written(batch, draws, moves)
    x = objective.made(view.nets["student"], batch, draws, moves)
    np.testing.assert_allclose(x, written.scores()[0], atol=1e-10)
    g = written.gradient()
    np.testing.assert_allclose(objective.gradient(x, view, batch, draws), g, atol=1e-9)
    value, gradient = jax.value_and_grad(objective.dmd_loss)(
        view.nets["student"], view, batch, draws, moves
    )
    np.testing.assert_allclose(value, (g**2).sum() / len(g), rtol=1e-8)
    z, angle = written.rollout()
    by_velocity = -2 * g / len(g) * np.sin(angle) / (np.cos(angle) + np.sin(angle))
    for name, slope in slopes(z, angle, written.d.scm.guidance).items():
        expected = (by_velocity * slope).sum()
        np.testing.assert_allclose(gradient["network"][name], expected, rtol=1e-7, atol=1e-10)
    critic = objective.fake_loss(view.nets["fake"], view, batch, draws, moves)[0]
    np.testing.assert_allclose(critic, written.critic(), rtol=1e-8)


def test_the_students_loss_is_the_sum_of_both_after_a_while_of_the_first_alone(given):
    view, batch = given
    objective = rcm(scm_weight=0.3, dmd_weight=2.0, scm_steps=4)
    draws = objective.draw(jax.random.key(7), batch)
    own = view.nets["student"]

    @jax.jit
    def gradients(moves):
        def of(loss):
            return jax.grad(loss)(own)["network"]

        return (
            of(lambda own: objective.student_loss(own, view, batch, draws, moves)[0]),
            of(lambda own: objective.loss(own, view, batch, draws.scm, moves)[0]),
            of(lambda own: objective.dmd_loss(own, view, batch, draws, moves)),
        )

    for moves, weight in ((3, 0.0), (4, 2.0), (5, 2.0)):
        found, scm, dmd = gradients(jnp.asarray(moves))
        for name in found:
            expected = 0.3 * scm[name] + weight * dmd[name]
            np.testing.assert_allclose(found[name], expected, rtol=1e-9)
            assert abs(dmd[name]) > 1e-3


def test_the_first_loss_may_be_the_discrete_one(given):
    view, batch = given
    objective = rcm(discrete_steps=3, scm_weight=2.0)
    draws = objective.draw(jax.random.key(7), batch)
    own = view.nets["student"]
    loss, metrics = objective.student_loss(own, view, batch, draws, jnp.asarray(1))
    discrete = objective.discrete_loss(own, view, batch, draws.scm)[0]
    dmd = objective.dmd_loss(own, view, batch, draws, 1)
    np.testing.assert_allclose(loss, 2 * discrete + dmd, rtol=1e-12)
    assert discrete > 0 and "tangent_norm" not in metrics


def test_without_the_consistency_loss_no_tangent_is_made(given, monkeypatch):
    view, batch = given
    objective = rcm(scm_weight=0.0, scm_steps=100)
    draws = objective.draw(jax.random.key(7), batch)
    monkeypatch.setattr(SCM, "loss", None)
    loss, _ = objective.student_loss(view.nets["student"], view, batch, draws, 2)
    assert loss == objective.dmd_loss(view.nets["student"], view, batch, draws, 2)
    assert objective.turn(0) == STUDENT and objective.turn(1) == FAKE  # no while alone, either


def test_the_student_is_alone_first_and_then_at_every_nth_step():
    objective = rcm(scm_steps=7, student_every=3)
    turns = [objective.turn(step) for step in range(14)]
    assert turns == 7 * [STUDENT] + 2 * [FAKE] + [STUDENT] + 2 * [FAKE] + [STUDENT, FAKE]
    assert rcm(scm_steps=1, student_every=2, cadence="both").turn(2) == BOTH


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_rollouts_times_fall(steps):
    _, batch = given_in(jnp.float32)
    objective = rcm(steps=steps)
    times = objective.rollout_times(objective.draw(jax.random.key(3), batch))
    assert times.shape == (steps + 1, SHAPE[0])
    assert (times[0] == 1).all() and (times[-1] == 0).all() and (jnp.diff(times, axis=0) <= 0).all()
    if steps > 1:
        assert (jnp.ptp(times[1:-1], 1) > 0).all()  # each sample's own
    listed = rcm(steps=steps, restarts="listed")
    times = listed.rollout_times(listed.draw(jax.random.key(3), batch))
    angles = [math.atan(t / (1 - t)) for t in times[1:-1, 2]]
    np.testing.assert_allclose(angles, listed.sample_angles[1:steps], rtol=1e-5)


def test_times_are_uniform_under_the_shift():
    batch = Batch(jnp.zeros((20_000, 1, 1)))
    t = np.asarray(rcm().draw(jax.random.key(0), batch).t)
    uniform = np.sort(t / (5 - 4 * t))
    assert np.abs(uniform - np.linspace(0, 1, len(t))).max() < 0.015


def test_samples_begin_at_the_first_listed_angles():
    schedule = rcm().sampled_by.schedule
    for steps in (1, 2, 4):
        times = np.asarray(schedule.times(steps, 16), np.float64)
        angles = np.arctan2(times, 1 - times)
        wanted = [math.atan(80), 1.5, 1.4, 1.0][:steps]
        np.testing.assert_allclose(angles, [*wanted, 0], rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": 5, "restarts": "listed"}, "objective.steps: rollouts of 5 jumps need as many"),
        ({"sample_angles": (1.5, 1.5)}, "sample_angles: .* is not a list of falling angles"),
        ({"sample_angles": (1.6, 1.5)}, "sample_angles: .* is not a list of falling angles"),
        ({"sample_angles": ()}, "sample_angles: .* is not a list of falling angles"),
    ],
)
def test_settings_that_cannot_be(settings, words):
    with pytest.raises(ValueError, match=words):
        rcm(**settings)


@pytest.mark.slow
def test_on_a_mixture_the_student_comes_to_the_target():
    """Energy distances of one and two steps, before and after (of the mixture itself: 0.001)."""
    objective = RCM(
        toy_mixture.perceptron(),
        toy_mixture.TEACHER,
        guidance_scales=(1.0,),
        angle_mean=-0.5,
        tangent_warmup=50,
        scm_steps=200,
        student_every=2,
        scm_weight=0.01,
    )
    start = toy_mixture.pretrained()
    fake = {"learning_rate": 1e-3, "b1": 0.0}
    players = toy_mixture.train(objective, start, 1000, optimizers={"fake": fake}).players
    assert players["fake"].moves == 400 and players["student"].moves == 600
    before, after = (
        [float(toy_mixture.distance(toy_mixture.drawn(objective, tree, n))) for n in (1, 2)]
        for tree in ({"network": start}, players["student"].ema)
    )
    assert min(before) > 0.5 and max(after) < 0.05, (before, after)
    shares = toy_mixture.shares(toy_mixture.drawn(objective, players["student"].ema, 1))
    np.testing.assert_allclose(shares, toy_mixture.WEIGHTS, atol=0.06)
