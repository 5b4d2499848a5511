"""What all commands share: a help that loads nothing heavy, lists, overrides, and how a command ends."""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from configs.load import ConfigError
from configs.schema import RunConfig
from launch import cli, train
from launch.__main__ import main
from launch.docs import find_documents

ROOT = Path(__file__).parent.parent.parent
OURS = re.compile(r"(?<![\w/.-])(?:pss-bench|-m launch\.(?P<module>\w+)) ")
HEAVY = ("torch", "torchrec", "fbgemm_gpu", "numpy", "pandas", "polars", "pyarrow", "scipy", "matplotlib", "pydantic")
SEE_HELP = """
import json, runpy, sys
sys.argv = json.loads(sys.argv[1])
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
except SystemExit as end:
    print("status", end.code)
print("heavy", sorted(set({heavy}) & sys.modules.keys()))
"""


def commands(group=main, *words):
    """The words of every command, (), ("train",), ..., and the module that it is started as, alone."""
    found = [(words, None)]
    for name in group.list_commands(None):
        command, module = group.get_command(None, name), getattr(group, "modules", {}).get(name)
        if isinstance(command, click.Group):
            found += commands(command, *words, name)
        found.append(((*words, name), module))
    return found


ENTRIES = [("launch", *words) for words, _ in commands()] + sorted({(module,) for _, module in commands() if module})


