"""sCM: the oracle, the equations, and what a step costs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_distill import flow
from jax_distill.flow import Batch, GaussianOracle, Network, Text
from jax_distill.models import mmdit
from jax_distill.objectives import teacher
from jax_distill.objectives.objective import View
from jax_distill.objectives.scm import SCM, SCMDraws
from jax_distill.planning.flops import count_flops

SHAPE = (6, 4, 3)
TEXT = Text(jnp.zeros((6, 2, 5)), jnp.zeros((6, 4)))


def draws_for(shape=SHAPE, dtype=np.float32, seed=0) -> SCMDraws:
    rng = np.random.default_rng(seed)
    return SCMDraws(
        jnp.asarray(rng.uniform(0.05, 1.5, shape[0]), dtype),
        jnp.asarray(rng.standard_normal(shape), dtype),
        jnp.full(shape[0], 4.5, dtype),
    )


def batch_for(shape=SHAPE, dtype=np.float32, seed=1) -> Batch:
    return Batch(jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype), TEXT)


def smooth_network() -> Network:
    """A small nonlinear network whose derivatives are easy to trust."""

    def velocity(params, x, t, text=None, guidance=None, interval=None):
        time = flow.per_sample(t, x)
        return jnp.tanh(x @ params["mix"]) * jnp.cos(3 * time) + params["gain"] * x * time

    def embedding(params, t, text=None, guidance=None):
        return jnp.stack([t, t**2, jnp.ones_like(t)], -1) * params["gain"]

    return Network(velocity, embedding)


def smooth_params(dtype=np.float32) -> dict:
    rng = np.random.default_rng(2)
    network = {
        "mix": jnp.asarray(rng.standard_normal((3, 3)), dtype),
        "gain": jnp.asarray(0.7, dtype),
    }
    head = {"kernel": jnp.asarray([[0.3], [-0.2], [0.1]], dtype), "bias": jnp.zeros(1, dtype)}
    return {"network": network, "logvar": head}


def scm(network: Network, **settings) -> SCM:
    return SCM(network, teacher.embedded_guidance(network), **settings)


@pytest.mark.parametrize("step", [0, 1000, 4000])
def test_tangent_vanishes_on_the_exact_consistency_function(step):
    """With the oracle as teacher, the oracle's own map to data has no tangent at full weight."""
    with jax.enable_x64(True):
        oracle = GaussianOracle(np.array([0.3, -0.5, 1.0]), np.array([0.5, 1.2, 0.8]))
        objective = SCM(
            GaussianOracle.consistency_network(),
            teacher.embedded_guidance(GaussianOracle.network()),
        )
        state = {"network": oracle}, View({"teacher": oracle})
        batch, draws = batch_for(dtype=np.float64), draws_for(dtype=np.float64)
        tangent = objective.tangent(*state, batch, draws, jnp.asarray(step)).tangent
        largest = float(jnp.max(jnp.abs(tangent)))
    if step >= objective.tangent_warmup:
        assert largest <= 1e-10
    else:  # during the warm-up it is not: only the sum of the two terms vanishes
        assert largest > 1e-3


def test_tangent_is_the_derivative_of_the_sampled_data():
    """g = cos(a) df/da along the teacher's flow, f = s_d x_0 by finite differences in float64."""
    with jax.enable_x64(True):
        network, params = smooth_network(), smooth_params(np.float64)
        objective = scm(network)
        oracle = GaussianOracle(0.2, 0.7)
        objective = dataclasses.replace(
            objective, teacher=teacher.embedded_guidance(GaussianOracle.network())
        )
        batch, draws = batch_for(dtype=np.float64), draws_for(dtype=np.float64)
        got = objective.tangent(params, View({"teacher": oracle}), batch, draws, 10**6).tangent

        sigma, a0 = objective.data_scale, flow.per_sample(draws.angle, batch.x)
        y0 = sigma * (jnp.cos(a0) * batch.x + jnp.sin(a0) * draws.noise)

        def data(change):
            """f at angle a + change, y moved along the teacher's exact trajectory."""
            a = draws.angle + change
            t0, t1 = map(flow.trig_to_linear_time, (draws.angle, a))
            x = oracle.flow_map(flow.trig_to_linear(y0, draws.angle, sigma), t0, t1)
            return flow.straight_step(
                x, t1, jnp.zeros_like(t1), network.velocity(params["network"], x, t1)
            )

        h = 1e-4
        slope = (8 * (data(h) - data(-h)) - (data(2 * h) - data(-2 * h))) / (12 * h)
        want = jnp.cos(a0) * sigma * slope
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-9 * float(jnp.abs(want).max()))


