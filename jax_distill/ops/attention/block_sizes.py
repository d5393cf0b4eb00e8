"""Block sizes: the queries and keys a kernel works on at once, by kernel, chip and head width.

`python benchmarks/attention.py --tune` measures candidates on its device and prints rows for the
table.
"""

from typing import NamedTuple

import jax

KERNELS = ("forward", "forward_tangent", "backward")


class Blocks(NamedTuple):
    """Upper limits on the tokens that a program keeps, and on those that it loops over at a time.

    The forward kernels keep queries and loop over keys; `backward` keeps keys and loops over
    queries, and on GPUs also the other way round.
    """

    kept: int
    looped: int
    warps: int = 4  # of a GPU program
    stages: int = 2  # of a GPU program's pipeline of loads


# (platform, chip or "" for any, head width or 0 for any, kernel): the first match holds, named
# chips before any chip. Rows with "" are starting points, measured on no chip.
TABLE: dict[tuple[str, str, int, str], Blocks] = {
    ("tpu", "", 0, "forward"): Blocks(512, 1024),
    ("tpu", "", 0, "forward_tangent"): Blocks(256, 512),
    ("tpu", "", 0, "backward"): Blocks(256, 512),
    ("cuda", "", 64, "forward"): Blocks(128, 64, 4, 2),
    ("cuda", "", 64, "forward_tangent"): Blocks(64, 64, 4, 2),
    ("cuda", "", 64, "backward"): Blocks(64, 64, 4, 2),
    ("cuda", "", 0, "forward"): Blocks(128, 64, 8, 2),
    ("cuda", "", 0, "forward_tangent"): Blocks(64, 64, 8, 2),
    ("cuda", "", 0, "backward"): Blocks(64, 64, 8, 2),
}


def block_sizes(platform: str, kernel: str, width: int) -> Blocks:
    """Block sizes for this process's chip, or those of any chip if the table does not name it.

    Args:
      platform: "tpu" or "cuda".
      kernel: one of `KERNELS`.
      width: channels of a head.
    """
    chip = jax.devices()[0].device_kind if jax.default_backend() in (platform, "gpu") else ""
    for row in ((chip, width), (chip, 0), ("", width), ("", 0)):
        if (platform, *row, kernel) in TABLE:
            return TABLE[platform, *row, kernel]
    raise ValueError(f"block_sizes: no row for the {kernel} kernel on {platform!r}")
