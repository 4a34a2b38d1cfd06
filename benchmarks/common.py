"""What the benchmarks share: interleaved timings, peak memory, the machine's description, tables and JSON.

Timings on shared machines drift, so only ratios count, and only between runs that were interleaved: every repetition
runs all competitors in turn. A result is a minimum and a median over repetitions.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "clipft",
    "torch",
    "transformers",
    "peft",
    "open_clip_torch",
    "onnxruntime",
    "openvino",
    "nncf",
    "torchao",
    "inf_cl",
    "memeff",
    "siglip-kernel",
)


def machine() -> dict[str, Any]:
    """CPU, ISA in use, threads and versions."""
    import torch

    from clipft import _C

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "isa": _C.isa(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
    }


def torch_limits() -> dict[str, str]:
    """What the environment holds torch's instruction set to."""
    names = ("ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA")
    return {name: os.environ[name] for name in names if name in os.environ}


def cpu_model() -> str:
    """The kernel's name for the CPU, with family and model, since cloud machines shorten the name."""
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    except OSError:
        return platform.processor() or platform.machine()
    name = fields.get("model name", platform.machine())
    return f"{name} (family {fields.get('cpu family', '?')}, model {fields.get('model', '?')})"


def interleave(competitors: dict[str, Callable[[], object]], repeats: int, rest: float = 0.0) -> dict[str, list[float]]:
    """Seconds of each competitor, `repeats` times in turn after one warm-up round. `rest`: seconds of sleep, and then
    an untimed run, before each timed one, for libraries whose threads go on spinning after their work is done.
    """
    for run in competitors.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in competitors}
    for _ in range(repeats):
        for name, run in competitors.items():
            if rest:
                time.sleep(rest)
                run()
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def gpu_seconds(run: Callable[[], object]) -> float:
    """Of one run on the GPU, by CUDA events."""
    import torch

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def summary(seconds: list[float]) -> dict[str, float]:
    return {"min_s": min(seconds), "median_s": statistics.median(seconds)}


def ratio(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Ours / theirs: of the minima, and the median of the ratios within a repetition."""
    paired = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {"min": min(ours) / min(theirs), "median": statistics.median(paired)}


def reset_peak_memory() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def memory(field: str) -> int:
    """Bytes of this process: "VmRSS" now, "VmHWM" at the peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def place(name: str, about: dict[str, Any]) -> Path:
    """benchmarks/results/<name>-<cpu>-<isa>.json of a machine."""
    slug = "".join(c if c.isalnum() else "-" for c in about["cpu"]).strip("-").lower()
    while "--" in slug:
        slug = slug.replace("--", "-")
    return RESULTS / f"{name}-{slug}-{about['isa']}.json"


def kept(name: str, about: dict[str, Any], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that an earlier run of the same settings left, on this machine with the same versions."""
    path = place(name, about)
    found = json.loads(path.read_text()) if path.exists() else {}
    return found["rows"] if found.get("machine") == about and found.get("settings") == settings else []


def save(name: str, results: dict[str, Any]) -> Path:
    """Writes benchmarks/results/<name>-<cpu>-<isa>.json."""
    RESULTS.mkdir(exist_ok=True)
    path = place(name, results["machine"])
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=1) + "\n")
    temporary.replace(path)
    return path
