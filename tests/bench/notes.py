"""`./launch.sh bench --notes`: how fast notes are written, beside transformers' generate.

A base with random weights is built in place: in NF4 with LoRA for the engine, then plain, as a
merged model, for generate. Beside each speed stands its share of the byte floor: the time that
reading all weights and all keys and values once a step takes at this machine's bandwidth. What
fails is said and the rest goes on; the exit code is 1 then.
"""

import argparse
import functools
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from shapes import SHAPES, make_base

HERE = Path(__file__).resolve().parent
RANK = 8  # of LoRA


def parse_args() -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        prog="launch.sh bench --notes", description="Measure how fast notes are written."
    )
    add = parser.add_argument
    add("--notes", action="store_true", help="this benchmark, instead of training's")
    add("--shape", choices=SHAPES, default="tinyllama" if on_gpu else "embedded")
    add("--slots", type=int, nargs="+", default=[2, 16, 64, 250] if on_gpu else [2, 8])
    add("--prompt", type=int, default=920 if on_gpu else 200, help="tokens of each prompt")
    add("--tokens", type=int, default=400 if on_gpu else 32, help="of each note")
    add("--peer-tokens", type=int, default=64 if on_gpu else 16, help="of a note by generate")
    add(
        "--compared",
        type=int,
        nargs=2,
        default=[32, 100] if on_gpu else [4, 16],
        metavar=("NOTES", "TOKENS"),
        help="greedy notes that are compared with generate's",
    )
    add("--without-peer", action="store_true", help="no generate beside it")
    add("--peer", choices=["unsloth"], help="its generate as well, in a process of its own")
    add("--json", help="write all figures there")
    return parser.parse_args()


def build_plain(shape: str, device: str):
    """The model in bf16 with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(LlamaConfig(**SHAPES[shape], dtype="bfloat16")).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def make_qlora(model):
    """The same model with its layers in NF4 and LoRA on them, as an adapter is loaded."""
    import bitsandbytes as bnb
    from peft import LoraConfig, get_peft_model

    from loop.model.quantization import keep_codes

    for parent in list(model.model.layers.modules()):
        for name, linear in list(parent.named_children()):
            if type(linear) is torch.nn.Linear:
                quantized = bnb.nn.Linear4bit(
                    linear.in_features,
                    linear.out_features,
                    bias=False,
                    compute_dtype=torch.bfloat16,
                    quant_type="nf4",
                    device="meta",
                )
                quantized.weight = bnb.nn.Params4bit(
                    linear.weight.data.cpu(),
                    requires_grad=False,
                    quant_type="nf4",
                    compress_statistics=True,
                    module=quantized,
                )
                setattr(parent, name, quantized.to(linear.weight.device))
    keep_codes(model, torch.bfloat16)
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, 0, 0.01)
    return model.eval()


class Tokens:
    """What writing asks of a tokenizer; no note of random weights comes to its own end."""

    eos_token_id = -1
    pad_token_id = 0

    def decode(self, ids, **_) -> str:
        return " ".join(map(str, torch.as_tensor(ids).tolist()))

    def batch_decode(self, rows, **_) -> list[str]:
        return [self.decode(row) for row in rows]


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def make_requests(model, lengths: list[int], tokens: int) -> list:
    """Notes of so many tokens, each on a random prompt of its length."""
    from loop.generation.engine import NoteRequest

    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    return [
        NoteRequest(
            str(i), torch.randint(3, vocabulary, (length,), generator=generator).tolist(), tokens
        )
        for i, length in enumerate(lengths)
    ]


def measure_engine(model, count: int, args: argparse.Namespace) -> dict:
    """One call as a command makes it, its parts included, and the time of a step in it."""
    from loop.config.schema import GenerationSettings
    from loop.generation.decode import write_notes
    from loop.generation.engine import SlotModel

    requests = make_requests(model, [args.prompt] * count, args.tokens)
    generation = GenerationSettings(max_new_tokens=args.tokens, end_loops=False)
    starts: list[float] = []
    slots: list[int] = []
    step = SlotModel.step

    def timed(self, longest):
        starts.append(time.perf_counter())
        slots.append(self.kv.shape[0])
        return step(self, longest)

    SlotModel.step = timed
    try:
        write_notes(model, Tokens(), requests[:1], generation)  # compiles, compares logits
        starts.clear()
        slots.clear()
        synchronize()
        start = time.perf_counter()
        notes = write_notes(model, Tokens(), requests, generation)
        synchronize()
        seconds = time.perf_counter() - start
    finally:
        SlotModel.step = step
    if not starts:
        raise RuntimeError("written by transformers' generate: the engine was not used")
    tokens = sum(len(note.text.split()) for note in notes)
    steady = starts[len(starts) // 4]  # behind the capture
    return {
        "tokens_per_second": tokens / seconds,
        "seconds": seconds,
        "step_ms": 1e3 * (time.perf_counter() - steady) / (len(starts) - len(starts) // 4),
        "before_steps_s": starts[0] - start,
        "slots": max(slots),
    }


def measure_generate(model, count: int, args: argparse.Namespace) -> dict:
    """transformers' generate on the plain model; its decoding alone, without the prompts."""
    ids = torch.randint(3, model.config.vocab_size, (count, args.prompt), device=model.device)
    mask = torch.ones_like(ids)

    def seconds(tokens: int) -> float:
        synchronize()
        start = time.perf_counter()
        with torch.no_grad():
            model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
            )
        synchronize()
        return time.perf_counter() - start

    seconds(2)
    step = (seconds(args.peer_tokens) - seconds(2)) / (args.peer_tokens - 2)
    return {"tokens_per_second": count / step, "step_ms": 1e3 * step, "slots": count}


