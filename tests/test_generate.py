"""Notes from dialogues."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from loop.generate import load_for_notes, prompt_ids
from loop.notes import write_notes


def command(*args: str, stdin: str = "") -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "loop.generate", *args], cwd=ROOT, input=stdin, capture_output=True, text=True)


def test_a_batch_gives_each_dialogue_its_own_note(trained):
    """Left padding and neighbours change nothing: fp32 rounding apart, a row is what it is alone."""
    model, tokenizer = load_for_notes(str(trained / "adapter"), None, "cpu")
    prompts = [prompt_ids(tokenizer, d) for d in ("Doctor: 1?\nPatient: pain 2", "Doctor: hello, how are you today?", "Patient: x")]
    together = write_notes(model, tokenizer, prompts, 6)
    assert together == [write_notes(model, tokenizer, [p], 6)[0] for p in prompts]
    other = [prompts[0], prompt_ids(tokenizer, "Doctor: bye, how are you then, so?"), prompts[2]]
    assert [write_notes(model, tokenizer, other, 6)[i] for i in (0, 2)] == [together[i] for i in (0, 2)]


def test_a_neighbours_tokens_move_no_logit_by_a_bit(trained):
    """Another dialogue of the same length in the same batch: every logit of the other notes' every token stays what it was."""
    model, tokenizer = load_for_notes(str(trained / "adapter"), None, "cpu")
    generate, seen = model.generate, []

    def recording(**kwargs):
        out = generate(**kwargs, output_logits=True, return_dict_in_generate=True)
        seen.append(torch.stack(out.logits))  # [new tokens, prompts, V]
        return out.sequences

    model.generate = recording
    ids = [prompt_ids(tokenizer, d) for d in ("Doctor: 1?\nPatient: pain 2", "Doctor: hello, how are you today?", "Patient: x")]
    write_notes(model, tokenizer, ids, 6)
    write_notes(model, tokenizer, [ids[0], [5 + i % 200 for i in ids[1]], ids[2]], 6)
    shorter = min(len(s) for s in seen)
    assert shorter > 1 and torch.equal(seen[0][:shorter, [0, 2]], seen[1][:shorter, [0, 2]])
    assert not torch.equal(seen[0][0, 1], seen[1][0, 1])


def test_the_model_is_left_as_it_was(trained):
    model, tokenizer = load_for_notes(str(trained / "adapter"), None, "cpu")
    model.train()
    before = (model.config._attn_implementation, model.config.use_cache, torch.get_rng_state())
    write_notes(model, tokenizer, [prompt_ids(tokenizer, "Doctor: hi")], 3)
    assert model.training and (model.config._attn_implementation, model.config.use_cache) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_the_command_reads_a_file_or_standard_input(trained, tmp_path):
    (tmp_path / "d.txt").write_text("Doctor: 5?\nPatient: pain")
    from_file = command("--adapter", str(trained / "adapter"), "--dialogue", str(tmp_path / "d.txt"), "--max-new-tokens", "8")
    piped = command("--adapter", str(trained / "adapter"), "--max-new-tokens", "8", stdin="Doctor: 5?\nPatient: pain")
    assert from_file.returncode == piped.returncode == 0, from_file.stderr
    assert from_file.stdout == piped.stdout and from_file.stdout.strip()


@pytest.mark.parametrize(("args", "words"), [
    (["--adapter", "nowhere", "--dialogue", "-"], "--adapter nowhere"), (["--dialogue", "nowhere.txt"], "nowhere.txt: No such file"),
    ([], "--adapter DIR or --base"),
])  # fmt: skip
def test_wrong_arguments_end_with_2(args, words):
    done = command(*args, stdin="Doctor: hi")
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1


def test_an_empty_dialogue_is_refused(trained):
    done = command("--adapter", str(trained / "adapter"), stdin="  \n")
    assert done.returncode == 2 and "empty" in done.stderr
