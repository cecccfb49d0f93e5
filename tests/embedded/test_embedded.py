"""The embedded demo: files, held-out combinations, the pre-training corpus, the untrained base."""

import json
import re
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache

import pytest

from loop.data.soap import SOAP, has_all_sections, parse_note, soap_messages
from loop.embedded import clinic, corpus
from loop.embedded.conditions import CONDITIONS, DRUGS

SAMPLE = 1000  # pre-training rows looked at


@lru_cache(maxsize=None)
def committed(split: str) -> list[dict[str, str]]:
    text = (clinic.DATA / f"{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@lru_cache(maxsize=None)
def pretraining() -> tuple[list[list[dict[str, str]]], list[clinic.Visit]]:
    """The chats of a sample of rows, and the visits that were drawn for them."""
    drawn: list[clinic.Visit] = []

    class Recorder(corpus.Scribe):
        def __init__(self, rng):
            super().__init__(rng)
            drawn.append(self.visit)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "Scribe", Recorder)
        return [corpus.messages(0, number) for number in range(SAMPLE)], drawn


def words_in(text: str, words: Iterable[str]) -> set[str]:
    longest_first = sorted(words, key=len, reverse=True)
    return set(re.findall(rf"\b(?:{'|'.join(map(re.escape, longest_first))})\b", text))


@pytest.mark.parametrize("split", clinic.SPLITS)
def test_files_regenerate_byte_for_byte(split):
    text = "".join(json.dumps(row) + "\n" for row in clinic.rows(split))
    assert (clinic.DATA / f"{split}.jsonl").read_bytes() == text.encode()
    assert len(committed(split)) == clinic.SPLITS[split]


def test_files_are_small():
    assert sum(path.stat().st_size for path in clinic.DATA.glob("*.jsonl")) < 2_000_000


def test_heldout_combinations_stay_out_of_training():
    train, valid, test = (
        {c for v in clinic.visits(split) for c in v.combinations} for split in clinic.SPLITS
    )
    assert {clinic.home_split(c) for c in train} == {"train"}
    for split in ("valid", "test"):
        for v in clinic.visits(split):
            assert any(clinic.home_split(c) == split for c in v.combinations)
    assert not any(clinic.home_split(c) == "test" for c in valid)
    assert len(test - train) >= 50
    assert {kind for kind, _, _ in test - train} == {"drug", "side", "history"}


def test_pretraining_uses_train_visits_only():
    _, drawn = pretraining()
    assert len(drawn) > SAMPLE / 2
    assert all(clinic.fits_split(v, "train") for v in drawn)


def test_pretraining_text_has_no_heldout_drug():
    """No row has a diagnosis together with a prescription that is held out for it."""
    chats, _ = pretraining()
    heldout = []
    for condition in CONDITIONS:
        pattern = re.sub(r"<[^>]*>", r"\\d+", condition.diagnosis)
        diagnosis = re.compile(pattern.replace("{side}", "(left|right)"))
        for drug in condition.drugs:
            if clinic.home_split(("drug", condition.name, drug)) != "train":
                for dose in DRUGS[drug].doses:
                    for often in DRUGS[drug].frequencies:
                        heldout.append((diagnosis, f"{drug} {dose} {often} for"))
    assert heldout
    for chat in chats:
        text = "\n".join(message["content"] for message in chat)
        for diagnosis, prescription in heldout:
            assert not (prescription in text and diagnosis.search(text)), text


def test_every_condition_can_be_trained_on():
    counts = Counter(v.condition for v in clinic.visits("train"))
    assert len(counts) == len(CONDITIONS) and min(counts.values()) >= 10


@pytest.mark.parametrize("split", clinic.SPLITS)
def test_notes_state_only_what_was_said(split):
    sides = ["left", "right"]
    headings = [f"{heading}:" for heading in SOAP.headings]
    for row in committed(split):
        note, dialogue = row["soap"], row["dialogue"]
        assert has_all_sections(note)
        assert re.findall(r"^\w:", note, re.MULTILINE) == headings
        for section in parse_note(note).values():
            assert 1 <= len(re.findall(r"\.(?=\s|$)", section)) <= 4
        number = r"\d+(?:[./]\d+)*"
        assert set(re.findall(number, note)) <= set(re.findall(number, dialogue)), row["id"]
        assert words_in(note, DRUGS) <= words_in(dialogue, DRUGS), row["id"]
        assert words_in(note, sides) <= words_in(dialogue, sides), row["id"]


