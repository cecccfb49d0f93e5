"""How a model writes notes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LogitsProcessor

from loop.config.schema import GenerationSettings
from loop.data.soap import SOAP, parse_note
from loop.generation.controls import GumbelSampler, sampling_processors
from loop.generation.decode import Note, generate_notes, generate_with_headings, write_notes
from loop.generation.engine import NoteRequest
from loop.generation.loading import load_for_generation, prompt_ids

DIALOGUES = ["Doctor: 1?\nPatient: pain 2", "Doctor: hello, how are you today?", "Patient: x"]


@pytest.fixture(scope="module")
def loaded(trained):
    return load_for_generation(str(trained / "adapter"), None, "cpu")


class Force(LogitsProcessor):
    """Makes each note hold these tokens, one after the other, the last one for ever."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows = rows
        self.count = 0

    def __call__(self, input_ids, scores):
        for row, tokens in enumerate(self.rows):
            scores[row] = -torch.inf
            scores[row, tokens[min(self.count, len(tokens) - 1)]] = 0.0
        self.count += 1
        return scores


def test_a_batch_gives_each_dialogue_its_own_note(loaded):
    """Left padding and neighbours change nothing: a row is what it is alone."""
    model, tokenizer = loaded
    prompts = [prompt_ids(tokenizer, d) for d in DIALOGUES]
    together = generate_notes(model, tokenizer, prompts, 6)
    assert together == [generate_notes(model, tokenizer, [p], 6)[0] for p in prompts]
    other = prompt_ids(tokenizer, "Doctor: bye, how are you then, so?")
    notes = generate_notes(model, tokenizer, [prompts[0], other, prompts[2]], 6)
    assert notes[0] == together[0] and notes[2] == together[2]


def test_a_neighbours_tokens_move_no_logit_by_a_bit(loaded, monkeypatch):
    """Another dialogue of the same length in the same batch: all logits of other notes stay."""
    model, tokenizer = loaded
    generate, seen = model.generate, []

    def recording(**kwargs):
        out = generate(**kwargs, output_logits=True, return_dict_in_generate=True)
        seen.append(torch.stack(out.logits))  # [new tokens, prompts, V]
        return out.sequences

    monkeypatch.setattr(model, "generate", recording)
    ids = [prompt_ids(tokenizer, d) for d in DIALOGUES]
    generate_notes(model, tokenizer, ids, 6)
    generate_notes(model, tokenizer, [ids[0], [5 + i % 200 for i in ids[1]], ids[2]], 6)
    shorter = min(len(s) for s in seen)
    assert shorter > 1 and torch.equal(seen[0][:shorter, [0, 2]], seen[1][:shorter, [0, 2]])
    assert not torch.equal(seen[0][0, 1], seen[1][0, 1])


def test_greedy_is_greedy_whatever_the_base_brings(loaded, monkeypatch):
    """Its generation_config.json may ask for penalties and beams."""
    model, tokenizer = loaded
    prompts = [prompt_ids(tokenizer, d) for d in DIALOGUES]
    before = generate_notes(model, tokenizer, prompts, 6)
    options = {"repetition_penalty": 5.0, "num_beams": 2, "no_repeat_ngram_size": 1}
    for name, value in options.items():
        monkeypatch.setattr(model.generation_config, name, value)
    assert generate_notes(model, tokenizer, prompts, 6) == before


PLANTED = {
    "suppress_tokens": list(range(3, 200)),
    "begin_suppress_tokens": list(range(3, 300)),
    "bad_words_ids": [[token] for token in range(10, 250)],
    "sequence_bias": [[[100], 50.0]],
    "guidance_scale": 3.0,
    "encoder_repetition_penalty": 2.0,
    "encoder_no_repeat_ngram_size": 2,
    "repetition_penalty": 5.0,
    "no_repeat_ngram_size": 1,
    "exponential_decay_length_penalty": [2, 3.0],
    "stop_strings": ["a", "e"],
    "forced_bos_token_id": 1,
    "forced_eos_token_id": 310,
    "min_length": 300,
    "min_new_tokens": 20,
    "max_length": 5,
    "max_time": 0.001,
    "num_beams": 3,
    "do_sample": True,
    "temperature": 0.1,
    "top_k": 3,
    "top_p": 0.3,
    "min_p": 0.5,
    "typical_p": 0.2,
    "eos_token_id": [4, 5, 6],
    "prompt_lookup_num_tokens": 3,
    "return_dict_in_generate": True,
    "cache_implementation": "static",
    "a_key_of_its_own": 1,
}


