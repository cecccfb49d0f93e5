"""The decode engine writes the notes that transformers' generate writes."""

import copy
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from loop.config.schema import GenerationSettings
from loop.generation import controls, decode, engine, engine_choice, kv_slots
from loop.generation.controls import add_gumbel_noise, gumbel_noise
from loop.generation.decode import Note, plain_writer, write_notes, write_with_headings
from loop.generation.dense_weights import DenseWeights
from loop.generation.engine import NoteRequest
from loop.kernels.attention import AttentionError
from loop.model.loading import load_tokenizer

SHAPE = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def make_model(config, lora: bool = True):
    """A random model in fp32, whose LoRA changes what it writes."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    if lora:
        options = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"}
        model = get_peft_model(model, LoraConfig(**options, task_type="CAUSAL_LM"))
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, 0, 0.1)
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer(tiny_base):
    return load_tokenizer(tiny_base)


@pytest.fixture(scope="module")
def model():
    return make_model(LlamaConfig(**SHAPE))


def make_requests(lengths: list[int], max_new_tokens: int = 60) -> list[NoteRequest]:
    """Random prompts of these lengths; each note has a limit of its own."""
    generator = torch.Generator().manual_seed(1)
    return [
        NoteRequest(
            f"id-{i}",
            torch.randint(3, 320, (length,), generator=generator).tolist(),
            max_new_tokens - i,
        )
        for i, length in enumerate(lengths)
    ]


LENGTHS = [37, 5, 120, 64, 1, 80, 23]


def plain_notes(model, tokenizer, requests, generation) -> list[Note]:
    write = plain_writer(model, tokenizer, generation, False, None, 16)
    if generation.forced_headings:
        return write_with_headings(tokenizer, requests, write)
    return write(requests, "", None, None)


@pytest.fixture
def by_engine(monkeypatch):
    """Fails where notes are written the plain way."""
    monkeypatch.setattr(decode, "plain_writer", lambda *_: pytest.fail("the plain way"))


@pytest.mark.parametrize(
    "settings",
    [
        {"end_loops": False},
        {},
        {"no_repeat_ngram": 2},
        {"temperature": 1.1, "top_p": 0.9, "min_p": 0.02, "seed": 5},
        {"temperature": 0.9, "no_repeat_ngram": 3},
        {"forced_headings": True},
        {"forced_headings": True, "temperature": 1.3, "no_repeat_ngram": 4},
    ],
    ids=str,
)
def test_the_notes_are_those_of_the_plain_way(model, tokenizer, by_engine, settings):
    """With unequal prompts, token for token; slots are filled again where there are fewer."""
    requests = make_requests(LENGTHS, 24 if settings.get("forced_headings") else 60)
    generation = GenerationSettings(**settings)
    wanted = plain_notes(model, tokenizer, requests, generation)
    assert len({note.text for note in wanted}) == len(wanted)
    for rows in (None, 2):
        assert write_notes(model, tokenizer, requests, generation, rows=rows) == wanted


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 1.1, "seed": 5}, {"forced_headings": True}], ids=str
)
def test_many_steps_are_read_at_once(model, tokenizer, by_engine, monkeypatch, settings):
    """As on a GPU: what a slot computes behind the end of its note is dropped."""
    begin = engine.Session.__init__

    def begin_as_on_a_gpu(self, *args):
        begin(self, *args)
        self.steps_a_reading = engine.STEPS_A_READING

    monkeypatch.setattr(engine.Session, "__init__", begin_as_on_a_gpu)
    monkeypatch.setattr(controls, "SHORTEST_LOOP", 1)  # the same token twice is a loop here
    monkeypatch.setattr(controls, "FEWEST_PERIODS", 2)
    requests = make_requests(LENGTHS, 24 if settings else 60)
    generation = GenerationSettings(**settings)
    wanted = plain_notes(model, tokenizer, requests, generation)
    assert settings or {note.looped for note in wanted} == {True, False}
    assert write_notes(model, tokenizer, requests, generation, rows=3) == wanted


def test_a_note_ends_by_its_eos_and_its_slot_takes_the_next(model, tokenizer, by_engine):
    """The EOS is what some greedy notes write by themselves; others reach their limit."""
    requests = make_requests(LENGTHS, 40)
    generation = GenerationSettings(end_loops=False)
    free = plain_notes(model, tokenizer, requests, generation)
    ids = [tokenizer(note.text, add_special_tokens=False)["input_ids"] for note in free]
    tokens = [token for note in ids for token in set(note)]
    eos, used = tokenizer.eos_token, max(set(tokens), key=tokens.count)
    other = copy.deepcopy(tokenizer)
    other.eos_token = tokenizer.convert_ids_to_tokens(used)
    assert other.eos_token != eos
    wanted = plain_notes(model, other, requests, generation)
    assert {note.ended for note in wanted} == {True, False}
    ended: list[int] = []
    notes = write_notes(
        model, other, requests, generation, rows=2, done=lambda i, note: ended.append(i)
    )
    assert notes == wanted and sorted(ended) == list(range(len(requests)))
    assert ended != sorted(ended)  # as they end, not as they came


def test_what_is_drawn_depends_on_key_and_seed_alone(model, tokenizer, by_engine):
    """Several notes of one prompt; whatever is beside them."""
    (request,) = make_requests([30], 20)
    candidates = [NoteRequest(f"{seed}", request.prompt, 20) for seed in range(5)]
    generation = GenerationSettings(temperature=1.5, end_loops=False)
    together = write_notes(model, tokenizer, candidates, generation)
    assert len({note.text for note in together}) == 5
    backwards = write_notes(model, tokenizer, candidates[::-1], generation, rows=3)
    assert backwards == together[::-1]
    assert write_notes(model, tokenizer, candidates[2:3], generation) == together[2:3]


def test_the_noise_is_the_same_for_a_note_wherever_it_stands():
    keys, places = torch.tensor([7, 2**62, 7]), torch.tensor([0, 3, 1])
    noise = gumbel_noise(keys[:, None], places[:, None], torch.arange(5000))
    assert torch.equal(noise[1], gumbel_noise(keys[1], places[1], torch.arange(5000)))
    assert noise[2, 4321] == gumbel_noise(keys[2], places[2], torch.tensor(4321))
    assert abs(noise.mean() - 0.5772) < 0.05 and abs(noise.var() - 1.6449) < 0.1
    assert abs(torch.corrcoef(noise) - torch.eye(3)).max() < 0.05


def test_tokens_that_are_ruled_out_get_no_noise():
    torch.manual_seed(0)
    keys, places = torch.tensor([7, 8]), torch.tensor([0, 3])
    scores = torch.randn(2, 500)
    left = scores.masked_fill(torch.rand(2, 500) < 0.9, -torch.inf)
    before = left.clone()
    few, all_of_them = (add_gumbel_noise(left, keys, places, flag) for flag in (True, False))
    assert torch.equal(few, all_of_them) and torch.equal(left, before)
    assert few.dtype == torch.float64 and torch.equal(few.isinf(), left.isinf())
    assert not torch.equal(few.argmax(1), left.argmax(1))


@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_as_it_was(model, tokenizer, by_engine, training):
    model.train(training)
    before = {name: p.clone() for name, p in model.named_parameters()}
    forwards = [vars(module).get("forward") for module in model.modules()]
    state = model.config._attn_implementation, model.config.use_cache, torch.get_rng_state()
    write_notes(model, tokenizer, make_requests([9, 4], 3), GenerationSettings())
    assert [vars(module).get("forward") for module in model.modules()] == forwards
    assert (model.config._attn_implementation, model.config.use_cache) == state[:2]
    assert torch.equal(torch.get_rng_state(), state[2]) and model.training == training
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    model.eval()


def train_lora(model, scale: float) -> None:
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.mul_(scale)


@pytest.fixture
def kept(monkeypatch):
    """A model whose copies and slots are kept; and how often the copies were made."""
    model, made = make_model(LlamaConfig(**SHAPE)), []
    make = DenseWeights.__init__
    monkeypatch.setattr(DenseWeights, "__init__", lambda *args: made.append(1) or make(*args))
    engine_choice.keep_writer_cache(model, 1e9)
    return model, made


def test_what_is_kept_between_notes_follows_lora(kept, tokenizer, by_engine):
    """The same copies and slots; LoRA was trained meanwhile, and the notes are others."""
    model, made = kept
    generation = GenerationSettings(end_loops=False)
    texts, slots = set(), set()
    for scale in (1.0, 1.5, 0.3):
        train_lora(model, scale)
        requests = make_requests(LENGTHS, 40)
        notes = write_notes(model, tokenizer, requests, generation)
        assert notes == plain_notes(model, tokenizer, requests, generation)
        texts.add(notes[0].text)
        slots.add(engine_choice._caches[model].slots)
    assert len(texts) == 3 and len(slots) == 1 and len(made) == 1
    shorter = make_requests(LENGTHS, 10)  # the same slots are long enough
    more = make_requests([*LENGTHS, 9], 50)
    for requests in (shorter, more):
        wanted = plain_notes(model, tokenizer, requests, generation)
        assert write_notes(model, tokenizer, requests, generation) == wanted
    assert engine_choice._caches[model].slots not in slots and len(made) == 1


def test_slots_that_a_stop_left_full_are_free_again(kept, tokenizer, by_engine):
    class Stop:
        requested = False

    model, stop = kept[0], Stop()
    requests = make_requests([9, 30, 4], 12)
    generation = GenerationSettings(end_loops=False)

    def ask(number: int, note: Note) -> None:
        stop.requested = True

    write_notes(model, tokenizer, requests, generation, stop=stop, done=ask)
    wanted = plain_notes(model, tokenizer, requests, generation)
    assert write_notes(model, tokenizer, requests, generation) == wanted


def test_nothing_is_kept_of_weights_that_move_or_are_large(kept, tokenizer, monkeypatch):
    model, made = kept
    requests = make_requests([9, 4], 5)
    generation = GenerationSettings(end_loops=False)
    write_notes(model, tokenizer, requests, generation)
    for p in model.parameters():
        p.data = 1.1 * p.data
    wanted = plain_notes(model, tokenizer, requests, generation)
    assert write_notes(model, tokenizer, requests, generation) == wanted and len(made) == 2
    size = engine_choice.writer_cache_bytes(model)
    slots = engine_choice._caches[model].slots
    weights = sum(p.nbytes for name, p in model.named_parameters() if "layers" in name)
    assert weights < size - slots.kv.num_bytes < 1.2 * weights and slots.kv.num_bytes > 0
    engine_choice.keep_writer_cache(model, size - 1)
    assert write_notes(model, tokenizer, requests, generation) == wanted
    assert engine_choice.writer_cache_bytes(model) == 0


def test_a_stop_request_cuts_notes_off_and_begins_no_other(model, tokenizer, by_engine):
    class Stop:
        requested = False

    stop, ended = Stop(), []

    def done(number: int, note: Note) -> None:
        ended.append(number)
        stop.requested = True

    requests = make_requests([9, 9, 9], 12)
    generation = GenerationSettings(end_loops=False)
    notes = write_notes(model, tokenizer, requests, generation, stop=stop, done=done, rows=2)
    wanted = plain_notes(model, tokenizer, requests, generation)
    assert ended == [1] and notes[1] == wanted[1]  # the one of fewest tokens
    assert wanted[0].text.startswith(notes[0].text) and notes[2] == Note("", False)


def test_a_note_ends_where_the_context_does(model, tokenizer, by_engine, capsys):
    requests = [NoteRequest("a", [5] * 505, 60), NoteRequest("b", [6] * 20, 3)]
    notes = write_notes(model, tokenizer, requests, GenerationSettings(end_loops=False))
    capped = [NoteRequest("a", [5] * 505, 7), requests[1]]
    assert notes == plain_notes(model, tokenizer, capped, GenerationSettings(end_loops=False))
    assert capsys.readouterr().err.count("context of 512 tokens") == 1


def test_the_dense_weights_compute_what_the_layers_do(trained):
    """An NF4 base with LoRA, in groups and alone, for tokens and for rows."""
    from loop.generation.loading import load_for_generation

    model, _ = load_for_generation(str(trained / "adapter"), None, "cpu")
    layer = model.get_base_model().model.layers[0]
    x = torch.randn(1, 6, 64).to(model.get_base_model().dtype)
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    with torch.no_grad():
        wanted = [getattr(layer.self_attn, name)(x) for name in names] + [layer.mlp(x)]
        with DenseWeights(model.get_base_model().model.layers).installed():
            found = [getattr(layer.self_attn, name)(x) for name in names] + [layer.mlp(x)]
    for ours, theirs in zip(found, wanted):
        torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (MistralConfig(**SHAPE, sliding_window=16), "a sliding window shorter than the notes"),
        (
            LlamaConfig(
                **SHAPE, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
            ),
            "positions depend on the longest note",
        ),
    ],
    ids=["sliding window", "dynamic positions"],
)
def test_what_the_engine_cannot_do_is_written_the_plain_way(tokenizer, config, reason, capsys):
    """And said once."""
    model = make_model(config, lora=False)
    requests = make_requests([40, 9], 8)
    generation = GenerationSettings(end_loops=False)
    wanted = plain_notes(model, tokenizer, requests, generation)
    for _ in range(2):
        assert write_notes(model, tokenizer, requests, generation) == wanted
    assert capsys.readouterr().err.count(reason) == 1
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("fault", ["positions", "nan"])
def test_wrong_logits_are_noticed(tokenizer, monkeypatch, capsys, fault):
    """An engine that computes something else is not used: positions off by one, or no numbers."""
    model = make_model(LlamaConfig(**SHAPE))
    forward = engine_choice.SlotModel._forward

    def wrong(self, longest):
        if fault == "nan":
            return forward(self, longest) * torch.nan
        self.kv.lengths += 1
        out = forward(self, longest)
        self.kv.lengths -= 1
        return out

    monkeypatch.setattr(engine_choice.SlotModel, "_forward", wrong)
    requests = make_requests([30], 5)
    generation = GenerationSettings()
    assert write_notes(model, tokenizer, requests, generation) == plain_notes(
        model, tokenizer, requests, generation
    )
    assert "from the plain ones" in capsys.readouterr().err


def test_short_memory_fills_fewer_slots_or_none(model, tokenizer, monkeypatch, capsys):
    requests = make_requests(LENGTHS, 30)
    generation = GenerationSettings()
    wanted = plain_notes(model, tokenizer, requests, generation)
    with engine_choice.open_engine(model, requests[0].prompt) as engine:
        slots = engine.slots_for(requests)
        num_slots, capacity = slots.kv.shape
        assert num_slots == len(requests)
        token = 2 * 2 * 16 * 4 * 3  # keys and values, heads, size, bytes, layers
        monkeypatch.setattr(
            engine_choice, "free_bytes", lambda *_: int(2.5 * token * capacity / 0.7)
        )
        assert engine.slots_for(requests).kv.shape[0] == 2
        monkeypatch.setattr(
            engine_choice, "free_bytes", lambda *_: int(0.4 * token * capacity / 0.7)
        )
        with pytest.raises(engine_choice.EngineError, match="memory is short"):
            engine.slots_for(requests)  # not even one
    monkeypatch.setattr(engine_choice, "free_bytes", lambda *_: 100)
    assert write_notes(model, tokenizer, requests, generation) == wanted
    assert "memory is short" in capsys.readouterr().err


class Scripted:
    """In the place of a SlotModel: a note is the script whose number its prompt is."""

    def __init__(self, scripts: list[list[int]]) -> None:
        self.kv, self.ids = SimpleNamespace(shape=(1, 999)), torch.zeros(1, 1, dtype=torch.int64)
        self.scripts = scripts

    def read_prompts(self, prompts: list[list[int]], slots: list[int]) -> torch.Tensor:
        self.tokens = iter(self.scripts[prompts[0][0]])
        return self.step(0)

    def step(self, longest: int) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.tensor([next(self.tokens)]), 10).float()

    def free(self, slots: list[int]) -> None:
        self.tokens = iter([])


def write_scripts(scripts: list[list[int]], **settings) -> list:
    """One after the other in one slot, each up to its end."""
    requests = [NoteRequest(f"{i}", [i], len(script)) for i, script in enumerate(scripts)]
    written: dict = {}
    generation = GenerationSettings(**settings)
    engine.Session(Scripted(scripts), requests, generation, 2, written.__setitem__).run()
    return [written[i] for i in range(len(scripts))]


def test_a_loop_ends_a_note_where_the_settings_say_so():
    for end_loops, length in ((True, controls.SHORTEST_LOOP), (False, 90)):
        (note,) = write_scripts([[7] * 90], end_loops=end_loops)
        assert (note.looped, len(note.tokens)) == (end_loops, length)


def test_a_loop_begins_in_its_own_note():
    """Two notes of one slot, whose tokens are a loop together."""
    half = [7] * (controls.SHORTEST_LOOP - 9)
    notes = write_scripts([half, half])
    assert [(note.looped, note.tokens) for note in notes] == [(False, half)] * 2


@torch.no_grad()
def test_a_free_slot_stays_empty_beside_one_that_is_written(model):
    requests = make_requests([9, 14])
    with engine_choice.open_engine(model, requests[0].prompt) as made:
        slots = made.make_slots(2, 60)
        slots.read_prompts([r.prompt for r in requests], [0, 1])
        assert slots.kv.lengths.tolist() == [9, 14]
        slots.step(14)
        slots.free([0])
        slots.step(15)
    assert slots.kv.lengths.tolist() == [0, 16]


def test_a_packed_row_of_prompts_has_a_limit(model, tokenizer, by_engine, monkeypatch):
    monkeypatch.setattr(engine, "PROMPT_TOKENS", 130)
    read, rows = engine.SlotModel.read_prompts, []

    def counted(self, prompts, slots):
        rows.append([len(prompt) for prompt in prompts])
        return read(self, prompts, slots)

    requests = make_requests(LENGTHS, 12)
    generation = GenerationSettings(end_loops=False)
    wanted = plain_notes(model, tokenizer, requests, generation)
    write_notes(model, tokenizer, requests[:1], generation)  # the first time compares logits
    monkeypatch.setattr(engine.SlotModel, "read_prompts", counted)
    assert write_notes(model, tokenizer, requests, generation) == wanted
    assert sorted(n for row in rows for n in row) == sorted(LENGTHS)
    assert len(rows) > 2 and all(sum(row) <= 130 for row in rows)


def test_a_base_with_a_state_of_its_own_is_written_the_plain_way(model, monkeypatch):
    monkeypatch.setattr(type(model.get_base_model()), "_is_stateful", True, raising=False)
    with pytest.raises(engine_choice.EngineError, match="carries a state beside keys and values"):
        with engine_choice.open_engine(model, [5, 6]):
            pass


def test_attention_that_slots_do_not_compute_is_refused():
    slots, x = kv_slots.KVSlots(1, 64, "sdpa", False, "cpu"), torch.zeros(1, 2, 1, 16)
    module = torch.nn.Module()

    def attend(mask=None, **more):
        return kv_slots._attend_for_transformers(module, x, x, x, mask, **more)

    for more in ({"softcap": 30.0}, {"s_aux": torch.zeros(2)}, {"dropout": 0.1}):
        with pytest.raises(AttentionError, match="soft caps or sinks"):
            attend(kv_slots=slots, **more)
    with pytest.raises(AttentionError, match="a sliding window shorter"):
        attend(kv_slots=slots, sliding_window=63)
    for options in ({"kv_slots": None}, {"kv_slots": slots, "mask": torch.ones(1)}):
        with pytest.raises(AttentionError, match="takes kv_slots, without a mask"):
            attend(**options)
