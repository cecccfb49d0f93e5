"""The card says what made the model, and the code that it shows writes the model's own notes."""

import functools
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from helpers import run_ok
from peft import PeftModel

from loop.commands import evaluate, generate
from loop.config.schema import ConfigError, GenerationSettings
from loop.data.soap import SOAP
from loop.export import card
from loop.export.card import base_license, record_evaluation, write_card, write_papers
from loop.export.merge import merge
from loop.generation import prompt as prompts
from loop.generation.decode import write_notes
from loop.generation.engine import NoteRequest
from loop.generation.loading import prompt_ids
from loop.model.loading import load_base, load_tokenizer
from loop.model.lora import NEVER_NULL, NULL_ANSWERS, read_adapter

DIALOGUES = ["Doctor: 5?\nPatient: pain 7", "Patient: x\nDoctor: since when? 12\n", "Doctor: 81?"]


def front_matter(text: str) -> dict:
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL).group(1))


def run_code(folder: Path, monkeypatch, dtype: str) -> dict:
    """Executes the card's only block of Python, as a reader would in the card's folder."""
    text = (folder / "README.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert "loop" not in code
    assert "dtype = torch.bfloat16\n" in code
    code = code.replace("dtype = torch.bfloat16\n", f"dtype = torch.{dtype}\n")
    monkeypatch.chdir(folder)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    return names


def request(tokenizer, dialogue: str, settings: GenerationSettings) -> NoteRequest:
    return NoteRequest("x", prompt_ids(tokenizer, dialogue), settings.max_new_tokens)


def recorded(model, tokens: list) -> None:
    """Lets `model.generate` add the token ids that it returns to `tokens`."""
    write = model.generate

    def writing(*args, **options):
        out = write(*args, **options)
        tokens.append(out[0].tolist())
        return out

    model.generate = writing


def written_again(folder: Path, out: Path, **generation) -> tuple[Path, GenerationSettings]:
    """A copy of a folder whose card has these settings, and the settings."""
    shutil.copytree(folder, out)
    settings = {"end_loops": False, **generation}
    write_papers(out, json.loads((out / "trained.json").read_text()) | {"generation": settings})
    return out, GenerationSettings(**settings)


@pytest.fixture(scope="module")
def merged(trained, tmp_path_factory) -> Path:
    """The run's adapter, with settings that notes can be compared by, merged."""
    folder = tmp_path_factory.mktemp("merged")
    shutil.copytree(trained / "adapter", folder / "adapter")
    path = folder / "adapter" / "trained.json"
    settings = {"max_new_tokens": 24, "end_loops": False}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"generation": settings}))
    return merge(str(folder / "adapter"), str(folder / "m"), into="nf4")


@pytest.mark.parametrize("no_repeat_ngram", [0, 1, 2])
def test_the_cards_code_writes_the_notes_of_generate(
    merged, monkeypatch, tmp_path, no_repeat_ngram
):
    """The merged folder by transformers alone, in fp32, token for token."""
    folder, settings = written_again(
        merged, tmp_path / "m", max_new_tokens=24, no_repeat_ngram=no_repeat_ngram
    )
    model = load_base(str(merged), torch.float32, "cpu", quantization=None).eval()
    tokenizer = load_tokenizer(str(merged))
    tokens: list = []
    recorded(model, tokens)

    def write(by_generate: bool) -> list[str]:
        requests = [request(tokenizer, d, settings) for d in DIALOGUES]
        notes = [
            write_notes(model, tokenizer, [r], settings, partitioned=by_generate) for r in requests
        ]
        return [note.text for (note,) in notes]

    ours = write(by_generate=True)
    assert write(by_generate=False) == ours
    names = run_code(folder, monkeypatch, "float32")
    theirs: list = []
    recorded(names["model"], theirs)
    assert [names["write_note"](d) for d in DIALOGUES] == ours
    assert theirs == tokens and len({*map(tuple, tokens)}) == len(DIALOGUES)


def test_the_cards_code_prints_what_the_command_prints(merged, monkeypatch, capsys, tmp_path):
    """In the precision of the card, bf16."""
    monkeypatch.setattr("loop.generation.loading.has_fast_bf16", lambda: True)
    names = run_code(merged, monkeypatch, "bfloat16")
    (tmp_path / "d.txt").write_text(DIALOGUES[0])
    options = ["--base", str(merged), "--dialogue", str(tmp_path / "d.txt")]
    capsys.readouterr()
    generate.main([*options, "--max-new-tokens", "24", "--no-end-loops"])
    assert capsys.readouterr().out == names["write_note"](DIALOGUES[0]) + "\n"


