"""Whether the decode engine can write notes with a model here, and the model made ready for it.

The plain way, transformers' generate, stays where memory is short, where weights come and go, and
where the engine's logits are not the plain model's.
"""

import contextlib
import functools
from collections.abc import Iterator
from weakref import WeakKeyDictionary

import psutil
import torch
import torch.distributed as dist
from peft import PeftModel
from transformers import PreTrainedModel

from ..config.error_text import first_line
from ..kernels.attention_backends import choose_backend
from ..model.structure import attention_shape, decoder_layers
from .dense_weights import DenseWeights, dense_bytes
from .engine import STEPS_A_READING, NoteRequest, SlotModel
from .kv_slots import SLOT_ATTENTION, KVSlots, flash_step_works
from .model_mode import generation_mode

MOST_SLOTS = 256
MEMORY_SHARE = 0.7  # of the free memory that copies of weights, keys and values may take
CHECKED_TOKENS = 256  # of the prompt on which the engine is compared with the plain model
CHECKED_STEPS = 3  # on a GPU: launched, recorded, replayed
BOUND = 1e-3  # of the logits' relative error in that comparison
BOUND_OF_16_BITS = 0.1  # rounding is some 0.02; a wrong mask or position is 0.5 and more

_checked: WeakKeyDictionary = WeakKeyDictionary()  # a model: why it can't be used, or ""
_caches: WeakKeyDictionary = WeakKeyDictionary()  # a model: its WriterCache


class EngineError(RuntimeError):
    """Why notes can't be written by the engine, in a few words."""


class WriterCache:
    """What the next notes of a model can use again: copies of its weights, and a recorded step.

    Its base is frozen, and its weights stay where they are. LoRA is read anew each time.
    """

    def __init__(self, most_bytes: float) -> None:
        self.most_bytes = most_bytes
        self.dense: DenseWeights | None = None
        self.slots: SlotModel | None = None
        self.addresses: list[int] = []  # of all weights

    def check(self, base: PreTrainedModel) -> None:
        """Forgets everything where a weight has moved."""
        addresses = [p.data_ptr() for p in base.parameters()]
        if addresses != self.addresses:
            self.dense = None
            self.slots = None
            self.addresses = addresses

    @property
    def num_bytes(self) -> int:
        """Bytes that are kept now."""
        weights = self.dense.num_bytes if self.dense else 0
        return weights + (self.slots.kv.num_bytes if self.slots else 0)

    def forget_what_is_large(self) -> None:
        """Gives the memory back where it is more than may be kept."""
        if self.num_bytes > self.most_bytes:
            self.dense = None
            self.slots = None


def keep_writer_cache(model, most_bytes: float) -> None:
    """Lets notes of this model, whose base is frozen, begin with what the ones before have made.

    most_bytes: of memory that may be kept between them.
    """
    _caches[model] = WriterCache(most_bytes)


def writer_cache_bytes(model) -> int:
    """Bytes that are kept for the next notes of this model."""
    return _caches[model].num_bytes if model in _caches else 0


def drop_writer_cache(model) -> None:
    """Gives the memory back that `keep_writer_cache` has taken."""
    _caches.pop(model, None)


