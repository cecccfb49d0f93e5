"""TRL's SFTTrainer on given token ids and labels, in a given order: `python
tests/proofs/trl_peer.py SPEC.json` prints its losses.
"""

import json
import sys

import torch
from datasets import Dataset
from reference import reference_model
from safetensors.torch import load_file
from trl import SFTConfig, SFTTrainer

from loop.model.loading import load_tokenizer

with open(sys.argv[1]) as file:
    spec = json.load(file)
model = reference_model(spec["base"], "lora", spec["lora"])
initial = load_file(spec["initial"])
with torch.no_grad():
    for i, p in enumerate(p for p in model.parameters() if p.requires_grad):
        p.copy_(initial[f"0.weight.{i}"])

losses = []


class Recording(SFTTrainer):
    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        losses.append((loss[0] if isinstance(loss, tuple) else loss).item())
        return loss


arguments = SFTConfig(
    output_dir=spec["out"],
    per_device_train_batch_size=spec["batch"],
    max_steps=spec["steps"],
    learning_rate=spec["lr"],
    lr_scheduler_type="cosine",
    weight_decay=spec["weight_decay"],
    max_grad_norm=spec["max_grad_norm"],
    adam_epsilon=spec["eps"],
    train_sampling_strategy="sequential",
    dataset_kwargs={"skip_prepare_dataset": True},
    max_length=None,
    packing=False,
    bf16=False,
    gradient_checkpointing=False,
    use_cpu=True,
    optim="adamw_torch",
    report_to="none",
    save_strategy="no",
    disable_tqdm=True,
)
rows = Dataset.from_list([{"input_ids": ids, "labels": labels} for ids, labels in spec["examples"]])
Recording(
    model=model, args=arguments, train_dataset=rows, processing_class=load_tokenizer(spec["base"])
).train()
print(json.dumps(losses))
