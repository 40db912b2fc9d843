"""Every number of the configuration has a range, and every pair an order."""

import re

import pytest

from dit_jax import options
from dit_jax.config import ConfigError, default_config, flatten, resolve
from tests.test_config import tree

SCHEMA = options.schema()
DEFAULTS = dict(flatten(default_config()))
PAIRS = {
    path: f"{path.rpartition('.')[0]}.{known.below or known.at_most}"
    for path, known in SCHEMA.items()
    if known.below or known.at_most
}
INTERVALS = [path for path, known in SCHEMA.items() if known.interval]
NUMBERS = {
    path: value
    for path, value in DEFAULTS.items()
    if isinstance(value, int | float | tuple) and not isinstance(value, bool)
}
# Their names say an end of a range, but there is no other end.
ALONE = {
    "augmentation.hue_max",
    "augmentation.rotate_frac_max",
    "augmentation.translate_int_max",
    "cache.first_block.max_reuses",
    "method.consistency.min_r",
    "method.tcm.min_r",
    "process.edm.vp_beta_min",
}


def test_every_number_has_a_range_in_which_its_default_lies():
    assert {path for path in DEFAULTS if SCHEMA[path].within} == set(NUMBERS)
    for path, value in NUMBERS.items():
        assert options.number_error(path, value, SCHEMA[path]) is None
    assert options.order_error(DEFAULTS, SCHEMA) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_no_number_is_nan_or_infinite(value):
    for path, default in NUMBERS.items():
        with pytest.raises(ConfigError, match=re.escape(f"config.{path}=")):
            resolve(tree(path, (value,) if isinstance(default, tuple) else value))


def test_every_pair_that_has_an_order_is_known():
    ends = re.compile(r"(^|_)(min|max|low|high|lower|upper|start|end)(_|$)")
    found = {path for path in NUMBERS if ends.search(path.rpartition(".")[2])}
    known = {*PAIRS, *PAIRS.values()}
    assert found - known == ALONE
    intervals = {path for path in NUMBERS if path.endswith("interval")}
    assert intervals == set(INTERVALS)


@pytest.mark.parametrize("low", PAIRS)
def test_a_pair_the_wrong_way_round_is_refused(low):
    high = PAIRS[low]
    config = default_config()
    config.model.dit.learn_sigma = "edm" not in low
    for path, value in ((low, 0.5), (high, 0.3)):
        *sections, name, key = path.split(".")
        section = config
        for part in sections:
            section = section[part]
        if path.startswith("sampling"):
            section.solver = name
        else:
            section.name = name
        section[name][key] = value
    with pytest.raises(ConfigError, match=f"config.{low}=.*expected .*config.{high}="):
        resolve(config)


@pytest.mark.parametrize("path", INTERVALS)
def test_an_interval_has_two_ends_the_lower_one_first(path):
    for value in [(0.8, 0.2), (0.5,), 0.5, (0.1, 0.2, 0.3)]:
        with pytest.raises(ConfigError, match=rf"config.{path}=.*expected \(low, high\)"):
            resolve(tree(path, value))
