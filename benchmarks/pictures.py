"""A public set of pictures through the whole program: prepare, the autoencoder, a short training.

    python benchmarks/pictures.py --set=emoji    # npm's emoji-datasource-google: 3,786 pictures
    python benchmarks/pictures.py --set=stamps   # Debian's tuxpaint-stamps-default: 796 in PNG
        [--size=64] [--steps=20] [--embedding=prepared] [--sheet=sheet.png] [--folder=DIR]

The package is fetched by its name with npm, or with apt-get and dpkg, and nothing of it is kept but
in --folder, where a second run finds it. Networks are small and random, of FLUX's layout; they need
`pip install -e '.[test]'`. --sheet draws pictures as the autoencoder gets them, above their
captions. The last line is JSON: `ratio` is the share of the pictures found that were prepared.
"""

import argparse
import collections
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from jax_distill.data import pictures
from jax_distill.data.records import LatentRecords
from jax_distill.data.sources.folder import PictureFolder

ROOT = Path(__file__).resolve().parents[1]
TEXT_LENGTH = 32
SMALL = {
    "batch_size": 8,
    "rescale.batch_size": 8,
    "rescale.total_steps": 4,
    "log_every": 5,
    "samples.prompts": 4,
    "samples.teacher_steps": 2,
    "samples.every": 0,
    "evaluation.student_steps": 2,
    "evaluation.teacher_steps": 2,
}
SHEET = (6, 10)  # rows and columns
TONES = {
    "1F3FB": "light",
    "1F3FC": "medium-light",
    "1F3FD": "medium",
    "1F3FE": "medium-dark",
    "1F3FF": "dark",
}


class Set(NamedTuple):
    """A package of pictures.

    Attributes:
      fetch: commands that fetch and unpack it into the current folder.
      pictures: where the pictures are below it.
      caption: writes captions where `prepare` reads them.
    """

    fetch: tuple[str, ...]
    pictures: str
    caption: Callable[[Path], None]


def caption_emoji(folder: Path) -> None:
    """Lists the pictures of `emoji.json` in a table, with their names and tones of skin."""
    lines = []
    for emoji in json.loads((folder.parents[2] / "emoji.json").read_text()):
        name = (emoji["name"] or emoji["short_name"].replace("_", " ")).lower()
        lines.append({"file_name": emoji["image"], "text": name})
        for tones, varied in emoji.get("skin_variations", {}).items():
            skin = " and ".join(TONES[tone] for tone in tones.split("-"))
            lines.append({"file_name": varied["image"], "text": f"{name}, {skin} skin"})
    kept = [json.dumps(line) for line in lines if (folder / line["file_name"]).exists()]
    (folder / "metadata.jsonl").write_text("\n".join(kept) + "\n")


def caption_stamps(folder: Path) -> None:
    """Leaves the English caption of each picture, the first line, and drops its translations."""
    for path in folder.rglob("*.txt"):
        path.write_text(path.read_text(encoding="utf-8").partition("\n")[0].strip() + "\n")


SETS = {
    "emoji": Set(
        ("npm pack --silent emoji-datasource-google", "tar -xzf emoji-datasource-google-*.tgz"),
        "package/img/google/64",
        caption_emoji,
    ),
    "stamps": Set(
        (
            "apt-get -q download tuxpaint-stamps-default",
            "dpkg -x tuxpaint-stamps-default_*.deb .",
        ),
        "usr/share/tuxpaint/stamps",
        caption_stamps,
    ),
}


def fetch(name: str, folder: Path) -> Path:
    """The pictures of a set, with captions; fetched where they are not there yet."""
    found = folder / SETS[name].pictures
    if not (folder / "fetched").exists():
        for command in SETS[name].fetch:
            run(["sh", "-c", command], cwd=folder)
        SETS[name].caption(found)
        (folder / "fetched").touch()
    return found


