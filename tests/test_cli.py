"""The command line: every command, its help, and errors in one line."""

import io
import json
import subprocess
import sys

import pytest
from checks import DEVICE
from stages import sentences

from ulmfit_fast import cli, config, results

for _extra in ("tokenizers", "safetensors", "matplotlib", "tqdm"):
    pytest.importorskip(_extra)

ON = ["--device", str(DEVICE)]
TINY = ["--preset", "tiny", "--quiet", "--epochs", "1", "--batch-size", "4", "--min-freq", "1", *ON]
SMALL = ["--emb-sz", "12", "--n-hid", "16", "--n-layers", "2", "--bptt", "8"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with data and the runs of all three stages, made by the command line."""
    folder = tmp_path_factory.mktemp("cli")
    texts, labels = sentences(30)
    (folder / "general.txt").write_text("\n".join(texts))
    (folder / "train.csv").write_text(
        "text,label\n" + "".join(f"{t},{x}\n" for t, x in zip(texts, labels, strict=True))
    )
    csv = str(folder / "train.csv")
    for line in (
        ["pretrain", str(folder / "general.txt"), csv, "--out", str(folder / "general"), *TINY, *SMALL],
        ["finetune", str(folder / "general"), csv, "--out", str(folder / "target"), "--valid", csv, *TINY],
        ["classify", str(folder / "target"), csv, "--out", str(folder / "clf"), "--valid", csv, *TINY],
    ):
        assert cli.main(line) == 0
    return folder


def test_options_reach_the_configuration(runs):
    record = json.loads((runs / "general" / "config.json").read_text())
    assert record["preset"] == "tiny" and record["config"]["n_hid"] == 16 and record["config"]["bptt"] == 8


def test_predict(runs, capsys, monkeypatch):
    assert cli.main(["predict", str(runs / "clf"), "The film was superb", "dull " * 40, *ON]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 2 and all(
        label in ("good", "bad") and share.endswith("%") for label, share, _ in rows
    )
    assert len(rows[1][2]) == 60
    assert cli.main(["predict", str(runs / "clf"), "--file", str(runs / "train.csv"), "--proba", *ON]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 30 and all(abs(sum(row.values()) - 1) < 1e-4 for row in rows)
    (runs / "lines.txt").write_bytes("\ufeffone\n\ntwo \n".encode())
    for source in (["--file", str(runs / "lines.txt")], []):
        monkeypatch.setattr("sys.stdin", io.StringIO("\ufeffone\n\ntwo\n"))
        assert cli.main(["predict", str(runs / "clf"), *source, *ON]) == 0
        assert [line.split("\t")[2] for line in capsys.readouterr().out.splitlines()] == ["one", "", "two"]


def test_options_stand_anywhere(runs, capsys, tmp_path):
    assert cli.main(["predict", str(runs / "clf"), "--proba", "What a film!", *ON, "dull", "--", "-x"]) == 0
    assert len([json.loads(line) for line in capsys.readouterr().out.splitlines()]) == 3
    assert cli.main(["predict", *ON, str(runs / "target"), "--tokens", "0", "The film"]) == 0
    assert capsys.readouterr().out == "The film\n"
    files = str(runs / "train.csv"), str(runs / "general.txt")
    assert (
        cli.main(["finetune", str(runs / "general"), *TINY, files[0], "--out", str(tmp_path / "x"), files[1]])
        == 0
    )


def test_a_warning_and_no_path_where_there_are_no_curves(runs, capsys, tmp_path, monkeypatch):
    from ulmfit_fast import plots

    monkeypatch.setattr(plots, "curves", lambda history, stage: 1 / 0)
    line = ["pretrain", str(runs / "general.txt"), "--out", str(tmp_path / "x"), *TINY, *SMALL]
    with pytest.warns(UserWarning, match="curves.png' could not be drawn: ZeroDivisionError"):
        assert cli.main([option for option in line if option != "--quiet"]) == 0
    assert "curves.png" not in capsys.readouterr().out


def test_predict_with_a_language_model_continues(runs, capsys, monkeypatch):
    assert cli.main(["predict", str(runs / "target"), "The film", "--tokens", "5", *ON]) == 0
    assert capsys.readouterr().out.lower().startswith("the film")
    monkeypatch.setattr(results.TrainedLM, "generate", lambda self, text, *options: f"{text}\n{options}")
    assert cli.main(["predict", str(runs / "target"), "a", "b", "--temperature", "0", *ON]) == 0
    assert capsys.readouterr().out.splitlines() == ["a (40, 0.0, 0)", "b (40, 0.0, 0)"]


@pytest.mark.parametrize(
    ("run", "options", "message"),
    [
        ("target", ["--proba"], "--proba needs a classifier"),
        ("target", ["--tokens", "-1"], "--tokens must be at least 0, got -1"),
        ("clf", ["--tokens", "5"], "--tokens needs a language model"),
        ("clf", ["--temperature", "0"], "--temperature needs a language model"),
        ("clf", ["--seed", "0"], "--seed needs a language model"),
    ],
)
def test_predict_refuses_options_of_the_other_kind(runs, run, options, message, capsys):
    assert cli.main(["predict", str(runs / run), "The film", *options, *ON]) == 2
    said = capsys.readouterr()
    assert message in said.err and not said.out


def test_training_says_where_the_run_is(runs, capsys, tmp_path):
    line = ["classify", "-", str(runs / "train.csv"), "--out", str(tmp_path / "x"), *TINY]
    assert cli.main([option for option in line if option != "--quiet"]) == 0
    said = capsys.readouterr()
    assert "epoch 1/1: loss" in said.err and "tokens/s" in said.err
    assert f"{tmp_path / 'x'}: training accuracy 0." in said.out and "curves.png" in said.out


def test_resume_after_ctrl_c(runs, capsys, tmp_path, monkeypatch):
    from ulmfit_fast import fitting

    line = ["pretrain", str(runs / "general.txt"), "--out", str(tmp_path / "x"), *TINY, *SMALL]
    with monkeypatch.context() as patch:

        def stop(self):
            raise KeyboardInterrupt

        patch.setattr(fitting.Loop, "_log", stop)
        assert cli.main(line) == 130
    assert cli.main([*line, "--resume"]) == 0


def test_info(capsys):
    assert cli.main(["info"]) == 0
    assert "torch" in capsys.readouterr().out
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["version"]


def test_a_reader_that_has_gone_is_no_error():
    """`ulmfit-fast info | head -0`"""
    program = subprocess.Popen(
        [sys.executable, "-m", "ulmfit_fast.cli", "info"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    program.stdout.close()
    assert program.stderr.read() == b"" and program.wait() == 141


@pytest.mark.parametrize("command", ["", *cli.EXAMPLES])
def test_help_explains(command, capsys):
    with pytest.raises(SystemExit) as done:
        cli.main([command, "--help"] if command else ["--help"])
    text = capsys.readouterr().out
    assert done.value.code == 0 and max(map(len, text.splitlines())) <= 88
    if command in ("pretrain", "finetune", "classify"):
        stage = config.STAGES[command]
        assert all("--" + name.replace("_", "-") in text for name in stage.__dataclass_fields__)
    assert "Example" in text or not command


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["predict", "no-such-run", "x"], "run_dir='no-such-run' is no run directory"),
        (["pretrain", "no-such.txt", "--out", "x"], "no such file: 'no-such.txt'"),
        (["pretrain", __file__, "--out", "x", "--drop-mult", "9"], "a dropout probability must stay below 1"),
        (["finetune", "no-such-run", "a.txt", "--out", "x"], "base_run='no-such-run'"),
    ],
)
def test_errors_are_one_line(line, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(line) == 2
    said = capsys.readouterr()
    assert (
        message in said.err
        and len(said.err.splitlines()) == 1
        and said.err.startswith(f"ulmfit-fast {line[0]}: error")
    )
    with pytest.raises((ValueError, OSError), match=message[:20]):
        cli.main([*line, "--traceback"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["pretrain", "a.txt"], "required: --out"),
        (["pretrain", "a.txt", "--out", "x", "--epochs", "many"], "--epochs: invalid int value: 'many'"),
        (["pretrain", "a.txt", "--out", "x", "--epoks", "3"], "unrecognized arguments: --epoks"),
        (
            ["classify", "a", "b", "--out", "x", "--gradual-unfreezing", "maybe"],
            "must be true or false, got 'maybe'",
        ),
        (["train"], "invalid choice: 'train'"),
        ([], "required: COMMAND"),
    ],
)
def test_wrong_command_lines(line, message, capsys):
    with pytest.raises(SystemExit) as done:
        cli.main(line)
    said = capsys.readouterr().err
    assert done.value.code == 2 and message in said and len(said.splitlines()) == 1