def test_dialogues_say_every_fact():
    for split in clinic.SPLITS:
        for v, row in zip(clinic.visits(split), committed(split), strict=True):
            facts = [
                v.title,
                str(v.age),
                v.complaint,
                v.duration,
                v.bare,
                v.past,
                v.medicine,
                v.allergy,
                v.diagnosis,
                v.excluded,
                v.prescription,
                v.test,
                v.advice,
                v.follow_up,
                *v.symptoms,
                *v.findings,
            ]
            facts += [f"{name} {value}" for name, value in v.vitals]
            dialogue = row["dialogue"].lower()
            assert [fact for fact in facts if fact.lower() not in dialogue] == [], row["id"]


def test_dialogues_are_varied_and_alternate():
    rows = [row for split in clinic.SPLITS for row in committed(split)]
    assert len({row["dialogue"] for row in rows}) == len(rows)
    assert len({row["soap"] for row in rows}) == len(rows)
    for row in rows:
        speakers = [line.partition(": ")[0] for line in row["dialogue"].splitlines()]
        assert speakers == ["Doctor", "Patient"] * (len(speakers) // 2)
        assert 14 <= len(speakers) <= 24


def test_visits_fit_their_patient():
    for number in range(3000):
        v = clinic.invent_visit(number)
        assert v.denied not in v.symptoms
        assert ("fever" in v.symptoms) == (float(v.temperature.removesuffix(" C")) >= 38)
        if v.allergy in ("penicillin", "amoxicillin"):
            assert "penicillin" not in DRUGS[v.drug].classes
        assert not (v.history == "an enlarged prostate" and v.sex == "woman")
        assert not v.medicine.startswith(v.drug)
        assert v.excluded not in v.history


def test_pretraining_has_no_note():
    chats, _ = pretraining()
    for chat in chats:
        for message in chat:
            assert not parse_note(message["content"]), message["content"]
            assert SOAP.request.strip() not in message["content"]


def test_pretraining_is_varied_and_reproducible():
    chats, _ = pretraining()
    assert chats[:50] == [corpus.messages(0, number) for number in range(50)]
    assert len({json.dumps(chat) for chat in chats}) == len(chats)
    # The first turn is after the system message, if there is one.
    openings = {chat[len(chat) % 2]["content"].partition("\n\n")[0] for chat in chats}
    assert len(openings) > 100


def test_pretraining_file_does_not_depend_on_workers(tmp_path):
    for workers in (1, 2):
        corpus.write(tmp_path / f"{workers}.jsonl", 600, 3, workers)
    first = (tmp_path / "1.jsonl").read_bytes()
    assert first == (tmp_path / "2.jsonl").read_bytes()
    assert len(first.splitlines()) == 600


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    from loop.embedded import base

    folder = tmp_path_factory.mktemp("base")
    base.build_tokenizer(0).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_tokenizer_round_trip(tokenizer):
    texts = [row["dialogue"] + "\n\n" + row["soap"] for row in committed("test")]
    texts.append("  two  spaces,\ttab\n\n\nÄrger 12.5 €")
    for text in texts:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    assert len(tokenizer) == 2048
    assert len(tokenizer("140/90", add_special_tokens=False).input_ids) == 6


def test_prompt_is_a_prefix_of_the_example(tokenizer):
    for row in committed("valid")[:20]:
        prompt = tokenizer.apply_chat_template(
            soap_messages(row["dialogue"]), tokenize=False, add_generation_prompt=True
        )
        example = tokenizer.apply_chat_template(
            soap_messages(row["dialogue"], row["soap"]), tokenize=False
        )
        assert example.startswith(prompt)
        prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
        example_ids = tokenizer(example, add_special_tokens=False).input_ids
        assert example_ids[: len(prompt_ids)] == prompt_ids
        assert prompt_ids.count(tokenizer.eos_token_id) == 2
        assert example_ids[-2] == tokenizer.eos_token_id


def test_rows_fit(tokenizer):
    chats, _ = pretraining()
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    assert max(map(len, tokenizer(texts, add_special_tokens=False).input_ids)) <= 700


def test_model_loads_from_its_folder(tokenizer, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    from loop.embedded import base

    base.build_model(tokenizer, 0).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16 and 5e6 < model.num_parameters() < 6e6
    config = model.config
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)
    assert model.generation_config.pad_token_id == 0 and model.generation_config.eos_token_id == 2
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 12e6
