"""The teacher's velocity, the one thing that every distillation asks of it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jax_distill.flow import Network, Text, guided_velocity

TeacherVelocity = Callable[..., jax.Array]
"""(frozen, x, t, text, guidance) -> velocity (B, N, C); frozen has "teacher" and "null"."""


def embedded_guidance(network: Network) -> TeacherVelocity:
    """A teacher that takes the guidance scale as an input, such as FLUX.1-dev: one evaluation."""

    def velocity(frozen, x, t, text, guidance):
        return network.velocity(frozen["teacher"], x, t, text, guidance)

    return velocity


def unguided(network: Network) -> TeacherVelocity:
    """A teacher that knows no guidance scale and needs none, such as FLUX.1-schnell."""

    def velocity(frozen, x, t, text, guidance):
        del guidance
        return network.velocity(frozen["teacher"], x, t, text)

    return velocity


def classifier_free(network: Network) -> TeacherVelocity:
    """A plain teacher under classifier-free guidance, v_null + w (v_c - v_null): two evaluations.

    Source: Ho & Salimans, arXiv:2207.12598.
    """

    def velocity(frozen, x, t, text, guidance):
        return guided(network, frozen["teacher"], x, t, text, frozen["null"], guidance)

    return velocity


def guided(
    network: Network,
    params: dict,
    x: jax.Array,
    t: jax.Array,
    text: Text,
    null: Text,
    guidance: jax.Array,
) -> jax.Array:
    """The guided velocity of a plain network, captions and null captions in one doubled batch."""
    empty = jax.tree.map(lambda n, c: jnp.broadcast_to(n, c.shape), null, text)
    both = jax.tree.map(lambda c, n: jnp.concatenate([c, n]), text, empty)
    velocity = network.velocity(params, jnp.concatenate([x, x]), jnp.concatenate([t, t]), both)
    conditional, unconditional = jnp.split(velocity, 2)
    return guided_velocity(conditional, unconditional, guidance)
