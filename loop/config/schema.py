"""The configuration of a run: every key with its type, its default, its bounds and its meaning.

It owns the recipe: model, LoRA, data, token budgets, optimizer, schedule, intervals, paths. What
DeepSpeed does with it stands in ds_config.json, see deepspeed.py. How a configuration is read from
YAML and the command line: cli.py. help.py reads the descriptions here without importing anything.
"""

import re
import unicodedata
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from .lora_fields import check_lora

ROOT = Path(__file__).resolve().parents[2]


class ConfigError(ValueError):
    """A user's mistake, in one line that names the key and what is allowed.

    A command's main() turns it into exit code 2.
    """


def check_path(key: str, text: str) -> None:
    """Raises ConfigError for a text that can be no path: pasted words, which are not shown."""
    longest = max(len(part.encode("utf-8", "replace")) for part in text.split("/"))
    if len(text) > 4000 or longest > 255:
        raise ConfigError(f"{key}: {len(text):,} characters, more than a path can have: shorten it")
    if any(ord(c) < 32 or ord(c) == 127 for c in text):
        raise ConfigError(f"{key}: holds a control character, which no path may: rename it")


class Section(BaseModel):
    """A part of the configuration. Unknown keys are refused, and values can't be reassigned."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_bool_as_number(cls, value, info):
        # pydantic takes true for 1; in a configuration that is a slip, not a number.
        annotation = str(cls.model_fields[info.field_name].annotation)
        if isinstance(value, bool) and "bool" not in annotation and "Any" not in annotation:
            raise ValueError("true/false is not allowed here")
        return value


# The SOAP task, which is what a run without a task section learns.
SYSTEM = (
    "You are a medical scribe. "
    "You turn the conversation of a doctor and a patient into a SOAP note."
)
REQUEST = (
    "Write the SOAP note of this conversation under the headings S:, O:, A: and P:, "
    "in plain text without markdown. State only what was said.\n\n"
)
# What data.columns maps; other names there stand for the {columns} of a request.
COLUMNS = ("id", "dialogue", "note", "messages", "conversations")
PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)\}")
# Spellings of other tools, which would stand in the request as they are.
NO_PLACEHOLDER = re.compile(
    r"\{\{\s*[A-Za-z_]\w*\s*\}\}|\$\{[A-Za-z_]\w*\}"  # of Jinja and of a shell
    r"|\{(?:\s+[A-Za-z_]\w*\s*|[A-Za-z_]\w*(?:\s+|[:!][^{}\s\"']*))\}"  # of Python
)


def both_compositions(text: str) -> list[str]:
    """The text with each accented letter as one character, and as two."""
    return [unicodedata.normalize("NFC", text), unicodedata.normalize("NFD", text)]


class TaskConfig(Section):
    """What is asked of the model: the prompt around a dialogue, and the headings of its notes."""

    system: str = Field(
        None,
        validate_default=True,
        description="The system's message; null: that of the SOAP task; '' (in quotes): there is "
        "none.",
    )
    request: str = Field(
        None,
        validate_default=True,
        description="What stands before the dialogue in the user's message, an empty line between "
        "them; {NAME} stands for the row's column NAME, or the one that data.columns maps to it; "
        "null: that of the SOAP task.",
    )
    headings: dict[str, str | list[str]] = Field(
        {"S": "Subjective", "O": "Objective", "A": "Assessment", "P": "Plan"},
        description="The headings of a note, in order, each with its other spelling or a list of "
        "them; {}: notes have none. One counts where it begins a line before a colon; one in "
        "capitals, of two letters or more, also where it has the line for itself.",
    )

    @field_validator("system", mode="before")
    @classmethod
    def _choose_system(cls, system):
        return SYSTEM if system is None else system

    @field_validator("request", mode="before")
    @classmethod
    def _choose_request(cls, request):
        if not isinstance(request, str):
            return REQUEST if request is None else request
        return f"{request.strip()}\n\n".lstrip()

    @field_validator("headings", mode="before")
    @classmethod
    def _name_headings(cls, headings):
        if isinstance(headings, list):  # without other spellings
            return {heading: heading for heading in headings}
        return headings

    @model_validator(mode="after")
    def _check_texts(self):
        if PLACEHOLDER.search(self.system):
            raise ValueError("system: a {NAME} is filled in the request alone; put it there")
        if other := NO_PLACEHOLDER.search(self.request):
            (name,) = re.findall(r"[A-Za-z_]\w*", other[0])[:1]
            raise ValueError(
                f"request: {other[0][:60]} stands for no column; write {{{name}}}, without blanks, "
                "a format or other signs"
            )
        if taken := sorted(self.columns & set(COLUMNS)):
            raise ValueError(
                f"request: {{{taken[0]}}} is filled from no column; the dialogue always stands "
                "behind the request, and id and note are never shown"
            )
        if [*self.headings] != [*"SOAP"] and self.request == REQUEST:
            raise ValueError("request: asks for S:, O:, A: and P:; give one that fits headings")
        spellings = [text for found in self.spellings.values() for text in found]
        for text in spellings:
            if not text or text != text.strip(" \t\n#*_>:") or "\n" in text:
                raise ValueError(
                    f"headings: {text!r} must be a text on one line, without the colon, markdown "
                    "or blanks around it"
                )
            if spellings.count(text) > 1:
                raise ValueError(f"headings: {text!r} is named twice")
        owner: dict[str, str] = {}
        for heading, forms in self.spellings.items():
            for text in forms:
                if owner.setdefault(text.casefold(), heading) != heading:
                    raise ValueError(
                        f"headings: {text!r} of {heading} differs from one of "
                        f"{owner[text.casefold()]} in case alone; give another spelling"
                    )
        return self

    @property
    def columns(self) -> set[str]:
        """The names that the request has in braces, each filled from a column of the row."""
        return set(PLACEHOLDER.findall(self.request))

    @property
    def spellings(self) -> dict[str, list[str]]:
        """Each heading with all of its spellings, its own first.

        A letter with an accent may be one character in one file and two in another.
        """
        found = {}
        for heading, others in self.headings.items():
            own = [heading, *([others] if isinstance(others, str) else others)]
            composed = [spelling for text in own for spelling in both_compositions(text)]
            found[heading] = list(dict.fromkeys([*own, *composed]))
        return found


class DataConfig(Section):
    """Where the examples come from, and what happens to those that can't be used.

    A source is a file (.jsonl, .ndjson, .json, .csv, .tsv, .xlsx, .parquet; compressed as .gz,
    .bz2 or .xz), a pattern of such, a folder of `NAME.dialogue.txt` and `NAME.note.txt` pairs, a
    folder in the hub's layout or of save_to_disk, or a hub id. `SOURCE@REVISION:SUBSET:SPLIT` names
    a part of the last ones; otherwise train, validation and test are taken.
    """

    train: str | list[str] = Field(
        description="The source of the training examples, or a list of sources: a file (.jsonl, "
        ".ndjson, .json, .csv, .tsv, .xlsx, .parquet; compressed .gz, .bz2, .xz), a pattern such "
        "as visits/*.csv, a folder of NAME.dialogue.txt and NAME.note.txt pairs, a folder in the "
        "hub's layout or of save_to_disk, or a hub id; SOURCE@REVISION:SUBSET:SPLIT names a part "
        "of the last ones.",
    )
    valid: str | list[str] | None = Field(
        None, description="The source of the validation examples, named as in data.train."
    )
    test: str | list[str] | None = Field(
        None, description="The source of the test examples, which evaluate scores."
    )
    weights: list[float] | None = Field(
        None,
        description="For a list of train sources: how often an epoch visits each of them; 0.25 "
        "visits a random quarter of it.",
    )
    valid_fraction: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="Without data.valid: this fraction of data.train, chosen by a hash of the id, "
        "is the validation split and is not trained on.",
    )
    columns: dict[str, str | list[str]] = Field(
        {"id": "id", "dialogue": "dialogue", "note": "soap"},
        description="The names of your columns: for id, dialogue and note, or for messages (a "
        "chat, of which every assistant's turn is supervised), or for conversations (a chat as "
        "ShareGPT writes it, with from and value), and for each {NAME} of task.request. Of a list "
        "of names the first one that a source has counts.",
    )
    supervise: Literal["note", "all"] = Field(
        "note",
        description="Which tokens are targets: those of the note, or all after the first "
        "(pre-training).",
    )
    headings: Literal["optional", "required"] = Field(
        "optional",
        description="required: a note without task.headings, in order, is a bad row; "
        "optional: such notes are counted.",
    )
    normalize_headings: bool = Field(
        False,
        description="Write headings such as Subjective:, **S:**, ## Plan, 1. Objective: or A/P: as "
        "task.headings before anything else (S:, O:, A: and P:); what was changed is counted.",
    )
    on_error: Literal["stop", "skip"] = Field(
        "stop",
        description="A bad row ends the run before it starts (stop), or is left out, counted and "
        "listed in the run's data.json (skip).",
    )
    overlong: Literal["drop", "truncate_dialogue", "error"] = Field(
        "drop",
        description="What happens to an example above max_seq_len; one that is dropped is listed.",
    )
    identifiers: Literal["warn", "error", "off"] = Field(
        "warn",
        description="Phone numbers, mail addresses, social security and record numbers and full "
        "dates in training data: listed by kind and id (warn), or the run ends before it starts "
        "(error).",
    )
    cache: bool = Field(
        True,
        description="Keep the token ids below run.dir, readable by their owner alone, so that the "
        "next start takes a second.",
    )
    limit: int | None = Field(
        None, ge=1, description="Take only the first so many rows of each split."
    )

    @field_validator("identifiers", mode="before")
    @classmethod
    def _off_is_a_word(cls, value):
        return "off" if value is False else value  # YAML reads off as false


class RunConfig(Section):
    """The run directory, checkpoints, and when a run ends before its time."""

    dir: str = Field("runs", description="The folder of all runs.")
    name: str = Field("soap", description="The run's folder in run.dir.")
    resume: bool | Literal["force"] = Field(
        True,
        description="Resume from the newest complete checkpoint of this run, if there is one. "
        "force: on other data, or with another plan, too. false: start over; the earlier run is "
        "moved to NAME.1.",
    )
    save_steps: int = Field(100, ge=1, description="Save a checkpoint after every so many steps.")
    keep_checkpoints: int = Field(
        2,
        ge=1,
        description="How many of the last checkpoints stay; the one of the best validation stays "
        "beside them (see monitor.best).",
    )
    max_skipped_in_a_row: int = Field(
        3, ge=1, description="Save and end after so many skipped steps in a row (1: at the first)."
    )
    skip_loss_sigmas: float | None = Field(
        None,
        gt=0,
        description="Skip a step whose loss is so many standard deviations above the last 50; "
        "null: skip only what is not finite.",
    )
    max_hours: float | None = Field(
        None,
        gt=0,
        description="Save and end after so much wall time; the same command then resumes.",
    )
    stall_timeout_minutes: float = Field(
        10,
        gt=0,
        le=10**6,
        description="End all ranks when one stands still for so long.",
    )
    heartbeat_timeout_minutes: float = Field(
        1,
        gt=0,
        le=10**6,
        description="End all ranks when nothing is heard for so long from one on another machine.",
    )
    rendezvous_timeout_minutes: float = Field(
        10,
        gt=0,
        le=10**6,
        description="How long ranks wait for each other at the start.",
    )
    export: Literal["best", "last", "none"] = Field(
        "last",
        description="What is exported at the end: the weights of the last step, those of the best "
        "validation (see monitor.best), or nothing.",
    )
    patience: int | None = Field(
        None,
        ge=1,
        description="End after so many validations in a row without a better one than before (see "
        "monitor.best); null: never.",
    )
    export_check_examples: int = Field(
        8,
        ge=0,
        description="The saved adapter must give the trained model's loss on so many examples, in "
        "a standalone process with PEFT alone; 0: only its files are read.",
    )
    deterministic: bool = Field(
        False,
        description="On GPUs, sum in a fixed order where a kernel offers it, so that a resumed run "
        "equals an uninterrupted one to the bit.",
    )


class MonitorConfig(Section):
    """What a run shows of itself, and how often."""

    eval_steps: int = Field(
        100, ge=1, description="Evaluate the validation split after every so many steps."
    )
    sample_notes: list[str] = Field(
        [],
        description="Ids of validation examples whose notes are written and shown at each "
        "evaluation; the text of no other example comes into a log.",
    )
    best: str = Field(
        "loss",
        description="What makes a validation the best one: loss, the lowest validation loss; or "
        "the highest value of a metric of evaluate, on notes that are written at each validation, "
        "e.g. rouge1, rougeLsum, sections (all headings in order), facts/supported, facts/kept.",
    )
    best_notes: int | None = Field(
        None,
        ge=1,
        description="For a metric of notes: they are written for so many validation examples, the "
        "first ones in the order of their ids; null: for monitor.sample_notes.",
    )


class GenerationSettings(Section):
    """How notes are written: the samples of a run, and those of evaluate and generate.

    What a base's own generation_config.json asks for never counts.
    """

    # A note that is cut off is lost, while a limit that no note reaches costs nothing: notes end
    # by themselves, or are ended where they run in circles.
    max_new_tokens: int = Field(600, ge=1, le=2**20, description="The longest note, in tokens.")
    temperature: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="0 takes the most likely token; above 0 tokens are drawn, and a higher one "
        "makes them more varied.",
    )
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="With a temperature: draw from the most likely tokens that have this "
        "probability together (arXiv 1904.09751).",
    )
    min_p: float = Field(
        0.0,
        ge=0,
        le=1,
        description="With a temperature: draw no token whose probability is below this fraction of "
        "the most likely one's (arXiv 2407.01082).",
    )
    seed: int = Field(
        0, ge=0, lt=2**62, description="With a temperature: another seed, other notes."
    )
    candidates: int = Field(
        1,
        ge=1,
        le=64,
        description="With a temperature: so many notes are drawn, and the one whose facts agree "
        "best with the dialogue is given.",
    )
    no_repeat_ngram: int = Field(
        0,
        ge=0,
        description="No so many tokens in a row occur twice in a note; what the dialogue holds "
        "does not count; 0: they may.",
    )
    end_loops: bool = Field(
        True,
        description="End a note that runs in circles: one whose last 48 tokens or more are at "
        "least four times the same 1 to 64 tokens.",
    )
    forced_headings: bool = Field(False, description="Force task.headings, and nothing else.")

    @model_validator(mode="after")
    def _check_sampling(self):
        for name, off in (("top_p", 1), ("min_p", 0), ("candidates", 1)):
            value = getattr(self, name)
            if not self.temperature and value != off:
                raise ValueError(
                    f"{name}={value} means something only with a temperature above 0; set both, "
                    "or neither"
                )
        return self


MOST_TOKENS_PER_STEP = 2**31
# What a run's `lora` adds to or changes.
LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": "all-linear"}


class Config(Section):
    """Every key of a run. Lengths are in tokens; a batch size is in rows of max_seq_len tokens."""

    base: str = Field(
        description="The model to fine-tune: a hub id, or a folder in the hub's layout."
    )
    revision: str | None = Field(None, description="The base's revision on the hub.")
    adapter: str | None = Field(
        None,
        description="Train on from this adapter, a run's adapter/ folder or another one of PEFT, "
        "of the same base and with the same lora but for its dropout; null: from new weights.",
    )
    method: Literal["qlora", "lora", "full"] = Field(
        "qlora",
        description="qlora: LoRA on a frozen NF4 base; lora: LoRA on a frozen bf16 base; full: all "
        "weights are trained.",
    )
    double_quant: bool = Field(
        True,
        description="NF4 quantizes its own scales as well (QLoRA, arXiv 2305.14314, section 3).",
    )
    lora: dict[str, Any] = Field(
        LORA,
        validate_default=True,
        description="Any field of peft.LoraConfig, e.g. lora.r=16; fields that are left out keep "
        "the values shown here.",
    )
    loraplus_lr_ratio: float = Field(
        1.0,
        gt=0,
        allow_inf_nan=False,
        description="The lr of the B matrices over that of the A matrices (LoRA+, arXiv "
        "2402.12354).",
    )
    attention: str = Field(
        "auto",
        description="The attention kernel: flash_attn_4, flash_attn, varlen, sdpa, or one that is "
        "registered in loop/kernels/attention.py; auto: the fastest that is right on this machine.",
    )
    gradient_checkpointing: bool | Literal["auto"] = Field(
        "auto",
        description="Recompute activations in the backward pass, to save memory; auto: where they "
        "would not fit.",
    )
    fused_layers: bool | Literal["auto"] = Field(
        "auto",
        description="Compute decoder layers in few kernels; false: as PEFT computes them; auto: "
        "where a self-test finds the fused ones right.",
    )
    embedding_on_cpu: bool = Field(
        False,
        description="Keep the frozen embedding in the CPU's memory, for one small GPU: 1 GiB less "
        "with Llama-3-8B. The result is the same to the bit.",
    )
    chunked_loss: bool = Field(
        False,
        description="Convert logits to fp32 a chunk at a time: 4 bytes a logit instead of 14. The "
        "gradient is the same; the loss may differ in its last bits.",
    )
    replicate_weights: bool | Literal["auto"] = Field(
        "auto",
        description="With several ranks: all weights on each of them, instead of a shard; auto: on "
        "GPUs where they fit.",
    )
    cuda_graphs: bool = Field(
        True,
        description="On GPUs that hold all weights: replay each decoder layer as a CUDA graph, "
        "instead of launching its kernels one by one.",
    )
    cache_dequantized_weights: bool | Literal["auto"] = Field(
        "auto",
        description="Dequantize NF4 weights once, for 2 bytes a weight; auto: without CUDA graphs, "
        "where they fit.",
    )

    data: DataConfig = Field(description="The examples.")
    task: TaskConfig = Field(TaskConfig(), description="The prompt and the headings.")
    max_seq_len: int = Field(
        2048, ge=8, le=2**22, description="The longest example, and the length of a row, in tokens."
    )
    batch_size: int = Field(
        8,
        ge=1,
        le=2**20,
        description="Rows of an optimizer step, over all ranks: a step has at most batch_size * "
        "max_seq_len tokens, packed.",
    )
    micro_batch_size: int | Literal["auto"] = Field(
        "auto",
        description="Rows of one forward and backward pass on one rank; auto: as many as fit.",
    )

    epochs: int = Field(1, ge=1, le=10_000, description="How often every example is visited.")
    max_steps: int | None = Field(
        None, ge=1, le=10**9, description="End after so many optimizer steps, whatever the epochs."
    )
    lr: float = Field(1e-4, gt=0, allow_inf_nan=False, description="The highest learning rate.")
    min_lr: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="The lowest one, at the end of a cosine cycle.",
    )
    lr_schedule: str = Field(
        "cosine",
        description="How the learning rate goes on after the warm-up: cosine, or a name that is "
        "added to SCHEDULES in loop/optim/schedule.py.",
    )
    warmup_steps: int = Field(
        0, ge=0, le=10**9, description="Steps in which lr rises linearly from 0."
    )
    restart_steps: int | None = Field(
        None,
        ge=1,
        le=10**9,
        description="The length of the first cosine cycle, in steps; null: one cycle over the "
        "whole run.",
    )
    restart_mult: int = Field(
        1,
        ge=1,
        le=10**6,
        description="Each further cycle is so many times longer (SGDR, arXiv 1608.03983).",
    )
    betas: tuple[float, float] = Field((0.9, 0.999), description="Of AdamW.")
    eps: float = Field(1e-8, gt=0, le=1, description="Of AdamW.")
    optimizer: str = Field(
        "auto",
        description="fused or plain: torch's AdamW in this implementation; auto: the faster one "
        "that is right here; or a name that is added to OPTIMIZERS in loop/optim/adamw.py. 8-bit "
        "states don't fit the checkpoints, which hold fp32 moments.",
    )
    weight_decay: float = Field(
        1e-4,
        ge=0,
        allow_inf_nan=False,
        description="Of AdamW, decoupled from the gradient.",
    )
    max_grad_norm: float = Field(
        1.0, gt=0, description="The global L2 norm above which a step's gradient is scaled down."
    )
    seed: int = Field(
        42, ge=0, lt=2**62, description="Of LoRA's weights, the order of examples, and dropout."
    )

    deepspeed: str = Field(
        "ds_config.json",
        description="DeepSpeed's own configuration: ZeRO stage, buckets, precision, communication, "
        "parameter offload.",
    )
    run: RunConfig = Field(RunConfig(), description="The run directory and checkpoints.")
    monitor: MonitorConfig = Field(MonitorConfig(), description="Evaluation and samples.")
    generation: GenerationSettings = Field(
        GenerationSettings(), description="How notes are written."
    )

    @field_validator("lora")
    @classmethod
    def _check_lora(cls, lora: dict[str, Any]) -> dict[str, Any]:
        return LORA | check_lora(lora)

    @model_validator(mode="after")
    def _check_together(self):
        """What no field can check alone."""
        size = self.micro_batch_size
        if isinstance(size, int) and not 1 <= size <= self.batch_size:
            raise ValueError(
                f"micro_batch_size={size} must lie between 1 and batch_size={self.batch_size}"
            )
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr={self.min_lr} is above lr={self.lr}")
        if self.batch_size * self.max_seq_len > MOST_TOKENS_PER_STEP:
            raise ValueError(
                f"batch_size={self.batch_size} rows of max_seq_len={self.max_seq_len} are above "
                f"{MOST_TOKENS_PER_STEP:,} tokens a step"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={list(self.betas)} must lie in [0, 1)")
        if self.adapter and self.method == "full":
            raise ValueError(
                f"adapter={self.adapter}: method=full trains no adapter; merge it into the base "
                "first"
            )
        self._check_paths()
        name = Path(self.run.name)
        if name.name == "" or ".." in name.parts or name.is_absolute() or len(name.name) > 200:
            raise ValueError(f"run.name={self.run.name}: must be the name of a folder in run.dir")
        self._check_sources()
        self._check_choice()
        return self

    def _check_paths(self) -> None:
        """Every text that is used as a path must be one."""
        paths = {
            "base": self.base,
            "adapter": self.adapter or "",
            "deepspeed": self.deepspeed,
            "run.dir": self.run.dir,
            "run.name": self.run.name,
        }
        for key, text in paths.items():
            check_path(key, text)
        for split in ("train", "valid", "test"):
            sources = getattr(self.data, split) or []
            for source in [sources] if isinstance(sources, str) else sources:
                check_path(f"data.{split}", source)

    def _check_choice(self) -> None:
        """What chooses the best validation must be measured."""
        monitor = self.monitor
        chooses = self.run.export == "best" or self.run.patience or monitor.best != "loss"
        has_examples = self.data.valid or self.data.valid_fraction
        if chooses and not has_examples:
            raise ValueError(
                "run.export=best, run.patience and monitor.best need validation examples: set "
                "data.valid or data.valid_fraction"
            )
        if monitor.best == "loss":
            return
        if self.data.supervise == "all":
            raise ValueError(
                f"monitor.best={monitor.best}: there are no notes with data.supervise=all; set it "
                "to loss"
            )
        if not monitor.best_notes and not monitor.sample_notes:
            raise ValueError(
                f"monitor.best={monitor.best}: a metric of notes; set monitor.best_notes to the "
                "number of validation examples to write them for"
            )

    def _check_sources(self) -> None:
        data = self.data
        if data.train == []:
            raise ValueError("data.train=[]: name at least one source")
        count = 1 if isinstance(data.train, str) else len(data.train)
        weights = data.weights
        if weights is not None:
            if len(weights) != count or not all(0 < w < float("inf") for w in weights):
                raise ValueError(
                    f"data.weights={weights}: give one number above 0 for each of the {count} "
                    "sources of data.train"
                )
        chats = {"messages", "conversations"} & set(data.columns)
        if len(chats) > 1 or not (chats or {"dialogue", "note"} <= set(data.columns)):
            raise ValueError(
                "data.columns must map either messages, or conversations, or dialogue and note"
            )
        listed = {kind: [n] if isinstance(n, str) else n for kind, n in data.columns.items()}
        if empty := [kind for kind, names in listed.items() if not all(names) or not names]:
            raise ValueError(f"data.columns.{empty[0]}: names no column; write its name")
        if unknown := sorted(data.columns.keys() - self.task.columns - set(COLUMNS)):
            raise ValueError(
                f"data.columns.{unknown[0]}: is none of {', '.join(COLUMNS)}, and task.request has "
                f"no {{{unknown[0]}}}"
            )
        self._check_headings()

    def _check_headings(self) -> None:
        """What needs headings must have some."""
        if self.task.headings:
            return
        if self.data.headings == "required":
            raise ValueError("data.headings=required: task.headings names none; set it to optional")
        if self.data.normalize_headings:
            raise ValueError("data.normalize_headings=true: task.headings names none to write")
        if self.generation.forced_headings:
            raise ValueError("generation.forced_headings=true: task.headings names none to force")

    @property
    def folder(self) -> Path:
        """The run directory, runs/<name>."""
        return Path(self.run.dir) / self.run.name

    @property
    def quantization(self) -> str | None:
        """How the frozen base is stored, by its name in `QUANTIZATIONS`; None: as plain weights."""
        return "nf4" if self.method == "qlora" else None

    @property
    def tokens_per_step(self) -> int:
        """The token budget of an optimizer step, over all ranks."""
        return self.batch_size * self.max_seq_len
