"""Memory that a process keeps: counted in page faults, in a process of its own."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys

import pytest

# Frees and allocates 64 MiB ten times in another thread, as XLA does with a program's buffers, and touches each page.
CHILD = """
import ctypes, json, resource, sys, threading
from sora_jax.runtime import keep_memory

kept = keep_memory() if sys.argv[1] == "keep" else None
libc, size = ctypes.CDLL(None), 64 << 20
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
libc.malloc.argtypes = [ctypes.c_size_t]

def work():
    for turn in range(11):
        if turn == 1:
            before.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
        piece = libc.malloc(size)
        ctypes.memset(piece, 1, size)
        libc.free(piece)

before = []
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(json.dumps([kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before[0]]))
"""


def faults(how: str, **environment: str) -> tuple[bool | None, int]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_", "LD_PRELOAD"))}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, how], env=clean | environment, capture_output=True, text=True, check=True
    )
    return tuple(json.loads(done.stdout))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_stays_with_a_process_that_computes_on_the_cpu():
    pages = (64 << 20) // os.sysconf("SC_PAGE_SIZE")
    kept, few = faults("keep", JAX_PLATFORMS="cpu")
    _, many = faults("leave", JAX_PLATFORMS="cpu")
    assert kept
    assert few < pages / 10, "after the first turn nothing is asked of the system again"
    assert many > 5 * pages, "without, every turn starts from pages that the system has to give out"


def test_settings_of_the_users_and_accelerators_are_left_alone():
    assert faults("keep", JAX_PLATFORMS="cpu", MALLOC_ARENA_MAX="4")[0] is False
    assert faults("keep", JAX_PLATFORMS="tpu")[0] is False
