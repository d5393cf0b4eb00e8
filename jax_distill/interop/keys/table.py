"""Tables that say which PyTorch tensor is which of our parameters, read in both directions.

A table is data: a list of rules, each a template of their name, a template of our path, and how the
array is laid out. A `{placeholder}` stands for an index. One that only their name has means that
our parameter stacks those tensors along its first axis (layers that are scanned). A path with
several rules is one parameter that they keep under several names (tied tensors).
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

Tree = dict[Any, Any]


class Layout(NamedTuple):
    """Two mutually inverse functions of one array."""

    to_jax: Callable[[np.ndarray], np.ndarray]
    from_jax: Callable[[np.ndarray], np.ndarray]


SAME = Layout(lambda x: x, lambda x: x)
LINEAR = Layout(lambda x: x.T, lambda x: x.T)  # (out, in) <-> (in, out)
CONV = Layout(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))  # OIHW <-> HWIO


class Rule(NamedTuple):
    """Their name, e.g. "blocks.{i}.norm.weight", our path, e.g. "blocks/norm/scale", the layout."""

    theirs: str
    ours: str
    layout: Layout = SAME


NORM_RULES = (Rule("weight", "scale"), Rule("bias", "bias"))
LINEAR_RULES = (Rule("weight", "kernel", LINEAR), Rule("bias", "bias"))
CONV_RULES = (Rule("weight", "kernel", CONV), Rule("bias", "bias"))


def under(theirs: str, ours: str, rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """The rules of a submodule, with its name in front on both sides."""
    return tuple(Rule(f"{theirs}.{r.theirs}", f"{ours}/{r.ours}", r.layout) for r in rules)


class Place(NamedTuple):
    """Where one of their tensors lives in our parameters."""

    name: str
    shape: tuple[int, ...]  # of their tensor
    path: tuple[Any, ...]
    index: int | None  # along the first axis of a stacked parameter
    layout: Layout


class _Entry(NamedTuple):
    path: tuple[Any, ...]
    leaf: Any
    names: list[str]  # one, or one for each index of the first axis
    stacked: bool
    layout: Layout


class KeyTable:
    """Translates between a flat PyTorch state dict and our nested parameters.

    Trees are nested dicts whose keys are names and list indices (int, or their digits), as
    `nnx.to_pure_dict` makes them.
    """

    def __init__(self, rules: Iterable[Rule], ignored: Iterable[str] = ()):
        """Compiles the rules.

        Args:
          rules: of every parameter.
          ignored: names of tensors that may be there but are no parameters.

        Raises:
          ValueError: if their name lacks a placeholder of our path, or has two that our path lacks.
        """
        self.rules, self.ignored = tuple(rules), frozenset(ignored)
        self._patterns = []
        for rule in self.rules:
            pattern = re.sub(r"\\{(\w+)\\}", r"(?P<\1>\\d+)", re.escape(rule.ours))
            ours, theirs = (set(re.findall(r"{(\w+)}", s)) for s in (rule.ours, rule.theirs))
            if ours - theirs or len(theirs - ours) > 1:
                raise ValueError(
                    f"rule {rule.theirs!r} <-> {rule.ours!r}: our path may lack at most one of"
                    " their placeholders and have none of its own."
                )
            self._patterns.append((re.compile(pattern), min(theirs - ours, default=None)))

    def _entries(self, tree: Mapping[Any, Any]) -> Iterator[_Entry]:
        for path, leaf in _leaves(tree):
            text, known = "/".join(map(str, path)), False
            for rule, (pattern, axis) in zip(self.rules, self._patterns, strict=True):
                if match := pattern.fullmatch(text):
                    values = match.groupdict()
                    if axis is None:
                        names = [rule.theirs.format(**values)]
                    else:
                        names = [
                            rule.theirs.format(**values, **{axis: i}) for i in range(len(leaf))
                        ]
                    yield _Entry(path, leaf, names, axis is not None, rule.layout)
                    known = True
            if not known:
                raise ValueError(f"parameter '{text}' has no rule in the key table.")

    def shapes(self, like: Mapping[Any, Any]) -> dict[str, tuple[int, ...]]:
        """Their names and shapes for parameters of the given shapes.

        Args:
          like: nested leaves with a `shape` (arrays, `jax.ShapeDtypeStruct`).
        """
        return {place.name: place.shape for place in self.places(like)}

    def places(self, like: Mapping[Any, Any]) -> Iterator[Place]:
        """Where each of their tensors lives in parameters of the given shapes.

        Args:
          like: as `shapes` takes it.
        """
        for entry in self._entries(_map(_empty, like)):
            leaf = entry.leaf[0] if entry.stacked and len(entry.leaf) else entry.leaf
            shape = entry.layout.from_jax(leaf).shape
            for index, name in enumerate(entry.names):
                yield Place(name, shape, entry.path, index if entry.stacked else None, entry.layout)

    def check(
        self,
        found: Mapping[str, tuple[int, ...]],
        like: Mapping[Any, Any],
        where: str = "state dict",
    ) -> None:
        """Compares the tensors that there are with those of parameters of the given shapes.

        Args:
          found: their names and shapes.
          like: as `shapes` takes it.
          where: begins the message.

        Raises:
          ValueError: if a tensor is missing, not expected, or of the wrong shape.
        """
        wanted = self.shapes(like)
        if missing := wanted.keys() - found.keys():
            raise ValueError(f"{where}: tensor '{min(missing)}' is missing{_more(missing)}.")
        if extra := found.keys() - wanted.keys() - self.ignored:
            raise ValueError(f"{where}: tensor '{min(extra)}' is not expected{_more(extra)}.")
        for name, shape in wanted.items():
            if tuple(found[name]) != shape:
                raise ValueError(
                    f"{where}: tensor '{name}' has shape {tuple(found[name])} where {shape} is"
                    " expected."
                )

    def to_jax(self, state_dict: Mapping[str, Any], like: Mapping[Any, Any]) -> Tree:
        """Nested parameters from a state dict.

        Args:
          state_dict: their names and arrays (numpy, or what `np.asarray` takes).
          like: the wanted parameters' shapes, nested, e.g. of `nnx.eval_shape`.

        Returns:
          The tree of `like` with numpy arrays of the types of `state_dict`.

        Raises:
          ValueError: if a tensor is missing, not expected, or of the wrong shape, or if tied ones
            differ.
        """
        self.check({name: x.shape for name, x in state_dict.items()}, like)
        tree: Tree = {}
        for entry in self._entries(_map(_empty, like)):
            arrays = [entry.layout.to_jax(np.asarray(state_dict[name])) for name in entry.names]
            if entry.stacked:
                value = np.stack(arrays) if arrays else np.zeros(entry.leaf.shape, np.float32)
            else:
                value = arrays[0]
            node = tree
            for key in entry.path[:-1]:
                node = node.setdefault(key, {})
            if entry.path[-1] in node and not np.array_equal(node[entry.path[-1]], value):
                raise ValueError(
                    f"state dict: tensor '{entry.names[0]}' differs from the one it is tied to;"
                    f" both are parameter '{'/'.join(map(str, entry.path))}'."
                )
            node[entry.path[-1]] = value
        return tree

    def from_jax(self, params: Mapping[Any, Any]) -> dict[str, np.ndarray]:
        """The state dict of nested parameters: contiguous numpy arrays of the same types.

        Raises:
          ValueError: if the table has no rule for a parameter.
        """
        state_dict = {}
        for entry in self._entries(params):
            value = np.asarray(entry.leaf)
            for name, array in zip(entry.names, value if entry.stacked else [value], strict=True):
                state_dict[name] = np.ascontiguousarray(entry.layout.from_jax(array))
        return state_dict


def _leaves(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, (*path, key))
    else:
        yield path, tree


def _map(function: Callable[[Any], Any], tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {key: _map(function, value) for key, value in tree.items()}
    return function(tree)


def _empty(leaf: Any) -> np.ndarray:
    """An array of the leaf's shape that takes no memory."""
    return np.broadcast_to(np.zeros((), np.int8), leaf.shape)


def _more(names: set[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