class Engine:
    """A model that is ready to write notes; made by `open_engine`."""

    def __init__(self, base: PreTrainedModel, cache: WriterCache | None = None) -> None:
        self.base = base
        self.cache = cache
        self.heads = attention_shape(base.config.get_text_config())  # of the language model
        self.backend = prompt_backend(base.device, base.dtype, self.heads)

    def make_slots(self, num_slots: int, longest: int) -> SlotModel:
        """At most so many slots for notes of so many tokens, prompts included.

        Raises EngineError where memory is short.
        """
        device = self.base.device
        dtype = self.base.dtype
        capacity = longest + STEPS_A_READING
        _, key_heads, size = self.heads
        per_token = 2 * key_heads * size * dtype.itemsize * len(decoder_layers(self.base))
        wanted = num_slots * per_token * capacity
        room = int(MEMORY_SHARE * free_bytes(device, wanted / MEMORY_SHARE))
        num_slots = min(num_slots, room // (per_token * capacity))
        if num_slots < 1:
            raise EngineError("memory is short")
        flash = flash_step_works(dtype, self.heads, device)
        return SlotModel(
            self.base, KVSlots(num_slots, capacity, self.backend, flash, device), longest - 1
        )

    def slots_for(self, requests: list[NoteRequest], most: int | None = None) -> SlotModel:
        """Slots for these notes, `most` at a time."""
        longest = max(len(r.prompt) + r.max_new_tokens for r in requests)
        count = min(most or MOST_SLOTS, len(requests))
        slots = self.cache.slots if self.cache else None
        if slots is None or not slots.serves(count, longest):
            slots = self.make_slots(count, longest)
            if self.cache:
                self.cache.slots = slots
        slots.free_all()
        return slots

    @torch.no_grad()
    def logits(self, ids: list[int]) -> torch.Tensor:
        """Those of the last positions, fp32 [1 + CHECKED_STEPS, V].

        The prompt lies behind another one in a packed row; its last tokens come in steps.
        """
        slots = self.make_slots(2, len(ids))
        prompt = ids[:-CHECKED_STEPS]
        found = [slots.read_prompts([prompt[::-1][: len(prompt) // 2 + 1], prompt], [0, 1])[1]]
        for place in range(len(prompt), len(ids)):
            slots.ids.fill_(ids[place])
            found.append(slots.step(place)[1].clone())
        return torch.stack(found)


@functools.cache
def prompt_backend(device: torch.device, dtype: torch.dtype, heads: tuple[int, int, int]) -> str:
    """The backend of packed attention that is right here. Raises AttentionError without one."""
    return choose_backend("auto", device, dtype, heads)[0]


def free_bytes(device: torch.device, wanted: float = float("inf")) -> int:
    """Bytes of memory that nobody uses; of a CPU's this process's share.

    wanted: where so many are free already, torch keeps what it has at hand for the next tensors.
    """
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        if free < wanted:
            torch.cuda.empty_cache()
            free = torch.cuda.mem_get_info(device)[0]
        return free
    processes = dist.get_world_size() if dist.is_initialized() else 1
    return psutil.virtual_memory().available // processes


def refuse_unfit(base: PreTrainedModel) -> None:
    """Raises EngineError for a model that the engine can't drive or has no memory for."""
    if getattr(base, "_is_stateful", False):
        raise EngineError("the base carries a state beside keys and values")
    for module in base.modules():
        if getattr(module, "rope_type", "default") in ("dynamic", "longrope"):
            raise EngineError("the base's positions depend on the longest note")
    size = dense_bytes(decoder_layers(base))
    if size > MEMORY_SHARE * free_bytes(base.device, size / MEMORY_SHARE):
        raise EngineError("memory is short")


@torch.no_grad()
def plain_logits(model, base: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """As `Engine.logits`, by the model as it is."""
    with generation_mode(model) as device:
        logits = base(input_ids=torch.tensor([ids], device=device), use_cache=False).logits
    return logits[0, -1 - CHECKED_STEPS :].float()


def logits_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The relative error of logits [n, V]; a constant added to all of a position does not count."""
    ours, theirs = (x - x.mean(1, keepdim=True) for x in (ours, theirs))
    return ((ours - theirs).norm() / theirs.norm()).item()


@contextlib.contextmanager
def open_engine(model, prompt: list[int]) -> Iterator[Engine]:
    """An engine for this model, which is as it was afterwards.

    Raises EngineError where notes must be written the plain way. The first time for a model the
    engine's logits on the prompt are compared with the plain ones.

    Args:
        model: its weights must all be here.
        prompt: token ids.
    """
    if _checked.get(model):
        raise EngineError(_checked[model])
    base: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
    ids = (prompt * (1 + CHECKED_STEPS))[:CHECKED_TOKENS]
    cache = _caches.get(model)
    with contextlib.ExitStack() as stack:
        try:
            dense = ready_weights(base, cache)
            theirs = None if model in _checked else plain_logits(model, base, ids)
            stack.enter_context(generation_mode(model, SLOT_ATTENTION))
            stack.enter_context(dense.installed())
            engine = Engine(base, cache)
            if theirs is not None:
                error = logits_error(engine.logits(ids), theirs)
                if not error < (BOUND if base.dtype == torch.float32 else BOUND_OF_16_BITS):
                    raise ValueError(f"its logits would be {error:.1e} from the plain ones")
                _checked[model] = ""
        except torch.OutOfMemoryError as error:
            raise EngineError("memory is short") from error
        except EngineError:
            raise
        except Exception as error:  # whatever the model or a kernel can't do
            _checked[model] = first_line(error, 160)
            raise EngineError(_checked[model]) from error
        yield engine
    if cache:
        cache.forget_what_is_large()


def ready_weights(base: PreTrainedModel, cache: WriterCache | None) -> DenseWeights:
    """The weights of a model that writes now; what was kept is used. Raises EngineError."""
    if cache:
        cache.check(base)
        if cache.dense:
            cache.dense.read_lora()
            return cache.dense
    refuse_unfit(base)
    dense = DenseWeights(decoder_layers(base))
    if cache:
        cache.dense = dense
    return dense
