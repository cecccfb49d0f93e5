"""What a person sees of a run: a few lines before it, a progress bar, TensorBoard, `metrics.jsonl`, a summary."""

import logging
import os
import warnings

import transformers


def quiet_libraries() -> None:
    """Libraries speak when something is wrong; their news about themselves would bury the lines that matter."""
    warnings.filterwarnings("ignore")
    for name in ("DeepSpeed", "deepspeed", "bitsandbytes", "torch", "datasets", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"  # it is imported late, where it is needed
