"""`inspect`: the plan of a quantization, without its work."""

from __future__ import annotations

from tests.unit.cli.conftest import strict_json


def test_what_would_be_quantized_by_the_recipe_of_the_flags(run, model):
    found = strict_json(run("inspect", model, "--bits", 8, "--exclude", "second", "--json").stdout)
    (group,) = found["taps"]
    assert group["sites"] == ["h"]
    assert group["spec"]["bits"] == 8
    (skipped,) = found["skipped"]
    assert skipped["reason"] == "excluded by 'second'"


def test_the_table_names_layers_and_reasons(run, model):
    shown = run("inspect", model, "--exclude", "second").stdout
    assert "\nh " in shown
    assert "excluded by 'second'" in shown


def test_nothing_is_written(run, model, tmp_path):
    run("inspect", model)
    assert list(tmp_path.iterdir()) == [model]


def test_a_bad_recipe_is_exit_code_2(run, model):
    assert "did you mean rtn" in run("inspect", model, "--method", "rtm", code=2).stderr
