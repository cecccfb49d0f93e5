"""One contender in its own process: it trains some steps and writes what it measured.

`python tests/bench/contenders.py SPEC.json`. All contenders get the same examples and the same
base. A step is 8 rows of 2,048 tokens, filled by whole examples where a contender packs. Elsewhere
it is 8 examples, or spec["micro"] if that is more. Padding does not count. All train LoRA of rank 8
on every linear layer of an NF4 base with double quantisation, in bf16.
"""

import importlib.util
import json
import os
import sys
import tempfile
import time
from pathlib import Path

STARTED = time.time()

import torch  # noqa: E402
from shapes import LONGEST, SHAPES, make_examples  # noqa: E402

LORA = {
    "r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.1,
    "target_modules": "all-linear",
    "task_type": "CAUSAL_LM",
}
ROWS = 8  # of a step; a row has one example where a contender does not pack


def on_gpu() -> bool:
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"


MEMORY_OF_GPU = torch.cuda.mem_get_info  # the real one, beside the one of cap_gpu_memory


def cap_gpu_memory(gib: float) -> None:
    """Leaves this process so much of the GPU, its CUDA context included, as on a smaller card."""
    free, total = MEMORY_OF_GPU()
    left = int(gib * 2**30) - (total - free)
    torch.cuda.set_per_process_memory_fraction(left / total)
    torch.cuda.mem_get_info = lambda *_: (left - torch.cuda.memory_reserved(), int(gib * 2**30))


class Clock:
    """When each step ended on rank 0, with the GPU's work done, and the tokens it took."""

    def __init__(self) -> None:
        self.ends = []  # seconds
        self.tokens = []
        self.peak = 0  # bytes
        self.card = 0  # bytes of the GPU in use at the end, with those that torch does not count
        self.micro_batch = None  # (rows, tokens of a row) as the model sees it; the loop's is flat

    def step(self, tokens: int) -> None:
        if on_gpu():
            # Late: it imports transformers, and Unsloth wants to come first.
            from loop.memory.measure import peak_gpu_bytes

            torch.cuda.synchronize()
            self.peak = peak_gpu_bytes()  # now: at its end the loop frees its graphs
            free, total = MEMORY_OF_GPU()
            self.card = total - free
        self.ends.append(time.time())
        self.tokens.append(tokens)

    def metrics(self, warm_up: int) -> dict:
        """Speeds of windows of four steps after the warm-up, memory, and the start-up time.

        The last step is in no window: it may run under the profiler.
        """
        speeds = [
            sum(self.tokens[i + 1 : i + 5]) / (self.ends[i + 4] - self.ends[i])
            for i in range(warm_up, len(self.ends) - 5, 4)
        ]
        return {
            "tokens_per_second": speeds,
            "tokens_per_step": sum(self.tokens[warm_up:]) / len(self.tokens[warm_up:]),
            "micro_batch": self.micro_batch,
            "peak_gib": self.peak / 2**30 or None,
            "card_gib": self.card / 2**30 or None,
            "first_step_after": self.ends[0] - STARTED,
        }


def ours(spec: dict, clock: Clock) -> None:
    """loop.train as it is, on examples that are not read from a file.

    With spec["without_deepspeed"]: the same loop around a bare model.
    """
    import bare

    import loop.train as train
    from loop.config.cli import load_config
    from loop.config.deepspeed import build_ds_config
    from loop.config.schema import ROOT
    from loop.monitor.quiet import quiet_libraries

    quiet_libraries()
    if spec.get("gpu_memory") and on_gpu():
        cap_gpu_memory(spec["gpu_memory"])
    config = load_config(
        [
            "--config",
            str(ROOT / "loop" / "configs" / "soap_qlora.yaml"),
            f"base={spec['base']}",
            f"max_steps={spec['steps']}",
            "monitor.sample_notes=[]",
            f"run.dir={tempfile.mkdtemp()}",
            "run.save_steps=100000",
            "run.export=none",
            "monitor.eval_steps=100000",
            *spec["args"],
        ]
    )
    count = spec["examples"] * config.batch_size // ROWS
    examples = make_examples(count, spec["vocab_size"], length=spec["length"])
    initialize = {}
    if spec.get("without_deepspeed"):
        initialize = {"initialize": bare.initialize}
        bare.use_plain_gradients(train)
    if spec.get("profile"):
        bare.profile_a_step(train, at=spec["steps"], spec=spec)
    train.Checkpointer = bare.NoCheckpoints
    train.train(
        config,
        build_ds_config(config),
        data=bare.as_training_data(examples),
        make_logger=bare.timed_logger(clock),
        **initialize,
    )


