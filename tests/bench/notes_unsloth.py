"""`python notes_unsloth.py BASE NOTES PROMPT TOKENS`: seconds of a step of Unsloth's generate.

As its notebooks write: 4 bits, LoRA, `for_inference`. The last line is a number: seconds of a token
of all notes together, prompts left out.
"""

import sys
import time

from unsloth import FastLanguageModel

# isort: split
import torch


def main() -> None:
    base, *numbers = sys.argv[1:]
    count, prompt, tokens = map(int, numbers)
    model, _ = FastLanguageModel.from_pretrained(
        base, max_seq_length=2048, dtype=torch.bfloat16, load_in_4bit=True
    )
    model = FastLanguageModel.get_peft_model(model, r=8, lora_alpha=16, lora_dropout=0)
    FastLanguageModel.for_inference(model)
    ids = torch.randint(3, model.config.vocab_size, (count, prompt), device=model.device)

    def seconds(new: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )
        torch.cuda.synchronize()
        return time.perf_counter() - start

    seconds(2)
    print((seconds(tokens) - seconds(2)) / (tokens - 2))


if __name__ == "__main__":
    main()
