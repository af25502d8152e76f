import pytest
import torch

from geomcache.cache_schemas.errors import ConfigError, UnknownName
from geomcache.cache_schemas.token_spec import TokenSpec
from geomcache.stages.train.building import compressors_for, pair_layers, parse_options, require_fitting_tokens, seeded


@pytest.mark.parametrize(
    ("layers", "blocks", "expected"),
    [(4, 4, (1, 2, 3, 4)), (4, 2, (2, 4)), (3, 2, (2, 3)), (2, 4, (1, 1, 2, 2)), (36, 1, (36,))],
)
def test_pairing_is_even_and_ends_at_the_last_layer(layers: int, blocks: int, expected: tuple[int, ...]) -> None:
    assert pair_layers(layers, blocks) == expected


def test_pairing_at_full_size() -> None:
    pairing = pair_layers(36, 16)
    assert len(set(pairing)) == 16
    assert pairing[-1] == 36


@pytest.mark.parametrize("explicit", [(1,), (0, 2), (2, 5), (3, 2)])
def test_bad_pairing_is_refused(explicit: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="between 1 and 4"):
        pair_layers(4, 2, explicit)


def test_unknown_options_and_names_are_refused_with_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="did you mean 'image_size'"):
        parse_options("backbone", "qwen2_5_vl", {"image_siz": 112})
    with pytest.raises(UnknownName, match="did you mean 'pool'"):
        parse_options("compressor", "pol", {})


def test_a_pooled_cache_trains_what_takes_means_with_as_many_of_them(spec: TokenSpec) -> None:
    pooled = spec.model_copy(update={"pooled_to": 4})
    assert compressors_for(spec) == ["gated", "per_layer", "pool", "qformer"]
    assert compressors_for(pooled) == ["per_layer", "pool"]
    require_fitting_tokens("qformer", False, spec, 5)
    require_fitting_tokens("pool", True, pooled, 4)
    with pytest.raises(ConfigError, match=r"reads every token[\s\S]*without view_embedding"):
        require_fitting_tokens("pool", False, pooled, 4)
    with pytest.raises(ConfigError, match="geom_dit_tokens=4"):
        require_fitting_tokens("pool", True, pooled, 5)


def test_seeded_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    with seeded(1):
        first = torch.rand(3)
    with seeded(1):
        second = torch.rand(3)
    assert torch.equal(first, second)
    assert torch.equal(before, torch.get_rng_state())
