"""Sources, columns, templates, and which tokens are supervised."""

import json

import numpy as np
import pandas
import pytest
from conftest import SHARED

from loop.cli import load_config
from loop.config import ConfigError
from loop.data import PLAIN_TEMPLATE, encode, encode_examples, load_examples, read_conversations
from loop.model import load_tokenizer
from loop.soap import soap_messages

ROWS = [{"id": f"r{i}", "dialogue": f"Doctor: How are you, {i}?\nPatient: Pain, 7/10.", "soap": f"S: Pain {i}.\nO: -\nA: x\nP: y"} for i in range(6)]

ZEPHYR = (  # TinyLlama's; role tags are ordinary text there
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '<|user|>\n' + message['content'] + eos_token }}"
    "{% elif message['role'] == 'system' %}{{ '<|system|>\n' + message['content'] + eos_token }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|assistant|>\n'  + message['content'] + eos_token }}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {  # template, end of sequence, further special tokens
    "own": (None, "</s>", []), "none": (PLAIN_TEMPLATE, "</s>", []), "zephyr": (ZEPHYR, "</s>", []),
    "llama3": (LLAMA3, "<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>"]), "chatml": (CHATML, "<|im_end|>", ["<|im_start|>"]),
}  # fmt: skip


@pytest.fixture(params=TEMPLATES)
def tokenizer(request, tiny_base):
    tokenizer = load_tokenizer(tiny_base)
    template, eos, specials = TEMPLATES[request.param]
    tokenizer.add_special_tokens({"eos_token": eos, "additional_special_tokens": specials})
    tokenizer.chat_template = template or tokenizer.chat_template
    return tokenizer


def write(folder, kind: str, rows=ROWS):
    path = folder / f"rows.{kind}"
    frame = pandas.DataFrame(rows)
    if kind == "jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    elif kind == "csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path)
    return str(path)


def config(source, tiny_base, *args):
    return load_config(["--config", "loop/configs/soap_qlora.yaml", f"base={tiny_base}", f"data.train={json.dumps(source)}", *args])


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_each_file_format_gives_the_same_conversations(kind, tmp_path, tiny_base):
    found = read_conversations(config(write(tmp_path, kind), tiny_base), "train")
    assert found == [(r["id"], soap_messages(r["dialogue"], r["soap"])) for r in ROWS]


def test_a_folder_in_the_hubs_layout_and_a_list_of_sources(tmp_path, tiny_base):
    folder = tmp_path / "set" / "data"
    folder.mkdir(parents=True)
    pandas.DataFrame(ROWS).drop(columns="id").to_parquet(folder / "train-00000-of-00001.parquet")
    pandas.DataFrame(ROWS[:2]).drop(columns="id").to_parquet(folder / "validation-00000-of-00001.parquet")
    c = config([str(tmp_path / "set"), write(tmp_path, "jsonl")], tiny_base, f"data.valid={tmp_path / 'set'}", f"data.test={tmp_path / 'set'}:train")
    assert [k for k, _ in read_conversations(c, "train")] == [f"train-{i}" for i in range(6)] + [r["id"] for r in ROWS]
    assert len(read_conversations(c, "valid")) == 2 and len(read_conversations(c, "test")) == 6


def test_messages_supervise_every_assistant_turn(tmp_path, tiny_base):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "one"},
             {"role": "user", "content": "b"}, {"role": "assistant", "content": "two"}]  # fmt: skip
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps({"messages": turns}) + "\n")
    c = config(str(path), tiny_base, "data.columns={messages: messages}")
    tokenizer = load_tokenizer(tiny_base)
    (e,), _ = load_examples(c, tokenizer, "train")
    assert tokenizer.decode(e.input_ids[e.labels != -100]) == "one</s>two</s>"
    (e,), _ = load_examples(c.model_copy(update={"data": c.data.model_copy(update={"supervise": "all"})}), tokenizer, "train")
    assert np.array_equal(e.labels[1:], e.input_ids[1:]) and e.labels[0] == -100


@pytest.mark.parametrize(("row", "words"), [
    ({"dialogue": "Doctor: secret"}, "no column 'soap'"), ({"dialogue": " ", "soap": "S: secret"}, "row 1 (id train-0): dialogue is empty"),
    ({"dialogue": "Doctor: secret", "soap": 3}, "soap is not a text"),
])  # fmt: skip
def test_a_bad_row_is_named_without_its_words(row, words, tmp_path, tiny_base):
    with pytest.raises(ConfigError) as caught:
        read_conversations(config(write(tmp_path, "jsonl", [row]), tiny_base), "train")
    assert words in str(caught.value) and "secret" not in str(caught.value)


