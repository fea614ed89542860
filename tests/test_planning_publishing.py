"""The host memory that publishing takes, as a plan tells it, against what it takes."""

import subprocess
import sys

import pytest

from crosscoder_jax.planning.plan import COPIES_WHERE_PUBLISHED

_PUBLISH = """
import sys
from pathlib import Path

import jax
import crosscoder_jax as cc
from crosscoder_jax.publishing import save

def kib(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))

sources = cc.Sources((cc.Source("base", 512), cc.Source("chat", 512)))
crosscoder = cc.Crosscoder(cc.CrosscoderConfig(sources, num_latents=1 << 14), key=jax.random.key(0))
jax.block_until_ready(crosscoder.w_enc[...])
size = 2 * 4 * 1024 * (1 << 14)
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = kib("VmRSS")
save(crosscoder, sys.argv[1])
print(1024 * (kib("VmHWM") - before) / size)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self")
def test_the_host_that_writes_holds_as_many_copies_as_a_plan_tells(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", _PUBLISH, str(tmp_path / "crosscoder")], capture_output=True, text=True
    )
    if "clear_refs" in done.stderr:
        pytest.skip("this kernel does not let a process begin its peak anew")
    assert done.returncode == 0, done.stderr
    # Of 134 MB each; what is imported on the way and allocators move it a little.
    assert float(done.stdout) == pytest.approx(COPIES_WHERE_PUBLISHED, abs=0.25)
