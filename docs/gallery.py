"""The reports of docs/gallery/: makes their pictures, runs the commands of docs/gallery/index.md, keeps the pages.

    python docs/gallery.py [--only labels ...] [--folder FOLDER]

Clothes are the notebooks' sample, as class folders; drawings are OpenMoji's, split by name as in the demo; the surface
is one of benchmarks/anomaly.py's, with masks.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]
GALLERY = ROOT / "docs" / "gallery"
LARGEST = 400_000  # bytes of a page
CLOTHES = {"train": range(0, 1500, 3), "test": range(1500, 2000, 2)}  # rows of the sample


def clothes(folder: Path) -> None:
    import datasets

    sample: Any = datasets.Dataset.from_parquet(str(ROOT / "notebooks" / "data" / "fashion.parquet"))
    names = sample.features["label"].names
    for part, rows in CLOTHES.items():
        for row in rows:
            one = sample[row]
            path = folder / part / names[one["label"]].replace("/", " or ") / f"{row}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            one["image"].save(path)


def drawings(folder: Path) -> None:
    from clipft.demo.styles import openmoji, split_by_name

    for part, rows in zip(("train", "test"), split_by_name(openmoji()), strict=True):
        lines = []
        (folder / part).mkdir(parents=True)
        for number, row in enumerate(rows):
            path = folder / part / f"{number}.png"
            row["image"].save(path)
            lines.append(json.dumps({"image": str(path.relative_to(folder)), "caption": row["caption"]}))
        (folder / f"{part}.jsonl").write_text("\n".join(lines) + "\n")


def surface(folder: Path) -> None:
    """Brushed metal as MVTec AD lays its sets out: 30 pictures to learn from, 12 others, 5 with each kind of defect."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from anomaly import DEFECTS, brushed

    rng = np.random.default_rng(1)

    def save(place: str, pixels: Any) -> None:
        path = folder / place
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8)).save(path)

    for number in range(42):
        save(f"{'train' if number < 30 else 'test'}/good/{number:02}.png", brushed(rng, (120, 160)))
    for defect in DEFECTS:
        for number in range(5):
            pixels, mask = defect(rng, brushed(rng, (120, 160)))
            save(f"test/{defect.__name__}/{number}.png", pixels)
            save(f"ground_truth/{defect.__name__}/{number}_mask.png", 255.0 * (mask > 0.4))


def commands() -> dict[str, list[str]]:
    """As the page has them, by what they write."""
    blocks = re.findall(r"^```bash\n(clipft .*?)^```$", (GALLERY / "index.md").read_text(), re.DOTALL | re.MULTILINE)
    lines = [shlex.split(block.replace("\\\n", " ")) for block in blocks]
    return {Path(line[line.index("--output") + 1]).stem: line for line in lines}


def page_of(output: Path) -> str:
    """Of a run's folder, or of a file of scores."""
    return (output / "report.html" if output.is_dir() else output.with_suffix(".html")).read_text()


def main() -> None:
    known = commands()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=known, default=list(known))
    parser.add_argument("--folder", type=Path, help="for pictures and models, and kept; default: one that is not")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as other:
        folder = options.folder or Path(other)
        for make in (clothes, drawings, surface):
            if not (folder / make.__name__).exists():
                make(folder / make.__name__)
        for name in options.only:
            line = known[name]
            subprocess.run([sys.executable, "-m", "clipft.cli", *line[1:]], cwd=folder, check=True)
            page = page_of(folder / line[line.index("--output") + 1])
            if len(page.encode()) > LARGEST:
                sys.exit(f"{name}: {len(page.encode())} bytes; a page of the gallery has {LARGEST} at most")
            (GALLERY / f"{name}.html").write_text(page)


if __name__ == "__main__":
    main()