def test_loss_is_the_published_formula():
    """Written out again with numpy from the tangent and the output."""
    network, params = smooth_network(), smooth_params()
    objective, batch, draws = scm(network), batch_for(), draws_for()
    view = View({"teacher": smooth_params()["network"]})
    loss, metrics = objective.loss(params, view, batch, draws, jnp.asarray(1000))
    output, g = map(np.asarray, objective.tangent(params, view, batch, draws, 1000))
    norm = np.sqrt((g**2).sum((1, 2)))
    g = g / (norm + 0.1)[:, None, None]
    embedding = np.asarray(network.embedding(params["network"], draws.angle))
    lv = (embedding @ np.asarray(params["logvar"]["kernel"]))[:, 0]
    weight = 1 / (0.5 * np.tan(np.asarray(draws.angle)))
    want = ((weight / np.exp(lv))[:, None, None] * g**2 + lv[:, None, None]).mean()
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    np.testing.assert_allclose(metrics["tangent_norm"], norm.mean(), rtol=1e-5)


def test_gradient_follows_the_tangent():
    """d loss / d F = -2 weight g / size: descending moves F along +g, through nothing else."""
    params, batch, draws = smooth_params(), batch_for(), draws_for()
    view = View({"teacher": smooth_params()["network"]})

    def network_of(offset):
        base = smooth_network()
        return base._replace(velocity=lambda *args, **kw: base.velocity(*args, **kw) + offset)

    def loss(offset):
        objective = SCM(
            network_of(offset), teacher.embedded_guidance(smooth_network()), weighting="sum"
        )
        return objective.loss(params, view, batch, draws, jnp.asarray(10**6))[0]

    objective = SCM(smooth_network(), teacher.embedded_guidance(smooth_network()))
    g = objective.tangent(params, view, batch, draws, 10**6).tangent
    g = g / (jnp.sqrt(jnp.sum(g**2, (1, 2), keepdims=True)) + 0.1)
    radius = 1 / (jnp.sin(draws.angle) + jnp.cos(draws.angle))
    want = -200 / SHAPE[0] * g * flow.per_sample(radius, g)  # F = ... + rho v
    np.testing.assert_allclose(jax.grad(loss)(jnp.zeros(SHAPE)), want, rtol=2e-4, atol=1e-5)


def test_rcm_warmup_joins_scm_at_full_weight():
    params, batch, draws = smooth_params(), batch_for(), draws_for()
    view = View({"teacher": GaussianOracle(0.2, 0.7)})
    velocity = teacher.embedded_guidance(GaussianOracle.network())
    plain, rcm = (SCM(smooth_network(), velocity, warmup=kind) for kind in ("scm", "rcm"))

    def tangent(objective, step):
        return objective.tangent(params, view, batch, draws, step).tangent

    np.testing.assert_allclose(tangent(plain, 4000), tangent(rcm, 4000), atol=1e-5)
    # At step 0 nothing is left of the derivative, only the pull towards the teacher.
    ratio = tangent(plain, 0) / tangent(rcm, 0)
    cos = flow.per_sample(jnp.cos(draws.angle), ratio)
    np.testing.assert_allclose(ratio, jnp.broadcast_to(cos, SHAPE), rtol=1e-3)
    # Half way, r = 1/2.
    pull = jnp.sqrt(1 - (1 - cos**2) / 4) / cos - 1
    moved = tangent(rcm, 2000) - tangent(plain, 2000)
    np.testing.assert_allclose(moved, pull * tangent(plain, 0), rtol=1e-3, atol=1e-4)


