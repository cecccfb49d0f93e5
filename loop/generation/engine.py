"""The decode engine: many notes at a time, a token for all of them in one step.

A step is the ordinary forward pass of the model, on one token a slot. On a GPU it is recorded as a
CUDA graph and replayed; what was chosen is read back after several steps, as all that the host has
to see is where a note ends. A slot whose note has ended takes the next one.
"""

import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from ..config.error_text import first_line
from ..config.schema import GenerationSettings
from ..distributed.watchdog import set_activity
from ..kernels.cuda_graphs import undo_failed_capture
from .controls import LONGEST_PERIOD, LoopDetector, SlotChoice
from .kv_slots import KVSlots, PackedPrompts

STEPS_A_READING = 16  # on a GPU; a note that ended in between has computed up to 15 steps too many
PROMPT_TOKENS = 16_384  # of a packed row of prompts

_said: set[str] = set()


def say_once(text: str) -> None:
    """Prints a line once in this process, on rank 0."""
    if text not in _said and not (dist.is_initialized() and dist.get_rank()):
        print(text, file=sys.stderr, flush=True)
    _said.add(text)


@dataclass(frozen=True)
class NoteRequest:
    """A note to be written, or the rest of one."""

    key: str  # with the seed it decides what is drawn
    prompt: list[int]  # token ids, with those of `begun`
    max_new_tokens: int
    begun: list[int] = field(default_factory=list)  # tokens of the note that the prompt ends with
    dialogue: str = ""  # what candidates are compared with; the model reads the prompt alone


@dataclass
class SlotNote:
    """A note that is being written in a slot."""

    number: int  # of its request
    limit: int  # tokens
    tokens: list[int] = field(default_factory=list)
    looped: bool = False
    stopped: bool = False  # cut off by a stop request


class SlotModel:
    """A model's forward passes over slots: packed prompts, and steps of one token a slot."""

    def __init__(self, base: PreTrainedModel, kv: KVSlots, last_place: int) -> None:
        """last_place: the last position of any note."""
        self.base = base
        self.kv = kv
        self.last_place = last_place
        num_slots = kv.shape[0]
        device = kv.lengths.device
        self.ids = torch.zeros(num_slots, 1, dtype=torch.int64, device=device)
        self.active = torch.zeros(num_slots, dtype=torch.int32, device=device)  # 1: has a note
        self.logits: torch.Tensor | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.can_capture = device.type == "cuda"
        self.steps = 0

    def read_prompts(self, prompts: list[list[int]], slots: list[int]) -> torch.Tensor:
        """Puts prompts into slots; returns the logits of their next tokens, fp32 [prompts, V]."""
        self.kv.prompts = packed = PackedPrompts(prompts, slots, self.ids.device)
        logits = self.base(
            input_ids=packed.ids,
            position_ids=packed.places[None],
            logits_to_keep=packed.last,
            use_cache=False,
            kv_slots=self.kv,
        ).logits[0]
        lengths = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int32)
        self.kv.lengths[slots] = lengths.to(self.ids.device)
        self.active[slots] = 1
        self.kv.prompts = None
        return logits.float()

    def serves(self, num_slots: int, longest: int) -> bool:
        """Whether these are so many slots, for notes of so many tokens, prompts included."""
        return self.kv.shape[0] == num_slots and self.last_place >= longest - 1

    def free_all(self) -> None:
        """No note is left from an earlier use."""
        self.kv.lengths.zero_()
        self.active.zero_()

    def free(self, slots: list[int]) -> None:
        """Their notes have ended; a step leaves them where they are."""
        self.kv.lengths[slots] = 0
        self.active[slots] = 0

    def step(self, longest: int) -> torch.Tensor:
        """Takes `ids`, a token for each slot; returns the next ones' logits, fp32 [slots, V].

        longest: a bound of the notes' lengths, prompts included.
        """
        if self.steps == 1 and self.can_capture:  # the first step has compiled all kernels
            self._capture()
        self.steps += 1
        if self.graph:
            self.graph.replay()
        else:
            self.logits = self._forward(longest)
        assert self.logits is not None
        return self.logits

    def _forward(self, longest: int) -> torch.Tensor:
        kv = self.kv
        kv.begin_step(longest)
        places = kv.lengths.clamp(max=self.last_place).long()[:, None]
        out = self.base(input_ids=self.ids, position_ids=places, use_cache=False, kv_slots=kv)
        kv.lengths += self.active
        return out.logits[:, -1].float()

    def _capture(self) -> None:
        stream = torch.cuda.current_stream()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.logits = self._forward(self.kv.shape[1] - 1)
            self.graph = graph
        except RuntimeError as problem:  # a kernel that waits for the GPU or refuses
            undo_failed_capture(stream)
            reason = first_line(problem, 120)
            say_once(f"notes       steps are launched kernel by kernel: {reason}")
        self.can_capture = False


