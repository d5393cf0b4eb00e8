"""Going on with a run: what each setting may do to it. `docs/resuming.md` is made from `TABLE`."""

import fnmatch
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from absl import logging
from ml_collections import ConfigDict

from jax_distill.assembly import build
from jax_distill.assembly.resolution import EMBEDDED, absolute
from jax_distill.config import ConfigError, base, load, optimizer_of
from jax_distill.config.rules import general
from jax_distill.config.settings import flatten
from jax_distill.data.folders import folders
from jax_distill.data.identity import Identity, identity_of
from jax_distill.data.manifest import DESCRIPTION
from jax_distill.objectives.methods import FROM_SCRATCH, KINDS
from jax_distill.objectives.objective import STUDENT
from jax_distill.objectives.settings import settings_of
from jax_distill.storage import paths
from jax_distill.storage.quoting import shown
from jax_distill.training import acceptance, checkpoint
from jax_distill.training.optimizer import learning_rate
from jax_distill.training.step import moves_of

FREE = "may change"
SAID = "a line says so"
REFUSED = "refused"

ALL, AUTOENCODER = "all runs", "the autoencoder"
NETWORKS, FIRST, STUDENTS, ADAPTERS = "networks", "first teachers", "students", "adapters"
"""Runs that read a setting; of others it may change. A first teacher is trained on data alone."""


class Row(NamedTuple):
    """The effect of changed settings on a run that goes on.

    Attributes:
      keys: names, or patterns of them such as "mesh.*".
      kind: `FREE`, `SAID` or `REFUSED`.
      effect: what changes, or why it may not, in words that follow a colon.
      runs: which runs read them.
    """

    keys: tuple[str, ...]
    kind: str
    effect: str
    runs: str = ALL


TABLE = (
    Row(("name",), REFUSED, "it tells one run from another"),
    Row(("world",), REFUSED, "pictures and captions are of another kind"),
    Row(("objective.name",), REFUSED, "another method would go on from the state of this one"),
    Row(("objective.*",), REFUSED, "the network would learn something else"),
    Row(("seed",), REFUSED, "every random number comes from it, and the order of the data"),
    Row(("teacher.*",), REFUSED, "the student would learn from another network", STUDENTS),
    Row(
        ("teacher.guidance",),
        SAID,
        "pictures are drawn with other guidance from here on, and students learn it; training does"
        " not read it",
        FIRST,
    ),
    Row(("start.*",), REFUSED, "the student began with another network", STUDENTS),
    Row(
        ("rescale.*",),
        REFUSED,
        "the student starts from what that stage made, whose schedule is as long as it is",
        STUDENTS,
    ),
    Row(("lora.*",), REFUSED, "adapters have its shapes and stand beside its kernels", STUDENTS),
    Row(
        ("model.remat", "model.attention"),
        SAID,
        "the same numbers, to rounding, in another time and memory",
        NETWORKS,
    ),
    Row(("model.*",), REFUSED, "the network would have another shape or another time", NETWORKS),
    Row(("autoencoder.*",), REFUSED, "the network would have another shape", AUTOENCODER),
    Row(("data.examples", "data.seed"), REFUSED, "the data would be another"),
    Row(("data.text_length", "data.resolution"), REFUSED, "the data would be another", NETWORKS),
    Row(
        ("data.weights",),
        REFUSED,
        "other examples would come, some of them twice in an epoch",
        NETWORKS,
    ),
    Row(("data.caption_dropout",), REFUSED, "the network would learn something else", NETWORKS),
    Row(
        ("data.damaged", "data.damaged_share"),
        SAID,
        "what happens to damaged examples, from here on",
        NETWORKS,
    ),
    Row(
        ("data.threads", "data.prefetch", "data.workers"),
        FREE,
        "how batches are read ahead; they are the same",
    ),
    Row(
        ("data.path",),
        SAID,
        "the same data lies there; other data is refused",
        NETWORKS,
    ),
    Row(
        ("data.embedding",),
        SAID,
        "captions are embedded elsewhere; padding that is stored as shared becomes their own",
        NETWORKS,
    ),
    Row(("optimizer.name",), REFUSED, "what it remembers is of another kind"),
    Row(("optimizer.moments",), REFUSED, "what the optimizer remembers is stored in that type"),
    Row(("optimizer.frozen",), REFUSED, "what is frozen has nothing remembered of it"),
    Row(("ema_dtype",), REFUSED, "the average is stored in that type"),
    Row(
        ("dtype",),
        REFUSED,
        "the frozen network, beside which adapters are trained, is rounded to it",
        ADAPTERS,
    ),
    Row(("dtype",), SAID, "networks compute in it from here on"),
    Row(
        ("total_steps",),
        SAID,
        "the run and its schedule end there; never before the step that it has reached",
    ),
    Row(
        (
            "optimizer.learning_rate",
            "optimizer.schedule",
            "optimizer.decay_share",
            "optimizer.warmup_steps",
        ),
        SAID,
        "learning rates from here on are those that the run would have had with it from its start",
    ),
    Row(
        ("optimizer.adam_share",),
        SAID,
        "AdamW's share of the learning rate beside muon, from here on",
    ),
    Row(
        ("optimizer.b1", "optimizer.b2"),
        SAID,
        "moments forget at another pace from here on; what they hold was averaged at the old one",
    ),
    Row(
        ("optimizer.epsilon", "optimizer.weight_decay", "optimizer.clip_norm"),
        SAID,
        "updates from here on are made with it",
    ),
    Row(
        ("batch_size",),
        SAID,
        "data goes on with the next example; steps from here on have so many",
    ),
    Row(
        ("accumulate",),
        SAID,
        "data goes on with the next example; micro-batches from here on are of another size, and"
        " draw other random numbers",
    ),
    Row(
        ("ema_decay", "ema_warmup", "ema_power"),
        SAID,
        "the average forgets at another pace from here on",
    ),
    Row(("on_nonfinite",), SAID, "what happens to steps that are not finite, from here on"),
    Row(
        (
            "evaluation.prompts",
            "evaluation.student_steps",
            "evaluation.teacher_steps",
            "evaluation.guidance",
            "evaluation.diversity_prompts",
            "evaluation.diversity_pictures",
        ),
        SAID,
        "scores before and after are not of the same pictures",
        NETWORKS,
    ),
    Row(("evaluation.every",), FREE, "how often a student under way is scored", STUDENTS),
    Row(("samples.*",), FREE, "which grids are drawn, and when", NETWORKS),
    Row(("log_every",), FREE, "how many lines metrics.jsonl has"),
    Row(("checkpoint.*",), FREE, "how often the run is saved, and how many checkpoints are kept"),
    Row(("mesh.*",), FREE, "the same run to rounding, on other devices"),
)
"""Every setting; the first row that has a key, and is of such a run, counts."""

