"""Imports the slow libraries once, in the server of `processes.py`, for all checks.

It takes only those that leave the GPU alone when they are imported: a CUDA that was used before a
fork is unusable after it. bitsandbytes, and with it peft, asks the GPU for its capability. The
compiler is left out, as it may start helpers of its own. What can't be imported is not reported
here: the checks do that.
"""

import contextlib
import importlib

import torch

LIBRARIES = [
    "transformers.models.llama.modeling_llama",
    "deepspeed",
    "loop.kernels.attention",
]
if not torch.cuda.device_count():
    LIBRARIES += ["bitsandbytes", "peft"]
for _name in LIBRARIES:
    with contextlib.suppress(Exception):
        importlib.import_module(_name)
