"""How each mistake is shown: in which setting of both runs, by which curves, and what one sees.

The numbers are of two CPU ranks and 40 steps. Another machine rounds otherwise, so they differ a
little there.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shown:
    """One mistake: the explanation and the setting in which it can be seen."""

    paragraph: str
    curves: tuple[str, ...] = ()  # tags beside loss and gradient norm
    args: tuple[str, ...] = ()  # key=value, of both runs
    # Every second note is one line, so that numbers of targets are very unequal.
    short_notes: bool = False
    spike: float | None = None  # the gradient of one step is that many times as large
    resume: bool = False  # both runs are interrupted in the middle and resumed


# A micro-batch holds one example, so that gradients accumulate over some three.
ONE_EXAMPLE_A_ROW = ("batch_size=4", "max_seq_len=640")
VALIDATION = ("eval/loss",)

# deepspeed_clips_too is not here: its second clipping is a constant factor that Adam divides away.
# tests/proofs/test_gradient.py has its numbers.
SHOWN = {
    "divide_by_accumulation_steps": Shown(
        "Every second note is shortened to one line in both runs, and each micro-batch holds one "
        "example. Now a token of a short note weighs nine times as much (18 and 159 targets) as "
        "one of a long note, and with the factor for the ranks left in, the norm of the gradient "
        "is twice the right one: 2.79 instead of 1.39 in step 1, 11.4 instead of 5.9 in step 7. "
        "The losses run together: 0.717 in step 10 of both. Later the wrong one even comes out "
        "lower, 0.076 in step 40 (right: 0.102), validation 0.130 (0.160): nothing in the loss "
        "says which of the two is wrong, only the gradient does.",
        VALIDATION,
        ONE_EXAMPLE_A_ROW,
        short_notes=True,
    ),
    "unequal_ranks": Shown(
        "Every second note is shortened to one line in both runs, so that the ranks of a step "
        "have unequal numbers of targets. Still nothing to see: loss 0.101 in step 40 (right: "
        "0.102), validation 0.158 (0.160), norms of 1.39 in step 1 of both. The gradient of step "
        "1 is 2.5 % away from the right one: over two or three notes a rank the lengths nearly "
        "cancel. Where one rank has 200 targets and another 10, it is 17 % "
        "(tests/proofs/test_gradient.py, on the notes of the tests). The logged loss can't tell, "
        "as it is summed and divided rightly; the gradient alone is wrong.",
        VALIDATION,
        ONE_EXAMPLE_A_ROW,
        short_notes=True,
    ),
    "unequal_examples": Shown(
        "One example of the four in a step is left out, but the loss is divided by the targets of "
        "all. So the wrong curve looks better nearly all the way: 2.20 instead of 2.92 in step 1, "
        "0.053 instead of 0.069 in step 40, and the gradient norm is lower, too (1.05, 1.29). The "
        "validation loss tells the truth, as it is divided by what it sums: 0.70 after 10 steps "
        "(right: 0.58), 0.20 after 20 (0.16), 0.112 after 40 (0.099). More than a quarter of the "
        "examples was never trained on.",
        VALIDATION,
    ),
    "forget_world_size": Shown(
        "As there are two ranks, the gradient norm is half of the right one (0.64 instead of 1.29 "
        "in step 1) and stays near that; on eight it would be an eighth. The loss hardly tells: "
        "0.072 in step 40 (right: 0.069), validation 0.103 (0.099). Adam divides a gradient by "
        "its own size, so a constant factor nearly vanishes; what is left is that clipping at 1 "
        "no longer clips the first steps. It is a mistake all the same: with another number of "
        "GPUs max_grad_norm means something else, and SGD would learn at half the rate.",
        VALIDATION,
    ),
    "bf16_accumulation": Shown(
        "Nothing to see: loss 0.102 in step 40 of both runs, validation 0.159 (right: 0.160), "
        "norms of 1.39 in step 1. The gradient of step 1 is 0.18 % away from the right one. Three "
        "micro-batches are too few: bf16 keeps 8 bits, so each sum is rounded by at most 0.4 %, "
        "at random, and the activations' own rounding is larger. It grows with the number of "
        "micro-batches: when a sum is some 256 times as large as what is added to it, the "
        "addition changes nothing at all.",
        VALIDATION,
        ONE_EXAMPLE_A_ROW,
        short_notes=True,
    ),
    "one_document_mask": Shown(
        "Two documents lie in each rank's row, and the second reads the first. The base never saw "
        "that, so the loss begins at 3.98 instead of 2.92, and the norm of the gradient stays "
        "near 1 instead of falling to 0.3. After 40 steps the loss is 0.67 in training (right: "
        "0.07), but 0.17 on validation examples (right: 0.10), which are evaluated with the right "
        "mask: a training loss far above the validation one is the sign. Step 28 gives it away: "
        "it has one document a row, nothing can leak, and the loss is 0.09.",
        VALIDATION,
    ),
    "positions_run_on": Shown(
        "Nothing to see, in no curve: loss 0.069 in step 40 of both runs, validation 0.0984 "
        "(right: 0.0988), norms of 1.29 in step 1. The gradient of step 1 is 1.8 % away from the "
        "right one, which is what bf16 rounds: rotary embeddings see differences of positions "
        "only, and those within a document are the same wherever it begins. It turns into a real "
        "mistake where a row is longer than the positions that the base was trained on, or where "
        "positions are learned. So the row itself must be looked at, as "
        "tests/data/test_collate.py does.",
        VALIDATION,
    ),
    "targets_cross_documents": Shown(
        "One target too many in each row: the last token of a document is to predict the first of "
        "its neighbour. That is one target in 320, and the gradient of step 1 is 1.0 % away from "
        "the right one; norms and validation loss (0.098 after 40 steps, right: 0.099) show "
        "nothing. The training loss does: what can't be known keeps it up, 0.109 in step 40 "
        "(0.069), and its curve ends on a floor. Step 28 has one document a row, nothing to "
        "cross, and the losses are the same (0.057).",
        VALIDATION,
    ),
    "prompt_supervised": Shown(
        "The loss looks better: it begins at 1.42 instead of 2.92, as the base has read such "
        "dialogues and seven tenths of the tokens are theirs, and the norm of the gradient is a "
        "third. From step 12 on it is the higher one, and stays at 0.26 (right: 0.07): what the "
        "next patient will say can't be known. The two losses are of other tokens and can't be "
        "compared. On the validation notes alone the mistake costs time: 0.70 after 10 steps "
        "(right: 0.58), 0.20 after 20 (0.16), 0.115 after 40 (0.099).",
        VALIDATION,
    ),
    "unsupervised_eos": Shown(
        "Neither loss nor gradient norm shows it: one target of 160 is missing, the losses differ "
        "by 0.6 % in step 1 and by less in step 40, and the validation loss of a run is blind in "
        "the same way, as its examples come from the same code. So here both runs are also "
        "evaluated on the EOS alone (eval/eos_loss). The base knows well when to stop (0.0003 "
        "nats). The right run keeps that: never above 0.023, 0.004 at the end. The wrong one "
        "unlearns it: 0.25 after 10 steps, 1.2 after 20, which is a chance of 31 % to stop where "
        "the note ends, and 0.86 in step 40.",
        ("eval/eos_loss",),
    ),
    "no_clipping": Shown(
        "In step 10 of both runs the gradient is 1,000 times as large (norm 1,080). The right run "
        "clips it to 1 and learns on: loss 0.07 in step 40, 0.10 on validation examples. Without "
        "clipping nothing blows up, which is why this is missed: Adam divides by the root of its "
        "second moment, so one step moves weights by a few learning rates at most. But that "
        "moment forgets only 0.1 % a step (beta2 0.999): it remembers the spike for the rest of "
        "the run, and every later update is divided by it. Learning stands still: from step 13 "
        "the loss lies between 0.34 and 0.47, validation 0.46, and the gradient norm stays near 1 "
        "instead of falling to 0.3.",
        VALIDATION,
        spike=1000.0,
    ),
    "stale_grad_norm": Shown(
        "In step 10 of both runs the gradient is 1,000 times as large (norm 1,100). The factor "
        "that clips it comes from the norm of step 9, so the spike passes unclipped, and step 11, "
        "which is harmless, is divided by 1,100. What follows is what no clipping at all gives: "
        "Adam's second moment remembers the spike, and learning stands still. Loss 0.38 in step "
        "40 (right: 0.07), validation 0.48 (right: 0.10). Before the spike the two runs hardly "
        "differ (0.683 and 0.672 in step 9): the norm that is logged is right in both, and it "
        "changes little from step to step.",
        VALIDATION,
        spike=1000.0,
    ),
    "lr_stepped_twice": Shown(
        "The learning rate shows it at once: it is 0 from step 20 on, half-way. The losses run "
        "together for eight steps; then the wrong run is behind (0.80 instead of 0.70 in step 10) "
        "and stands still when its rate is gone: between 0.25 and 0.44 from step 20 to 40, where "
        "the right one goes from 0.12 to 0.07. The validation loss is 0.4147 after 20, 30 and 40 "
        "steps, the same to the last digit, as no weight moves any more (right: 0.164, 0.107, "
        "0.099). The gradient norm stays at 0.6: there is still much to learn. In code that "
        "counts micro-batches or ranks as steps the factor can be larger than two.",
        ("train/lr",),
    ),
    "stale_resume": Shown(
        "Both runs are interrupted after step 20 and resumed. Step 21 is the same in both, loss "
        "0.095 and gradient to the bit: the weights that compute are the loaded ones, so a look "
        "at the first loss after a resume finds nothing. Then the optimizer writes its own fp32 "
        "copy over them, which is still that of the start: loss 2.84 in step 22 (right: 0.094), "
        "near that of step 1. The second half, with half the learning rate left, does not repair "
        "it: 1.7 in step 40 (0.07), validation 1.88 (0.099), and the gradient norm is back above "
        "1. `train --verify-resume` compares everything, to the bit.",
        VALIDATION,
        resume=True,
    ),
    "resume_without_moments": Shown(
        "Both runs are interrupted after step 20 and resumed. Weights and gradient of step 21 are "
        "right to the bit; only Adam has forgotten. Its first update moves every weight by the "
        "learning rate in the gradient's sign, which shows as a small bump: 0.108 in step 22 "
        "(right: 0.094). After that the wrong run is the better one here: 0.056 in step 40 "
        "(0.069), validation 0.088 (0.099), presumably because the moments it lost still held the "
        "large gradients of the first steps and kept updates small. A curve that looks fine, or "
        "finer, does not prove a resume: it is another run than the uninterrupted one. `train "
        "--verify-resume` tells.",
        VALIDATION,
        resume=True,
    ),
}
