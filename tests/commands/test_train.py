"""How `./launch.sh train` ends where a run fails."""

import pytest
import torch

from loop.commands import evaluate, generate, train


@pytest.mark.parametrize(
    ("command", "name"), [(train, "train"), (evaluate, "evaluate_split"), (generate, "generate")]
)
def test_a_full_gpu_is_one_line_that_says_who_holds_it(
    command, name, config_file, monkeypatch, capsys
):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 128.00 MiB. Process 1")

    monkeypatch.setattr(command, name, fail)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**28, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 2 * 2**30)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(evaluate, "choose_weights", lambda config, options: (config, options))
    monkeypatch.setattr(evaluate, "check_own_prompt", lambda config, options: None)
    monkeypatch.setattr(evaluate, "written_by", lambda config, options: {})
    arguments = ["--base", "x"] if command is generate else ["--config", str(config_file)]
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the memory of GPU 3 is full: of 80.0 GiB this process holds 2.0")
    remedy = "--batch-size" if command is generate else "micro_batch_size"
    assert "others and CUDA 77.8" in line and remedy in line


@pytest.mark.parametrize(
    ("text", "ends"), [("DefaultCPUAllocator: can't allocate memory: you", True), ("x", False)]
)
def test_memory_that_ran_out_on_a_cpu_is_one_line(config_file, monkeypatch, capsys, text, ends):
    def full(*args):
        raise RuntimeError(text)

    monkeypatch.setattr(train, "train", full)
    with pytest.raises(SystemExit if ends else RuntimeError) as caught:
        train.main(["--config", str(config_file)])
    if ends:
        assert caught.value.code == 1
        assert capsys.readouterr().err.startswith("error: memory ran out: ")