def test_the_merged_model_writes_the_adapters_notes(merged, trained, tiny_base, monkeypatch):
    """In fp32, where the adapter is on the base that it was merged into; a merged weight is rounded
    to bf16, which the first tokens survive.
    """
    base = load_base(tiny_base, torch.float32, "cpu", quantization="nf4")
    model = PeftModel.from_pretrained(base, str(trained / "adapter")).eval()
    tokenizer = load_tokenizer(tiny_base)
    settings = GenerationSettings(max_new_tokens=4, end_loops=False)
    names = run_code(merged, monkeypatch, "float32")
    names["model"].generation_config.max_new_tokens = 4
    for d in DIALOGUES:
        (note,) = write_notes(model, tokenizer, [request(tokenizer, d, settings)], settings)
        assert names["write_note"](d) == note.text


def test_the_cards_code_loads_the_adapter(trained, tiny_base, tmp_path, monkeypatch):
    """On its NF4 base, with PEFT: the notes that `generate` writes."""
    shutil.copytree(trained / "adapter", tmp_path / "adapter")
    names = run_code(tmp_path / "adapter", monkeypatch, "bfloat16")
    tokenizer = load_tokenizer(tiny_base)
    settings = GenerationSettings(max_new_tokens=12, end_loops=False)
    requests = [request(tokenizer, DIALOGUES[0], settings)]
    (note,) = write_notes(names["model"], tokenizer, requests, settings)
    assert names["write_note"](DIALOGUES[0]) == note.text
    assert names["SYSTEM"] == SOAP.system and names["REQUEST"] == SOAP.request


def test_the_card_says_what_made_the_adapter(trained):
    """Counts and hashes, and no text and no id of the data."""
    text = (trained / "adapter" / "README.md").read_text()
    says = json.loads((trained / "adapter" / "trained.json").read_text())
    matter = front_matter(text)
    assert matter["library_name"] == "peft" and matter["license"] == "other"
    assert matter["datasets"] == [f"sha256-{says['data']['train']['fingerprint']}"]
    assert "/" not in matter["base_model"]  # a local folder's path is nobody's business
    assert SOAP.system in text and SOAP.request.strip() in text and says["prompt"]["sha256"] in text
    assert says["max_seq_len"] == 512 and says["recipe"]["lora"]["r"] == 8
    assert (says["steps"], says["planned_steps"]) == (6, 6) and "6 of 6 planned" in text
    data = json.loads((trained / "data.json").read_text())
    assert says["data"]["train"]["examples"] == data["train"]["kept"] == 35
    assert 0 < says["supervised_tokens"] < says["tokens"]
    loss = json.loads((trained / "report.json").read_text())["eval/loss"]
    assert says["figures"]["validation_loss"] == loss
    assert f"Validation loss {loss:.4f} nats a token, on 5 examples" in text
    assert "clinician must review" in text and "trained on 35 examples" in text
    assert "valid-" not in text + json.dumps(says) and "Patient: pain" not in text
    assert not (trained / "adapter" / "Modelfile").exists()


def test_the_merged_model_has_papers_of_its_own(merged):
    text = (merged / "README.md").read_text()
    says = json.loads((merged / "trained.json").read_text())
    assert front_matter(text)["library_name"] == "transformers"
    assert says["merged_into"] == "nf4" and "| merged into | nf4 |" in text
    assert "sha256" not in says and len(says["adapter_sha256"]) == 64
    assert "figures of the adapter before it was merged" in text
    modelfile = (merged / "Modelfile").read_text()
    assert "PARAMETER num_ctx 512" in modelfile and "PARAMETER num_predict 24" in modelfile
    assert 'TEMPLATE """<|system|>' in modelfile


