"""Imported once by the server of `processes.py`: the slow libraries that every check would otherwise import anew.

Only what leaves the GPU alone when it is imported: a CUDA that was touched before a fork is unusable after it. bitsandbytes,
and with it peft, asks the GPU for its capability. Nor the compiler, which may start helpers of its own. What can't be
imported is for the checks to tell, not for this file.
"""

import contextlib
import importlib

import torch

LIBRARIES = ["transformers.models.llama.modeling_llama", "deepspeed", "loop.kernels.attention"]
for _name in LIBRARIES if torch.cuda.device_count() else [*LIBRARIES, "bitsandbytes", "peft"]:
    with contextlib.suppress(Exception):
        importlib.import_module(_name)