def overflowing_network() -> Network:
    """Infinite where x or pooled is large, not a number where the sequence is."""

    def velocity(params, x, t, text=None, guidance=None, interval=None):
        scale = params["gain"] * jnp.exp(params["gain"] * text.pooled.mean(1))
        time = flow.per_sample(t, x)
        out = jnp.exp(x @ params["mix"]) * jnp.cos(3 * time) * flow.per_sample(scale, x)
        return out + flow.per_sample(
            jnp.sin(jnp.exp(params["gain"] * text.sequence.max((1, 2)))), x
        )

    def embedding(params, t, text=None, guidance=None):
        return jnp.stack([t, t**2, jnp.exp(params["gain"] * text.pooled.mean(1))], -1)

    return Network(velocity, embedding)


def spoilt(batch: Batch, row: int, where: str, value: float) -> Batch:
    leaves = {"x": batch.x, **batch.text._asdict()}
    if where in leaves:
        leaves[where] = leaves[where].at[row].set(value)
    x = leaves.pop("x")
    return Batch(x, Text(**leaves))


@pytest.mark.parametrize("weighting", ["learned", "sum"])
@pytest.mark.parametrize(
    ("where", "value"),
    [("x", 1e3), ("sequence", 1e3), ("pooled", 1e3), ("x", np.nan), ("teacher", np.nan)]
    + [("teacher", np.inf), ("teacher", 1e30)],
)
def test_a_dropped_sample_leaves_no_trace_in_loss_and_gradient(where, value, weighting):
    """Whether student or teacher is not finite there: all is as of the batch without it."""
    params, draws, step = smooth_params(), draws_for(), jnp.asarray(4000)
    row, rest = 2, jnp.asarray([0, 1, 3, 4, 5])
    batch = spoilt(batch_for(), row, where, value)

    def gradient(spoil, batch, draws):
        def velocity(frozen, x, t, text, guidance):
            return jnp.where(flow.per_sample(spoil, x), value, x)

        objective = SCM(overflowing_network(), velocity, weighting=weighting, drop_nonfinite=True)
        function = jax.value_and_grad(objective.loss, has_aux=True)
        return function(params, View({}), batch, draws, step)

    spoil = jnp.arange(SHAPE[0]) == (row if where == "teacher" else -1)
    (loss, metrics), found = gradient(spoil, batch, draws)
    alone = jax.tree.map(lambda leaf: leaf[rest], (spoil, batch, draws))
    (expected_loss, expected_metrics), expected = gradient(*alone)
    assert metrics["dropped_samples"] == 1 and expected_metrics["dropped_samples"] == 0
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    np.testing.assert_allclose(metrics["tangent_norm"], expected_metrics["tangent_norm"], rtol=1e-6)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.isfinite(b).all()
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * np.abs(b).max())


