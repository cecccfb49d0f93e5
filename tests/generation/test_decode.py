"""How a model writes notes."""

import pytest
import torch
from transformers import LogitsProcessor

from loop.data.soap import HEADINGS, parse_note
from loop.generation.controls import GumbelSampler, sampling
from loop.generation.decode import Note, generate_notes, generate_with_headings
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
    ((note, ended),) = generate_notes(
        model, tokenizer, [prompt_ids(tokenizer, DIALOGUES[0])], 50, stop=Stop()
    )
    assert not ended and len(tokenizer(note, add_special_tokens=False)["input_ids"]) <= 1


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
            logits_processor=sampling(temperature, top_p, seed, keys),
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
        assert list(parse_note(note.text)) == list(HEADINGS)
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
