"""What TensorBoard shows of a run, and that no patient's word is in it."""

import json
import os
import resource
import subprocess
import sys
import urllib.request
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from helpers import CPU, PYTHON, ROOT, communicate, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import (
    EventAccumulator as PluginEventAccumulator,
)
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.metadata import (
    EXPERIMENT_TAG,
    SESSION_END_INFO_TAG,
    SESSION_START_INFO_TAG,
    parse_session_start_info_plugin_data,
)

from loop.checkpoint.run_dir import whole_lines
from loop.checkpoint.train_state import TrainState
from loop.config.cli import load_config
from loop.data.batch_plan import PackingSpec, plan_batches
from loop.data.conversations import read_split
from loop.data.dataset import TrainingData
from loop.data.report import DatasetReport
from loop.data.tokenization import Example
from loop.monitor.late_file import EventLog, LateFile
from loop.monitor.run_logger import RunLogger
from loop.monitor.tensorboard import (
    CHARTS,
    COLORS,
    UNUSED,
    chart_layout,
    draw_packed_rows,
    flatten_hparams,
)


@pytest.fixture(scope="module")
def board(trained):
    board = EventAccumulator(str(trained / "tensorboard"))
    board.Reload()
    return board


def last_layout(board) -> tuple[Layout, list[str]]:
    """The layout that TensorBoard takes, and the tags of its charts."""
    tensor = board.Tensors("custom_scalars__config__")[-1].tensor_proto
    layout = Layout.FromString(tensor.string_val[0])
    charts = [chart for category in layout.category for chart in category.chart]
    return layout, [tag for chart in charts for tag in chart.multiline.tag]


def test_the_layout_names_what_the_run_wrote_and_all_of_it(board):
    """No tag comes after the last layout. No chart shows perplexity, the loss in other units."""
    layout, tags = last_layout(board)
    assert all(tag.startswith("^") and tag.endswith("$") for tag in tags)
    assert len(tags) == len(set(tags))
    assert {tag[1:-1] for tag in tags} == set(board.Tags()["scalars"]) - {"eval/perplexity"}
    assert [category.title for category in layout.category] == list(CHARTS)


def test_charts_without_curves_are_left_out():
    assert chart_layout(set()) == {}
    assert chart_layout({"train/mfu", "other"}) == {
        "speed": {"share of the measured matrix rate (MFU)": ["Multiline", ["^train/mfu$"]]}
    }


def test_the_phases_of_earlier_versions_are_still_shown():
    (chart,) = chart_layout({"time/agreement", "time/data"})["speed"].values()
    assert chart == ["Multiline", ["^time/data$", "^time/agreement$"]]


def test_clipped_steps_are_counted(trained, board):
    limit = load_config(["--config", str(trained / "config.yaml")]).max_grad_norm
    clipped = np.cumsum([e.value > limit for e in board.Scalars("train/grad_norm")])
    assert [e.value for e in board.Scalars("train/clipped_steps")] == clipped.tolist()
    assert clipped[-1] > 0
    limits = [(e.step, e.value) for e in board.Scalars("plan/max_grad_norm")]
    assert limits == [(1, limit), (6, limit)]


def made_up_data() -> TrainingData:
    """20 examples of 700 tokens, all of them supervised."""
    examples = [Example("a", np.arange(700), np.arange(700))] * 20
    lengths = np.array([700] * 20)
    report = DatasetReport(20, 20, [], [], [], 0, False)
    reports = {"train": report, "valid": report}
    return TrainingData(examples, [], [], lengths, lengths - 1, None, reports)


def bare_engine() -> SimpleNamespace:
    model = torch.nn.Linear(2, 2)
    for p in model.parameters():
        p.ds_numel = p.numel()
    return SimpleNamespace(module=model, optimizer=torch.optim.AdamW(model.parameters()))


