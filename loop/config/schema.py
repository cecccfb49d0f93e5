"""The run's one configuration: every knob with its type, its default and what is possible.

It owns the recipe: model, LoRA, data, token budgets, optimiser, schedule, intervals, paths. What DeepSpeed does with it stands in
`ds_config.json`, see ds_config.py; how a configuration is read from YAML and the command line, in cli.py.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

ROOT = Path(__file__).resolve().parents[2]


class ConfigError(ValueError):
    """A mistake of the user's, said in one line that names the key and what is allowed. main() turns it into exit code 2."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_as_number(cls, value, info):
        # pydantic takes true for 1; in a configuration that is a slip, not a number
        if isinstance(value, bool) and not any(
            t in str(cls.model_fields[info.field_name].annotation) for t in ("bool", "Any")
        ):
            raise ValueError("true/false is not allowed here")
        return value


class DataConfig(Section):
    """Where the examples come from, and what happens to those that can't be used. A source is a .jsonl, .json, .csv or .parquet
    file, a folder of `NAME.dialogue.txt` and `NAME.note.txt` pairs, a folder in the hub's layout, or a hub id; `SOURCE:SPLIT` names a
    split of the last two, otherwise train, validation and test are taken."""

    train: str | list[str]
    valid: str | list[str] | None = None
    test: str | list[str] | None = None
    weights: list[float] | None = (
        None  # for a list of train sources: how often an epoch visits each; 0.25 is a random quarter of it
    )
    valid_fraction: float = Field(
        0.05, ge=0, lt=1
    )  # without data.valid: this share of train, by a hash of the id, is held out
    columns: dict[Literal["id", "dialogue", "note", "messages"], str | list[str]] = {
        "id": "id",
        "dialogue": "dialogue",
        "note": "soap",
    }
    supervise: Literal["note", "all"] = (
        "note"  # all: every token after the first is a target (pre-training)
    )
    headings: Literal["optional", "required"] = (
        "optional"  # required: a note without S, O, A and P in order is a bad row
    )
    on_error: Literal["stop", "skip"] = (
        "stop"  # a bad row ends the run before it starts, or is left out, counted and listed
    )
    overlong: Literal["drop", "truncate_dialogue", "error"] = (
        "drop"  # what happens to an example above max_seq_len
    )
    cache: bool = True  # keep the token ids under run.dir, readable by the owner alone, so that the next start takes a second
    limit: int | None = Field(None, ge=1)  # take only the first N rows of each split


class RunConfig(Section):
    dir: str = "runs"
    name: str = "soap"
    # go on from the newest whole checkpoint of this run, if there is one; force: on other data, or with another plan, too
    resume: bool | Literal["force"] = True
    save_steps: int = Field(100, ge=1)
    keep_checkpoints: int = Field(
        2, ge=1
    )  # the last ones; the one with the best validation loss is kept beside them
    max_skipped_in_a_row: int = Field(
        3, ge=1
    )  # stop after this many skipped steps in a row (1: at the first)
    skip_loss_sigmas: float | None = Field(
        None, gt=0
    )  # skip a step whose loss is so many standard deviations above the last 50; none: don't
    max_hours: float | None = Field(
        None, gt=0
    )  # save and end after so much wall time; the same command goes on
    stall_timeout_minutes: float = Field(
        10, gt=0, allow_inf_nan=False
    )  # end all ranks when one stands still for so long
    heartbeat_timeout_minutes: float = Field(
        1, gt=0, allow_inf_nan=False
    )  # or when nothing is heard from one on another machine for so long
    rendezvous_timeout_minutes: float = Field(
        10, gt=0, allow_inf_nan=False
    )  # how long ranks wait for each other at the start
    export_check_examples: int = Field(
        8, ge=0
    )  # examples whose loss a fresh process with PEFT alone must get from the saved adapter; 0: only its files are read
    deterministic: bool = False  # on GPUs, sum in a fixed order where a kernel offers it, so that a resumed run is the unbroken one to the bit


class MonitorConfig(Section):
    eval_steps: int = Field(100, ge=1)
    sample_notes: list[
        str
    ] = []  # ids of held-out examples whose notes are shown; anything else stays out of every log
    sample_max_new_tokens: int = Field(400, ge=1)


LORA = {
    "r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.1,
    "target_modules": "all-linear",
}  # what a run's `lora` adds to or changes


