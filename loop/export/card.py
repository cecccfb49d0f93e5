"""The model card beside an adapter or a model: what it is, what made it, and how it is used.

All that a card says of a training stands in trained.json, so a card can be written anew wherever
the folder was copied to. It holds counts and hashes of the data, and no text and no id of it.
"""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from ..checkpoint.identity import examples_fingerprint
from ..checkpoint.run_dir import collect_versions, whole_lines
from ..config.error_text import first_line
from ..config.plain_yaml import read_small_file, read_yaml
from ..config.schema import Config, ConfigError, GenerationSettings
from ..data.batch_plan import BatchPlan
from ..data.dataset import TrainingData
from ..data.soap import SOAP
from ..distributed.files import write_atomically
from ..evaluation.scoring import Metric, metrics_of
from ..generation.prompt import prompt_texts, task_of
from ..model.loading import load_tokenizer, resolve_base
from ..model.lora import without_nulls
from ..model.streaming import fetch_base
from .card_text import (
    LLAMA_CPP,
    NO_REPEAT,
    NO_REPEAT_ARGUMENT,
    RECIPE,
    SYSTEM_MESSAGE,
    VLLM,
    WRITING,
)
from .ollama import modelfile

CARD = "README.md"
TRAINED = "trained.json"
CONTEXT = 4096  # tokens for Ollama, where the length of the training is not known
# Of the configuration, in the card's order.
RECIPE_KEYS = (
    "method",
    "lora",
    "loraplus_lr_ratio",
    "lr",
    "min_lr",
    "lr_schedule",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "epochs",
    "max_steps",
    "batch_size",
    "max_seq_len",
    "seed",
)
COUNTS = ("rows", "skipped", "dropped", "truncated", "without_headings")


# ---- what trained.json says


def describe_run(config: Config, data: TrainingData, plan: BatchPlan, step: int) -> dict[str, Any]:
    """What trained.json says of a run beside `provenance`: recipe, data, versions and figures.

    The data is described by hashes of its tokenised examples and by counts.

    Args:
        step: the steps after which the weights are what is exported.
    """
    splits = {"train": data.train, "valid": data.valid}
    described = {}
    for split, examples in splits.items():
        report = data.reports.get(split)
        counts = {name: getattr(report, name) for name in COUNTS} if report else {}
        counts = {name: len(n) if isinstance(n, list) else n for name, n in counts.items()}
        described[split] = {
            **counts,
            "examples": len(examples),
            "tokens": sum(len(e) for e in examples),
            "supervised_tokens": sum(e.num_targets for e in examples),
            "fingerprint": examples_fingerprint(examples),
        }
    recipe = config.model_dump(mode="json", include=set(RECIPE_KEYS))
    if config.method == "full":
        del recipe["lora"], recipe["loraplus_lr_ratio"]
    visited = plan.order[: plan.offsets[step]]
    return {
        "recipe": {key: recipe[key] for key in RECIPE_KEYS if key in recipe},
        "steps": step,
        "planned_steps": len(plan),
        "tokens": int(data.lengths[visited].sum()),
        "supervised_tokens": int(data.num_targets[visited].sum()),
        "data": described,
        "versions": collect_versions(),
        "figures": {"validation_loss": validation_loss(config.folder, step), "evaluate": {}},
    }


def validation_loss(run_dir: Path, step: int) -> float | None:
    """The validation loss after `step` steps in a run's metrics.jsonl; None where it has none."""
    path = run_dir / "metrics.jsonl"
    loss = None
    for values in whole_lines(path.read_text(errors="replace")) if path.is_file() else []:
        if values["step"] == step:
            loss = values.get("eval/loss", loss)
    return loss


