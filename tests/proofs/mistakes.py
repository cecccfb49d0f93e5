"""The classic mistakes, each planted into the real loop by replacing one function.

The proofs of test_gradient.py must catch them, and `./launch.sh break` shows them.
"""

import numpy as np
import torch
from deepspeed.utils import safe_get_local_fp32_param, safe_set_local_fp32_param

import loop.checkpoint.checkpointer
import loop.data.collate
import loop.data.dataset
import loop.train
from loop.zero3.gradients import local_gradients


def divide_by_accumulation_steps():
    """Each micro-batch's loss is its own mean, then averaged over micro-batches: a short note
    weighs as much as a long one.
    """
    step = loop.train.train_step

    def wrong(engine, parameters, micro_batches, num_targets, *rest, **options):
        backward, rounds = engine.backward, iter(micro_batches)

        def mean_of_means(loss, scale_wrt_gas=False):
            mine = (next(rounds).targets != -100).sum().clamp(min=1)
            backward(loss * num_targets / mine / len(micro_batches), scale_wrt_gas=False)

        engine.backward = mean_of_means
        try:
            return step(engine, parameters, micro_batches, num_targets, *rest, **options)
        finally:
            engine.backward = backward

    loop.train.train_step = wrong


def forget_world_size():
    """DeepSpeed averages gradients over ranks; without the factor the gradient shrinks with every
    GPU added.
    """
    step = loop.train.train_step

    def wrong(engine, *args, **options):
        backward = engine.backward
        engine.backward = lambda loss, **kw: backward(
            loss / torch.distributed.get_world_size(), **kw
        )
        try:
            return step(engine, *args, **options)
        finally:
            engine.backward = backward

    loop.train.train_step = wrong


def unequal_ranks():
    """Each rank divides by its own targets and DeepSpeed averages: a token weighs more on the rank
    that has few of them.
    """
    step = loop.train.train_step

    def wrong(engine, parameters, micro_batches, num_targets, *rest, **options):
        backward = engine.backward
        mine = sum((batch.targets != -100).sum().item() for batch in micro_batches)
        engine.backward = lambda loss, **kw: backward(
            loss * num_targets / max(mine, 1) / torch.distributed.get_world_size(), **kw
        )
        try:
            return step(engine, parameters, micro_batches, num_targets, *rest, **options)
        finally:
            engine.backward = backward

    loop.train.train_step = wrong


def bf16_accumulation():
    """The accumulated gradient is rounded to bf16 after every micro-batch, as with
    `grad_accum_dtype: bf16`, which the loop refuses."""
    step = loop.train.train_step

    def wrong(engine, parameters, *args, **options):
        backward = engine.backward

        def rounding(loss, **kw):
            backward(loss, **kw)
            for gradient in local_gradients(parameters):
                gradient.copy_(gradient.bfloat16())

        engine.backward = rounding
        try:
            return step(engine, parameters, *args, **options)
        finally:
            engine.backward = backward

    loop.train.train_step = wrong


def one_document_mask():
    """The row is treated as one document: every note reads its neighbours."""
    collate = loop.train.collate

    def wrong(examples, packing):
        batch = collate(examples, packing)
        row = torch.tensor([0, batch.input_ids.shape[1]], dtype=torch.int32)
        return loop.data.collate.PackedBatch(
            **{**batch.__dict__, "cu_seqlens": row, "max_seqlen": batch.input_ids.shape[1]}
        )

    loop.train.collate = wrong


def positions_run_on():
    """Position ids count through the row. With rotary embeddings alone a shifted document attends
    as before: only rounding tells.
    """
    collate = loop.train.collate

    def wrong(examples, packing):
        batch = collate(examples, packing)
        return loop.data.collate.PackedBatch(
            **{**batch.__dict__, "position_ids": torch.arange(batch.input_ids.shape[1])[None]}
        )

    loop.train.collate = wrong


def targets_cross_documents():
    """The shift by one runs over the whole row, so that the last token of a document predicts its
    neighbour's first."""
    collate = loop.train.collate

    def wrong(examples, packing):
        batch = collate(examples, packing)
        if len(examples) > 1:
            ends = batch.cu_seqlens[1:-1].long() - 1
            batch = loop.data.collate.PackedBatch(
                **{
                    **batch.__dict__,
                    "target_positions": torch.cat([batch.target_positions, ends]),
                    "targets": torch.cat([batch.targets, batch.input_ids[0, ends + 1]]),
                }
            )
        return batch

    loop.train.collate = wrong


