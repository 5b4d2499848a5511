"""What a method's options are: keys of a config, keywords of its class, and what `help` says of them."""

import inspect
from typing import Any, Literal

import pytest
from pydantic import Field

from pss.method import CompressionRefused, MethodOptions, parse_options
from pss.methods.robe import Options, RobeArguments, RobeEmbeddingBagCollection
from tests.pss.jagged import table


class Toy(MethodOptions):
    count: int = Field(default=2, ge=1)
    share: float = Field(default=0.5, gt=0, lt=1)
    kind: Literal["one", "two"] = "one"
    cuts: tuple[tuple[int, float], ...] = ()


def test_keywords_make_options_and_lists_stand_for_tuples():
    assert parse_options(Toy, {"count": 3, "cuts": [[1, 0.5]]}) == Toy(count=3, cuts=((1, 0.5),))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0}, "count must be at least 1, not 0"),
        ({"share": 0}, "share must be above 0, not 0"),
        ({"share": 1}, "share must be below 1, not 1"),
        ({"kind": "three"}, "kind 'three' is unknown: known are 'one' or 'two'"),
        ({"count": "many"}, "count = 'many': input should be a valid integer"),
        ({"count": 0, "share": 1}, "count must be .*; share must be"),
    ],
)
def test_a_value_out_of_range_is_named_with_what_is_allowed(values: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        parse_options(Toy, values)


def test_an_unknown_option_is_refused_with_those_that_there_are():
    with pytest.raises(TypeError, match=r"'blocksize' is no option; known: .*block_size"):
        RobeEmbeddingBagCollection([table("a", 9, 4)], blocksize=4)


def test_signature_and_help_show_every_option():
    parameters = inspect.signature(RobeEmbeddingBagCollection).parameters
    assert list(parameters)[:4] == ["tables", "is_weighted", "device", "compression"]
    assert (parameters["compression"].default, parameters["block_size"].default) == (1000.0, 8)
    shown = RobeEmbeddingBagCollection.__doc__
    assert shown is not None
    for name, field in RobeArguments.model_fields.items():
        assert parameters[name].default == field.get_default()
        assert field.description is not None
        assert " ".join(field.description.split()[:4]) in " ".join(shown.split())
    assert Options.model_fields.keys() < RobeArguments.model_fields.keys()


def test_of_an_instance_the_signature_is_that_of_its_call():
    module = RobeEmbeddingBagCollection([table("a", 9, 4)])
    assert "block_size" not in inspect.signature(module).parameters


def test_the_nearest_compression_has_four_digits_and_is_reached():
    assert CompressionRefused("m", 100.0, 53.14159).nearest == 53.14
    assert CompressionRefused("m", 2.0, 0.5).nearest == 1.0