_RATES = (
    *("total_steps", "optimizer.learning_rate", "optimizer.schedule", "optimizer.decay_share"),
    "optimizer.warmup_steps",
)


def row_of(key: str, config: ConfigDict) -> Row | None:
    """The row that says what a change of a key does to a run; None where the run reads none."""
    reads = {
        ALL: True,
        AUTOENCODER: config.objective.name == "autoencoder",
        NETWORKS: config.objective.name != "autoencoder",
        STUDENTS: config.objective.name not in FROM_SCRATCH,
        ADAPTERS: config.objective.name not in FROM_SCRATCH and config.lora.rank > 0,
        FIRST: config.objective.name == "flow_matching",
    }
    key = general(key)
    for row in TABLE:
        if reads[row.runs] and any(fnmatch.fnmatchcase(key, name) for name in row.keys):
            return row
    return None


def check(config: ConfigDict, workdir: Path) -> None:
    """Checks that a workdir is empty or holds a run that `config` can go on with.

    What changes is said, a line a setting, once nothing is refused.

    Args:
      config: of the run, whole.
      workdir: of the run; nothing is written.

    Raises:
      ConfigError: naming the setting that differs, its old and its new value, and the fix.
    """
    if not (workdir / "config.json").exists():
        return
    before = load(workdir)
    steps = steps_taken(workdir)
    lines = list(_changes(before, config, workdir))
    if config.total_steps < steps:
        raise ConfigError(
            f"total_steps: {config.total_steps} is fewer than the {steps} that the run in"
            f" '{workdir}' has taken; set it to {steps} or more, or give another --workdir"
        )
    lines += _rate_change(before, config, steps)
    if (moved := check_same_data(before, config, workdir)) is not None:
        lines.append(moved)
    for line in lines:
        logging.info("%s", line)


def steps_taken(workdir: Path) -> int:
    """The step of a run's latest complete checkpoint; 0 where there is none."""
    try:
        return checkpoint.complete_steps(workdir)[0]
    except checkpoint.OldLayout:
        raise
    except ValueError:
        return 0


def _changes(before: ConfigDict, config: ConfigDict, workdir: Path) -> Iterator[str]:
    """Lines about settings that change, but for `data.path`; see `check`."""
    sections = {*before.optimizers, *config.optimizers}
    old, new = (_plain(run, sections) for run in (before, config))
    changed = [key for key in old.keys() & new.keys() if old[key] != new[key]]
    rows = [(row_of(key, config), key) for key in changed if key != "data.path"]
    known = sorted((TABLE.index(row), key) for row, key in rows if row is not None)
    for index, key in known:
        if TABLE[index].kind == REFUSED:
            raise ConfigError(
                f"--workdir: '{workdir}' holds another run, of {key}={shown(old[key])} and not"
                f" {shown(new[key])}; give another --workdir or set --config.{key} back"
            )
    for index, key in known:
        if TABLE[index].kind == SAID:
            yield f"{key}: {shown(old[key])} -> {shown(new[key])}; {TABLE[index].effect}"