def greedy_and_sampled(base: str) -> tuple[list[Note], list[Note]]:
    """The notes of a base without an adapter."""
    model, tokenizer = load_for_generation(None, base, "cpu")
    requests = [NoteRequest(str(i), prompt_ids(tokenizer, d), 24) for i, d in enumerate(DIALOGUES)]
    settings = {"max_new_tokens": 24, "end_loops": False}
    sampled = GenerationSettings(temperature=1.0, **settings)
    greedy = GenerationSettings(**settings)
    before = model.generation_config.to_dict()
    notes = tuple(write_notes(model, tokenizer, requests, s) for s in (greedy, sampled))
    assert model.generation_config.to_dict() == before
    return notes


@pytest.fixture(scope="module")
def unasked(tiny_base):
    """The notes of a base that asks for nothing."""
    return greedy_and_sampled(tiny_base)


@pytest.mark.parametrize("keys", [list(PLANTED), *([key] for key in PLANTED)], ids=str)
def test_what_a_base_asks_for_never_leaks_in(tiny_base, unasked, tmp_path, keys):
    """All of it in its generation_config.json, and each key alone."""
    base = shutil.copytree(tiny_base, tmp_path / "base")
    path = Path(base) / "generation_config.json"
    content = json.loads(path.read_text()) | {key: PLANTED[key] for key in keys}
    path.write_text(json.dumps(content))
    assert greedy_and_sampled(str(base)) == unasked


def test_a_note_that_runs_in_circles_is_ended_and_marked(loaded):
    """Its neighbour goes on; a note that ended before is none, though padding repeats."""
    model, tokenizer = loaded
    a, b, c = tokenizer("abc", add_special_tokens=False)["input_ids"]
    eos = tokenizer.eos_token_id
    prompts = [prompt_ids(tokenizer, d) for d in DIALOGUES]
    varied = [c, *(token for i in range(100) for token in [a] * (i % 9) + [b])]
    rows = [[c, *[a, b] * 60], [*varied[:90], eos], [b, eos]]
    notes = generate_notes(
        model, tokenizer, prompts, 100, logits_processor=[Force(rows)], end_loops=True
    )
    text = tokenizer.decode(varied[:90])
    assert notes == [Note("c" + "ab" * 24, False, True), Note(text, True), Note("b", True)]
    notes = generate_notes(model, tokenizer, prompts, 100, logits_processor=[Force(rows)])
    assert notes == [Note("c" + "ab" * 49 + "a", False), Note(text, True), Note("b", True)]


def test_a_section_that_runs_in_circles_is_followed_by_the_next(loaded):
    model, tokenizer = loaded
    a, eos = tokenizer("a", add_special_tokens=False)["input_ids"][0], tokenizer.eos_token_id
    sections = iter([[[a]], [[a, eos]], [[a, eos]], [[a, eos]]])
    prompts = [prompt_ids(tokenizer, DIALOGUES[0])]
    (note,) = generate_with_headings(
        model, tokenizer, prompts, 200, lambda *_: [Force(next(sections))], end_loops=True
    )
    assert note == Note(f"S: {'a' * 48}\nO: a\nA: a\nP: a", True, True)


@pytest.mark.parametrize("forced_headings", [False, True])
def test_no_ngram_of_a_written_note_occurs_twice(loaded, monkeypatch, forced_headings):
    """Neither within a section nor across them, whatever the dialogue repeats."""
    model, tokenizer = loaded
    prompt = prompt_ids(tokenizer, "Doctor: pain pain pain pain?\nPatient: pain pain.")
    generate, seen = model.generate, []

    def recording(**kwargs):
        out = generate(**kwargs)
        ids = out[0, len(prompt) :].tolist()  # the note with its beginning
        seen.append((ids, out.shape[1] - kwargs["input_ids"].shape[1]))
        return out

    def repeated(no_repeat_ngram: int) -> int:
        """How many 3-grams occur in the note a second time, where their last token is written."""
        seen.clear()
        generation = GenerationSettings(
            max_new_tokens=60,
            end_loops=False,
            forced_headings=forced_headings,
            no_repeat_ngram=no_repeat_ngram,
        )
        request = NoteRequest("1", prompt, generation.max_new_tokens)
        write_notes(model, tokenizer, [request], generation, partitioned=True)  # by generate
        assert len(seen) == (len(SOAP.headings) if forced_headings else 1)
        count = 0
        for ids, written in seen:
            grams = [tuple(ids[i : i + 3]) for i in range(len(ids) - 2)]
            first = max(0, len(grams) - written)
            count += sum(grams[i] in grams[:i] for i in range(first, len(grams)))
        return count

    monkeypatch.setattr(model, "generate", recording)
    assert repeated(3) == 0 < repeated(0)


