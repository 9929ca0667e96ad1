"""What this machine is, as its node's row tells it."""

from __future__ import annotations

import platform
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil
from django.conf import settings

from workers.memory import gpu_memory, has_gpu_build


@lru_cache(maxsize=1)
def hardware() -> dict[str, Any]:
    """Return cores, processor, system, whether llama.cpp was compiled for a GPU, and what is known of GPUs; memory in bytes."""
    return {
        "cpu_cores": psutil.cpu_count(logical=False) or psutil.cpu_count() or 1,
        "cpu_name": _cpu_name(),
        "system": f"{platform.system()} {platform.machine()}",
        "has_gpu": has_gpu_build(),
        "gpu_names": _gpu_names(),
        "gpu_memory_bytes": gpu_memory(),
    }


def free_disk() -> int:
    """Return the free bytes of the disk with the models directory; 0 while there is none."""
    try:
        return shutil.disk_usage(settings.MODELS_DIR).free
    except OSError:
        return 0


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def _gpu_names() -> list[str]:
    if not has_gpu_build():
        return []
    try:
        command = ("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in answer.splitlines() if line.strip()]
