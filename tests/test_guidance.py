"""How teachers are guided: by an input, by classifier-free guidance, or not at all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import random_parameters, settings

from jax_distill import flow, pipeline
from jax_distill.assembly import build, draw_settings, resolution
from jax_distill.config import ConfigError
from jax_distill.flow import Text

KINDS = {"embedded": True, "cfg": False, "none": False}


def teacher(world: str, guidance: str = "auto", **model):
    config = settings({"name": "flow_matching", "time_shift": 0.0}, **model)
    with config.unlocked():
        config.world, config.teacher.guidance = world, guidance
        config.data.resolution = (64, 64)
    return config


@pytest.mark.parametrize("world", ["shapes", "flux"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_says_how_it_is_guided(world, kind):
    config = teacher(world, kind, guidance_embeds=KINDS[kind])
    assert build.guidance_of(config) == kind
    assert build.needs_null(config) == (kind == "cfg")


@pytest.mark.parametrize("world", ["shapes", "flux"])
def test_where_nothing_is_said_the_network_and_its_world_decide(world):
    assert build.guidance_of(teacher(world, guidance_embeds=True)) == "embedded"
    assert build.guidance_of(teacher(world)) == {"shapes": "cfg", "flux": "none"}[world]


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_that_cannot_is_refused(kind):
    config = teacher("flux", kind, guidance_embeds=not KINDS[kind])
    with pytest.raises(ConfigError, match=f"^teacher.guidance: '{kind}', but .*; set it to "):
        build.guidance_of(config)


def test_the_students_setting_is_its_teachers():
    config, plain = teacher("flux", "cfg"), teacher("flux")
    assert build.guidance_of(resolution.as_teacher(config, plain)) == "cfg"
    assert build.guidance_of(resolution.as_teacher(teacher("flux"), plain)) == "none"
    for asked in ("cfg", "none"):
        rescaled = settings({"name": "time_rescale"}, guidance_embeds=True)
        with pytest.raises(ConfigError, match="has an input for the guidance scale; set it to emb"):
            resolution.as_teacher(teacher("shapes", asked), rescaled)
    # What a rescaled network learned from is not how it is guided itself.
    rescaled = settings({"name": "time_rescale"}, guidance_embeds=True)
    with rescaled.unlocked():
        rescaled.teacher.guidance = "cfg"
    assert build.guidance_of(rescaled) == "embedded"


@pytest.mark.parametrize("kind", KINDS)
def test_velocities_in_fluxs_world_are_guided_as_said(kind):
    """With the null caption of the data, no text encoder at hand."""
    config = teacher("flux", kind, guidance_embeds=KINDS[kind])
    params = random_parameters(config)
    network = build.network(config)
    keys = jax.random.split(jax.random.key(0), 4)
    width, pooled = config.model.joint_attention_dim, config.model.pooled_projection_dim
    x, t, w = jax.random.normal(keys[0], (2, 16, 64)), jnp.array([0.2, 0.8]), jnp.array([3.0, 5.0])
    text, null = (
        Text(jax.random.normal(key, (n, 3, width)), jax.random.normal(key, (n, pooled)))
        for key, n in ((keys[1], 2), (keys[2], 1))
    )
    found = build.teacher_velocity(config)({"teacher": params, "null": null}, x, t, text, w)
    if kind == "embedded":
        expected = network.velocity(params, x, t, text, w)
    else:
        expected = network.velocity(params, x, t, text)
    if kind == "cfg":
        empty = jax.tree.map(lambda n, c: jnp.broadcast_to(n, c.shape), null, text)
        expected = flow.guided_velocity(expected, network.velocity(params, x, t, empty), w)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    # From one batch: what guidance adds is the difference to the conditional velocity.
    one = (jnp.ones(2),) if kind == "embedded" else ()
    asked = build.teacher_velocity(config)
    guided, conditional = asked.both({"teacher": params, "null": null}, x, t, text, w)
    np.testing.assert_allclose(guided, found, atol=2e-5)
    np.testing.assert_allclose(conditional, network.velocity(params, x, t, text, *one), atol=2e-5)
    hidden = asked.features({"teacher": params}, x, t, text, w, blocks=(1, 0))
    scale = (w,) if kind == "embedded" else ()
    expected = network.features(params, x, t, text, *scale, blocks=(1, 0))
    jax.tree.map(np.testing.assert_array_equal, hidden, expected)


def test_a_guided_teacher_of_fluxs_world_draws_away_from_the_null_caption(monkeypatch):
    """Its pictures with scale 1 are the unguided ones; with another they are not."""
    config, plain = teacher("flux", "cfg"), teacher("flux", "none")
    params = {"network": random_parameters(config)}
    width, pooled = config.model.joint_attention_dim, config.model.pooled_projection_dim
    text = Text(np.ones((2, 3, width), np.float32), np.ones((2, pooled), np.float32))
    null = Text(-text.sequence[:1], -text.pooled[:1])
    guided, unguided = pipeline.Pipeline(config, params), pipeline.Pipeline(plain, params)
    monkeypatch.setattr(type(guided.world), "null", null)
    drawn = {scale: guided.latents(text, steps=1, guidance=scale) for scale in (1.0, 3.0)}
    np.testing.assert_allclose(drawn[1.0], unguided.latents(text, steps=1), atol=2e-5)
    assert np.abs(drawn[3.0] - drawn[1.0]).max() > 1e-3


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.5, float("nan")])
def test_guidance_of_a_network_that_takes_none_is_refused(scale):
    """Also a scale that would mean none elsewhere; that of a configuration is nobody's wish."""
    config = teacher("flux", "none")
    pipe = pipeline.Pipeline(config, lambda: pytest.fail("the network is read"))
    text = Text(np.ones((1, 3, 8), np.float32), np.ones((1, 8), np.float32))
    for draw in (pipe.draw, pipe.latents):
        with pytest.raises(ValueError, match="^guidance: .* the network of 'tiny' takes no guid"):
            draw(text, steps=1, guidance=scale)
    with pytest.raises(ValueError, match="^guidance: "):
        pipe("a fox", guidance=scale)
    assert draw_settings.guidance(None, config) == config.evaluation.guidance
