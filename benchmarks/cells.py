"""What the tables of ``tables.py`` share: results, the machine that they are of, and how figures are written."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ZEN4 = "amd-epyc-family-25-model-17-avx512_vnni"
ZEN3 = "amd-epyc-family-25-model-1-avx2"
XEON = "intel-r-xeon-r-processor-family-6-model-167"
NAMES = {
    "AMD EPYC (family 25, model 17)": "AMD EPYC (Zen 4)",
    "AMD EPYC (family 25, model 1)": "AMD EPYC (Zen 3)",
    "Intel(R) Xeon(R) Processor (family 6, model 167)": "Intel Xeon (with AMX)",
    "amx": "AMX",
    "avx2": "AVX2",
    "avx512": "AVX-512",
    "avx512_vnni": "AVX-512 VNNI",
}


def results(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    return found


def machine(found: dict[str, Any]) -> str:
    """What it was measured on, as a line above the table."""
    about = found["machine"]
    torch = f"torch {about['versions']['torch']}"
    if "gpu" in about:
        return f"{about['gpu']}, CUDA {about['cuda']}, {torch}"
    cpu, isa = (NAMES.get(about[key], about[key]) for key in ("cpu", "isa"))
    threads = about["threads"]
    return f"{cpu}, {isa}, {threads} thread{'s' * (threads > 1)}, {torch}"


def table(head: Iterable[str], rows: Iterable[Iterable[str]], first: str = "---:") -> str:
    head = list(head)
    lines = [head, [first, *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(re.sub(" +", " ", f"| {' | '.join(line)} |") for line in lines)


def ratios(row: dict[str, Any], peers: Iterable[str], of: str = "ratio") -> list[str]:
    return [f"{row[of][peer]['median']:.2f}" for peer in peers]


def size(mib: float) -> str:
    return f"{mib:.0f} MiB" if mib < 1024 else f"{mib / 1024:.1f} GiB"


def significant(value: float, digits: int) -> str:
    return f"{float(f'{value:.{digits}g}'):g}"


def part(share: float, digits: int) -> str:
    """Below 1, without the 0."""
    return f"{share:.{digits}f}".replace("0.", ".", 1)


def signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("0.", ".", 1)


def span(shares: Iterable[float]) -> str:
    shares = list(shares)
    return f"{100 * min(shares):.0f} to {100 * max(shares):.0f} %"
