import pytest
from pydantic import Field

from geomcache.cache_schemas.base import Schema
from geomcache.cache_schemas.errors import ConfigError
from geomcache.pipeline.config_errors import parse_config


class Inner(Schema):
    learning_rate: float = 0.1


class Other(Schema):
    momentum: float = 0.9


class Outer(Schema):
    batch_size: int
    grid: tuple[int, int] = (1, 2)
    inner: Inner = Inner()
    many: tuple[Inner, ...] = ()
    named: dict[str, Inner] = Field(default_factory=dict)
    either: Inner | Other | None = None


def test_lists_stand_for_tuples() -> None:
    assert parse_config(Outer, {"batch_size": 3, "grid": [4, 5]}, "x") == Outer(batch_size=3, grid=(4, 5))


@pytest.mark.parametrize(
    ("data", "key", "suggestion"),
    [
        ({"batch_size": 1, "gird": [1, 2]}, "gird", "grid"),
        ({"batch_size": 1, "inner": {"learning_rat": 1}}, "inner.learning_rat", "learning_rate"),
        ({"batch_size": 1, "many": [{}, {"learningrate": 1}]}, "many.1.learningrate", "learning_rate"),
        ({"batch_size": 1, "named": {"a": {"lerning_rate": 1}}}, "named.a.lerning_rate", "learning_rate"),
    ],
)
def test_unknown_key_gets_a_suggestion(data: dict[str, object], key: str, suggestion: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(Outer, data, "train.yaml")
    assert caught.value.what == f"train.yaml: unknown key {key!r}"
    assert caught.value.fix == f"did you mean {suggestion!r}?"


def test_unknown_key_inside_a_union() -> None:
    with pytest.raises(ConfigError, match="did you mean 'momentum'"):
        parse_config(Outer, {"batch_size": 1, "either": {"momentun": 1}}, "x")


def test_unlike_key_lists_what_there_is() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(Inner, {"zzz": 1}, "x")
    assert caught.value.expected == "one of learning_rate"
    assert "remove the key" in caught.value.fix


def test_missing_wrong_and_several() -> None:
    with pytest.raises(ConfigError, match="'batch_size' is missing"):
        parse_config(Outer, {}, "x")
    with pytest.raises(ConfigError) as caught:
        parse_config(Outer, {"batch_size": "many", "gird": 1}, "x")
    assert "'batch_size' has a wrong value" in caught.value.what
    assert "valid integer" in caught.value.expected
    assert "also unknown key 'gird'" in caught.value.found


def test_not_a_mapping() -> None:
    with pytest.raises(ConfigError, match="not a mapping"):
        parse_config(Outer, ["batch_size"], "x")  # type: ignore[arg-type]