@pytest.mark.slow
def test_a_full_model_has_them_too(config_file, tmp_path, monkeypatch):
    """A run with method=full: no LoRA in its recipe, and code that writes notes."""
    run_ok(1, "-m", "loop.train", "--config", str(config_file), "method=full", "max_steps=2")
    folder = tmp_path / "runs" / "t" / "model"
    text = (folder / "README.md").read_text()
    says = json.loads((folder / "trained.json").read_text())
    assert says["method"] == "full" and says["steps"] == 2 and "lora" not in says["recipe"]
    assert front_matter(text)["library_name"] == "transformers" and "PEFT" not in text
    assert "PARAMETER num_ctx 1024" in (folder / "Modelfile").read_text()
    names = run_code(folder, monkeypatch, "bfloat16")
    assert isinstance(names["write_note"](DIALOGUES[0]), str)
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="another prompt"):
        patch.setattr(prompts, "_sha256", lambda text: "x")
        prompts.check_prompt("--base", str(folder), load_tokenizer(str(folder)))


def test_a_merged_model_is_not_asked_another_prompt(merged, monkeypatch, capsys):
    monkeypatch.setattr(prompts, "_sha256", lambda text: "x")
    monkeypatch.setattr("sys.stdin.read", lambda size: "Doctor: hi", raising=False)
    with pytest.raises(SystemExit) as end:
        generate.main(["--base", str(merged)])
    assert end.value.code == 2 and "--any-prompt" in capsys.readouterr().err


def test_an_evaluation_is_added_to_the_card(trained, tmp_path):
    """Its figures with their intervals; not the unsupported facts, which are a patient's."""
    shutil.copytree(trained / "adapter", tmp_path / "adapter")
    figures = {"rouge1": {"value": 0.5, "low": 0.4, "high": 0.6, "first turns": 0.2}}
    report = {"examples": 6, "notes": 2, "figures": figures, "unsupported": {"valid-1": ["x: 7"]}}
    record_evaluation(tmp_path / "adapter", "test", report)
    text = (tmp_path / "adapter" / "README.md").read_text()
    assert "| ROUGE-1 | 50.0 | 40.0 to 60.0 |" in text and "test: 6 examples, 2 notes" in text
    assert "valid-1" not in text + (tmp_path / "adapter" / "trained.json").read_text()
    out = merge(str(tmp_path / "adapter"), str(tmp_path / "m"))
    assert "| ROUGE-1 | 50.0 | 40.0 to 60.0 |" in (out / "README.md").read_text()
    (tmp_path / "adapter" / "README.md").unlink()  # an older run's
    record_evaluation(tmp_path / "adapter", "test", report)
    assert not (tmp_path / "adapter" / "README.md").exists()