def record_evaluation(folder: Path, name: str, report: dict[str, Any]) -> None:
    """Adds the figures of an evaluation to the trained.json and the card of a folder.

    It does nothing where there is no card: older runs wrote none. Raises OSError, and ConfigError
    where trained.json is broken; the folder is what it was then.

    Args:
        folder: of the adapter or model that was evaluated.
        name: of the evaluation, e.g. "test".
        report: of `evaluate_split`. Its figures and counts are taken, and no id.
    """
    if not (folder / CARD).is_file() or not (folder / TRAINED).is_file():
        return
    kept = {key: report[key] for key in ("examples", "notes", "figures") if key in report}
    try:
        trained = without_nulls(json.loads((folder / TRAINED).read_text()))
        figures = without_nulls(trained.get("figures", {}))
        trained["figures"] = figures | {"evaluate": figures.get("evaluate", {}) | {name: kept}}
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ConfigError(f"{TRAINED} is broken ({type(error).__name__})") from error
    check_card(str(folder), folder, trained)
    write_atomically(folder / TRAINED, json.dumps(trained, indent=1))
    write_card(folder, trained)


# ---- what is written


def write_papers(folder: Path, trained: dict[str, Any]) -> None:
    """Writes trained.json, the card and, beside a model that is complete, Ollama's Modelfile.

    Args:
        folder: of an adapter or a model, with its tokenizer.
        trained: the content of trained.json.
    """
    (folder / TRAINED).write_text(json.dumps(trained, indent=1))
    write_card(folder, trained)
    if is_adapter(folder) or not (folder / "tokenizer_config.json").is_file():
        return
    tokenizer = load_tokenizer(str(folder))
    prompt = prompt_of(trained)
    context = trained.get("max_seq_len") or CONTEXT
    text = modelfile(tokenizer, prompt, context, settings_of(trained))
    (folder / "Modelfile").write_text(text, "utf-8")


def is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def prompt_of(trained: dict[str, Any]) -> dict[str, Any]:
    """The prompt of the training; where trained.json does not say, the one of `generate`."""
    return prompt_texts(task_of(trained)) | without_nulls(trained.get("prompt") or {})


def settings_of(trained: dict[str, Any]) -> GenerationSettings:
    """How the run wrote its notes; the defaults where trained.json does not say."""
    return GenerationSettings(**trained.get("generation") or {})


def check_card(named: str, folder: Path, trained: dict[str, Any]) -> None:
    """Raises ConfigError where no card can be written of a stranger's trained.json.

    To be called before the work that ends with the card. named: the folder as it was given.
    """
    try:
        card_text(folder, trained)
    except ConfigError:
        raise
    except Exception as error:  # any key may hold any type
        raise ConfigError(
            f"{named}: {TRAINED} is not what a run writes ({first_line(error, 80)}); copy it "
            "again, or remove it"
        ) from error


def write_card(folder: Path, trained: dict[str, Any]) -> None:
    """Writes README.md; arguments as in `card_text`."""
    write_atomically(folder / CARD, card_text(folder, trained))


def card_text(folder: Path, trained: dict[str, Any]) -> str:
    """The card. trained: the content of trained.json; it may lack any key but the base."""
    base = trained["base"]
    name = base_name(base)
    task = task_of(trained)
    is_soap = task == SOAP
    kind = "a SOAP note (Subjective, Objective, Assessment, Plan)"
    if not is_soap:
        kind = f"a note ({', '.join(task.headings)})" if task.headings else "a note"
    what = "an adapter for" if is_adapter(folder) else "fine-tuned from"
    license_id = base_license(base, trained.get("revision"))
    matter = yaml.safe_dump(front_matter(folder, trained, name, license_id), sort_keys=False)
    sections = [
        f"---\n{matter}---",
        f"# {'SOAP' if is_soap else 'Clinical'} notes: {what} {name}",
        f"It writes {kind} from the conversation of a doctor and a patient. **The notes are "
        "drafts: a clinician must review each one.**",
        f"## How to use it\n\n{usage(folder, trained)}",
        f"## The prompt\n\n{prompt_section(trained)}",
        f"## What it was trained on\n\n{data_section(trained, name)}",
        f"## How it was trained\n\n{recipe_section(trained)}",
        f"## Figures\n\n{figures_section(trained)}",
        f"## Limits\n\n{limits_section(trained)}",
        f"## Licence\n\nThe licence of the base: {license_id}. The data may set further terms.",
    ]
    return "\n\n".join(sections) + "\n"