def test_the_model_is_left_as_it_was(loaded):
    model, tokenizer = loaded
    model.train()
    before = (model.config._attn_implementation, model.config.use_cache)
    generator_state = torch.get_rng_state()
    generate_notes(model, tokenizer, [prompt_ids(tokenizer, "Doctor: hi")], 3)
    assert model.training
    model.eval()
    assert (model.config._attn_implementation, model.config.use_cache) == before
    assert torch.equal(torch.get_rng_state(), generator_state)


def test_a_note_is_ended_by_its_eos_and_by_nothing_else(loaded):
    """Not by its last token, and not where it is cut off.

    After its end a row is padding, here with the EOS itself, as in many bases.
    """
    model, tokenizer = loaded
    word = tokenizer("a", add_special_tokens=False)["input_ids"][0]
    eos = tokenizer.eos_token_id
    prompts = [prompt_ids(tokenizer, d) for d in DIALOGUES]

    def write(max_new_tokens, until=None):
        force = Force([[word, word, eos], [word], [word]])
        return generate_notes(
            model, tokenizer, prompts, max_new_tokens, logits_processor=[force], until=until
        )

    pad = tokenizer.pad_token_id
    tokenizer.pad_token_id = eos
    try:
        notes = write([6, 6, 2])
        assert notes == [Note("aa", True), Note("a" * 6, False), Note("aa", False)]
        notes = write(6, until=lambda tail: tail == "aaaa")
        assert notes == [Note("aa", True), Note("aaaa", False), Note("aaaa", False)]
    finally:
        tokenizer.pad_token_id = pad


def test_a_stop_request_cuts_notes_off(loaded):
    class Stop:
        requested = True

    model, tokenizer = loaded
    ((note, ended, looped),) = generate_notes(
        model, tokenizer, [prompt_ids(tokenizer, DIALOGUES[0])], 50, stop=Stop()
    )
    assert not ended and not looped
    assert len(tokenizer(note, add_special_tokens=False)["input_ids"]) <= 1


def test_a_draw_follows_the_distribution():
    """4,000 notes' first token: frequencies within four standard errors of the softmax."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    drawn = GumbelSampler(1, [str(i) for i in range(4000)])(None, logits.expand(4000, 4)).argmax(1)
    wanted = logits.softmax(0)
    error = (wanted * (1 - wanted) / 4000).sqrt()
    assert ((drawn.bincount(minlength=4) / 4000 - wanted).abs() < 4 * error).all()


def test_a_sampled_note_depends_on_seed_and_id_alone(loaded):
    model, tokenizer = loaded
    prompts = [prompt_ids(tokenizer, d) for d in DIALOGUES]
    # Logits in bf16 may be equal, and of equal ones greedy and sampled notes may take different
    # ones. Less than a rounding apart, they are not equal.
    model.get_output_embeddings().register_forward_hook(
        lambda head, args, out: out.float() + torch.linspace(0, 1e-3, out.shape[-1])
    )

    def write(keys: list[str], seed=0, temperature=1.5, top_p=1.0):
        return generate_notes(
            model,
            tokenizer,
            [prompts[int(k)] for k in keys],
            3,
            logits_processor=sampling_processors(temperature, top_p, seed, keys),
        )

    keys = ["0", "1", "2"]
    together = write(keys)
    assert together == write(keys) == [*write(["0"]), *write(["1", "2"])]  # whatever the batch
    assert together != write(keys, seed=1)
    greedy = generate_notes(model, tokenizer, prompts, 3)
    assert together != greedy
    assert write(keys, top_p=1e-6) == greedy == write(keys, temperature=1e-4)


def test_strict_forces_the_headings_and_nothing_else(loaded):
    """A model without headings, one that ends at once, one that begins a section too early."""
    model, tokenizer = loaded
    prompts = [prompt_ids(tokenizer, dialogue) for dialogue in DIALOGUES]
    for note in generate_with_headings(model, tokenizer, prompts, 4, lambda *_: None):
        assert list(parse_note(note.text)) == list(SOAP.headings)
    words = [
        [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        for text in (" a b", " c\nPlan: d", "")
    ]
    notes = generate_with_headings(model, tokenizer, prompts, 32, lambda *_: [Force(words)])
    assert [note.text for note in notes] == [
        "S: a b\nO: a b\nA: a b\nP: a b",
        "S: c\nO: c\nA: c\nP: c",
        "S:\nO:\nA:\nP:",
    ]
    assert [note.ended for note in notes] == [True, True, True]
    endless = [words[0][:1]]
    (note,) = generate_with_headings(model, tokenizer, prompts[:1], 6, lambda *_: [Force(endless)])
    assert note.ended is False
