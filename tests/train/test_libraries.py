"""The memory of a rank's interpreter and libraries, which the plan adds on CPU."""

from __future__ import annotations

import subprocess
import sys

import pytest

from forge.plan.memory import LIBRARIES_BYTES

MEASURE = """
import pathlib, re
from forge.train.process_group import import_late_modules
import_late_modules(device="cpu")
import forge.elastic.workers.worker_process
import torch, transformers
torch.randn(1024, 1024) @ torch.randn(1024, 1024)
transformers.LlamaForCausalLM
status = pathlib.Path("/proc/self/status").read_text()  # getrusage would count the parent before the exec
print(int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) * 1024)
"""


@pytest.mark.slow
def test_libraries_bytes__imports_of_a_rank__are_what_the_plan_adds() -> None:
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, timeout=120, check=True)
    assert (
        0.8 < int(done.stdout.splitlines()[-1]) / LIBRARIES_BYTES < 1.4
    )  # 1.24 where accelerate is installed, which imports MLflow
