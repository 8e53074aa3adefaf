"""What a run had and used: processor, GPUs, peak memory."""

from __future__ import annotations

import os
import platform
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

OWN = Path("/proc/self")


def hardware() -> dict[str, Any]:
    """`cpu` and `gpus` by name; `cores` this process may use; `memory_gb` of the machine."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    count = torch.cuda.device_count()
    return {
        "cpu": _cpu_name(),
        "cores": cores,
        "memory_gb": round(pages / 1e9, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(count)],
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def reset_peak() -> None:
    """From here on the peaks count: the jobs of a sweep take turns in one process.

    Where the kernel has no such reset, the resident peak is that of the process so far.
    """
    import torch

    with suppress(OSError):  # not Linux, or a container that denies it
        (OWN / "clear_refs").write_text("5")  # the peak is what is resident now: proc(5)
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> dict[str, float | None]:
    """In MB: the resident peak of this process (other ranks and workers are not in it), and the
    largest sum of tensors on its GPU; None without one.
    """
    import torch

    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0
    return {
        "memory_mb": round(_resident_peak() / 1e6, 1),
        "gpu_memory_mb": round(gpu / 1e6, 1) if gpu else None,
    }


def _resident_peak() -> int:
    try:
        lines = (OWN / "status").read_text().splitlines()
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