def _plain(config: ConfigDict, optimizers: Iterable[str]) -> dict[str, Any]:
    """The configuration flat and as JSON has it, with the objective's defaults.

    Args:
      config: of a run.
      optimizers: sections of its players' optimizers, whole; one that it lacks is the student's.
    """
    whole = config.to_dict()
    kind = KINDS.get(whole["objective"]["name"])
    whole["objective"] = {**(settings_of(kind) if kind else {}), **whole["objective"]}
    whole["optimizers"] = {name: {**optimizer_of(config, name)} for name in optimizers}
    teacher = absolute(whole["teacher"]["checkpoint"])
    whole["teacher"]["checkpoint"] = teacher or EMBEDDED
    whole["start"]["checkpoint"] = absolute(whole["start"]["checkpoint"])
    # A network's setting that an older version did not know had today's default.
    whole["model"] = {**base().model.to_dict(), **whole["model"]}
    return json.loads(json.dumps(flatten(whole)))


def _rate_change(before: ConfigDict, config: ConfigDict, steps: int) -> Iterator[str]:
    """A line about learning rates, where they go on otherwise than they would have."""
    old, new = flatten(before.to_dict()), flatten(config.to_dict())
    if not steps or steps == config.total_steps or all(old[key] == new[key] for key in _RATES):
        return
    last, following = (_rate(run, steps, moves) for run, moves in ((before, -1), (config, 0)))
    line = f"the learning rate was {last:.3g} at step {steps} and is {following:.3g} after it"
    line += f", by optimizer.schedule={config.optimizer.schedule}"
    if following > 2 * last and config.optimizer.schedule != "constant":
        line += (
            "; such a jump can undo what the fall of the rate has gained: runs that are to be made"
            " longer have optimizer.schedule=trapezoid, and go on from before its fall"
        )
    yield line


def _rate(config: ConfigDict, steps: int, later: int) -> float:
    """The student's learning rate at the move that a run begins after `steps`, or `later`."""
    method = build.without_networks(config)
    total, taken = (moves_of(method, count)[STUDENT] for count in (config.total_steps, steps))
    return float(learning_rate(config.optimizer, total)(taken + later))


def check_same_data(before: ConfigDict, config: ConfigDict, workdir: Path) -> str | None:
    """Checks that a run goes on with the data that it began with.

    Args:
      before: configuration that the workdir holds.
      config: of the run now.
      workdir: of the run.

    Returns:
      A line that says so, where the data has moved.

    Raises:
      ConfigError: there is other data, or it cannot be told.
    """
    if config.objective.name == "autoencoder":
        return None
    old, new = before.data.path, config.data.path
    moved = [*map(absolute, folders(old))] != [*map(absolute, folders(new))]
    known = acceptance.known(workdir).get("records")
    if known is None and not moved:
        return None
    known, found = known or _identity(old, workdir), _identity(new, workdir)
    fix = f"set --config.data.path back to {old!r}" if moved else "put the old data back"
    fix += ", or give another --workdir"
    if known is None or found is None:
        missing, path = ("old", old) if known is None else ("new", new)
        raise ConfigError(
            f"data.path: {old!r} -> {new!r}, and it cannot be told whether that is the data of the"
            f" run in '{workdir}', for there is none in the {missing} folder"
            f" '{path or workdir / 'data'}'; {fix}"
        )
    if known != found:
        raise ConfigError(
            f"data.path: {new!r} holds other data ({found['examples']} examples) than the run in"
            f" '{workdir}' began with ({known['examples']} examples); {fix}"
        )
    if not moved:
        return None
    return f"data.path: {old!r} -> {new!r}; the same {found['examples']} examples lie there"


def _identity(path: str, workdir: Path) -> Identity | None:
    """Of the data of a run; None where there is none."""
    names = folders(path) or [workdir / "data"]
    if not all((paths.path(name) / DESCRIPTION).is_file() for name in names):
        return None
    return identity_of(names)


def known_keys() -> list[str]:
    """Every setting that there is, of all objectives."""
    keys = flatten(base().to_dict())
    for name, kind in KINDS.items():
        keys |= flatten({"objective": {"name": name, **settings_of(kind)}})
    return list(keys)


def table() -> str:
    """`TABLE` in Markdown, with every setting by its name."""
    lines = ["| settings | of | when they change | |", "|---|---|---|---|"]
    left = {runs: known_keys() for runs in (ALL, AUTOENCODER, NETWORKS, FIRST, STUDENTS, ADAPTERS)}
    for row in TABLE:
        found = [key for name in row.keys for key in fnmatch.filter(left[row.runs], name)]
        left[row.runs] = [key for key in left[row.runs] if key not in found]
        keys = ", ".join(f"`{key}`" for key in found)
        lines.append(f"| {keys} | {row.runs} | {row.kind} | {row.effect} |")
    return "\n".join(lines) + "\n"
