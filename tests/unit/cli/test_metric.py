"""A metric is found by its name, or the error says what is there instead; its prints are not in the way."""

from __future__ import annotations

import os
import sys

import pytest

from onnx_woq.cli.metric import load_metric, output_to_stderr
from onnx_woq.errors import EvaluationError
from tests.support.commands import python


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("cli_metric", "write MODULE:FUNCTION"),
        (":score", "write MODULE:FUNCTION"),
        ("cli_metric:", "write MODULE:FUNCTION"),
        ("cli_metric:nothing", "has no attribute"),
        ("cli_metric:scores", "did you mean score"),
        ("cli_metrik:score", "did you mean cli_metric"),
        ("no_such_metric:score", "No module named"),
        ("cli_metric.inner:score", "importing it fails|No module named"),
        ("cli_metric:three", "is not a function"),
    ],
)
def test_what_is_no_metric(name, says, metric):
    with pytest.raises(EvaluationError, match=says):
        load_metric(name)


def test_a_metric_is_found_in_the_current_folder(metric, tmp_path):
    assert load_metric(None) is None
    assert load_metric(metric)(tmp_path / "m.onnx") == 1.0


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import no_such_library", "No module named 'no_such_library'.*install what it needs"),
        ("raise ValueError('out of cheese')", "ValueError: out of cheese"),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("raise type('Odd', (BaseException,), {})('x')", "Odd: x"),
        ("def score(:", "SyntaxError"),
    ],
)
def test_a_module_that_cannot_be_imported(code, says, metric, tmp_path):
    (tmp_path / "broken_metric.py").write_text(f"import os; os.chdir('/')\n{code}\n")
    with pytest.raises(EvaluationError, match=f"--eval broken_metric: .*{says}"):
        load_metric("broken_metric:score")
    assert os.getcwd() == str(tmp_path)


def test_prints_of_python_go_to_standard_error(capsys):
    with output_to_stderr():
        print("a step")
    print("the result")
    assert capsys.readouterr() == ("the result\n", "a step\n")


def test_prints_of_anything_else_do_too():
    code = """
import subprocess
from onnx_woq.cli.metric import output_to_stderr
with output_to_stderr():
    subprocess.run(["echo", "a step"], check=True)
print("the result")
"""
    done = python(code)
    assert (done.stdout, done.stderr) == ("the result\n", "a step\n")


def test_a_standard_output_that_is_closed_is_no_hindrance(monkeypatch):
    monkeypatch.setattr(sys, "__stdout__", None)
    with output_to_stderr():
        print("a step")