class Session:
    """Writes some notes: which one is in which slot, and where each ends."""

    def __init__(
        self,
        model: SlotModel,
        requests: list[NoteRequest],
        generation: GenerationSettings,
        eos_token: int | None,
        done: Callable[[int, SlotNote], None],
        stop=None,
        until: Callable[[list[int]], bool] | None = None,
    ) -> None:
        """
        Args:
            model: its slots are free.
            requests: the notes; the shortest prompts come first.
            generation: the settings; a request has its own limit.
            eos_token: ends a note.
            done: takes a request's number and what was written, as soon as the note has ended.
            stop: a StopRequest; when it is set, notes are cut off, and others do not begin.
            until: a note is cut off when this is true for its tokens.
        """
        self.model = model
        self.requests = requests
        self.done = done
        self.stop = stop
        self.until = until
        self.eos_token = eos_token
        num_slots = model.kv.shape[0]
        self.choice = SlotChoice(generation, num_slots, model.ids.device)
        waits = self.choice.needs_each_token or model.ids.device.type != "cuda"
        self.steps_a_reading = 1 if waits else STEPS_A_READING
        self.loops = LoopDetector(num_slots) if generation.end_loops else None
        # Of each slot the last tokens, -1 where there are none yet.
        self.recent = torch.full((num_slots, LONGEST_PERIOD + 1), -1)
        self.notes: dict[int, SlotNote] = {}  # by slot
        self.idle = list(range(num_slots))
        self.pending = deque(sorted(range(len(requests)), key=lambda i: len(requests[i].prompt)))

    @torch.no_grad()
    def run(self) -> None:
        num_slots = self.model.kv.shape[0]
        enough = max(1, num_slots // 16)  # idle slots that are worth a row of prompts
        while self.pending or self.notes:
            if self.stop and self.stop.requested:
                self.pending.clear()
            if self.pending and (len(self.idle) >= enough or not self.notes):
                self._fill()
            if self.notes:
                self._steps()

    def _fill(self) -> None:
        """Takes the next prompts into idle slots, as many as a packed row holds."""
        slots: list[int] = []
        prompts: list[list[int]] = []
        while self.pending and self.idle:
            request = self.requests[self.pending[0]]
            if prompts and sum(map(len, prompts)) + len(request.prompt) > PROMPT_TOKENS:
                break
            slot = self.idle.pop(0)
            self.notes[slot] = SlotNote(self.pending.popleft(), request.max_new_tokens)
            slots.append(slot)
            prompts.append(request.prompt)
            self.recent[slot] = -1
            if self.loops:
                self.loops.forget(slot)
        chosen = [self.requests[self.notes[slot].number] for slot in slots]
        self.choice.begin(slots, [r.key for r in chosen], [r.begun for r in chosen])
        tokens = self.choice.choose(self.model.read_prompts(prompts, slots), slots)
        self.model.ids[slots, 0] = tokens
        tokens = tokens.cpu()
        self.recent[slots, -1] = tokens
        self._take({slot: [token] for slot, token in zip(slots, tokens.tolist())}, {})

    def _steps(self) -> None:
        """Some steps for all slots, then what came of them is read at once."""
        left = max(w.limit - len(w.tokens) for w in self.notes.values())
        longest = self._longest()
        chosen = []
        for number in range(min(left, self.steps_a_reading)):
            logits = self.model.step(longest + number)
            tokens = self.choice.choose(logits, slice(None))
            self.model.ids[:, 0] = tokens
            chosen.append(tokens)
        steps = torch.stack(chosen, 1).cpu()  # [slots, steps]
        looping = self._find_loops(steps) if self.loops else {}
        values = steps.tolist()
        self._take({slot: values[slot] for slot in self.notes}, looping)

    def _find_loops(self, steps: torch.Tensor) -> dict[int, int]:
        """Of slots whose tokens, [slots, steps], run in circles: after how many steps."""
        assert self.loops
        found = []
        for tokens in steps.unbind(1):
            self.recent = self.recent.roll(-1, 1)
            self.recent[:, -1] = tokens
            found.append(self.loops.update(self.recent))
        looping = torch.stack(found, 1)
        slots = looping.any(1).nonzero().flatten().tolist()
        return {slot: int(looping[slot].int().argmax()) + 1 for slot in slots}

    def _longest(self) -> int:
        """Tokens of the longest note with its prompt, before the one that is computed next."""
        return max(
            len(self.requests[w.number].prompt) + len(w.tokens) - 1 for w in self.notes.values()
        )

    def _take(self, tokens: dict[int, list[int]], looping: dict[int, int]) -> None:
        """Gives each slot's note its next tokens, and ends the notes that have their last.

        looping: of slots whose tokens run in circles, after how many of these.
        """
        stopped = bool(self.stop and self.stop.requested)
        ended = []
        for slot, new in tokens.items():
            note = self.notes[slot]
            before = len(note.tokens)
            new = new[: note.limit - before]
            if self.eos_token in new:
                new = new[: new.index(self.eos_token) + 1]
            met = self._append(slot, note, new[: looping.get(slot)])
            has_eos = note.tokens[-1] == self.eos_token
            note.looped = len(note.tokens) - before == looping.get(slot)
            note.stopped = stopped
            full = len(note.tokens) >= note.limit
            if has_eos or full or met or stopped or note.looped:
                ended.append(slot)
        set_activity(f"writing notes, {len(self.notes)} at a time")
        for slot in ended:
            note = self.notes.pop(slot)
            self.idle.append(slot)
            self.done(note.number, note)
        if ended:
            self.model.free(ended)

    def _append(self, slot: int, note: SlotNote, new: list[int]) -> bool:
        """Appends tokens to a note; True, and no more of them, where `until` is met."""
        if not (self.until or self.choice.needs_each_token):
            note.tokens += new
            return False
        for token in new:
            note.tokens.append(token)
            self.choice.append(slot, token)
            if self.until and self.until(note.tokens):
                return True
        return False
