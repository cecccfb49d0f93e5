"""The loss of an adapter or a full model, loaded as anybody would: by transformers and PEFT.

It imports nothing of this project, and runs as a script:
`python standalone_loss.py < request.json`, a list of folder, device and rows. Rows are [[input_ids,
labels], ...], and a label of -100 does not count. It prints nats per supervised token. Each row
goes through the model alone, so packing and its attention play no part here. Libraries are imported
before the request is read: it can be started ahead of it.
"""

import json
import os
import sys
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


def load(folder: str, device: str):
    """A folder's model, in evaluation mode. trained.json says how an adapter's base is stored."""
    options: dict[str, Any] = {
        "dtype": "auto",
        "device_map": {"": device},
        "use_safetensors": True,
        "trust_remote_code": False,
    }
    if not os.path.isfile(os.path.join(folder, "adapter_config.json")):
        return AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    with open(os.path.join(folder, "trained.json")) as file:
        trained = json.load(file)
    options["dtype"] = getattr(torch, trained["dtype"])
    if trained["storage"] == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=trained["double_quant"],
            bnb_4bit_compute_dtype=options["dtype"],
        )
    model = AutoPeftModelForCausalLM.from_pretrained(folder, **options).eval()
    for module in model.modules():  # that kernel raises where a width is no multiple of 64
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


@torch.no_grad()
def loss_of(folder: str, device: str, rows: list[tuple[list[int], list[int]]]) -> float:
    """The mean cross-entropy over all labels that count, in nats. rows: (input_ids, labels)."""
    model = load(folder, device)
    total = 0.0
    count = 0
    for ids, labels in rows:
        input_ids = torch.tensor([ids], device=device)
        logits = model(input_ids=input_ids, use_cache=False).logits[0, :-1].float()  # [L - 1, V]
        targets = torch.tensor(labels[1:], device=device)
        total += torch.nn.functional.cross_entropy(
            logits, targets, ignore_index=-100, reduction="sum"
        ).item()
        count += int((targets != -100).sum())
    return total / count


if __name__ == "__main__":
    print(loss_of(*json.load(sys.stdin)))
