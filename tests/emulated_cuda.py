"""The CUDA ops on an emulated GPU: built from csrc/, cuda/ and tests/cuda/, and put in the CPU ops' place."""

from __future__ import annotations

import contextlib
import ctypes
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch

from clipft.nn import QuantizedLinear

ROOT = Path(__file__).parents[1]
OPS = re.findall(r"^OP_CUDA\((\w+)", (ROOT / "csrc" / "ops" / "ops_cuda.inc").read_text(), re.M)


def build(folder: Path, device_code: Path = ROOT / "cuda") -> None:
    done = subprocess.run(
        ["make", "-s", "-j2", "-C", str(ROOT / "tests" / "cuda"), f"BUILD={folder}", f"CUDA={device_code}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


class EmulatedCuda:
    """One GPU, as long as the process lives. Kernels' faults (races, bounds) come as the ops' RuntimeErrors."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._registered = folder, False
        self._library = ctypes.CDLL(str(folder / "lib" / "clipft_emulated.so"))
        for name in ("emulated_pretend", "emulated_register", "emulated_problem"):
            getattr(self._library, name).restype = ctypes.c_char_p
        libtorch = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
        problem = self._library.emulated_pretend(str(libtorch).encode())
        assert problem is None, problem.decode()

    def problem(self, device: int = 0) -> str | None:
        """Why the kernels cannot run."""
        text = self._library.emulated_problem(device)
        return text.decode() if text is not None else None

    def launches(self, prefix: str = "") -> int:
        """Of kernels whose names begin so."""
        return int(ctypes.CDLL(str(self._folder / "libcuda.so")).emulated_launches(prefix.encode()))

    def compilations(self) -> int:
        return int(ctypes.CDLL(str(self._folder / "libnvrtc.so")).emulated_compilations())

    @contextlib.contextmanager
    def without_optional(self) -> Iterator[None]:
        """Within, torch lacks the functions that it has only since 2.11 or 2.13, or promises to nobody."""
        self._library.emulated_has_optional(0)
        try:
            yield
        finally:
            self._library.emulated_has_optional(1)

    def _register(self) -> None:
        if not self._registered:
            problem = self._library.emulated_register(str(self._folder / "libcuda.so").encode())
            assert problem is None, problem.decode()
        self._registered = True

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Within, clipft's ops on CPU tensors are those of the emulated GPU."""
        self._register()
        library = torch.library.Library("clipft", "IMPL")
        for name in OPS:
            op = getattr(torch.ops.clipft_emulated, name).default
            library.impl(name, op, "CPU", allow_override=True)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # between its products torch's other threads would only spin
        operands = QuantizedLinear._operands
        on_gpu = lambda layer, none: (layer._plain_weight(), *operands(layer, none)[1:])  # noqa: E731
        QuantizedLinear._operands = on_gpu
        try:
            yield
        finally:
            QuantizedLinear._operands = operands
            torch.set_num_threads(threads)
            library._destroy()