def unsupervised_eos():
    """The EOS behind the note is no target: the model never learns to stop."""
    encode = loop.data.dataset.encode_examples

    def wrong(*args):
        examples = encode(*args)
        for e in examples:
            e.labels[-1] = -100
        return examples

    loop.data.dataset.encode_examples = wrong


def prompt_supervised():
    """Every token is a target: three quarters of the gradient teach the model to play doctor and
    patient."""
    encode = loop.data.dataset.encode_examples
    loop.data.dataset.encode_examples = lambda tokenizer, conversations, supervise="note": encode(
        tokenizer, conversations, "all"
    )


def no_clipping():
    """The norm is measured and nothing is clipped."""
    clip = loop.train.clip_grad_norm
    loop.train.clip_grad_norm = lambda parameters, max_norm: clip(parameters, float("inf"))


def stale_grad_norm():
    """The norm is read from DeepSpeed, which still holds the last step's: the clipping factor is
    one step late.
    """
    last = [1.0]
    clip = loop.train.clip_grad_norm

    def wrong(parameters, max_norm):
        factor, norm = min(1.0, max_norm / last[0]), clip(parameters, float("inf"))
        torch._foreach_mul_(local_gradients(parameters), factor)
        last[0] = norm.item()
        return norm

    loop.train.clip_grad_norm = wrong


def deepspeed_clips_too():
    """`gradient_clipping` left out of DeepSpeed's configuration: it clips at 1.0 on top of our own
    clipping."""
    build = loop.train.build_model

    def wrong(config, ds_config, *rest):
        ds_config = {k: v for k, v in ds_config.items() if k != "gradient_clipping"}
        return build(config, ds_config, *rest)

    loop.train.build_model = wrong


def lr_stepped_twice():
    """The schedule advances by two a step and reaches its end in half the run."""
    build = loop.train.build_lr_schedule

    def wrong(config, num_steps):
        schedule = build(config, num_steps)
        return lambda step: schedule(2 * step)

    loop.train.build_lr_schedule = wrong


def unequal_examples():
    """The step's last example is left out, as by a sampler with drop_last, while the loss is still
    divided by all targets."""
    split = loop.train.split_step

    def wrong(step, *rest):
        return split(np.asarray(step)[:-1], *rest)

    loop.train.split_step = wrong


def stale_resume():
    """After a resume the optimizer's fp32 masters are those of the start: the first update writes
    them over the loaded weights.
    """
    put = loop.checkpoint.checkpointer.scatter_full_tensor

    def wrong(p, kind, whole, ranks):
        stale = safe_get_local_fp32_param(p).clone()
        put(p, kind, whole, ranks)
        if kind == "master":
            safe_set_local_fp32_param(p, stale)

    loop.checkpoint.checkpointer.scatter_full_tensor = wrong


def resume_without_moments():
    """After a resume Adam's moments and its step count begin at zero: its first update moves every
    weight by the full learning rate."""
    put, create = (
        loop.checkpoint.checkpointer.scatter_full_tensor,
        loop.checkpoint.checkpointer.create_adam_state,
    )
    loop.checkpoint.checkpointer.scatter_full_tensor = lambda p, kind, *rest: (
        put(p, kind, *rest) if kind == "master" else None
    )
    loop.checkpoint.checkpointer.create_adam_state = lambda engine, step: create(engine, 0)


MISTAKES = {
    f.__name__: f
    for f in (
        divide_by_accumulation_steps,
        forget_world_size,
        unequal_ranks,
        bf16_accumulation,
        one_document_mask,
        positions_run_on,
        targets_cross_documents,
        unsupervised_eos,
        prompt_supervised,
        no_clipping,
        stale_grad_norm,
        deepspeed_clips_too,
        lr_stepped_twice,
        unequal_examples,
    )
}
# test_train.py's runs are never broken off, so it can't see these; that a resumed run is the
# unbroken one is test_checkpoint.py's proof.
SHOWN_ONLY = {f.__name__: f for f in (stale_resume, resume_without_moments)}