def base_name(base: str) -> str:
    """A hub id as it is; of a local folder the last part, as its path is nobody's business."""
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists()
    return base if is_hub_id else Path(base).name


def base_license(base: str, revision: str | None) -> str:
    """The licence in the front matter of the base's README.md or its config.json; else "other"."""
    try:
        folder = fetch_base(resolve_base(base)["pretrained_model_name_or_path"], revision)
        front = re.match(r"---\n(.*?\n)---", _text(folder / "README.md"), re.DOTALL)
        found = read_yaml(front.group(1)) if front else {}
        found = found if isinstance(found, dict) else {}
        found = found.get("license") or json.loads(_text(folder / "config.json")).get("license")
    except (ConfigError, OSError, ValueError, yaml.YAMLError):
        return "other"
    is_id = isinstance(found, str) and re.fullmatch(r"[A-Za-z0-9.+-]+", found)
    return found if is_id else "other"


def _text(path: Path) -> str:
    return read_small_file(path) if path.is_file() else ""


def front_matter(folder: Path, trained: dict, name: str, license_id: str) -> dict[str, Any]:
    """What the hub reads of a card."""
    adapter = is_adapter(folder)
    library = "peft" if adapter else "transformers"
    if "gguf" in trained:
        library = "gguf"
    method = trained.get("method", "lora")
    data = trained.get("data", {})
    matter: dict[str, Any] = {
        "base_model": name,
        "base_model_relation": "adapter" if adapter else "finetune",
        "library_name": library,
        "pipeline_tag": "text-generation",
        "license": license_id,
        "tags": ["clinical-notes", "medical", "summarization", method],
    }
    if task_of(trained) == SOAP:
        matter |= {"language": ["en"]}  # of the prompt
        matter["tags"] = ["soap-notes", "medical", "summarization", method]
    if fingerprint := data.get("train", {}).get("fingerprint"):
        matter["datasets"] = [f"sha256-{fingerprint}"]
    return matter


# ---- the sections


def usage(folder: Path, trained: dict[str, Any]) -> str:
    """How a note is written: a sentence and code for transformers, PEFT, vLLM or llama.cpp."""
    prompt = prompt_of(trained)
    settings = settings_of(trained)
    if "gguf" in trained:
        file = f"model-{trained['gguf']}.gguf"
        context = trained.get("max_seq_len") or CONTEXT
        return LLAMA_CPP.format(file=file, context=context, request=chat_request(prompt, settings))
    libraries = "transformers and PEFT" if is_adapter(folder) else "transformers"
    kind = "model"
    if is_adapter(folder):
        kind = "adapter_nf4" if trained.get("storage", "nf4") == "nf4" else "adapter"
    code = (RECIPE[kind] + WRITING).format(
        **prompt_code(prompt, sorted(task_of(trained).columns)),
        dtype=trained.get("dtype", "bfloat16"),
        double_quant=trained.get("double_quant", True),
        options=generation_options(settings),
        **no_repeat_code(settings.no_repeat_ngram),
    )
    lines = [f"With {libraries} alone:", f"```python\n{code.strip()}\n```"]
    beyond = beyond_the_recipe(settings)
    if beyond:
        lines.append(f"The project's `generate` also {' and '.join(beyond)}.")
    if not is_adapter(folder):
        context = trained.get("max_seq_len") or CONTEXT
        lines.append(VLLM.format(context=context, request=chat_request(prompt, settings)))
    return "\n\n".join(lines)