def measure_unsloth(base: Path, count: int, args: argparse.Namespace) -> dict:
    """Unsloth's generate, NF4 with LoRA, in a process of its own: it patches transformers."""
    numbers = map(str, (count, args.prompt, args.peer_tokens))
    command = [sys.executable, str(HERE / "notes_unsloth.py"), str(base), *numbers]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no output"])[-1])
    step = json.loads(done.stdout.splitlines()[-1])
    return {"tokens_per_second": count / step, "step_ms": 1e3 * step, "slots": count}


def where_they_part(model, prompt: list[int], pair: list[list[int]]) -> tuple[float, float | None]:
    """(usual difference of the best two tokens' logits, that of the two tokens where notes part).

    In standard deviations of the plain model's logits; None where the notes are equal.
    """
    length = len(pair[0])
    same = next((i for i, (a, b) in enumerate(zip(*pair)) if a != b), length)
    ids = torch.tensor([prompt + pair[0][:same]], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :].float()
    best, scale = logits.topk(2).values, logits.std(1)
    usual = ((best[:, 0] - best[:, 1]) / scale).median().item()
    if same == length:
        return usual, None
    gap = logits[same, pair[0][same]] - logits[same, pair[1][same]]
    return usual, (gap.abs() / scale[same]).item()


@torch.no_grad()
def compare_greedy(model, args: argparse.Namespace) -> dict:
    """Greedy notes by the engine and by generate, on one model, and where they part.

    In 16 bits two tokens can have the same logit but for rounding. So where notes part, the plain
    model's logits of the two tokens are compared: `gaps` are their differences, beside the usual
    difference of the best two tokens.
    """
    from loop.config.schema import GenerationSettings
    from loop.generation.decode import engine_writer, plain_writer
    from loop.generation.engine_choice import open_engine

    count, tokens = args.compared
    lengths = [args.prompt - i * args.prompt // (2 * count) for i in range(count)]
    requests = make_requests(model, lengths, tokens)
    generation = GenerationSettings(max_new_tokens=tokens, end_loops=False)
    with open_engine(model, requests[0].prompt) as engine:
        ours = engine_writer(engine, Tokens(), generation, None, None)(requests, "", None, None)
    theirs = plain_writer(model, Tokens(), generation, False, None, 16)(requests, "", None, None)
    parted = [
        where_they_part(model, request.prompt, [list(map(int, n.text.split())) for n in notes])
        for request, *notes in zip(requests, ours, theirs)
    ]
    gaps = [gap for _, gap in parted if gap is not None]
    usual = [usual for usual, _ in parted]
    return {"notes": count, "equal": count - len(gaps), "gaps": gaps, "usual": usual}


def describe_comparison(name: str, found: dict) -> str:
    line = f"{name}: {found['equal']} of {found['notes']} greedy notes as generate writes them"
    if found["gaps"]:
        usual = statistics.median(found["usual"])
        line += (
            f"; where one parts, the two tokens' logits are {max(found['gaps']):.4f} sd apart at "
            f"most (the best two otherwise: {usual:.4f}, median)"
        )
    return line


def bytes_of_step(shape: str, slots: int, args: argparse.Namespace) -> float:
    """Bytes that a step must read in 16 bits: layers, head, keys and values half-way."""
    s = SHAPES[shape]
    hidden, layers = s["hidden_size"], s["num_hidden_layers"]
    size = hidden // s["num_attention_heads"]
    attention = 2 * hidden * (hidden + s["num_key_value_heads"] * size)
    weights = layers * (attention + 3 * hidden * s["intermediate_size"])
    weights += hidden * s["vocab_size"]
    pairs = 2 * layers * s["num_key_value_heads"] * size
    return 2 * (weights + slots * pairs * (args.prompt + args.tokens / 2))


def bandwidth() -> float:
    """Bytes a second that a copy reads and writes here and now."""
    from kernels_check.ceilings import check_bandwidth

    row = next(iter(check_bandwidth("cuda" if torch.cuda.is_available() else "cpu")))
    return row.speed * 1e9


def describe(name: str, count: int, found: dict) -> str:
    line = (
        f"{name:34} {count:5} {found['tokens_per_second']:9,.0f} {found['step_ms']:9.2f} "
        f"{found['of_floor']:12.1%}"
    )
    if "seconds" in found:
        before = found["before_steps_s"]
        line += f"  {found['seconds']:.2f} s in all, {before:.2f} before the first step"
    return line


class Measurements:
    """What is found is said and written at once, as a later part can fail or take too long."""

    def __init__(self, args: argparse.Namespace, bandwidth: float) -> None:
        """bandwidth: bytes a second, for the floor of a step."""
        self.args = args
        self.bandwidth = bandwidth
        self.found: dict[str, dict] = {}

    def attempt(self, name: str, find: Callable[[], tuple[dict, str]]) -> None:
        """find: gives figures and the line that says them."""
        try:
            self.found[name], line = find()
        except Exception as error:
            traceback.print_exc()
            self.found[name] = {"error": f"{type(error).__name__}: {error}"}
            line = f"{name}: FAILED: {error}"[:200]
        print(line, flush=True)
        if self.args.json:
            Path(self.args.json).write_text(json.dumps(self.found, indent=1))
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def speed(self, name: str, measure, model, counts: list[int]) -> None:
        """Of a writer, for each number of notes at a time."""

        def find(count: int) -> tuple[dict, str]:
            found = measure(model, count, self.args)
            floor = bytes_of_step(self.args.shape, found["slots"], self.args) / self.bandwidth
            found["of_floor"] = 1e3 * floor / found["step_ms"]
            return found, describe(name, count, found)

        for count in counts:
            self.attempt(f"{name}, {count}", functools.partial(find, count))

    def comparison(self, name: str, model) -> None:
        """Of the engine's greedy notes with generate's."""

        def find() -> tuple[dict, str]:
            found = compare_greedy(model, self.args)
            return found, describe_comparison(name, found)

        self.attempt(f"{name}, compared", find)


def measure_all(args: argparse.Namespace) -> bool:
    """Measures, says and writes all contenders. Returns whether all went well."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rate = bandwidth()
    print(
        f"{args.shape} on {device}, random weights; prompts of {args.prompt} tokens, notes of "
        f"{args.tokens}; a copy moves {rate / 1e9:,.0f} GB/s\n"
        f"{'writer':34} {'notes':>5} {'tokens/s':>9} {'ms a step':>9} {'of the floor':>12}",
        flush=True,
    )
    measured = Measurements(args, rate)
    model = make_qlora(build_plain(args.shape, device))
    measured.speed("the engine, NF4 and LoRA", measure_engine, model, args.slots)
    if not args.without_peer:
        measured.comparison("NF4 and LoRA", model)
        few = [count for count in args.slots if count <= 16]
        measured.speed("generate, NF4 and LoRA", measure_generate, model, few)
        del model
        model = build_plain(args.shape, device)
        measured.comparison("merged, bf16", model)
        name = "generate on the merged copy, bf16"
        measured.speed(name, measure_generate, model, args.slots)
    if args.peer:
        model = None
        gc.collect()  # it has a process of its own on the same GPU
        with tempfile.TemporaryDirectory() as folder:
            base = make_base(args.shape, Path(folder))
            measured.speed("unsloth's generate, NF4 and LoRA", measure_unsloth, base, args.slots)
    return not any("error" in found for found in measured.found.values())


def main() -> None:
    args = parse_args()
    sys.exit(0 if measure_all(args) else 1)
