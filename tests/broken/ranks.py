"""One rank of `./launch.sh break`: trains the embedded job twice in one process, right and then with the mistake planted.

`python tests/broken/ranks.py SPEC.json`. What the command changes for both runs (a spike, short notes, a stop in the middle) is planted
first, so the mistake is the only difference between them."""

import dataclasses
import gc
import json
import signal
import sys
import zlib
from pathlib import Path

import deepspeed
import numpy as np
import torch
from mistakes import MISTAKES, SHOWN_ONLY

import loop.data.dataset
import loop.train as train
from loop.distributed.world import Ranks
from loop.monitor.quiet import quiet_libraries
from loop.zero3.gradients import local_gradients

HELD_OUT = (
    12  # examples of each evaluation: enough to see a gap, and an evaluation takes a second or two
)


class NoStop:
    """In the place of StopRequest: asks to stop where the spec says so, and leaves Ctrl-C to end the process at once."""

    reason, requested = None, False


def plant_spike(at: int, factor: float) -> None:
    """The gradient of step `at` is `factor` times as large, as of a spoilt batch."""
    step, count = train.train_step, [0]

    def spiked(engine, *args):
        count[0] += 1
        backward = engine.backward
        engine.backward = lambda loss, **kw: backward(
            loss * (factor if count[0] == at else 1.0), **kw
        )
        try:
            return step(engine, *args)
        finally:
            engine.backward = backward

    def fresh(config, ds):
        count[0] = 0
        return run(config, ds)

    run, train.train, train.train_step = train.train, fresh, spiked


def shorten_notes() -> None:
    """Of every second note only the line with the diagnosis is left, so that examples have very unequal numbers of targets."""
    encode = loop.data.dataset.encode_examples

    def shortened(c):
        line = next(
            (line for line in c.messages[-1]["content"].splitlines() if line.startswith("A:")), "A:"
        )
        return dataclasses.replace(
            c, messages=[*c.messages[:-1], c.messages[-1] | {"content": line}]
        )

    loop.data.dataset.encode_examples = lambda tokenizer, conversations, *rest: encode(
        tokenizer,
        [shortened(c) if zlib.crc32(c.id.encode()) % 2 else c for c in conversations],
        *rest,
    )


def watch_held_out(config, eos: bool) -> None:
    """Both runs are evaluated on the same right examples, whatever the mistake makes of its own; eos: and on their last token alone."""
    held_out = loop.data.dataset.load_examples(config, train.load_tokenizer(config.base), "valid")[
        0
    ][:HELD_OUT]
    ends = [
        dataclasses.replace(e, labels=np.where(np.arange(len(e)) == len(e) - 1, e.labels, -100))
        for e in held_out
    ]
    evaluate = train.evaluate_loss

    def both(engine, _, *rest):
        figures = evaluate(engine, held_out, *rest)
        return figures | (
            {"eval/eos_loss": evaluate(engine, ends, *rest)["eval/loss"]} if eos else {}
        )

    train.evaluate_loss = both


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    quiet_libraries()
    spec = json.loads(Path(sys.argv[1]).read_text())
    stop_at, at, gradients, engines, done = spec["resume"], spec["at"], [], [], [0]
    ranks = Ranks()
    watch_held_out(train.load_config(spec["args"]), spec["eos"])
    if spec["spike"]:
        plant_spike(*spec["spike"])
    if spec["short_notes"]:
        shorten_notes()
    clip, initialize = train.clip_grad_norm, deepspeed.initialize
    train.StopRequest, train.Monitor.say = lambda *_: NoStop, lambda *_: None

    def recording(parameters, max_norm):
        done[0] += 1
        if done[0] == at:
            gradients.append(
                torch.cat([g.flatten() for g in local_gradients(parameters)]).double().cpu()
            )
        NoStop.reason, NoStop.requested = (
            ("in mid-run", True) if done[0] == stop_at else (None, False)
        )
        return clip(parameters, max_norm)

    def remembering(**kwargs):
        engines.append(initialize(**kwargs))
        return engines[-1]

    train.clip_grad_norm, deepspeed.initialize = recording, remembering
    for name in ("right", "wrong"):
        if name == "wrong":
            (MISTAKES | SHOWN_ONLY)[spec["name"]]()
        done[0] = 0
        for _ in range(2 if stop_at else 1):
            NoStop.reason, NoStop.requested = None, False
            if ranks.is_main:
                print(f"{name}{f', from step {done[0]}' if done[0] else ''}", flush=True)
            config = train.load_config([*spec["args"], f"run.name={name}"])
            train.train(config, train.build_ds_config(config))
            engines.pop()[0].destroy()
            gc.collect()
    right, wrong = gradients
    squares = ranks.sum_scalars((wrong - right).square().sum().item(), right.square().sum().item())
    if ranks.is_main:
        Path(spec["out"]).write_text(
            json.dumps({"step": at, "gradient_distance": (squares[0] / squares[1]) ** 0.5})
        )
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except train.ConfigError as error:
        train.exit_with_config_error(error)