@pytest.fixture
def make_logger(config_file):
    """A function that makes the logger of a run of four steps, from a step on, and a step's log."""
    config = load_config(["--config", str(config_file), "data.valid=null"])
    config.folder.mkdir(parents=True)
    ranks = SimpleNamespace(
        is_main=True,
        world_size=1,
        device=torch.device("cpu"),
        all_gather_json=lambda value: [value],
    )
    engine, data = bare_engine(), made_up_data()
    plan = plan_batches(data.lengths, 4096, seed=0)
    assert len(plan) == 4
    execution = SimpleNamespace(
        ds_config={}, description="", max_tokens=4096, estimate_memory=lambda tokens: {}
    )
    memory = SimpleNamespace(begin=lambda: None, describe_beside=lambda estimate: "")
    checkpointer = SimpleNamespace(notes=[], start_note="")
    row = SimpleNamespace(input_ids=torch.zeros(1, 3500))

    def make(first):
        state = TrainState(config.run, step=first, eval_metrics={})
        logger = RunLogger(config, execution, engine, ranks, state, plan, None, memory)
        logger.log_start(data, None, PackingSpec(4096, 1024), checkpointer, [])

        def log_step(norm):
            logger.start_step(state.step)
            state.record(1.0, applied=True)
            result = SimpleNamespace(loss=1.0, grad_norm=norm)
            logger.log_step(state, result, 1e-3, np.array([700] * 5), 700, [row])

        return logger, log_step

    return make


def read_as_the_server_does(folder):
    """The reader of TensorBoard's server; EventAccumulator is another one."""
    return PluginEventAccumulator(str(folder / "tensorboard")).Reload()


def test_a_resumed_run_counts_on_and_draws_the_same_charts(make_logger):
    """Four steps, then a resume after the second with other norms: TensorBoard shows one run."""
    for first, norms in ((0, [2.0, 0.5, 3.0, 3.0]), (2, [float("inf"), 1.5])):
        logger, log_step = make_logger(first)
        for norm in norms:
            log_step(norm)
        logger.close({})
    board = EventAccumulator(str(logger.folder / "tensorboard")).Reload()
    clipped = [(e.step, e.value) for e in board.Scalars("train/clipped_steps")]
    assert clipped == [(1, 1), (2, 1), (3, 1), (4, 2)]
    assert [e.step for e in board.Scalars("plan/max_grad_norm")] == [1, 4]
    assert [e.step for e in board.Scalars("plan/lr")] == [1, 2, 3, 4]
    _, patterns = last_layout(board)
    tags = {pattern[1:-1] for pattern in patterns}
    assert tags == set(board.Tags()["scalars"]) and "plan/lr" in tags
    assert len(board.Images("plan/packed_rows_of_the_first_step")) == 1
    server = read_as_the_server_does(logger.folder)
    assert [e.step for e in server.Tensors("train/loss")] == [1, 2, 3, 4]


def test_a_report_counts_what_was_made_and_a_checkpoint_finds_it_written(make_logger):
    logger, log_step = make_logger(0)
    for norm in (0.5, 0.5, 0.5):
        log_step(norm)
    logger.flush()  # as before a checkpoint, however long ago the last write was
    board = EventAccumulator(str(logger.folder / "tensorboard")).Reload()
    assert [e.step for e in board.Scalars("train/loss")] == [1, 2, 3]
    report = logger.close({})
    assert (report["steps"], report["planned_steps"]) == (3, 4)
    assert logger.tokens == 3 * 5 * 700
    assert report["train/tokens_per_second"] == logger.tokens / logger.seconds
    lines = [json.loads(line) for line in (logger.folder / "metrics.jsonl").open()]
    seconds = [5 * 700 / line["train/tokens_per_second"] for line in lines]
    assert logger.seconds == pytest.approx(sum(seconds))


def test_a_norm_that_is_no_number_is_not_clipped(make_logger):
    logger, log_step = make_logger(0)
    for norm in (float("nan"), float("inf"), 3.0):
        log_step(norm)
    logger.close({})
    lines = [json.loads(line) for line in (logger.folder / "metrics.jsonl").open()]
    assert [line["train/clipped_steps"] for line in lines] == [0, 0, 1]


def test_patience_that_runs_out_at_the_last_step_ends_nothing_early(make_logger):
    for steps, early in ((3, True), (4, False)):
        logger, log_step = make_logger(0)
        state = SimpleNamespace(
            step=steps,
            out_of_patience=True,
            best_step=1,
            choice="validation loss",
            eval_metrics=None,
            to_manifest=lambda: {"best": None},
        )
        report = logger.finish(state, {}, SimpleNamespace(reason=None))
        assert bool(report["ended_early"]) is early