def test_where_nothing_is_dropped_the_option_changes_nothing():
    params, batch, draws = smooth_params(), batch_for(), draws_for()
    view = View({"teacher": smooth_params()["network"]})
    (loss, _), gradient = jax.value_and_grad(scm(smooth_network()).loss, has_aux=True)(
        params, view, batch, draws, jnp.asarray(4000)
    )
    (dropping, _), same = jax.value_and_grad(
        scm(smooth_network(), drop_nonfinite=True).loss, has_aux=True
    )(params, view, batch, draws, jnp.asarray(4000))
    np.testing.assert_allclose(dropping, loss, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("drop", [True, False])
def test_the_loss_tells_where_no_sample_is_left_or_none_may_be_dropped(drop):
    objective = SCM(
        smooth_network(), lambda frozen, x, t, text, w: x * jnp.nan, drop_nonfinite=drop
    )
    loss, metrics = objective.loss(
        smooth_params(), View({}), batch_for(), draws_for(), jnp.asarray(0)
    )
    assert jnp.isnan(loss) and metrics["dropped_samples"] == (SHAPE[0] if drop else 0)


def test_finite_differences_come_to_the_derivative():
    """Their error is O(h): halved where h is."""
    with jax.enable_x64(True):
        params = smooth_params(np.float64)
        batch, draws = batch_for(dtype=np.float64), draws_for(dtype=np.float64)
        view = View({"teacher": smooth_params(np.float64)["network"]})
        view.frozen["teacher"]["gain"] = jnp.asarray(-0.4)

        def tangent(**settings):
            objective = scm(smooth_network(), data_scale=0.7, **settings)
            return objective.tangent(params, view, batch, draws, 10**6)

        exact = tangent()
        for kind in ("difference", "mixed"):
            found = [tangent(derivative=kind, difference=h) for h in (2e-3, 1e-3)]
            first, second = (jnp.abs(near.tangent - exact.tangent).max() for near in found)
            assert 1e-4 < first < 3e-2
            np.testing.assert_allclose(first / second, 2, rtol=0.02)
            assert (found[0].output == exact.output).all()


def test_a_difference_needs_no_forward_mode():
    """All of a loss by "difference" can be had of a network without a rule for it."""

    @jax.custom_vjp
    def opaque(x):
        return jnp.sin(x)

    opaque.defvjp(lambda x: (jnp.sin(x), x), lambda x, slope: (slope * jnp.cos(x),))

    def velocity(params, x, t, text=None, guidance=None, interval=None):
        return opaque(params["gain"] * x) * flow.per_sample(t, x)

    def gradient(**settings):
        objective = scm(Network(velocity, smooth_network().embedding), weighting="sum", **settings)
        view = View({"teacher": smooth_params()["network"]})
        args = smooth_params(), view, batch_for(), draws_for(), jnp.asarray(0)
        return jax.grad(lambda *inputs: objective.loss(*inputs)[0])(*args)

    for settings in ({"derivative": "difference"}, {"discrete_steps": 3}):
        assert jnp.isfinite(gradient(**settings)["network"]["gain"])
    with pytest.raises((NotImplementedError, TypeError)):
        gradient()


@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_the_discrete_loss_of_a_known_student(scale):
    """The teacher of standard normal data stands still, so that z is the same after n steps.

    The exact student of N(m, 1) predicts z + (1 - cos a) m there.
    """
    with jax.enable_x64(True):
        teacher_, student = GaussianOracle(0.0, 1.0), GaussianOracle(0.6, 1.0)
        objective = SCM(
            GaussianOracle.consistency_network(),
            teacher.embedded_guidance(GaussianOracle.network()),
            discrete_steps=5,
            data_scale=scale,
        )
        batch = batch_for(dtype=np.float64)
        draws = objective.draw(jax.random.key(0), batch)
        loss, metrics = objective.loss(
            {"network": student}, View({"teacher": teacher_}), batch, draws, 0
        )
        first = np.asarray(draws.angle)
        t = np.tan(first) / (1 + np.tan(first))
        even = t / (5 - 4 * t)
        last = 5 * (even - 5 / 48) / (1 + 4 * (even - 5 / 48))
        last = np.arctan2(last, 1 - last)
        assert (last < first).all() and (last >= 0).all()
        expected = 12 * (0.6 * (np.cos(last) - np.cos(first))) ** 2
        np.testing.assert_allclose(loss, expected.mean(), rtol=1e-5)  # angles are drawn in float32
        assert metrics["dropped_samples"] == 0


def test_the_discrete_loss_holds_the_target_and_drops_what_is_not_finite():
    params, view = smooth_params(), View({"teacher": smooth_params()["network"]})
    objective = scm(smooth_network(), discrete_steps=4, drop_nonfinite=True)
    batch = batch_for()
    draws = objective.draw(jax.random.key(1), batch)
    target = objective.discrete_target(params, view, batch, draws)

    def fixed(params, rows=slice(None)):
        t = flow.trig_to_linear_time(draws.angle)
        x_t = flow.interpolate(batch.x, draws.noise, t)
        jump = objective.motion(params)
        data = jump(x_t, t, jnp.zeros_like(t), batch.text, draws.guidance)
        return jnp.mean(jnp.sum((data - target)[rows] ** 2, (1, 2)))

    def gradient(batch):
        return jax.value_and_grad(objective.loss, has_aux=True)(params, view, batch, draws, 0)

    kept = jnp.asarray([0, 1, 3, 4, 5])
    for given, rows in ((batch, slice(None)), (spoilt(batch, 2, "x", np.nan), kept)):
        (loss, metrics), found = gradient(given)
        wanted, expected = jax.value_and_grad(fixed)(params, rows)
        assert metrics["dropped_samples"] == (rows is kept)
        np.testing.assert_allclose(loss, wanted, rtol=1e-5)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_differences_in_bfloat16_are_warned_of():
    for settings, words in (
        ({"derivative": "difference"}, "set objective.derivative=jvp or dtype=float32"),
        ({"derivative": "jvp"}, ""),
        ({"derivative": "mixed", "discrete_steps": 2}, ""),
    ):
        found = list(scm(smooth_network(), **settings).check_run("bfloat16"))
        assert len(found) == bool(words) and all(words in text for text in found)
        assert not list(scm(smooth_network(), **settings).check_run("float32"))


@pytest.mark.parametrize("field", ["warmup", "weighting", "derivative"])
def test_unknown_option_is_named(field):
    with pytest.raises(ValueError, match=f"objective.{field}: 'x' is not one of"):
        scm(smooth_network(), **{field: "x"})


def test_flow_map_reaches_the_oracles_data_in_one_step():
    with jax.enable_x64(True):
        oracle = GaussianOracle(0.3, 0.6)
        objective = SCM(GaussianOracle.consistency_network(), None)
        noise = jax.random.normal(jax.random.key(0), (5, 4, 3), jnp.float64)
        got = objective.sample({"network": oracle}, noise, None, None, None, jax.random.key(1), 1)
        want = oracle.flow_map(noise, jnp.ones(5), jnp.zeros(5))
        np.testing.assert_allclose(got, want, atol=1e-12)


def test_a_step_spends_one_student_forward_less_than_computing_the_output_apart():
    config = mmdit.MMDiTConfig(
        in_channels=8,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=6,
        pooled_projection_dim=5,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )
    network = mmdit.as_network(config)
    shape = (2, 4, 8)
    text = Text(jnp.zeros((2, 3, 6)), jnp.zeros((2, 5)))
    batch, draws = Batch(jnp.zeros(shape), text), draws_for(shape)
    params = jax.eval_shape(lambda: mmdit.initial_parameters(config, nnx.Rngs(0)))
    objective = SCM(network, teacher.embedded_guidance(network), weighting="sum")
    step = jnp.asarray(0)

    def gradient(loss):
        return jax.grad(
            lambda p, f: loss({"network": p}, View({"teacher": f}), batch, draws, step)[0]
        )

    def apart(*args):
        """The same loss with the output from a forward of its own beside the jvp."""
        loss, metrics = objective.loss(*args)
        t = flow.trig_to_linear_time(draws.angle)
        x = flow.interpolate(batch.x, draws.noise, t)
        own = network.velocity(args[0]["network"], x, t, text, draws.guidance)
        return loss + jnp.mean(own), metrics

    def forward(p):
        return network.velocity(p, batch.x, draws.angle, text, draws.guidance)

    one = count_flops(forward, params)
    ours = count_flops(gradient(objective.loss), params, params)
    embedding = count_flops(
        lambda p: network.embedding(p, draws.angle, text, draws.guidance), params
    )
    # teacher 1 + student 1 + tangent 1 + backward 2; what does not depend on x has fewer terms.
    assert ours == pytest.approx(5 * one, rel=0.12)
    assert embedding < one
    separate = count_flops(gradient(apart), params, params)
    assert separate - ours >= one
