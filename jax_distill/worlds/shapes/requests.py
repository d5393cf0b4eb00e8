"""Requests that captions of the shapes world express: the six questions of GenEval."""

from dataclasses import dataclass

RELATIONS = ("left", "right", "above", "below")
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


@dataclass(frozen=True)
class Request:
    """The content that a caption asks for.

    Attributes:
        task: one of `TASKS`.
        objects: (shape, colour or None, count) each; None leaves the colour open.
        relation: None, or where objects[0] is relative to objects[1]: one of `RELATIONS`.
    """

    task: str
    objects: tuple[tuple[str, str | None, int], ...]
    relation: str | None = None
