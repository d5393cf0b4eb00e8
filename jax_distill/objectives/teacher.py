"""The frozen teacher: its velocity, guided in its own way, and its hidden tokens."""

import dataclasses

import jax
import jax.numpy as jnp

from jax_distill.flow import Network, Text, guided_velocity


@dataclasses.dataclass(frozen=True)
class TeacherVelocity:
    """(frozen, x, t, text, guidance) -> velocity (B, N, C); frozen has "teacher" and "null".

    Attributes:
      network: the teacher's own, which may embed time otherwise than the student's.
      guidance: "embedded", "cfg" or "none", see `embedded_guidance` and so on.
    """

    network: Network
    guidance: str

    def __call__(
        self, frozen: dict, x: jax.Array, t: jax.Array, text: Text, guidance: jax.Array
    ) -> jax.Array:
        if self.guidance == "cfg":
            return self.both(frozen, x, t, text, guidance)[0]
        return self.network.velocity(frozen["teacher"], x, t, text, *self._embedded(guidance))

    def both(
        self, frozen: dict, x: jax.Array, t: jax.Array, text: Text, guidance: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The guided velocity, and the conditional one, which is that of scale 1.

        Their difference is what guidance adds: (w - 1) (v_c - v_null) under classifier-free
        guidance, v(w) - v(1) where the scale is embedded, and zero where none is applied. Both come
        from one doubled batch.
        """
        if self.guidance == "none":
            velocity = self(frozen, x, t, text, guidance)
            return velocity, velocity
        other, embedded = text, ()
        if self.guidance == "cfg":
            other = jax.tree.map(lambda n, c: jnp.broadcast_to(n, c.shape), frozen["null"], text)
        else:
            embedded = (jnp.concatenate([guidance, jnp.ones_like(guidance)]),)
        twice = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), (x, t, text), (x, t, other))
        first, second = jnp.split(self.network.velocity(frozen["teacher"], *twice, *embedded), 2)
        if self.guidance == "cfg":
            return guided_velocity(first, second, guidance), first
        return first, second

    def features(
        self,
        frozen: dict,
        x: jax.Array,
        t: jax.Array,
        text: Text,
        guidance: jax.Array,
        *,
        blocks: tuple[int, ...],
    ) -> tuple[jax.Array, ...]:
        """Hidden image tokens (B, N, hidden) after chosen blocks, of these captions alone.

        The scale matters only to a network that embeds it. A gradient reaches x through the
        frozen parameters.
        """
        embedded = self._embedded(guidance)
        return self.network.features(frozen["teacher"], x, t, text, *embedded, blocks=blocks)

    def _embedded(self, guidance: jax.Array) -> tuple[jax.Array, ...]:
        return (guidance,) if self.guidance == "embedded" else ()


def embedded_guidance(network: Network) -> TeacherVelocity:
    """A teacher that takes the guidance scale as an input, such as FLUX.1-dev: one evaluation."""
    return TeacherVelocity(network, "embedded")


def unguided(network: Network) -> TeacherVelocity:
    """A teacher that knows no guidance scale and needs none, such as FLUX.1-schnell."""
    return TeacherVelocity(network, "none")


def classifier_free(network: Network) -> TeacherVelocity:
    """A plain teacher under classifier-free guidance, v_null + w (v_c - v_null): two evaluations.

    Source: Ho & Salimans, arXiv:2207.12598.
    """
    return TeacherVelocity(network, "cfg")
