"""The loss of an adapter (or a whole model) in a process of its own, loaded as anybody would: transformers and PEFT, nothing of this project.

`python loop/fresh.py FOLDER DEVICE < rows.json`; rows: [[input_ids, labels], ...], a label of -100 is not counted. Prints nats a supervised
token. Each row goes through the model alone, so packing and its attention play no part here."""

import json
import os
import sys
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


@torch.no_grad()
def loss_of(folder: str, device: str, rows: list[tuple[list[int], list[int]]]) -> float:
    options: dict[str, Any] = {"dtype": "auto", "device_map": {"": device}, "use_safetensors": True}
    adapter = os.path.isfile(os.path.join(folder, "adapter_config.json"))
    if adapter:
        with open(os.path.join(folder, "trained.json")) as file:
            trained = json.load(file)
        options["dtype"] = dtype = getattr(torch, trained["dtype"])
        if trained["storage"] == "nf4":
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=trained["double_quant"],
                bnb_4bit_compute_dtype=dtype,
            )
    model = (
        (AutoPeftModelForCausalLM if adapter else AutoModelForCausalLM)
        .from_pretrained(folder, **options)
        .eval()
    )
    total, count = 0.0, 0
    for ids, labels in rows:
        logits = (
            model(input_ids=torch.tensor([ids], device=device), use_cache=False)
            .logits[0, :-1]
            .float()
        )  # [L - 1, V]
        targets = torch.tensor(labels[1:], device=device)
        total += torch.nn.functional.cross_entropy(
            logits, targets, ignore_index=-100, reduction="sum"
        ).item()
        count += int((targets != -100).sum())
    return total / count


if __name__ == "__main__":
    print(loss_of(sys.argv[1], sys.argv[2], json.load(sys.stdin)))
