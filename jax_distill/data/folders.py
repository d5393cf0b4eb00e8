"""The folders that `data.path` names, their weights, and the sizes of their pictures."""

from collections.abc import Sequence

from jax_distill.data import manifest
from jax_distill.data.manifest import Description
from jax_distill.storage import paths


def folders(path: str) -> list[str]:
    """The folders that `data.path` names: one, or several between commas.

    Raises:
      ValueError: one has no name, or is there twice.
    """
    if not path:
        return []
    found = [name.strip() for name in path.split(",")]
    if "" in found:
        raise ValueError(f"data.path: '{path}' has no name beside a comma; take the comma away")
    places = [paths.absolute(name) for name in found]
    for number, place in enumerate(places):
        if place in places[:number]:
            raise ValueError(f"data.path: '{found[number]}' is given twice; give it once")
    return found


def weighed(path: str, weights: Sequence[float]) -> list[tuple[str, float]]:
    """The folders that `data.path` names, each with its weight.

    Raises:
      ValueError: there is not one weight for each.
    """
    found = folders(path)
    if len(weights) != len(found):
        several = "s" * (len(found) > 1)
        raise ValueError(
            f"data.weights: {len(weights)} for {len(found)} folder{several} of data.path; give one"
            " for each"
        )
    return list(zip(found, weights))


def resolution_of(description: Description) -> tuple[int, ...]:
    """Height and width in pixels of the pictures in a folder; () where it does not say."""
    return tuple(description.get("resolution", ()))


def resolutions(path: str) -> list[tuple[int, ...]]:
    """The sizes of pictures in the folders of `data.path`, each once, that of the first first."""
    described = (manifest.read(paths.path(folder), whole=False) for folder in folders(path))
    return list(dict.fromkeys(size for size in map(resolution_of, described) if size))
