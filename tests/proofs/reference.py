"""The plainest possible fine-tuning loop: one process, one example at a time, no packing, no
DeepSpeed, nothing clever.

`tests/proofs/test_gradient.py` holds the real loop against it. If you want to know what the real
loop computes, read this one.
"""

import torch
import torch.nn.functional as F

from loop.model.loading import load_base


def reference_model(
    base: str, method: str, lora: dict, dtype=torch.float32, device="cpu", double_quant=True
):
    """The base (in NF4 for "qlora") with LoRA, as peft and transformers build it, attention by
    torch.
    """
    from peft import LoraConfig, get_peft_model

    quantization = "nf4" if method == "qlora" else None
    options = {"quantization": quantization, "double_quant": double_quant, "attention": "sdpa"}
    model = load_base(base, dtype, device, **options)
    if method == "full":
        return model.requires_grad_(True)
    return get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", **lora), autocast_adapter_dtype=False
    )


def summed_loss(model, example) -> torch.Tensor:
    """The cross-entropy of one example in nats, summed over its supervised tokens."""
    input_ids = torch.from_numpy(example.input_ids).long()[None].to(model.device)  # [1, L]
    labels = torch.from_numpy(example.labels).long().to(model.device)
    logits = model(input_ids=input_ids, use_cache=False).logits[0]  # [L, V]
    return F.cross_entropy(logits[:-1].float(), labels[1:], ignore_index=-100, reduction="sum")


def reference_steps(
    model,
    initial: list[torch.Tensor],
    steps: list[list],
    lr,
    *,
    weight_decay: float,
    max_grad_norm: float,
    betas=(0.9, 0.999),
    eps=1e-8,
) -> list[dict]:
    """Trains on `steps`, each a list of examples with `input_ids` and `labels` [L], from the
    `initial` trainable weights.

    lr: a function of the step. Returns for each step the mean loss over its supervised tokens, the
    gradients before clipping, their norm, the clipped gradients and the weights after the update.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for p, value in zip(parameters, initial, strict=True):
            p.copy_(value)
    decayed = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in decayed if g["params"]], lr=1.0, betas=betas, eps=eps)
    model.train()
    records = []
    for step, examples in enumerate(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr(step)
        optimizer.zero_grad()
        num_targets = sum(int((e.labels[1:] != -100).sum()) for e in examples)
        total = 0.0
        for e in examples:
            loss_sum = summed_loss(model, e)
            (loss_sum / num_targets).backward()
            total += loss_sum.item()
        grads = [p.grad.clone() for p in parameters]
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm).item()
        clipped = [p.grad.clone() for p in parameters]
        optimizer.step()
        records.append(
            {
                "loss": total / num_targets,
                "norm": norm,
                "grads": grads,
                "clipped": clipped,
                "weights": [p.detach().clone() for p in parameters],
            }
        )
    return records
