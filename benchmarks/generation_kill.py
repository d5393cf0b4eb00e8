"""Kills the drawing of a benchmark again and again, on several processes, and compares pictures.

    python benchmarks/generation_kill.py [--kills=5] [--processes=1,2,4] [--prompts=553] [--seed=0]

Prompts of GenEval's kind, four pictures each, are drawn by a tiny random FLUX: in one go by one
process; and on each number of processes, of which one dies by SIGKILL at random moments, while it
starts and while it draws, and all are started again with the same command. One JSON line: `ratio`
is the share of PNG files that are byte for byte those drawn in one go. With
JAX_COMPILATION_CACHE_DIR set, restarts do not compile again.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import starting
from absl import app, flags

ROOT = Path(__file__).parents[1]
LIMIT = 3000.0  # seconds for each start
STARTING = 15.0  # seconds in which a process dies that is to die while it starts
MADE = """
import sys
from pathlib import Path
sys.path.insert(0, "tests")
from random_pipeline import save_random
from jax_distill.runs.porting import port
root = Path(sys.argv[1])
(root / "flux").mkdir()
save_random(root / "flux")
port(str(root / "flux"), root / "ported", text_length=24)
"""
COLORS, THINGS = ("red", "blue", "pink", "black"), ("owl", "kettle", "drum", "ladder", "boat")

_KILLS = flags.DEFINE_integer("kills", 5, "How often, on each number of processes.", 0)
_PROCESSES = flags.DEFINE_list("processes", ["1", "2", "4"], "Numbers of processes.")
_PROMPTS = flags.DEFINE_integer("prompts", 553, "How many.", 1)
_SEED = flags.DEFINE_integer("seed", 0, "Of the moments.")


def write_prompts(path: Path) -> None:
    """Prompts in GenEval's format, as many as asked for."""
    lines = []
    for number in range(_PROMPTS.value):
        color, thing = COLORS[number % len(COLORS)], THINGS[number % len(THINGS)]
        clause = {"class": thing, "count": 1, "color": color}
        prompt = f"photo {number} of a {color} {thing}"
        lines.append(json.dumps({"tag": "colors", "include": [clause], "prompt": prompt}))
    path.write_text("\n".join(lines))


def start(root: Path, name: str, log, count: int = 1) -> list[subprocess.Popen]:
    """The processes of one command, which find each other on a free port."""
    command = [sys.executable, "-m", "jax_distill.evaluate", "--benchmark=geneval", "--steps=2"]
    command += [f"--checkpoint={root}/ported", f"--prompts_file={root}/prompts.jsonl"]
    command += ["--height=32", "--width=48", f"--output={root / name}"]
    return starting.start(command, log, count)


def pictures(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.png")}


def count_of(folder: Path) -> int:
    return sum(1 for _ in folder.glob("*/samples/*.png"))


def kill(
    running: list[subprocess.Popen], folder: Path, rng: random.Random, early: bool, part: int
) -> bool:
    """Kills one of the processes, any; False when it had ended before.

    It dies while it starts, or some time after a part of the pictures was drawn.
    """
    victim, begun, before = rng.choice(running), time.monotonic(), count_of(folder)
    delay, drawn = rng.uniform(0, STARTING) if early else LIMIT, before + rng.randint(1, part)
    while time.monotonic() - begun < delay and (early or count_of(folder) < drawn):
        if victim.poll() is not None:
            break
        time.sleep(0.002)
    alive = victim.poll() is None
    victim.kill()
    return alive


def main(argv: list[str]) -> None:
    del argv
    rng, kills, seconds, stuck = random.Random(_SEED.value), 0, {}, 0
    with tempfile.TemporaryDirectory() as name, Path(name, "log").open("w+") as log:
        root, made = Path(name), {}
        environment = {"PYTHONPATH": str(ROOT), **os.environ}
        command = [sys.executable, "-c", MADE, name]
        subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=log, stderr=log)
        write_prompts(root / "prompts.jsonl")

        def finish(folder: str, count: int = 1) -> None:
            begun = time.monotonic()
            if any(starting.wait(start(root, folder, log, count), LIMIT)):
                log.seek(0)
                sys.exit(f"{folder} failed:\n{log.read()[-5000:]}")
            seconds[folder], made[folder] = time.monotonic() - begun, pictures(root / folder)
            print(f"{folder}: {len(made[folder])} files, {seconds[folder]:.1f} s", flush=True)

        finish("whole")
        part = max(4 * _PROMPTS.value // (_KILLS.value + 1), 1)
        for count in map(int, _PROCESSES.value):
            folder = f"on {count}"
            for number in range(_KILLS.value):
                running = start(root, folder, log, count)
                # Every third dies while it starts, before anything or between what was drawn.
                died = kill(running, root / folder, rng, number % 3 == 2, part)
                codes = starting.wait(running, LIMIT)
                kills += died
                stuck += died and count > 1 and not all(codes)  # one that went on alone
                drawn = count_of(root / folder)
                print(f"{folder}, kill {number + 1}: {drawn} pictures, codes {codes}", flush=True)
            finish(folder, count)
        whole = made["whole"]
        names = [(key, name) for key, found in made.items() for name in found.keys() | whole.keys()]
        same = sum(made[key].get(name) == whole.get(name) for key, name in names)
        hidden = [path for key in made for path in (root / key).rglob(".*")]
        left = [str(path.relative_to(root)) for path in hidden]
    line = {
        "benchmark": "generation_kill",
        "ratio": same / len(names),
        "reference": "the PNG files that one process drew in one go",
        "files": len(whole),
        "distinct": len(set(whole.values())),
        "kills": kills,
        "ended_without_the_killed": stuck,
        "left": left,
        "seed": _SEED.value,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }
    print(json.dumps(line))
    asked = _KILLS.value * len(_PROCESSES.value)
    whole_files = len(whole) == 5 * _PROMPTS.value
    sys.exit(not (same == len(names) and whole_files and kills == asked and not (left or stuck)))


if __name__ == "__main__":
    app.run(main)
