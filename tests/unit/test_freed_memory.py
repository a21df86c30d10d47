"""A command keeps what a step frees, so that the next step need not wait for fresh pages."""

import platform
import subprocess
import sys

import pytest

COUNT = """
import resource
import torch
from hidream.cli.loading import keep_freed_memory

keep_freed_memory()

def step():
    blocks = [torch.ones(2**20) for _ in range(8)]  # 4 MiB each

step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="only glibc gives memory back so soon"
)
def test_a_step_finds_the_memory_of_the_one_before():
    out = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=True)
    assert int(out.stdout) < 8 * 2**20 // 1024  # pages of one step, of ten
