"""The code that a model card shows: a note, written with transformers and PEFT alone.

The parts are templates of str.format; a card's reader runs them in the folder of the card.
"""

_IMPORTS = """\
import torch
from transformers import {imports}

folder = "."  # where this card lies
dtype = torch.{{dtype}}
device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(folder)
"""
_PEFT = "\nfrom peft import AutoPeftModelForCausalLM"

# How the model is loaded, by what lies in the folder.
RECIPE = {
    "model": _IMPORTS.format(imports="AutoModelForCausalLM, {libraries}")
    + """\
model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
""",
    "adapter": _IMPORTS.format(imports="{libraries}" + _PEFT)
    + """\
model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
""",
    "adapter_nf4": _IMPORTS.format(imports="BitsAndBytesConfig, {libraries}" + _PEFT)
    + """\
nf4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant={double_quant},
    bnb_4bit_compute_dtype=dtype,
)
model = AutoPeftModelForCausalLM.from_pretrained(
    folder, dtype=dtype, device_map={{"": device}}, quantization_config=nf4
).eval()
""",
}

# What writes a note, for all of them.
WRITING = """\
pad_token = tokenizer.pad_token_id
# These stand for the settings that the base brings.
model.generation_config = GenerationConfig(
{options}    eos_token_id=tokenizer.eos_token_id,
    pad_token_id=tokenizer.eos_token_id if pad_token is None else pad_token,
)

SYSTEM = {system}
REQUEST = {request}
{no_repeat}

@torch.no_grad()
def write_note(conversation{parameters}):
    messages = [{system_message}
        {{"role": "user", "content": {filled} + conversation.strip()}},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(
        text, add_special_tokens=False, return_token_type_ids=False, return_tensors="pt"
    ).to(device)
    width = prompt.input_ids.shape[1]
    ids = model.generate(**prompt{argument})
    return tokenizer.decode(ids[0, width:], skip_special_tokens=True).strip()


print(write_note("Doctor: What brings you in?\\nPatient: A cough for a week."{arguments}))
"""
SYSTEM_MESSAGE = """
        {"role": "system", "content": SYSTEM},"""

# Transformers' own no_repeat_ngram_size counts the prompt as well.
NO_REPEAT = """

class NoRepeat(LogitsProcessor):
    # No {n} tokens in a row occur twice in a note; those of the conversation don't count.
    def __init__(self, width):
        self.width = width

    def __call__(self, input_ids, scores):
        note = input_ids[0, self.width :].tolist()
        last = note[len(note) - {n} + 1 :]
        for end in range({n}, len(note) + 1):
            if note[end - {n} : end - 1] == last:
                scores[0, note[end - 1]] = -torch.inf
        return scores
"""
NO_REPEAT_ARGUMENT = ", logits_processor=LogitsProcessorList([NoRepeat(width)])"