def prompt_code(prompt: dict[str, Any], columns: list[str]) -> dict[str, str]:
    """The parts of the code that make the messages. columns: what the request has in braces."""
    return {
        "request": repr(prompt["request"]),
        "system": repr(prompt["system"]),
        "system_message": SYSTEM_MESSAGE if prompt["system"] else "",
        "filled": "REQUEST" + "".join(f'.replace("{{{c}}}", {c})' for c in columns),
        "parameters": "".join(f", {column}" for column in columns),
        "arguments": "".join(f', {column}="..."' for column in columns),
    }


def chat_request(prompt: dict[str, Any], settings: GenerationSettings) -> str:
    """The arguments of curl that ask a server with OpenAI's interface for a note."""
    conversation = "Doctor: What brings you in?\nPatient: A cough for a week."
    messages = [{"role": "user", "content": prompt["request"] + conversation}]
    if prompt["system"]:
        messages.insert(0, {"role": "system", "content": prompt["system"]})
    body = {
        "model": "soap",
        "messages": messages,
        "temperature": settings.temperature,
        "max_tokens": settings.max_new_tokens,
    }
    return f"-H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}"


def no_repeat_code(n: int) -> dict[str, str]:
    """The parts of the code that keep n tokens in a row from occurring twice; 0: nothing does."""
    libraries = "AutoTokenizer, GenerationConfig"
    if not n:
        return {"libraries": libraries, "no_repeat": "", "argument": ""}
    return {
        "libraries": f"{libraries}, LogitsProcessor, LogitsProcessorList",
        "no_repeat": NO_REPEAT.format(n=n),
        "argument": NO_REPEAT_ARGUMENT,
    }


def generation_options(settings: GenerationSettings) -> str:
    """The arguments of transformers' GenerationConfig, as Python code."""
    options: dict[str, Any] = {"max_new_tokens": settings.max_new_tokens, "do_sample": False}
    if settings.temperature:
        options |= {"do_sample": True, "temperature": settings.temperature, "top_k": 0}
        options |= {"top_p": settings.top_p, "min_p": settings.min_p}
    return "".join(f"    {key}={value!r},\n" for key, value in options.items())


def beyond_the_recipe(settings: GenerationSettings) -> list[str]:
    """What `generate` does by these settings that the card's code does not."""
    parts = []
    if settings.end_loops:
        parts.append("ends a note that runs in circles")
    if settings.forced_headings:
        parts.append("forces the headings")
    if settings.candidates > 1:
        parts.append(
            f"draws {settings.candidates} notes and gives the one whose facts agree best with the "
            "dialogue"
        )
    return parts


def prompt_section(trained: dict[str, Any]) -> str:
    """The prompt's texts, word for word, and their hashes."""
    prompt = prompt_of(trained)
    if "sha256" in prompt and "chat_template_sha256" in prompt:
        lead = (
            f"Its SHA-256 is `{prompt['sha256']}`, the chat template's "
            f"`{prompt['chat_template_sha256']}`."
        )
    elif "prompt" in trained:
        lead = "The rows of the training brought their own prompts. This is the one of `generate`."
    else:
        lead = "What it was trained with is not recorded. This is the one of `generate`."
    columns = ", ".join(f"{{{name}}}" for name in sorted(task_of(trained).columns))
    filled = f", {columns} filled from the row's columns," if columns else ","
    system = "There is no system message."
    if prompt["system"]:
        system = f"The system's message:\n\n````text\n{prompt['system']}\n````"
    return (
        f"{lead} The code above has it to the character.\n\n{system}\n\n"
        f"The user's message{filled} with an empty line and the conversation behind it:\n\n"
        f"````text\n{prompt['request'].rstrip()}\n````"
    )