def base_model(spec: dict, attention: str, **options):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=torch.bfloat16,
    )
    return AutoModelForCausalLM.from_pretrained(
        spec["base"],
        dtype=torch.bfloat16,
        quantization_config=nf4,
        attn_implementation=attention,
        device_map={"": 0 if on_gpu() else "cpu"},
        **options,
    )


def pad(examples: list) -> dict[str, torch.Tensor]:
    """A batch of examples, padded to the longest."""
    shape = (len(examples), max(map(len, examples)))
    batch = {
        "input_ids": torch.full(shape, 0),
        "labels": torch.full(shape, -100),
        "attention_mask": torch.full(shape, 0),
    }
    for row, example in enumerate(examples):
        batch["input_ids"][row, : len(example)] = torch.from_numpy(example.input_ids)
        batch["labels"][row, : len(example)] = torch.from_numpy(example.labels)
        batch["attention_mask"][row, : len(example)] = 1
    return batch


def plain(spec: dict, clock: Clock) -> None:
    """What one writes first: ZeRO-3 around PEFT's model, padded batches, the model's own loss."""
    import deepspeed
    from peft import LoraConfig, get_peft_model

    deepspeed.init_distributed(dist_backend="nccl" if on_gpu() else "gloo")
    model = base_model(spec, flash_or_sdpa())
    model.enable_input_require_grads()
    model = get_peft_model(model, LoraConfig(**LORA))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ds_config = {
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3},
        "train_micro_batch_size_per_gpu": spec["micro"],
        "gradient_accumulation_steps": ROWS // spec["micro"],
        "gradient_clipping": 1.0,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)[0]
    examples = make_examples(spec["steps"] * ROWS, spec["vocab_size"])
    for first in range(0, len(examples), ROWS):
        for start in range(first, first + ROWS, spec["micro"]):
            batch = pad(examples[start : start + spec["micro"]])
            batch = {key: tensor.to(engine.device) for key, tensor in batch.items()}
            loss = engine(**batch, use_cache=False).loss
            engine.backward(loss)
            engine.step()
        clock.step(sum(map(len, examples[first : first + ROWS])))


def rows_for_trl(spec: dict, rows_a_step: int, packed: bool):
    """The data set of TRL's trainer: an example a row, or rows that whole examples fill."""
    from datasets import Dataset
    from trl import pack_dataset

    number = spec["steps"] * rows_a_step
    if packed:
        number = spec["examples"] * rows_a_step // ROWS
    rows = Dataset.from_list(
        [
            {"input_ids": example.input_ids.tolist(), "labels": example.labels.tolist()}
            for example in make_examples(number, spec["vocab_size"])
        ]
    )
    return pack_dataset(rows, spec["micro"] * LONGEST, "bfd") if packed else rows