def test_the_licence_is_the_one_that_the_base_names(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert base_license(str(tmp_path), None) == "other"
    (tmp_path / "config.json").write_text('{"license": "mit"}')
    assert base_license(str(tmp_path), None) == "mit"
    readme = tmp_path / "README.md"
    readme.write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# x\nlicense: mit\n")
    assert base_license(str(tmp_path), None) == "apache-2.0"
    for broken in ("---\n: : [\n---\n", "---\nlicense: [a, b]\n---\n", "---\n- x\n---\n"):
        (tmp_path / "config.json").write_text("{}")
        readme.write_text(broken)
        assert base_license(str(tmp_path), None) == "other"
    assert base_license(str(tmp_path / "nowhere"), None) == "other"


def test_a_card_names_the_bases_licence(trained, tmp_path):
    (tmp_path / "config.json").write_text('{"license": "mit"}')
    says = json.loads((trained / "adapter" / "trained.json").read_text())
    write_card(tmp_path, says | {"base": str(tmp_path)})
    text = (tmp_path / "README.md").read_text()
    assert front_matter(text)["license"] == "mit" and "The licence of the base: mit." in text


def test_an_adapter_from_elsewhere_gets_a_card(trained, tmp_path):
    """It names its base only: nothing is claimed of its training."""
    shutil.copytree(trained / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter" / "trained.json").unlink()
    text = (merge(str(tmp_path / "adapter"), str(tmp_path / "m")) / "README.md").read_text()
    assert "is not recorded" in text and "Not recorded." in text and "None yet" in text
    assert front_matter(text).keys().isdisjoint({"datasets"})


def test_what_the_code_cannot_do_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(card, "base_license", lambda base, revision: "other")  # no hub
    settings = {"no_repeat_ngram": 6, "forced_headings": True, "temperature": 0.7, "top_p": 0.9}
    settings["candidates"] = 8
    write_card(tmp_path, {"base": "owner/name", "generation": settings, "prompt": None})
    text = (tmp_path / "README.md").read_text()
    assert "No 6 tokens in a row occur twice" in text and "forces the headings" in text
    assert "do_sample=True" in text and "temperature=0.7" in text and "top_p=0.9" in text
    assert "brought their own prompts" in text and "also ends" in text and "draws 8 notes" in text
    assert front_matter(text)["base_model"] == "owner/name"


def test_evaluate_refuses_an_adapter_of_another_prompt(trained, monkeypatch, capsys):
    monkeypatch.setattr(prompts, "_sha256", lambda text: "x")
    monkeypatch.setattr(evaluate, "evaluate_split", lambda *_: pytest.fail("it was evaluated"))
    with pytest.raises(SystemExit) as end:
        evaluate.main(["--config", str(trained / "config.yaml"), "--split", "valid"])
    err = capsys.readouterr().err
    assert end.value.code == 2 and "another prompt" in err and err.count("\n") == 1
    monkeypatch.setattr(evaluate, "evaluate_split", lambda *_: {})
    monkeypatch.setattr(evaluate.torch.distributed, "destroy_process_group", lambda: None)
    evaluate.main(["--config", str(trained / "config.yaml"), "--split", "valid", "--any-prompt"])


def test_no_line_of_metrics_is_no_loss(tmp_path):
    assert card.validation_loss(tmp_path, 3) is None
    lines = ['{"step": 3, "train/loss": 2.0}', '{"step": 3, "eval/loss": 1.5}', '{"step": 4, "e']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert card.validation_loss(tmp_path, 3) == 1.5 and card.validation_loss(tmp_path, 4) is None


def test_what_no_card_can_be_made_of_is_refused_before_the_work(trained, tmp_path):
    """Keys of trained.json that the card alone reads, as a stranger may write them."""
    folder = tmp_path / "adapter"
    shutil.copytree(trained / "adapter", folder)
    whole = json.loads((folder / "trained.json").read_text())
    for key, value in (
        ("recipe", {"lora": 5}),
        ("data", {"train": {"examples": "x"}}),
        ("figures", {"evaluate": 5}),
        ("figures", {"evaluate": {"test": 5}}),
        ("figures", {"validation_loss": "x"}),
        ("started_from", [{"steps": 3}]),
    ):
        changed = json.dumps(whole | {key: value})
        (folder / "trained.json").write_text(changed)
        with pytest.raises(ConfigError, match="trained.json"):
            merge(str(folder), str(tmp_path / "merged"))
        with pytest.raises(ConfigError, match="trained.json is "):
            record_evaluation(folder, "test", {"examples": 1})
        assert (folder / "trained.json").read_text() == changed
        assert not (tmp_path / "merged").exists()


def parts(tree: dict, above: tuple = ()) -> list[tuple]:
    """The keys of each value of a tree, from the outside in."""
    found = []
    for key, value in tree.items():
        found.append((*above, key))
        if isinstance(value, dict):
            found += parts(value, (*above, key))
    return found


def test_the_card_takes_what_an_adapter_is_read_with(trained, tmp_path):
    """A null says as much as no key, and nothing is read that `merge` refuses for its card."""
    folder = tmp_path / "adapter"
    shutil.copytree(trained / "adapter", folder)
    whole = json.loads((folder / "trained.json").read_text())
    whole["started_from"] = [{"sha256": "0" * 64, "steps": 3}]
    whole["figures"]["evaluate"] = {}
    headings = ("prompt", "headings")  # without one of them it is no task, to any command
    for keys in (found for found in parts(whole) if found[:-1] != headings):
        cards = []
        for null in (False, True):
            changed = json.loads(json.dumps(whole))
            *above, last = keys
            inside = functools.reduce(dict.__getitem__, above, changed)
            del inside[last]
            if null:
                inside[last] = None
            (folder / "trained.json").write_text(json.dumps(changed))
            try:
                described = read_adapter(str(folder))
            except ConfigError:
                continue
            card.check_card("x", folder, described)
            cards.append(card.card_text(folder, described))
        if len(keys) == 1 and keys[0] not in (*NEVER_NULL, *NULL_ANSWERS):
            assert len(cards) == 2 and len(set(cards)) == 1, keys