@pytest.mark.parametrize("entry", ENTRIES, ids=" ".join)
def test_help_loads_nothing_heavy(entry):
    module, *words = entry
    done = subprocess.run(
        [sys.executable, "-c", SEE_HELP.format(heavy=HEAVY), json.dumps([module, *words, "--help"])],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout.startswith("Usage: "), done.stderr
    assert done.stdout.endswith("status 0\nheavy []\n")


def test_every_command_is_listed_with_a_line_of_its_own():
    text = CliRunner().invoke(main, ["--help"]).output
    for name, module in main.modules.items():
        line = next(line for line in text.splitlines() if line.startswith(f"  {name} "))
        assert line.split(maxsplit=1)[1].endswith("."), f"{module}: its summary is cut or no sentence"


def find(words):
    context, command = click.Context(main), main
    for word in words:
        command = command.get_command(context, word)
    return command


LEAVES = [words for words, _ in commands() if not isinstance(find(words), click.Group)]


@pytest.mark.parametrize("words", LEAVES, ids=" ".join)
def test_every_example_of_a_help_is_one_of_this_command_that_it_takes(words):
    command = find(words)
    assert command.examples
    for example in command.examples:
        line, _, _ = example.partition(" | ")
        program, *given = shlex.split(line, comments=True)
        assert [program, *given[: len(words)]] == ["pss-bench", *words]
        with contextlib.suppress(click.exceptions.Exit):
            command.make_context(words[-1], given[len(words) :])


def test_names_of_before_go_on_working_and_are_not_listed():
    assert find(("experiments",)) is find(("study",))
    assert "experiments " not in CliRunner().invoke(main, ["--help"]).output


def test_a_command_that_does_not_exist_is_told_with_the_one_that_was_meant(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["trian"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: No such command 'trian'. Did you mean 'train'?\n"


@cli.command("ends", "Ends as it is told.", summary="Ends.", when_interrupted=cli.GOES_ON)
@click.argument("how")
@click.option("--list", "values", type=cli.CommaList(click.IntRange(min=0)), default="7")
def ends(how, values):
    if how.endswith("returned"):
        return int(how.split()[0])
    if how == "mistake":
        with cli.mistakes():
            raise ConfigError("configs/x.toml: no such key")
    if how == "no file":
        with cli.mistakes(OSError):
            Path("/nowhere").read_text()
    if how == "failure":
        with cli.failures(RuntimeError):
            raise RuntimeError("rank 1 failed")
    if how == "bug":
        with cli.mistakes():
            raise ZeroDivisionError
    if how == "SIGTERM":
        os.kill(os.getpid(), signal.SIGTERM)
    if how == "list":
        print(values)
    if how == "pipe":
        print("x" * 1_000_000)
    if how == "other pipe":
        raise BrokenPipeError("of a worker")
    return None


@pytest.mark.parametrize(
    ("how", "status", "said"),
    [
        ("0 returned", 0, ""),
        ("1 returned", 1, ""),
        ("nothing", 0, ""),
        ("mistake", 2, "error: configs/x.toml: no such key\n"),
        ("no file", 2, "error: /nowhere: No such file or directory\n"),
        ("failure", 1, "error: rank 1 failed\n"),
        ("SIGTERM", 130, "interrupted: the same command goes on from here\n"),
    ],
)
def test_a_command_ends_with_the_status_of_its_kind(how, status, said, capsys):
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        ends([how])
    assert ended.value.code == status
    assert capsys.readouterr().err == said
    assert signal.getsignal(signal.SIGTERM) is handler


def test_an_error_of_ours_is_no_mistake():
    with pytest.raises(ZeroDivisionError):
        ends(["bug"])


def test_only_the_first_rank_tells_a_mistake(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as ended:
        ends(["mistake"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == ""


def test_a_reader_that_goes_away_is_no_error_but_another_broken_pipe_is(capfd):
    code = "from tests.launch.test_cli import ends; ends(['pipe'])"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(10) == "x" * 10
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(60) == 1
    with pytest.raises(SystemExit) as ended:
        ends(["other pipe"])
    assert ended.value.code == 1
    assert "BrokenPipeError: of a worker" in capfd.readouterr().err


@pytest.mark.parametrize(("given", "values"), [("0,1,2", (0, 1, 2)), ("5", (5,)), ("2, 1", (2, 1)), (None, (7,))])
def test_a_list_is_parted_by_commas(given, values, capsys):
    options = [] if given is None else ["--list", given]
    assert ends(["list", *options], standalone_mode=False) is None
    assert capsys.readouterr().out == f"{values}\n"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("0,,1", "a value is missing between the commas"),
        ("", "a value is missing between the commas"),
        ("0,x", "'x' is not a valid integer range"),
        ("0,-1", "-1 is not in the range x>=0"),
        ("1,2,1", "a value is given twice"),
    ],
)
def test_a_mistaken_list_is_told_with_its_option(given, said, capsys):
    with pytest.raises(SystemExit) as ended:
        ends(["list", "--list", given])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: Invalid value for '--list': ")
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("override", ["training.epochs", "epochs=1", "configs/demo/robe.toml"])
def test_a_mistaken_override_is_told(override):
    ended = CliRunner().invoke(train.main, ["configs/demo/robe.toml", override], standalone_mode=False)
    assert str(ended.exception) == f"override {override!r}: must look like section.key=value"


def test_output_is_a_directory(tmp_path):
    kind = cli.OutputDirectory()
    assert kind.convert(str(tmp_path / "new"), None, None) == tmp_path / "new"
    (tmp_path / "file").touch()
    for mistaken in ("page.html", str(tmp_path / "file")):
        with pytest.raises(click.BadParameter):
            kind.convert(mistaken, None, None)


def test_help_of_train_tells_every_section():
    assert list(train.SECTIONS) == list(RunConfig.model_fields)


@pytest.mark.parametrize(
    ("section", "there", "absent"),
    [
        ("embedding", ("[embedding]", "[embedding.robe]", "block_size  (int, default 8)"), ("[training]",)),
        ("embedding.robe", ("[embedding.robe]", "hash_family"), ("[embedding]", "compression  (")),
        ("training", ("[training]", "Rows per step over all ranks."), ("[evaluation]",)),
        (None, ("[run]", "[embedding.robe]", "[model.dlrm]", "[profile]"), ()),
    ],
)
def test_keys_are_listed_by_section(section, there, absent):
    ended = CliRunner().invoke(train.main, ["--keys"] if section is None else ["--keys", section])
    assert ended.exit_code == 0
    for text in there:
        assert text in ended.output
    for text in absent:
        assert text not in ended.output


def test_keys_of_a_section_that_does_not_exist_are_a_mistake(capsys):
    with pytest.raises(SystemExit) as ended:
        train.main(["--keys", "embedding.robbe"])
    assert ended.value.code == 2
    assert "no section 'embedding.robbe' (did you mean embedding.robe?)" in capsys.readouterr().err


def document_lines(text):
    """Every line of a document's shell blocks that starts one of our commands, continued lines joined."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if OURS.search(line)]


DOCUMENTED = [(path.name, line) for path in find_documents(ROOT) for line in document_lines(path.read_text())]


def test_documents_name_commands():
    assert len(DOCUMENTED) > 8, "the pattern of a command no longer finds those of the documents"


@pytest.mark.parametrize(("document", "line"), DOCUMENTED)
def test_every_command_of_the_documents_is_one_that_parses(document, line):
    start = OURS.search(line)
    assert start is not None
    given = line[start.end() :]
    if line[: start.start()].endswith('"'):  # the command is an argument of another, as of sbatch
        given = given.partition('"')[0]
    words = [*filter(None, [start["module"]]), *shlex.split(given, comments=True)]
    command = main
    with contextlib.suppress(click.exceptions.Exit):  # what --help and --keys end with
        context = command.make_context("pss-bench", words)
        while isinstance(command, click.Group):
            name, command, words = command.resolve_command(context, [*context._protected_args, *context.args])
            assert command is not None
            context = command.make_context(name, words, parent=context)
