"""Options: sizes as people write them, and flags that arrive as one object."""

from __future__ import annotations

from dataclasses import fields

import click
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_woq.cli import options
from onnx_woq.cli.options import DataFlags, RecipeFlags, RunFlags, Size, TuneFlags

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
BUNDLES = [
    (options.recipe_options, RecipeFlags, "recipe"),
    (options.data_options, DataFlags, "data"),
    (options.tune_options, TuneFlags, "tuning"),
    (options.run_options, RunFlags, "run"),
]


@settings(deadline=None)
@given(st.integers(1, 4000), st.sampled_from(sorted(UNITS)), st.sampled_from(["", " "]), st.booleans())
def test_a_size_is_a_number_times_its_unit(count, unit, space, small):
    text = f"{count}{space}{unit}"
    assert Size()(text.lower() if small else text) == count * UNITS[unit]


@settings(deadline=None)
@given(st.integers(1, 10**6), st.sampled_from(["KB", "MB", "GB"]))
def test_decimals_and_larger_units_are_the_same_size(count, unit):
    assert abs(Size()(f"{count / 1000:.3f}{unit}") - count * UNITS[unit] // 1000) <= 1


@settings(deadline=None)
@given(st.text(max_size=12) | st.from_regex(r"[0-9.]{1,4} ?[KMGTkmgt]?[Ii]?[Bb]?", fullmatch=True))
def test_any_text_is_a_positive_size_or_refused(text):
    try:
        count = Size()(text)
    except click.BadParameter as refused:
        message = refused.message
    else:
        assert count > 0
        return
    assert message == f"{text!r} is not a size: write 3GB, 800MB or 512MiB"


@pytest.mark.parametrize(("decorate", "kind", "argument"), BUNDLES, ids=[kind.__name__ for _, kind, _ in BUNDLES])
def test_flags_arrive_as_one_object_with_the_defaults_of_its_class(decorate, kind, argument):
    @click.command()
    @decorate
    def command(**given):
        assert given == {argument: kind()}

    done = CliRunner().invoke(command, [], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert [parameter.name for parameter in command.params] == [field.name for field in fields(kind)]


@pytest.mark.parametrize("name", ["--method", "--algorithm"])
def test_the_method_has_two_names(name):
    @click.command()
    @options.recipe_options
    def command(recipe):
        click.echo(recipe.method)

    assert CliRunner().invoke(command, [name, "hqq"]).output == "hqq\n"
    assert "--method, --algorithm NAME" in CliRunner().invoke(command, ["--help"]).output


def test_arguments_of_the_command_pass_beside_its_flags():
    @click.command()
    @click.argument("model")
    @options.data_options
    @options.json_option
    def command(model, as_json, data):
        click.echo(f"{model} {as_json} {data.samples} {data.seqlen}")

    assert CliRunner().invoke(command, ["m", "--samples", "3", "--json"]).output == "m True 3 None\n"