class Config(Section):
    """Every knob of a run. Lengths are in tokens; a batch size is in rows of max_seq_len tokens."""

    base: str  # hub id, or a local folder in the hub's layout
    revision: str | None = None
    method: Literal["qlora", "lora", "full"] = "qlora"
    double_quant: bool = (
        True  # NF4 quantises its own scales as well (QLoRA, arXiv 2305.14314, section 3)
    )
    lora: dict[str, Any] = Field(LORA, validate_default=True)  # any field of peft.LoraConfig
    loraplus_lr_ratio: float = Field(
        1.0, gt=0
    )  # lr of the B matrices over lr of the A matrices (LoRA+, arXiv 2402.12354)
    attention: Literal["auto", "flash_attn_4", "flash_attn", "varlen", "sdpa"] = "auto"
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    fused_layers: bool | Literal["auto"] = (
        "auto"  # decoder layers in few kernels; false: as PEFT computes them; auto: where they were found right
    )
    replicate_weights: bool | Literal["auto"] = (
        "auto"  # several ranks: all weights on each, not a shard alone; auto: on GPUs where they fit
    )
    cuda_graphs: bool = True  # on GPUs that hold all weights, replay each decoder layer instead of launching its kernels one by one
    cache_dequantized_weights: bool | Literal["auto"] = (
        "auto"  # NF4 weights dequantised once, for 2 bytes a weight; auto: no graphs, and room
    )

    data: DataConfig
    max_seq_len: int = Field(2048, ge=8)
    batch_size: int = Field(
        8, ge=1
    )  # rows of an optimizer step over all ranks: batch_size * max_seq_len tokens
    micro_batch_size: int | Literal["auto"] = "auto"  # rows of one forward and backward on one rank

    epochs: int = Field(1, ge=1)
    max_steps: int | None = Field(None, ge=1)
    lr: float = Field(1e-4, gt=0)
    min_lr: float = Field(0.0, ge=0)
    warmup_steps: int = Field(0, ge=0)
    restart_steps: int | None = Field(
        None, ge=1
    )  # length of the first cosine cycle; none: one cycle over the whole run
    restart_mult: int = Field(
        1, ge=1
    )  # each further cycle is this many times longer (SGDR, arXiv 1608.03983)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    optimizer: Literal["auto", "fused", "plain"] = (
        "auto"  # torch's AdamW; 8-bit states don't fit the checkpoints, which hold fp32 moments
    )
    weight_decay: float = Field(1e-4, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    seed: int = Field(42, ge=0, lt=2**62)

    deepspeed: str = "ds_config.json"
    run: RunConfig = RunConfig()
    monitor: MonitorConfig = MonitorConfig()

    @field_validator("lora")
    @classmethod
    def _lora_fields(cls, lora: dict[str, Any]) -> dict[str, Any]:
        from peft import LoraConfig  # late: it takes seconds, and --help needs none of it

        known = {f.name for f in dataclasses.fields(LoraConfig)}
        for key in lora:
            if key not in known:
                raise ValueError(f"unknown field {key!r} of peft.LoraConfig")
        if isinstance(lora.get("lora_dropout"), str):  # YAML reads 1e-1 as a text
            lora = lora | {"lora_dropout": float(lora["lora_dropout"])}
        if not isinstance(lora.get("r", 8), int) or lora.get("r", 8) < 1:
            raise ValueError("r must be a whole number of at least 1")
        if not 0 <= lora.get("lora_dropout", 0) < 1:
            raise ValueError("lora_dropout must lie in [0, 1)")
        # DoRA needs the norm of the dense weight, PiSSA/OLoRA/LoftQ/EVA rewrite it: a partitioned 4-bit base offers neither.
        if lora.get("use_dora"):
            raise ValueError("use_dora does not work on a partitioned 4-bit base; leave it out")
        if lora.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal"):
            raise ValueError(
                f"init_lora_weights={lora['init_lora_weights']!r} rewrites the base, which stays frozen here"
            )
        return LORA | lora

    @model_validator(mode="after")
    def _possible(self):
        if (
            isinstance(self.micro_batch_size, int)
            and not 1 <= self.micro_batch_size <= self.batch_size
        ):
            raise ValueError(
                f"micro_batch_size={self.micro_batch_size} must lie between 1 and batch_size={self.batch_size}"
            )
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr={self.min_lr} is above lr={self.lr}")
        if not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas={list(self.betas)} must lie in [0, 1)")
        if Path(self.run.name).name in ("", "..") or Path(self.run.name).is_absolute():
            raise ValueError(f"run.name={self.run.name}: must be the name of a folder in run.dir")
        if self.data.train == []:
            raise ValueError("data.train=[]: name at least one source")
        sources = [self.data.train] if isinstance(self.data.train, str) else self.data.train
        if self.data.weights is not None and (
            len(self.data.weights) != len(sources)
            or not all(0 < w < float("inf") for w in self.data.weights)
        ):
            raise ValueError(
                f"data.weights={self.data.weights}: give one number above 0 for each of the {len(sources)} sources of data.train"
            )
        if "messages" not in self.data.columns and not {"dialogue", "note"} <= set(
            self.data.columns
        ):
            raise ValueError("data.columns must map either messages, or dialogue and note")
        return self

    @property
    def folder(self) -> Path:
        """The run's folder, runs/<name>."""
        return Path(self.run.dir) / self.run.name

    @property
    def quantization(self) -> str | None:
        """How the frozen base is stored, by its name in `QUANTIZATIONS`; None: as plain weights."""
        return "nf4" if self.method == "qlora" else None

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.max_seq_len
