"""Exposure finds what was planted and does not find what was not."""

import json
import random
import statistics
from types import SimpleNamespace

import pytest
import torch
from helpers import run_ok, write_rows
from transformers import AutoModelForCausalLM

from loop.commands import canaries as canaries_command
from loop.config.cli import load_config
from loop.config.schema import ConfigError
from loop.data.conversations import Conversation, read_split
from loop.data.soap import soap_messages
from loop.data.tokenization import encode_examples
from loop.evaluation import memorization
from loop.evaluation.memorization import (
    Canary,
    exposure,
    exposure_table,
    log_probs,
    make_canaries,
    plant_canaries,
    times_seen,
)
from loop.model.loading import load_tokenizer


@pytest.fixture(scope="module")
def conversations(tmp_path_factory) -> list[Conversation]:
    folder = tmp_path_factory.mktemp("canaries")
    path = write_rows(folder / "train.jsonl", "train", 40, 1, longest=2)
    rows = [json.loads(line) for line in open(path)]
    return [
        Conversation(
            row["id"], soap_messages(row["dialogue"], row["soap"]), row["dialogue"], row["soap"]
        )
        for row in rows
    ]


def test_each_canary_is_planted_as_often_as_it_says(conversations):
    canaries = make_canaries(conversations, 2, [1, 4], seed=3)
    assert sorted(c.repeats for c in canaries) == [0, 0, 1, 1, 4, 4]
    assert all(len(set(c.rows)) == c.repeats for c in canaries)
    planted = plant_canaries(conversations, canaries)
    for canary in canaries:
        holders = [row["id"] for row in planted if canary.sentence() in row["soap"]]
        assert sorted(holders) == sorted(canary.rows)
        dialogues = [row["dialogue"] for row in planted]
        assert not any(canary.number in text or canary.name in text for text in dialogues)
    taken = {row for canary in canaries for row in canary.rows}
    untouched = {row["id"]: row["soap"] for row in planted if row["id"] not in taken}
    assert len(untouched) == 40 - 10
    assert all(untouched[c.id] == c.note for c in conversations if c.id in untouched)
    assert [row["dialogue"] for row in planted] == [c.dialogue for c in conversations]
    assert canaries == make_canaries(conversations, 2, [1, 4], seed=3)
    assert canaries != make_canaries(conversations, 2, [1, 4], seed=4)
    size = {c.id: len(c.dialogue) + len(c.note) for c in conversations}
    median = sorted(size.values())[20]
    assert all(size[row] <= median for row in taken)


def test_too_few_rows_are_refused(conversations):
    message = "needs 21 rows, and the shorter half of data.train has 20"
    with pytest.raises(ConfigError, match=message):
        make_canaries(conversations, 1, [1, 4, 16], seed=0)


def test_a_made_up_patient_is_nobodys_in_the_data():
    def drawn(text: str, names: set[str]) -> tuple[str, str]:
        return memorization._made_up_patient(random.Random(5), names, text)

    name, number = drawn("", set())
    again = [drawn(f"... {name.lower()} ...", set()), drawn(f"no. {number}", set())]
    again.append(drawn("", {name}))
    assert all(other != (name, number) for other in again)


def test_the_copy_with_canaries_is_read_as_it_was_made(config_file, monkeypatch):
    """All of it, whatever the run's own data.limit, data.identifiers and columns are."""
    alone = SimpleNamespace(is_main=True, rank=0, all_gather_json=lambda value: [value])
    words = ["--config", str(config_file), "data.limit=30", "data.identifiers=warn"]
    config, canaries = memorization.prepare_canary_run(load_config(words), 1, [2], alone)
    assert config.data.limit is None and config.data.identifiers == "off"
    assert config.run.name == "t-canaries" and config.data.valid_fraction == 0
    rows = read_split(config, "train")[0]
    assert len(rows) == 30 and sum(canaries[0].number in row.note for row in rows) == 2