def test_what_a_full_disk_held_back_is_logged_when_there_is_room(make_logger, capsys):
    logger, log_step = make_logger(0)
    log_step(1.0)
    logger.flush()
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, unlimited[1]))  # no file may grow beyond
    try:
        for _ in range(2):
            log_step(1.0)
            logger.flush()
        logger._write_text("samples/step-000003.md", "x" * 200)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert len(whole_lines((logger.folder / "metrics.jsonl").read_text())) == 1
    said = capsys.readouterr().out
    assert said.count("not logged yet: File too large") == 1 and "Traceback" not in said
    log_step(1.0)
    logger.close({})
    assert capsys.readouterr().out.count("what could not be logged is written now (") == 1
    log = (logger.folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [1, 2, 3, 4]
    board = EventAccumulator(str(logger.folder / "tensorboard")).Reload()
    assert [e.step for e in board.Scalars("train/loss")] == [1, 2, 3, 4]
    assert (logger.folder / "samples" / "step-000003.md").read_text() == "x" * 200


def test_memory_holds_no_more_than_it_may_of_what_a_full_disk_held_back(tmp_path, monkeypatch):
    monkeypatch.setattr("loop.monitor.late_file.MOST_WAITING", 25)
    file = LateFile(tmp_path / "log")
    for number in range(4):
        file.write(f"record {number}\n".encode())
    file.flush()
    file.write(b"record 4\n")
    file.close()
    assert file.lost == 2
    assert (tmp_path / "log").read_text() == "record 0\nrecord 1\nrecord 4\n"
    synced = []
    monkeypatch.setattr("loop.monitor.late_file.os.fsync", synced.append)
    file = LateFile(tmp_path / "log")
    file.write(b"record 5\n")
    file.sync()  # before a checkpoint
    assert synced == [file._file.fileno()] and (tmp_path / "log").read_text().endswith(" 5\n")
    file.close()
    with pytest.raises(OSError):  # a link is not followed
        (tmp_path / "link").symlink_to(tmp_path / "log")
        LateFile(tmp_path / "link")


def test_a_later_file_sorts_behind_an_earlier_one_though_the_clock_was_set_back(
    tmp_path, monkeypatch
):
    names = []
    for now in (2e9, 1e9, 1.5e9, 2e9 + 5):
        monkeypatch.setattr("loop.monitor.late_file.time.time", lambda now=now: now)
        EventLog(tmp_path, 0).close()
        (new,) = {path.name for path in tmp_path.iterdir()} - {*names}
        names.append(new)
    assert names == sorted(names)


def test_the_configuration_is_there_to_compare_runs_by(trained, board):
    content = board.summary_metadata[SESSION_START_INFO_TAG].plugin_data.content
    start = parse_session_start_info_plugin_data(content)
    assert start.hparams["lr"].number_value == 1e-2 and start.hparams["lora.r"].number_value == 8
    assert start.hparams["restart_steps"].string_value == "None"
    assert start.hparams["micro_batch_size"].string_value == "auto"
    assert SESSION_END_INFO_TAG in board.summary_metadata
    assert EXPERIMENT_TAG not in board.summary_metadata, (
        "with a list of columns, TensorBoard would not put those first that differ"
    )


def test_a_hyperparameter_is_of_one_kind_in_all_runs(config_file):
    args = ["--config", str(config_file)]
    one = flatten_hparams(load_config(args))
    args += ["micro_batch_size=1", "restart_steps=3", "max_steps=9", "gradient_checkpointing=true"]
    args += ["lr=1", "lora.target_modules=[q_proj]", "data.valid=null", "data.limit=9"]
    other = flatten_hparams(load_config(args))
    assert one.keys() == other.keys()
    for layers in ("0", "[0]"):  # of the fields beside the usual ones
        config = load_config([*args, f"lora.layers_to_transform={layers}"])
        assert flatten_hparams(config)["lora.layers_to_transform"] == layers
    assert all(isinstance(one[k], str) == isinstance(other[k], str) for k in one)


def test_a_packed_row_is_drawn_document_by_document():
    """Two documents in a row of 64 tokens, four pixels a token.

    One has 16 tokens of prompt and 8 of note, the other 8 and 16; 16 tokens are unused.
    """
    first = Example("a", np.arange(24), np.array([-100] * 16 + [1] * 8))
    second = Example("b", np.arange(24), np.array([-100] * 8 + [1] * 16))
    picture = draw_packed_rows([("rank 0", [first, second])], capacity=64, width=256)
    assert picture.dtype == np.uint8 and picture.shape[1:] == (256, 3)
    row = picture[-20].tolist()  # through the middle of the band
    pale = [[255 - (255 - c) * 35 // 100 for c in color] for color in COLORS]
    assert row[1:64] == [pale[0]] * 63 and row[64:96] == [list(COLORS[0])] * 32
    assert row[96] == [0, 0, 0] == row[0]
    assert row[97:128] == [pale[1]] * 31 and row[128:192] == [list(COLORS[1])] * 64
    assert row[192:] == [list(UNUSED)] * 64


def test_plan_and_picture_are_on_the_board(trained, board):
    assert board.Tags()["images"] == ["plan/packed_rows_of_the_first_step"]
    names = {
        "tokens_of_an_example",
        "supervised_tokens_of_an_example",
        "tokens_of_a_step",
        "supervised_tokens_of_a_step",
        "examples_of_a_step",
    }
    assert set(board.Tags()["histograms"]) == {f"plan/{name}" for name in names}
    steps = board.Histograms("plan/tokens_of_a_step")[0].histogram_value
    assert steps.num == 6 and steps.max <= 4 * 512
    supervised = board.Histograms("plan/supervised_tokens_of_a_step")[0].histogram_value
    assert supervised.num == 6 and 0 < supervised.sum < steps.sum
    said = (trained.parent / "stdout").read_text()
    assert f"{steps.sum:,.0f} tokens, {supervised.sum:,.0f} of them supervised" in said


def test_memory_is_that_of_the_tensors(trained, board):
    """Two ranks: each has masters, gradients and two moments in fp32 of its half of the weights."""
    parts = {
        tag.split("/")[1]: board.Scalars(tag)[0].value
        for tag in board.Tags()["scalars"]
        if tag.startswith("memory/")
    }
    names = ["frozen_weights", "scales", "trained_weights", "masters", "moments", "gradients"]
    assert set(parts) == {f"{name}_gib" for name in names}
    assert parts["moments_gib"] == pytest.approx(2 * parts["masters_gib"])
    assert parts["gradients_gib"] == pytest.approx(parts["masters_gib"])
    assert [e.step for e in board.Scalars("memory/masters_gib")] == [1, 3, 6]


def test_no_patients_word_is_in_a_tag_or_a_value_beside_the_samples(trained, board):
    config = load_config(["--config", str(trained / "config.yaml")])
    lines = {
        line
        for c in read_split(config, "train")[0]
        for line in c.dialogue.splitlines() + c.note.splitlines()
        if len(line) > 12
    }
    lists = [tags for tags in board.Tags().values() if isinstance(tags, list)]
    texts = [str(tag) for tags in lists for tag in tags]
    texts += board.summary_metadata
    texts += [str(metadata) for metadata in board.summary_metadata.values()]
    texts += [str(board.Tensors(tag)) for tag in board.Tags()["tensors"] if "notes/" not in tag]
    assert len(lines) > 20
    assert not any(line in text for line in lines for text in texts)


def test_board_listens_on_this_machine_alone_and_ends_on_ctrl_c(trained):
    # Other tests may have left more than the one run.
    runs = len({path.parent for path in trained.parent.rglob("events.out.tfevents.*")})
    assert runs >= 1
    process = subprocess.Popen(
        [str(ROOT / "launch.sh"), "board", str(trained.parent)],
        env=os.environ | CPU | {"LOOP_PYTHON": sys.executable},  # its sockets are looked at
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        address = process.stdout.readline().partition("#")[0]
        line = process.stdout.readline()
        assert address.startswith("http://127.0.0.1:"), line
        assert f"shows {runs} run(s) of {trained.parent}," in line
        board = psutil.Process(process.pid)
        listening = [
            connection.laddr.ip
            for p in (board, *board.children(recursive=True))
            for connection in p.net_connections()
            if connection.status == psutil.CONN_LISTEN
        ]
        assert listening == ["127.0.0.1"]
        layout = f"{address}data/plugin/custom_scalars/layout"
        with urllib.request.urlopen(layout, timeout=60) as answer:
            assert [c["title"] for c in json.load(answer)["category"]] == list(CHARTS)
        process.send_signal(2)
        _, errors = communicate(process, 20)
        assert process.returncode == 0 and "Traceback" not in errors
    finally:
        process.kill()


@pytest.mark.parametrize(
    "args, says",
    [
        (["nowhere"], "no such folder"),
        (["a", "b"], "at most one folder"),
        (["--host=0.0.0.0"], "--host=0.0.0.0"),
    ],
)
def test_a_mistake_of_board_is_one_line(args, says, tmp_path):
    command = [PYTHON, "-m", "loop.commands.board", *args]
    done = run(command, cwd=tmp_path, env=os.environ | CPU | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1
