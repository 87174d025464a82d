"""What is printed: escape sequences in files and names reach no terminal."""

import os
import subprocess
import sys

import pytest
from helpers.kit import ROOT

from rwkv_peft.common.errors import UserError, handle_errors
from rwkv_peft.common.terminal import clean_output, clean_text


@pytest.mark.parametrize(
    "text, shown",
    [
        ("\x1b[2J", "\\x1b[2J"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("a\0b", "a\\x00b"),
        ("\x9b31m", "\\x9b31m"),
        ("all is well\rno", "all is well\\rno"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("half \ud83d", "half \\ud83d"),
        ("back\b\b\b\b", "back\\x08\\x08\\x08\\x08"),
        ("\rstep 3", "\rstep 3"),
        ("a\tb\n\u4e2d\u6587 \U0001f600\r\n", "a\tb\n\u4e2d\u6587 \U0001f600\r\n"),
    ],
)
def test_what_a_terminal_would_obey_is_written_out(text, shown):
    assert clean_text(text) == shown


def test_all_that_is_printed_is_cleaned_and_only_inside(capsys):
    with clean_output():
        print("a\x1b[2J")
        print("b\x1b[2J", file=sys.stderr)
        with clean_output():
            sys.stdout.write("c\x07\n")
        print("d\x07")
    print("e\x07")
    said = capsys.readouterr()
    assert (said.out, said.err) == ("a\\x1b[2J\nc\\x07\nd\\x07\ne\x07\n", "b\\x1b[2J\n")


def test_the_words_of_an_error_are_cleaned(capsys):
    with pytest.raises(SystemExit), handle_errors():
        raise UserError("x\x1b[2J: is wrong.")
    assert capsys.readouterr().err == "x\\x1b[2J: is wrong.\n"


def test_a_progress_bar_keeps_its_line(capsys):
    from tqdm import tqdm

    with clean_output(), tqdm(total=2, file=sys.stderr) as bar:
        bar.update(2)
    assert "\\r" not in capsys.readouterr().err


HOSTILE = {
    "a name of a file": ("\x1b[2Jx.jsonl", b'{"text": 5}\n'),
    "a column": ("x.csv", b"prompt,response,\x1b[2Jc\na,b,c\n"),
    "a column twice": ("x.csv", b"prompt,response,\x1b[2Jc,\x1b[2Jc\na,b,c,d\n"),
    "a key": ("x.jsonl", b'{"\\u001b[2Jtext": "a"}\n'),
    "a role": ("x.jsonl", b'{"messages": [{"role": "\\u001b[2J", "content": "a"}]}\n'),
    "a file in a zip": ("x.zip", b"PK\3\4" + bytes(40)),
}


@pytest.mark.smoke(2)
@pytest.mark.parametrize("name", HOSTILE)
def test_no_escape_sequence_of_a_data_file_is_printed(tmp_path, name):
    file, content = HOSTILE[name]
    (tmp_path / file).write_bytes(content)
    done = subprocess.run([ROOT / "make_tokenize.sh", tmp_path / file], capture_output=True)
    assert b"Traceback" not in done.stderr and done.stdout + done.stderr
    assert b"\x1b[2J" not in done.stdout + done.stderr


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_stream_that_was_closed_leads_nowhere_and_into_no_file(tmp_path, closed):
    code = (
        "import os, sys\nfrom rwkv_peft.common.errors import UserError, handle_errors\n"
        "with handle_errors():\n file = open('log', 'w')\n"
        " print('said')\n os.write(1, b'x')\n os.write(2, b'x')\n sys.stderr.isatty()\n raise UserError('wrong')"
    )
    shell = ["bash", "-c", f'exec "$@" {closed}', "-", sys.executable, "-c", code]
    done = subprocess.run(
        shell, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr and not (tmp_path / "log").read_text(), done.stderr
    assert "2>&-" in closed or done.stderr.endswith("wrong\n")