def test_ids_are_unique_and_missing_files_named(tmp_path, tiny_base):
    with pytest.raises(ConfigError, match="row 7 .id r0.: this id occurs twice"):
        read_conversations(config(write(tmp_path, "jsonl", [*ROWS, ROWS[0]]), tiny_base), "train")
    with pytest.raises(ConfigError, match="nowhere.jsonl: no such file"):
        read_conversations(config("nowhere.jsonl", tiny_base), "train")
    (tmp_path / "cut.jsonl").write_text(json.dumps(ROWS[0]) + '\n{"id": "r1", "dialogue": "Doctor: sec')
    with pytest.raises(ConfigError, match="cut.jsonl: repair the file") as caught:
        read_conversations(config(str(tmp_path / "cut.jsonl"), tiny_base), "train")
    assert "Doctor" not in str(caught.value)


def test_the_note_and_its_eos_are_supervised_and_nothing_else(tokenizer):
    conversations = [(r["id"], soap_messages(r["dialogue"], r["soap"])) for r in ROWS]
    for e, row in zip(encode_examples(tokenizer, conversations), ROWS):
        supervised = e.input_ids[e.labels != -100]
        assert supervised[-1] == tokenizer.eos_token_id == e.input_ids[-1]
        assert tokenizer.decode(supervised[:-1]).strip() == row["soap"]
        prompt = encode(tokenizer, [(soap_messages(row["dialogue"]), True)])[0]
        assert e.input_ids[: len(prompt)].tolist() == prompt  # what generation feeds is what training saw
        assert np.array_equal(e.labels[len(prompt) :], e.input_ids[len(prompt) :]) and (e.labels[: len(prompt)] == -100).all()


def test_the_spelling_of_a_special_token_stays_text(tokenizer):
    specials = [str(t) for t in tokenizer.added_tokens_decoder.values() if t.special]
    note = "S: he said " + " ".join(specials) + " and left.\nO: -\nA: x\nP: y"
    plain, injected = (encode_examples(tokenizer, [("a", soap_messages(d, note))])[0] for d in ("Doctor: hi", "Doctor: hi " + "".join(specials)))
    count = [sum(int(i) in tokenizer.all_special_ids for i in e.input_ids) for e in (plain, injected)]
    frame = encode_examples(tokenizer, [("a", soap_messages("Doctor: hi", "S: ok"))])[0]
    assert count[0] == count[1] == sum(int(i) in tokenizer.all_special_ids for i in frame.input_ids)
    supervised = injected.input_ids[injected.labels != -100]
    assert tokenizer.decode(supervised[:-1]).strip() == note and tokenizer.eos_token_id not in supervised[:-1]


def test_a_template_without_an_eos_gets_one(tiny_base):
    tokenizer = load_tokenizer(tiny_base)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    (e,) = encode_examples(tokenizer, [("a", soap_messages("Doctor: hi", "S: ok"))])
    assert e.input_ids[-1] == e.labels[-1] == tokenizer.eos_token_id


def test_overlong_examples_are_listed_or_refused(tmp_path, tiny_base):
    long = {"id": "long", "dialogue": "Doctor: hi\n" * 300, "soap": "S: a"}
    path, tokenizer = write(tmp_path, "jsonl", [*ROWS, long]), load_tokenizer(tiny_base)
    kept, dropped = load_examples(config(path, tiny_base, "max_seq_len=1024"), tokenizer, "train")
    assert len(kept) == 6 and dropped == ["long"]
    with pytest.raises(ConfigError, match="id long: .* max_seq_len=1024"):
        load_examples(config(path, tiny_base, "max_seq_len=1024", "data.overlong=error"), tokenizer, "train")
    with pytest.raises(ConfigError, match="no example is left"):
        load_examples(config(path, tiny_base, "max_seq_len=20"), tokenizer, "train")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real dialogues (ACI-Bench, MTS-Dialog) are not on this machine")
@pytest.mark.parametrize("name", ["aci_bench", "mts_dialog"])
def test_real_dialogues_load_by_column_mapping(name, tiny_base):
    c = config(str(SHARED / "data" / name / "train.jsonl"), tiny_base, "max_seq_len=100000", "batch_size=1")
    rows = [json.loads(line) for line in (SHARED / "data" / name / "train.jsonl").open()]
    kept, dropped = load_examples(c, load_tokenizer(tiny_base), "train")
    assert [e.id for e in kept] == [r["id"] for r in rows] and not dropped
