"""The stored notebooks are whole, the comparison that guards them can fail, and the runner loses nothing."""

import asyncio
import json
import os
import re
import select
import signal
import statistics
import subprocess
import sys
import textwrap

import nbformat
import pytest

from dalm_utils.__main__ import main
from dalm_utils.config import PROJECT
from dalm_utils.scripts import notebook as runner
from tests.helpers import PATIENCE
from tests.nbval_tolerance import RECORDED, snap, snap_outputs

NOTEBOOKS = sorted((PROJECT / "notebooks").glob("*.ipynb"))
IGNORED = "nbval-ignore-output"


def code_cells(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_executed_thin_and_private(path):
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    lengths = [len(cell.source.splitlines()) for cell in cells]
    assert statistics.median(lengths) <= 8 and max(lengths) <= 25
    outputs = str([cell.outputs for cell in cells])
    assert not re.search(r"/(home|root|tmp|Users|work)/", outputs), "an absolute path in an output"
    checked = [cell for cell in cells if IGNORED not in cell.metadata.get("tags", []) and cell.outputs]
    assert len(re.findall(r"\d\.\d+", str([cell.outputs for cell in checked]))) >= 10, "too few figures are checked"


def test_close_figures_pass_and_others_fail():
    stored = "NELBO 5.312 +- 0.041, better by 0.92"
    assert snap("NELBO 5.290 +- 0.043, better by 0.93", stored) == stored
    assert snap("NELBO 5.600 +- 0.041, better by 0.92", stored) != stored
    assert snap("NELBO 5.312, better by 0.92", stored) != stored
    assert snap("nelbo 5.312 +- 0.041, better by 0.92", stored) != stored
    assert snap("step 100", "step 101") != "step 101"  # whole numbers are compared to the letter


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_each_checked_figure_would_be_missed(path):
    """Change any one stored decimal by 12% and 0.1: the outputs no longer compare as equal."""
    for cell in code_cells(path):
        for output in cell.outputs:
            text = output.get("text", "")
            for number in re.finditer(r"\d+\.\d+", text):
                wrong = f"{float(number[0]) * 1.12 + 0.1:.4f}"
                changed = {**output, "text": text[: number.start()] + wrong + text[number.end() :]}
                assert snap_outputs([changed], [output])[0]["text"] != text


THIRD = "import sys\nprint('noise', file=sys.stderr)\nprint(f'a third is {1 / 3:.3f}')"


@pytest.mark.slow
def test_nbval_with_our_plugin_fails_where_a_figure_is_off(tmp_path):
    stored = [  # what the cell printed once, its tags, and whether 0.333 passes now
        ("0.333", [], True),
        ("0.338", [], True),
        ("0.400", [], False),
        ("0.333", [RECORDED], True),
        ("0.338", [RECORDED], False),
    ]
    notebook = nbformat.v4.new_notebook()
    for count, (printed, tags, _) in enumerate(stored, 1):
        output = nbformat.v4.new_output("stream", name="stdout", text=f"a third is {printed}\n")
        cell = nbformat.v4.new_code_cell(THIRD, execution_count=count, outputs=[output], metadata={"tags": tags})
        notebook.cells.append(cell)
    nbformat.write(notebook, tmp_path / "third.ipynb")
    command = [sys.executable, "-m", "pytest", "-p", "tests.nbval_tolerance", "-p", "no:cacheprovider", "-rA"]
    command += ["--nbval", "--nbval-current-env", "--rootdir", str(tmp_path), str(tmp_path / "third.ipynb")]
    told = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=PATIENCE).stdout
    verdicts = {int(cell): verdict == "PASSED" for verdict, cell in re.findall(r"^([A-Z]+) .*::Cell (\d+)", told, re.M)}
    assert [verdicts.get(number) for number in range(len(stored))] == [passes for *_, passes in stored], told