def run(command: list[str], cwd: Path = ROOT) -> str:
    """What a command logs; ends this program where it fails."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\nfailed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stderr


def timed(what: str, module: str, *flags: str) -> tuple[float, str]:
    """Seconds and the log of a command of the package."""
    begun = time.monotonic()
    log = run([sys.executable, "-m", f"jax_distill.{module}", *flags])
    seconds = time.monotonic() - begun
    print(f"{what}: {seconds:.0f} s", flush=True)
    return seconds, log


def ported(folder: Path) -> Path:
    """A small random FLUX as `port` leaves it."""
    sys.path.insert(0, str(ROOT / "tests"))
    from random_pipeline import save_random

    (folder / "diffusers").mkdir()
    save_random(folder / "diffusers")
    flags = [f"--source={folder / 'diffusers'}", f"--output={folder / 'ported'}"]
    timed("port", "port", *flags, "--dtype=bfloat16", f"--text_length={TEXT_LENGTH}")
    return folder / "ported"


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def left_out(prepared: Path, log: str) -> dict[str, int]:
    """Why pictures and files were left out, with their numbers."""
    found: dict[str, int] = collections.Counter()
    damaged = prepared / "damaged.jsonl"
    if damaged.exists():
        for line in damaged.read_text().splitlines():
            reason = json.loads(line)["reason"]
            found[re.sub(r"'[^']*'", "'...'", reason)[:90]] += 1
    for count, reason in re.findall(r"': (\d+) files (are left out: .*?), such as", log):
        found[f"files {reason[:84]}"] += int(count)
    return dict(found)


def draw_sheet(source: PictureFolder, keys: set[str], size: int, path: Path) -> None:
    """Draws prepared pictures, taken evenly, as they are fitted, above their captions."""
    usable = [index for index in range(len(source)) if source.key(index) in keys]
    rows, columns = SHEET
    cell = (max(size, 96), size + 26)
    sheet = Image.new("RGB", (columns * cell[0], rows * cell[1]), "grey")
    pen = ImageDraw.Draw(sheet)
    for place in range(min(rows * columns, len(usable))):
        example = source[usable[place * len(usable) // (rows * columns)]]
        x, y = place % columns * cell[0], place // columns * cell[1]
        sheet.paste(Image.fromarray(pictures.read(example.picture, size, size)), (x, y))
        words = example.caption
        pen.text((x, y + size), f"{words[:15]}\n{words[15:30]}", "white")
    sheet.save(path)
    print(f"drew {path}")


def losses(workdir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").open()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--set", choices=SETS, default="emoji")
    parser.add_argument("--size", type=int, default=64, help="height and width in pixels")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--embedding", choices=("prepared", "training"), default="prepared")
    parser.add_argument("--sheet", type=Path, help="picture to draw, for people")
    parser.add_argument("--folder", type=Path, help="where the package is fetched to and kept")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        kept = (flags.folder or work / "fetched") / flags.set
        kept.mkdir(parents=True, exist_ok=True)
        begun = time.monotonic()
        folder = fetch(flags.set, kept.resolve())
        print(f"fetch: {time.monotonic() - begun:.0f} s", flush=True)
        report = measure(flags, folder, work)
    print(json.dumps({"benchmark": "pictures", "set": flags.set, **report}))


def measure(flags: argparse.Namespace, folder: Path, work: Path) -> dict[str, object]:
    """Prepares the pictures of a folder, trains on them, and says what came of it."""
    found = len(PictureFolder(folder))
    flux, prepared, workdir = ported(work), work / "latents", work / "run"
    sides = [f"--height={flags.size}", f"--width={flags.size}"]
    settings = [f"--checkpoint={flux}", f"--source={folder}", f"--output={prepared}", *sides]
    settings += ["--damaged=skip", "--damaged_share=0.05"]
    settings += [f"--embed={'true' if flags.embedding == 'prepared' else 'false'}"]
    preparing, log = timed("prepare", "prepare", *settings)
    records = LatentRecords(prepared)
    captions = [records[index].caption for index in range(len(records))]
    left = left_out(prepared, log)
    print(f"{found} pictures found, {len(records)} prepared, {len(set(captions))} captions")
    for reason, count in left.items():
        print(f"  left out, {count}: {reason}")
    if flags.sheet:
        damaged = prepared / "damaged.jsonl"
        lines = damaged.read_text().splitlines() if damaged.exists() else []
        source = PictureFolder(folder)
        keys = {source.key(index) for index in range(found)}
        draw_sheet(source, keys - {json.loads(x)["key"] for x in lines}, flags.size, flags.sheet)
    changes = SMALL | {
        "total_steps": flags.steps,
        "data.resolution": f"{flags.size},{flags.size}",
        "data.path": prepared,
        "data.embedding": flags.embedding,
        "teacher.checkpoint": flux,
    }
    config = [f"--config.{key}={value}" for key, value in changes.items()]
    train = [f"--config={ROOT / 'configs/scm.py'}:flux_lite", *config, f"--workdir={workdir}"]
    training, _ = timed(f"train, {flags.steps} steps", "main", *train)
    found_losses = losses(workdir)
    print("losses:", " ".join(f"{loss:.3f}" for loss in found_losses))
    if not np.isfinite(found_losses).all():
        sys.exit("a loss is not finite")
    size = size_of(prepared)
    return {
        "ratio": round(len(records) / found, 4),
        "embedding": flags.embedding,
        "size": flags.size,
        "found": found,
        "prepared": len(records),
        "left_out": left,
        "captions": len(set(captions)),
        "bytes": size,
        "bytes_per_example": round(size / len(records)),
        "prepare_seconds": round(preparing, 1),
        "train_seconds": round(training, 1),
        "last_loss": round(found_losses[-1], 4),
    }


if __name__ == "__main__":
    main()
