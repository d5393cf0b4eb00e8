"""The kernel and the weight by which IMM matches moments, arXiv:2503.07565."""

import jax
import jax.numpy as jnp

TINY = 1e-8  # smallest distance in the kernel


def laplace_kernel(a: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
    """exp(-max(|a_i - b_j|_2, 1e-8) / (D scale)) for all pairs of a group.

    Args:
      a: (G, M, D), M particles in each of G groups.
      b: (G, M, D).
      scale: (G,), |c_out|.

    Returns:
      (G, M, M). Its derivative by a is zero where two particles agree.
    """
    difference = a[:, :, None] - b[:, None]
    square = jnp.sum(jnp.square(difference), -1)
    distance = jnp.sqrt(jnp.maximum(square, TINY**2))
    return jnp.exp(-distance / (a.shape[-1] * scale[:, None, None]))


def moment_weight(t: jax.Array, power: float, offset: float) -> jax.Array:
    """w(t) = 1/2 sigmoid(b - lambda) (-d lambda/dt) alpha^a / (alpha^2 + sigma^2), b the offset.

    On the linear path alpha = 1 - t, sigma = t, lambda = log(alpha^2 / sigma^2). Written without
    lambda, whose end t = 0 is infinite: sigmoid(b - lambda) = z / (1 + z), z = e^b t^2 / (1-t)^2,
    and -d lambda/dt = 2 / (t (1 - t)).
    """
    alpha = 1 - t
    z = jnp.exp(offset) * jnp.square(t / alpha)
    return jnp.exp(offset) * t / (alpha**3 * (1 + z)) * alpha**power / (alpha**2 + t**2)