# ---------------------------------------------------------------------------------------------------- the runner
@pytest.fixture
def runs(tmp_path, monkeypatch):
    """The folder where the runner leaves its results."""
    monkeypatch.setenv("DALM_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


def write_notebook(path, *sources, **metadata):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    path.write_text(json.dumps({**notebook, "metadata": metadata}))
    return path


def printed(path):
    """What each code cell of an executed notebook has printed."""
    return ["".join(output.get("text", "") for output in cell.outputs) for cell in code_cells(path)]


@pytest.mark.slow
def test_a_notebook_runs_with_progress_and_becomes_a_page(tmp_path, runs, capsys):
    path = write_notebook(
        tmp_path / "small.ipynb", "import sys", "print('busy', file=sys.stderr)", "print('where to look')"
    )
    assert main(["notebook", str(path)]) == 0
    captured = capsys.readouterr()
    assert "cell 3/3: print('where to look')" in captured.out and captured.out.count("where to look") == 2
    assert "busy" in captured.err
    executed = nbformat.read(runs / "small.ipynb", as_version=4)
    assert [cell.execution_count for cell in executed.cells] == [1, 2, 3]
    assert not any("execution" in cell.metadata for cell in executed.cells)
    assert not executed.cells[1].outputs  # progress bars and warnings stay on the terminal
    assert "where to look" in (runs / "small.html").read_text()
    assert main(["notebook", str(path)]) == 0  # its own results may be replaced


def test_formulas_of_the_page_need_no_network():
    text = "With $t < 1$:\n\n$$ \\frac{1}{t} $$\n\n`$HOME$` costs $5 or $6, and $\\unknown{$ stays."
    cells = [nbformat.v4.new_markdown_cell(text)]
    page = runner.Page(template_name="classic").from_notebook_node(nbformat.v4.new_notebook(cells=cells))[0]
    for wanted in (r"<math [^>]*display=\"inline\"[^>]*>.*?<mi>t</mi><mo>&lt;</mo><mn>1</mn>", "<mfrac>"):
        assert re.search(wanted, page)
    for untouched in ("<code>$HOME$</code> costs $5 or $6", "and $\\unknown{$ stays"):
        assert untouched in page


@pytest.mark.slow
def test_a_kernel_that_does_not_end_after_its_last_cell_is_not_waited_for(tmp_path, runs, monkeypatch):
    monkeypatch.setattr(runner, "IDLE_SHUTDOWN", 1)
    monkeypatch.setattr(runner, "SHUTDOWN", 10**6)
    stuck = (
        "import atexit, signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\natexit.register(time.sleep, 10**6)"
    )
    path = write_notebook(tmp_path / "stuck.ipynb", stuck, "print('done')")
    assert main(["notebook", str(path)]) == 0
    assert printed(runs / "stuck.ipynb") == ["", "done\n"]


@pytest.mark.slow
def test_a_notebook_without_code_runs(tmp_path, runs):
    assert main(["notebook", str(write_notebook(tmp_path / "empty.ipynb"))]) == 0
    assert (runs / "empty.ipynb").is_file() and (runs / "empty.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    "end, how",
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "killed by signal 9 (Killed), perhaps because memory ran out"),
        ("os._exit(3)", "with exit status 3"),
    ],
)
def test_a_kernel_that_dies_is_told_from_a_stop_and_leaves_its_outputs(tmp_path, runs, capsys, end, how, in_place):
    path = write_notebook(
        tmp_path / "dies.ipynb", "print('an hour of work')", f"import os, signal\n{end}", "print('never')"
    )
    stored = path.read_bytes()
    assert main(["notebook", str(path), *(["--in-place"] if in_place else [])]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    died = f"error: the kernel of dies.ipynb died in cell 2 of 3 (import os, signal), {how}. The outputs"
    assert error.startswith(died) and "dies.unfinished.ipynb" in error
    assert path.read_bytes() == stored and not (runs / "dies.ipynb").exists()
    assert printed(runs / "dies.unfinished.ipynb") == ["an hour of work\n", "", ""]


@pytest.mark.slow
def test_outputs_of_an_earlier_run_are_not_taken_for_those_of_this_one(tmp_path, runs):
    path = write_notebook(tmp_path / "bad.ipynb", "1 / 0", "print('never')")
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[1].outputs = [nbformat.v4.new_output("stream", name="stdout", text="earlier")]
    nbformat.write(notebook, path)
    assert main(["notebook", str(path)]) == 1
    assert printed(runs / "bad.unfinished.ipynb")[1] == ""


@pytest.mark.slow
def test_a_failing_notebook_says_which_line_and_keeps_the_stored_one(tmp_path, runs, capsys):
    path = write_notebook(tmp_path / "bad.ipynb", "print('before')", "1 / 0")
    stored = path.read_bytes()
    for options in ([], ["--in-place"]):
        assert main(["notebook", str(path), *options]) == 1
        error = capsys.readouterr().err
        assert "cell 2 of 2 (1 / 0) of bad.ipynb failed" in error and "ZeroDivisionError" in error
        assert path.read_bytes() == stored
        assert printed(runs / "bad.unfinished.ipynb")[0] == "before\n"


STEPS = """
import os, signal
asked = []
signal.signal(signal.SIGINT, lambda *which: (asked.append(which), os.write(report, b"asked")))
gate, report = os.open("gate", os.O_RDWR), os.open("report", os.O_RDWR)
os.write(report, b"begun")
os.read(gate, 1)
print(f"{len(asked)} signal")
"""  # ends its step after it was asked to stop, when the test opens the gate
STUBBORN = """
import os, signal
signal.signal(signal.SIGINT, lambda *which: os.write(report, b"asked"))
report = os.open("report", os.O_RDWR)
os.write(report, b"begun")
while True:
    signal.pause()
"""  # does not end


class Runner:
    """A process that runs a notebook, whose first cell reports through one pipe and may read from another.

    Args:
        at_start: what the kernel executes before anything else.
    """

    def __init__(self, folder, *sources, at_start="pass"):
        for name in ("gate", "report"):
            os.mkfifo(folder / name)
        self.gate, self.report = (os.open(folder / name, os.O_RDWR) for name in ("gate", "report"))
        path = write_notebook(folder / "long.ipynb", *sources)
        begin = "import os, sys\nif 'ipykernel_launcher' in sys.orig_argv:\n"
        (folder / "sitecustomize.py").write_text(begin + textwrap.indent(at_start, "    "))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dalm_utils", "notebook", str(path)],
            cwd=PROJECT,
            env=os.environ | {"DALM_RUNS": str(folder / "runs"), "PYTHONPATH": f"{folder}:{PROJECT}"},
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for(self, word):
        while not select.select([self.report], [], [], 1)[0]:
            assert self.process.poll() is None, self.process.stderr.read()
        assert os.read(self.report, len(word)) == word

    def stop(self):
        """Press Ctrl-C, and wait until that was noticed."""
        self.process.send_signal(signal.SIGINT)
        while not (line := self.process.stderr.readline()).startswith("stopping "):
            assert line, "it ended without a word"
        return line

    def end(self):
        """Its exit status, and what it said on stderr."""
        told = self.process.communicate(timeout=PATIENCE)[1]
        return self.process.returncode, told


@pytest.mark.slow
@pytest.mark.usefixtures("hears_hangups")
@pytest.mark.parametrize(
    "kind, status, more",
    [(signal.SIGINT, 130, ["print('never')"]), (signal.SIGTERM, 143, []), (signal.SIGHUP, 129, ["print('never')"])],
    ids=["ctrl-c", "last", "hangup"],
)
def test_a_notebook_that_is_stopped_ends_its_step_and_keeps_its_outputs(tmp_path, kind, status, more):
    started = Runner(tmp_path, STEPS, *more)
    started.wait_for(b"begun")
    started.process.send_signal(kind)
    started.wait_for(b"asked")
    if kind == signal.SIGHUP:  # which the shell and the system may both send
        started.process.send_signal(kind)
    os.write(started.gate, b"x")
    code, told = started.end()
    assert code == status and "Traceback" not in told
    assert re.search(r"stopped in cell 1 of . \(.*\)\. The outputs so far are in .*long\.unfinished\.ipynb", told)
    assert printed(tmp_path / "runs" / "long.unfinished.ipynb") == ["1 signal\n", *("" for _ in more)]
    assert not (tmp_path / "runs" / "long.ipynb").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("hears_hangups")
def test_a_signal_after_a_notebook_does_not_stop_the_next_one_in_this_process(tmp_path, runs):
    path = write_notebook(tmp_path / "small.ipynb", "print('done')")
    assert main(["notebook", str(path)]) == 0
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert main(["notebook", str(path)]) == 0


@pytest.mark.slow
def test_a_second_ctrl_c_kills_the_kernel(tmp_path):
    started = Runner(tmp_path, STUBBORN)
    started.wait_for(b"begun")
    started.process.send_signal(signal.SIGINT)
    started.wait_for(b"asked")
    started.process.send_signal(signal.SIGINT)
    code, told = started.end()
    assert code == 130 and "stopped in cell 1 of 1" in told and "Traceback" not in told
    assert (tmp_path / "runs" / "long.unfinished.ipynb").is_file()


HELD = """
gate, report = os.open("gate", os.O_RDWR), os.open("report", os.O_RDWR)
os.write(report, b"begun")
os.read(gate, 1)
"""


@pytest.mark.slow
@pytest.mark.parametrize("presses", [1, 2])
def test_a_notebook_can_be_stopped_while_its_kernel_starts(tmp_path, presses):
    started = Runner(tmp_path, "print('never')", at_start=HELD)
    started.wait_for(b"begun")
    said = [started.stop() for _ in range(presses)]
    assert said[0] == "stopping the start of the kernel; once more kills it\n"
    if presses == 1:
        os.write(started.gate, b"x")
    code, told = started.end()
    assert code == 130 and "stopped in the start of the kernel" in told and "Traceback" not in told
    assert printed(tmp_path / "runs" / "long.unfinished.ipynb") == [""]


@pytest.mark.slow
def test_a_kernel_that_does_not_start_is_an_error(tmp_path):
    code, told = Runner(tmp_path, "print('never')", at_start="os._exit(3)").end()
    assert code == 1 and "error: the kernel of long.ipynb failed" in told and "Traceback" not in told


def test_a_kernel_is_interrupted_as_soon_as_it_executes_a_cell_and_not_after(tmp_path):
    """Before, it would ignore it, and the cell might run for hours; between cells it would print a traceback."""

    class Manager(runner.Manager):
        has_kernel, interrupts = True, 0

        async def _async_signal_kernel(self, signum):
            self.interrupts += 1

    async def press():
        client = runner.Client(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1")]), tmp_path)
        client.km, counts = Manager(kernel_spec_manager=runner.ThisPython()), []
        client._announce(client.code[0])
        for happens in (
            lambda: client._stop(signal.SIGINT),
            lambda: client.process_message({"msg_type": "execute_input", "content": {}}, client.code[0], 0),
            lambda: client._rest(),
            lambda: client._send(client.km.interrupt_kernel()),  # as `shutdown_kernel` does first
        ):
            happens()
            await asyncio.sleep(0.01)
            counts.append(client.km.interrupts)
        return counts

    assert asyncio.run(press()) == [0, 1, 1, 1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "metadata",
    [
        {"kernelspec": {"name": "my-venv"}},
        {"kernelspec": {"name": "conda-env-x-py", "display_name": "Python [conda env:x]", "language": "python"}},
        {"kernelspec": {"name": "python3"}, "language_info": {"version": "2.7"}},
        {"kernelspec": "python3", "language_info": 5, "widgets": 3},
    ],
)
def test_a_notebook_runs_in_this_python_whatever_kernel_it_names(tmp_path, runs, monkeypatch, metadata):
    fake = tmp_path / "jupyter" / "kernels" / "python3"  # that of another Python, which the user has installed
    fake.mkdir(parents=True)
    fake.joinpath("kernel.json").write_text(json.dumps({"argv": ["false"], "display_name": "x", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    path = write_notebook(tmp_path / "mine.ipynb", "import sys\nprint(sys.executable)", **metadata)
    path.chmod(0o600)
    assert main(["notebook", str(path), "--in-place"]) == 0
    assert path.stat().st_mode & 0o777 == 0o600
    assert printed(path) == [f"{sys.executable}\n"]
    if "display_name" in metadata["kernelspec"]:  # one that is valid, by which the user's editor chooses
        assert nbformat.read(path, as_version=4).metadata["kernelspec"] == metadata["kernelspec"]


@pytest.mark.slow
def test_a_notebook_of_an_older_format_runs(tmp_path, runs):
    cells = [nbformat.v3.new_code_cell("print('three')")]
    old = nbformat.v3.new_notebook(worksheets=[nbformat.v3.new_worksheet(cells=cells)])
    (tmp_path / "old.ipynb").write_text(json.dumps({**old, "metadata": {"name": ""}}))
    assert main(["notebook", str(tmp_path / "old.ipynb")]) == 0
    assert printed(runs / "old.ipynb") == ["three\n"]


VALID = {"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": []}
CELL = {"cell_type": "code", "id": "a", "source": "", "metadata": {}, "outputs": [], "execution_count": None}


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is not a notebook"),
        (b"{", "is not a notebook"),
        (b"\xff\xfe", "is not a notebook"),
        (b"[]", "is not a notebook"),
        (b"{}", "is not a notebook"),
        (b'"text"', "is not a notebook"),
        (json.dumps({**VALID, "nbformat": 9}).encode(), "is not a notebook"),
        (json.dumps({**VALID, "cells": 5}).encode(), "is not a notebook"),
        (json.dumps({**VALID, "metadata": []}).encode(), "is not a notebook"),
        (json.dumps({**VALID, "metadata": {"title": 5}}).encode(), "is not a notebook"),
        (json.dumps({**VALID, "cells": [{**CELL, "metadata": {"tags": None}}]}).encode(), "is not a notebook"),
        (json.dumps({**VALID, "cells": [{**CELL, "source": 5}]}).encode(), "is not a notebook"),
        (json.dumps({**VALID, "metadata": {"language_info": {"name": "R"}}}).encode(), "is a notebook of R"),
        (json.dumps({**VALID, "metadata": {"kernelspec": {"language": "julia"}}}).encode(), "is a notebook of julia"),
    ],
)
def test_what_cannot_be_run_is_one_line(tmp_path, runs, capsys, content, message):
    path = tmp_path / "odd.ipynb"
    path.write_bytes(content)
    assert main(["notebook", str(path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path} {message}") and error.count("\n") == 1
    assert not runs.exists()


@pytest.fixture
def no_kernel(monkeypatch):
    """Fails a test that gets as far as running a cell."""
    monkeypatch.setattr(runner.Client, "execute", lambda client: pytest.fail("a cell would have run"))


@pytest.mark.parametrize("name", ["mine.ipynb", "mine.html", "mine.unfinished.ipynb"])
@pytest.mark.parametrize("make", [lambda path: path.write_text("my own"), lambda path: path.mkdir()])
def test_a_file_of_the_users_is_not_replaced(tmp_path, runs, no_kernel, capsys, name, make):
    path = write_notebook(tmp_path / "mine.ipynb", "1")
    runs.mkdir()
    make(runs / name)
    before = (runs / name).read_bytes() if (runs / name).is_file() else None
    assert main(["notebook", str(path)]) == 1
    assert f"{runs / name} was not written by this command, or was changed since" in capsys.readouterr().err
    assert before is None or (runs / name).read_bytes() == before


@pytest.mark.slow
def test_a_result_that_the_user_has_changed_is_not_replaced(tmp_path, runs, capsys):
    path = write_notebook(tmp_path / "mine.ipynb", "print(1)")
    assert main(["notebook", str(path)]) == 0
    assert main(["notebook", str(runs / "mine.ipynb")]) == 1
    assert "pass --in-place" in capsys.readouterr().err
    changed = runs / "mine.ipynb"
    changed.write_text(changed.read_text().replace("print(1)", "print(2)"))
    assert main(["notebook", str(path)]) == 1
    assert "or was changed since" in capsys.readouterr().err and "print(2)" in changed.read_text()


def executing(monkeypatch, cells, text="an hour of work"):
    """Clients execute that many cells, in no kernel, and then fail if there are more."""

    def execute(client):
        for number, cell in enumerate(client.code[:cells], 1):
            cell.execution_count = number
            cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=text)]
        if cells < len(client.code):
            raise RuntimeError("stopped")

    monkeypatch.setattr(runner.Client, "execute", execute)


def test_a_notebook_that_was_saved_while_it_ran_is_not_replaced(tmp_path, runs, monkeypatch, capsys):
    path = write_notebook(tmp_path / "mine.ipynb", "print(1)")
    executing(monkeypatch, 1)
    execute = runner.Client.execute
    monkeypatch.setattr(runner.Client, "execute", lambda client: (execute(client), path.write_text("edited")))
    assert main(["notebook", str(path), "--in-place"]) == 1
    assert f"{path} was changed while it ran, and stays as it is. The outputs" in capsys.readouterr().err
    assert path.read_text() == "edited" and printed(runs / "mine.unfinished.ipynb") == ["an hour of work"]


def test_a_result_that_was_edited_while_the_notebook_ran_is_kept(tmp_path, runs, monkeypatch):
    path = write_notebook(tmp_path / "mine.ipynb", "print(1)")
    executing(monkeypatch, 1)
    assert main(["notebook", str(path)]) == 0
    execute, edited = runner.Client.execute, runs / "mine.ipynb"
    monkeypatch.setattr(runner.Client, "execute", lambda client: (execute(client), edited.write_text("edited")))
    assert main(["notebook", str(path)]) == 0
    assert (runs / "mine.ipynb.old1").read_text() == "edited" and printed(edited) == ["an hour of work"]


def test_results_of_another_notebook_or_profile_are_kept(tmp_path, runs, monkeypatch, capsys):
    (tmp_path / "other").mkdir()
    mine, other = (write_notebook(folder / "same.ipynb", "print(1)") for folder in (tmp_path, tmp_path / "other"))
    for path, profile, text in ((mine, "full", "a"), (mine, "", "b"), (mine, "laptop", "c"), (other, "laptop", "d")):
        monkeypatch.setenv("DALM_PROFILE", profile)
        executing(monkeypatch, 1, f"the output {text}")
        assert main(["notebook", str(path)]) == 0
    results = [runs / f"same.{kind}{end}" for end in (".old1", ".old2", "") for kind in ("ipynb", "html")]
    for path, text in zip(results, "aaccdd", strict=True):
        assert f"the output {text}" in path.read_text()
    assert sorted(path for path in runs.iterdir() if path.name != runner.RECORD) == sorted(results)
    assert capsys.readouterr().err.count("since it is of another notebook or profile") == 2


def test_outputs_of_an_unfinished_run_are_replaced_only_by_one_that_got_as_far(tmp_path, runs, monkeypatch):
    path = write_notebook(tmp_path / "mine.ipynb", "print(1)", "print(2)", "print(3)")
    for cells, text in ((1, "a"), (2, "b"), (2, "c"), (0, "d")):
        executing(monkeypatch, cells, text)
        assert main(["notebook", str(path)]) == 1
    assert printed(runs / "mine.unfinished.ipynb.old1") == ["c", "c", ""]
    assert printed(runs / "mine.unfinished.ipynb") == ["", "", ""] and len(list(runs.glob("mine*"))) == 2


def test_where_a_notebook_was_run_is_not_written_into_it(tmp_path, runs, monkeypatch):
    path = write_notebook(tmp_path / "mine.ipynb", "print(1)")
    executing(monkeypatch, 1)
    assert main(["notebook", str(path)]) == 0
    assert nbformat.read(runs / "mine.ipynb", as_version=4).metadata[runner.ORIGIN]["source"] == str(path)
    copied = tmp_path / "copied.ipynb"
    copied.write_bytes((runs / "mine.ipynb").read_bytes())
    assert main(["notebook", str(copied), "--in-place"]) == 0
    assert runner.ORIGIN not in nbformat.read(copied, as_version=4).metadata


def test_a_read_only_notebook_is_found_before_the_work(tmp_path, runs, no_kernel, capsys):
    path = write_notebook(tmp_path / "mine.ipynb", "1")
    path.chmod(0o444)
    assert main(["notebook", str(path), "--in-place"]) == 1
    assert capsys.readouterr().err == f"error: {path} is read-only\n"


@pytest.mark.parametrize("options", [[], ["--in-place"]])
def test_a_folder_that_cannot_be_written_is_found_before_the_work(tmp_path, runs, no_kernel, capsys, options):
    runs.write_text("a file")
    assert main(["notebook", str(write_notebook(tmp_path / "mine.ipynb", "1")), *options]) == 1
    error = capsys.readouterr().err
    assert re.fullmatch(rf"error: {runs} cannot be written \(.*\); DALM_RUNS names another folder\n", error)


def test_a_disk_that_fills_leaves_the_notebook_as_it_was(tmp_path, runs, monkeypatch, capsys):
    path = write_notebook(tmp_path / "mine.ipynb", "print(1)")
    stored = path.read_bytes()

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runner.Client, "execute", lambda client: None)
    monkeypatch.setattr("os.fsync", fail)
    assert main(["notebook", str(path), "--in-place"]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert path.read_bytes() == stored and sorted(p.name for p in tmp_path.iterdir()) == ["mine.ipynb", "runs"]


def test_without_what_notebooks_need_the_remedy_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "nbclient", None)
    monkeypatch.delitem(sys.modules, "dalm_utils.scripts.notebook")
    monkeypatch.delattr("dalm_utils.scripts.notebook")
    assert main(["notebook", "mine.ipynb"]) == 1
    assert "pip install 'dalm_utils[notebooks]'" in capsys.readouterr().err