def data_section(trained: dict[str, Any], name: str) -> str:
    """The base, and the data by counts and hashes."""
    lines = ["| what | value |", "|---|---|", f"| base | {name} |"]
    facts = {
        "revision": trained.get("revision"),
        "fingerprint of the base": trained.get("base_fingerprint"),
        "stored while training as": trained.get("storage"),
        "merged into": trained.get("merged_into"),
        "converted to GGUF as": trained.get("gguf"),
    }
    lines += [f"| {key} | {value} |" for key, value in facts.items() if value]
    for split, counts in trained.get("data", {}).items():
        lines += [
            f"| {split}: {key.replace('_', ' ')} | {_number(value)} |"
            for key, value in counts.items()
            if counts.get("examples")
        ]
    return "\n".join(lines)


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def recipe_section(trained: dict[str, Any]) -> str:
    """The recipe, the steps and tokens, and the versions."""
    if "recipe" not in trained:
        steps = f" It had made {trained['steps']:,} steps." if "steps" in trained else ""
        return f"Not recorded.{steps}"
    rows = {}
    if "steps" in trained:
        planned = f" of {trained['planned_steps']:,} planned" if "planned_steps" in trained else ""
        rows["steps"] = f"{trained['steps']:,}{planned}"
    counts = ("tokens", "supervised_tokens")
    rows |= {key.replace("_", " "): _number(trained[key]) for key in counts if key in trained}
    recipe = dict(trained["recipe"])
    for number, start in enumerate(trained.get("started_from", []), 1):
        steps = f", after {start['steps']:,} steps" if "steps" in start else ""
        rows[f"trained on from, {number}"] = f"adapter `{start['sha256'][:16]}`{steps}"
    rows |= {f"lora.{key}": value for key, value in (recipe.pop("lora", None) or {}).items()}
    rows |= recipe
    rows |= trained.get("versions", {})
    lines = ["| what | value |", "|---|---|"]
    return "\n".join([*lines, *(f"| {key} | {value} |" for key, value in rows.items())])


def figures_section(trained: dict[str, Any]) -> str:
    """The validation loss, and the figures of each evaluation with their intervals."""
    figures = trained.get("figures", {})
    metrics = metrics_of(task_of(trained))
    parts = []
    if (loss := figures.get("validation_loss")) is not None:
        count = trained.get("data", {}).get("valid", {}).get("examples")
        on = f", on {count:,} examples" if count else ""
        parts.append(f"Validation loss {loss:.4f} nats a token{on}.")
    for name, report in (figures.get("evaluate") or {}).items():
        counts = [f"{report[key]:,} {key}" for key in ("examples", "notes") if key in report]
        lines = ["| figure | value | 95 % interval |", "|---|---|---|"]
        for key, values in report["figures"].items():
            if key in metrics and values["value"] is not None:
                numbers = values["value"], values["low"], values["high"]
                lines.append(figure_row(metrics[key], *numbers))
        parts.append(f"{name}: {', '.join(counts)}.\n\n" + "\n".join(lines))
    if "merged_into" in trained and parts:
        parts.insert(0, "These are the figures of the adapter before it was merged.")
    return "\n\n".join(parts) or "None yet: the project's `evaluate` adds them."


def figure_row(metric: Metric, value: float, low: float | None, high: float | None) -> str:
    """A line of the table, with an interval where there is one."""
    show = metric.format
    span = f"{show(low)} to {show(high)}" if low is not None and high is not None else ""
    return f"| {metric.title.strip()} | {show(value)} | {span} |"


def limits_section(trained: dict[str, Any]) -> str:
    """What a reader must know before a note is used."""
    lines = [
        "- The notes are drafts; a clinician must review each one. Wrong doses, sides and findings "
        "occur, and no figure above says that a note is safe to sign."
    ]
    if count := trained.get("data", {}).get("train", {}).get("examples"):
        lines.append(f"- It was trained on {count:,} examples.")
    if "max_seq_len" in trained:
        lines.append(
            f"- Conversation and note together had at most {trained['max_seq_len']:,} tokens."
        )
    prompt_language = "The prompt is English. " if task_of(trained) == SOAP else ""
    lines += [
        f"- {prompt_language}The language of the data was not examined.",
        "- It can remember single patients of its data: treat it as you treat that data.",
    ]
    return "\n".join(lines)
