"""The networks that draw: of a checkpoint, and of a teacher beside it."""

from jax_distill import pipeline
from jax_distill.assembly import build
from jax_distill.pipeline import Pipeline


def load(checkpoint: str, teacher: str | None) -> dict[str, Pipeline]:
    """The networks by name, "student" or "teacher"; that of the checkpoint first.

    Args:
      checkpoint: as of `pipeline.load`.
      teacher: likewise, to draw beside a student.

    Raises:
      ValueError: there is no such network, or the two do not fit.
    """
    first = pipeline.load(checkpoint)
    kind = build.role(first.config)
    if teacher is None:
        return {kind: first}
    second = pipeline.load(teacher)
    if kind == "teacher":
        raise ValueError(f"--teacher: '{checkpoint}' is a teacher itself; leave --teacher out")
    if type(second.world) is not type(first.world):
        raise ValueError(
            f"--teacher: '{teacher}' draws pictures of another world than '{checkpoint}'; give the"
            " student's own teacher"
        )
    return {"student": first, "teacher": second}