def train_with_trl(spec: dict, clock: Clock, model, tokenizer, packed=False, **options) -> None:
    """TRL's SFTTrainer on the given token ids.

    packed: whole examples fill one row of a micro-batch's tokens, by TRL's own packing.
    """
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    micro, accumulation = spec["micro"], max(1, ROWS // spec["micro"])
    rows = rows_for_trl(spec, micro * accumulation, packed)
    taken = []  # tokens of each micro-batch since the last step

    class Steps(TrainerCallback):
        def on_step_end(self, *_, **__):
            clock.step(int(sum(taken)))
            taken.clear()

    arguments = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=1 if packed else micro,
        gradient_accumulation_steps=accumulation,
        max_steps=spec["steps"],
        learning_rate=1e-4,
        lr_scheduler_type="cosine",
        weight_decay=1e-4,
        max_grad_norm=1.0,
        bf16=True,
        optim="adamw_torch_fused",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1000,
        packing=packed,
        max_length=LONGEST,
        dataset_kwargs={"skip_prepare_dataset": True},
        use_cpu=not on_gpu(),
        **options,
    )
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[Steps()],
    )
    training_step = trainer.training_step

    def counted_step(model, inputs, *rest, **more):
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        taken.append(ids.numel() if mask is None else mask.sum())  # a sum on the GPU: no wait
        clock.micro_batch = tuple(ids.shape)
        return training_step(model, inputs, *rest, **more)

    trainer.training_step = counted_step
    trainer.train()


def trl(spec: dict, clock: Clock) -> None:
    """TRL with ZeRO-3, gradient checkpointing and flash attention.

    Its documentation sets up QLoRA under DeepSpeed so.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer

    ds_config = {
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "zero_force_ds_cpu_optimizer": False,
    }
    path = Path(tempfile.mkdtemp()) / "zero3.json"
    path.write_text(json.dumps(ds_config))
    model = base_model(spec, flash_or_sdpa())
    model.enable_input_require_grads()
    model = get_peft_model(model, LoraConfig(**LORA))
    tokenizer = AutoTokenizer.from_pretrained(spec["base"])
    options = {"deepspeed": str(path), "gradient_checkpointing": True}
    train_with_trl(spec, clock, model, tokenizer, **options)


def trl_fast(spec: dict, clock: Clock) -> None:
    """TRL at its fastest without a compiler.

    No DeepSpeed, Liger's kernels, flash attention, packed rows without padding, no checkpointing,
    dropout 0. Its loss is chunked by itself since 1.15.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer

    model = get_peft_model(
        base_model(spec, flash_or_sdpa()), LoraConfig(**LORA | {"lora_dropout": 0.0})
    )
    tokenizer = AutoTokenizer.from_pretrained(spec["base"])
    train_with_trl(
        spec,
        clock,
        model,
        tokenizer,
        packed=True,
        gradient_checkpointing=False,
        use_liger_kernel=on_gpu(),  # they need Triton
    )


def unsloth(spec: dict, clock: Clock, packed: bool = False) -> None:
    """Unsloth without DeepSpeed, as its notebooks do it: dropout 0.

    It does not checkpoint unless it is asked to. Not packed, it pads these rows, which are token
    ids already; `micro_batch` of the result shows that.
    """
    from unsloth import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(
        spec["base"], max_seq_length=LONGEST, dtype=torch.bfloat16, load_in_4bit=True
    )
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = FastLanguageModel.get_peft_model(
        model,
        r=8,
        lora_alpha=16,
        lora_dropout=0,
        target_modules=modules,
        use_gradient_checkpointing=False,
    )
    train_with_trl(spec, clock, model, tokenizer, packed=packed, gradient_checkpointing=False)


def unsloth_packed(spec: dict, clock: Clock) -> None:
    """Unsloth on rows that are filled by whole examples."""
    unsloth(spec, clock, packed=True)


def flash_or_sdpa() -> str:
    """transformers' own attention for the peers; prints where it is not the fast one."""
    if on_gpu() and importlib.util.find_spec("flash_attn"):
        return "flash_attention_2"
    print("attention: sdpa, as flash-attn is not here", file=sys.stderr)
    return "sdpa"


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    spec["vocab_size"] = min(SHAPES[spec["shape"]]["vocab_size"], 4000)
    clock = Clock()
    contenders = {
        "ours": ours,
        "plain": plain,
        "trl": trl,
        "trl-fast": trl_fast,
        "unsloth": unsloth,
        "unsloth-packed": unsloth_packed,
    }
    contenders[spec["name"]](spec, clock)
    if os.environ.get("RANK", "0") == "0":
        Path(spec["out"]).write_text(
            json.dumps(clock.metrics(spec["warm_up"]) | spec.get("profiled", {}))
        )


if __name__ == "__main__":
    main()