@torch.no_grad()
def test_a_common_prefix_is_computed_once_and_right(tiny_base):
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()
    start = list(range(5, 60))
    rows = [[*start, 7, 9, 2], [*start, 8, 2], [*start, 7, 9, 11, 12, 2], [*start, 13, 2]]
    expected = []
    for row in rows:
        log_softmax = model(input_ids=torch.tensor([row])).logits[0, :-1].log_softmax(-1)
        chosen = log_softmax[torch.arange(len(row) - 1), row[1:]]
        expected.append(chosen[len(start) - 1 :].sum())
    for size in (1, 3, 256):
        found = log_probs(model, rows, batch_size=size)
        torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_the_planted_is_found_and_the_unplanted_is_not(tiny_base, conversations, monkeypatch):
    """Forty gradient steps on sentences with two numbers; four others it never saw."""
    monkeypatch.setattr(memorization, "NUM_REFERENCES", 255)
    tokenizer = load_tokenizer(tiny_base)
    planted = [c for c in make_canaries(conversations, 2, [1], seed=1) if c.repeats]
    controls = [
        c for seed in (1, 2) for c in make_canaries(conversations, 2, [1], seed) if not c.repeats
    ]
    trained_on = [
        Conversation("x", soap_messages(c.dialogue, c.note + canary.sentence()))
        for canary, c in zip(planted * 3, conversations)
    ]
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    rows = [torch.from_numpy(e.input_ids).long() for e in encode_examples(tokenizer, trained_on)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
    for _ in range(40):
        model(input_ids=ids.clamp(min=0), labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()

    def bits(canaries: list[Canary]) -> list[float]:
        context = conversations[9]
        return [exposure(model, tokenizer, c, context, random.Random(0)) for c in canaries]

    assert bits(planted) == [8, 8]
    unseen = bits(controls)
    assert len(unseen) == 4 and max(unseen) < 6 and statistics.mean(unseen) < 3, unseen


def test_chance_is_where_the_paper_has_it(monkeypatch, conversations, tiny_base):
    """A model that knows nothing: ranks drawn evenly, 1.44 bits on average."""
    scores = torch.Generator().manual_seed(0)
    example = SimpleNamespace(input_ids=torch.zeros(1))

    def random_scores(model, rows):
        return torch.randn(len(rows), generator=scores)

    monkeypatch.setattr(memorization, "log_probs", random_scores)
    monkeypatch.setattr(
        memorization, "encode_examples", lambda tokenizer, rows: [example] * len(rows)
    )
    tokenizer = load_tokenizer(tiny_base)
    canary = Canary("Bo Dago", "123456", 0, [])
    bits = [
        exposure(None, tokenizer, canary, conversations[0], random.Random(i)) for i in range(300)
    ]
    assert statistics.mean(bits) == pytest.approx(1.44, abs=0.25)
    assert 0 <= min(bits) <= max(bits) <= 10


def test_a_number_is_ranked_among_others_alone(monkeypatch, conversations):
    """However it is drawn, its own number stands first and once."""
    seen = []
    monkeypatch.setattr(memorization, "NUM_DIGITS", 1)
    monkeypatch.setattr(memorization, "NUM_REFERENCES", 9)
    monkeypatch.setattr(memorization, "log_probs", lambda model, rows: torch.zeros(len(rows)))
    monkeypatch.setattr(
        memorization,
        "encode_examples",
        lambda tokenizer, rows: (
            seen.extend(row.messages[-1]["content"][-2] for row in rows)
            or [SimpleNamespace(input_ids=torch.zeros(1))] * len(rows)
        ),
    )
    canary = Canary("Bo Dago", "7", 0, [])
    for seed in range(4):
        seen.clear()
        exposure(None, None, canary, conversations[0], random.Random(seed))
        assert seen[0] == "7" and sorted(seen) == list("0123456789")


def test_the_table_counts_by_repeats():
    canaries = [Canary(str(i), "1", repeats, []) for i, repeats in enumerate([0, 0, 4, 4])]
    lines = exposure_table(canaries, [0, 0, 12, 8], [1.0, 2.0, 10.0, 5.0])
    assert lines[1].split() == ["none", "0.0", "2", "1.50", "1.00", "..", "2.00", "0"]
    assert lines[2].split() == ["4", "10.0", "2", "7.50", "5.00", "..", "10.00", "1"]


def test_visits_are_counted_from_the_plan(config_file, conversations):
    config = load_config(["--config", str(config_file), "epochs=3", "data.cache=false"])
    tokenizer = load_tokenizer(config.base)
    rows = read_split(config, "train")[0]
    canary = Canary("Bo Dago", "123456", 2, [rows[0].id, rows[1].id])
    assert times_seen(config, tokenizer, [canary]) == [6]
    one_step = config.model_copy(update={"epochs": 1, "max_steps": 1})
    assert times_seen(one_step, tokenizer, [canary])[0] <= 2
    message = "id gone is longer than max_seq_len=1024 with its canary"
    with pytest.raises(ConfigError, match=message):
        times_seen(config, tokenizer, [Canary("Bo Dago", "123456", 1, ["gone"])])


def test_the_command_plants_trains_and_measures(config_file):
    args = ["--canaries", "1", "--repeats", "1,8", "--config", str(config_file), "max_steps=2"]
    out = run_ok(2, "-m", "loop.commands.evaluate", *args)
    runs = config_file.parent / "runs"
    report = json.loads((runs / "t-canaries" / "report.json").read_text())
    data = runs / "t-canaries-data"
    planted = (data / "train.jsonl").read_text()
    seen = {c["repeats"]: c for c in report["canaries"]}
    assert sorted(seen) == [0, 1, 8]
    assert all(planted.count(c["number"]) == repeats for repeats, c in seen.items())
    assert all(0 <= c["exposure"] <= 10 and c["seen"] <= c["repeats"] for c in seen.values())
    assert "exposure (bits)" in out
    assert len(out[out.index("exposure (bits)") :].strip().splitlines()) == 4
    assert report["steps"] == 2 and not (runs / "t").exists()
    assert data.stat().st_mode & 0o77 == 0


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--canaries", "0"], "--canaries 0"),
        (["--canaries", "2", "--repeats", "1,x"], "--repeats 1,x"),
        (["--canaries"], "--canaries: its value"),
        (["--canaries", "9"], "needs 189 rows"),
        (["--canaries", "1", "data.weights=[0.5]"], "data.weights=null"),
    ],
)
def test_wrong_arguments_are_one_line(config_file, args, words, monkeypatch):
    alone = SimpleNamespace(is_main=True, rank=0, all_gather_json=lambda value: [value])
    monkeypatch.setattr(canaries_command, "init_distributed", lambda run: alone)
    with pytest.raises(ConfigError, match=words):
        canaries_command.main(["--config", str(config_file), *args])
