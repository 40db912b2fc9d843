"""What a network declares, and what follows from it: checks, "no condition", dropping."""

import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax import conditions as lib
from dit_jax.conditions import Condition, ConditionError

TEXT = {
    **lib.class_label(10),
    "text": Condition((None, 4), null_is_given=True),
    "text_mask": Condition((None,), "bool", null=False),
    **lib.second_time(),
}


def some(batch=3, length=5):
    return {
        "label": jnp.arange(batch, dtype=jnp.int32),
        "text": jnp.arange(batch * length * 4, dtype=jnp.bfloat16).reshape(batch, length, 4),
        "text_mask": jnp.ones((batch, length), bool),
    }


def test_all_that_is_wrong_is_one_error():
    lib.check(TEXT, some())
    lib.check(TEXT, {**some(), "r": jnp.zeros(3)})
    wrong = {"label": jnp.zeros((3, 2), jnp.int32), "text": jnp.zeros((3, 5, 7)), "style": 1}
    with pytest.raises(ConditionError) as error:
        lib.check(TEXT, {**wrong, "style": jnp.zeros(3)})
    for part in (
        "unknown: style; missing: text_mask; label is int32 [3, 2], expected int32 [b]",
        "text is float32 [3, 5, 7], expected float32 [b, any, 4]",
        "It takes label int32 [b], text float32 [b, any, 4], text_mask bool [b, any], r float32 "
        "[b] (optional)",
    ):
        assert part in str(error.value)
    with pytest.raises(ConditionError, match=r"missing: label\. It takes label"):
        lib.check(lib.class_label(10), {})
    with pytest.raises(ConditionError, match=r"unknown: label\. It takes no conditions"):
        lib.check({}, {"label": jnp.zeros(2, jnp.int32)})


def test_lists_and_other_numbers_of_examples_are_errors():
    declared = lib.class_label(3)
    with pytest.raises(ConditionError, match="label is a list, expected an array int32"):
        lib.check(declared, {"label": [1, 2]})
    with pytest.raises(ConditionError, match="label is of 3 examples, expected 2"):
        lib.check(declared, {"label": np.zeros(3, np.int32)}, 2)


def test_values_out_of_range_are_errors():
    lib.check_values(TEXT, {"label": np.array([0, 10])})
    with pytest.raises(ConditionError, match=r"label 11 is out of range: .* 0 to 9, and 10 for no"):
        lib.check_values(TEXT, {"label": np.array([3, 11])})
    no_null = lib.class_label(10, null=False)
    with pytest.raises(
        ConditionError, match=r"label 10 is out of range: .* 0 to 9 and no null class"
    ):
        lib.check_values(no_null, {"label": np.array([10])})


def test_null_values_are_arrays_that_fill_what_is_longer():
    empty = np.full((2, 4), 7, np.float32)
    nulls = lib.null_values(TEXT, {"text": empty})
    assert set(nulls) == {"label", "text", "text_mask"}
    given = {**some(), "r": jnp.ones(3)}
    absent = lib.without(given, nulls)
    np.testing.assert_array_equal(absent["label"], [10] * 3)
    np.testing.assert_array_equal(absent["text"][:, :2], np.full((3, 2, 4), 7))
    assert not absent["text"][:, 2:].any() and absent["text"].dtype == jnp.bfloat16
    assert not absent["text_mask"].any() and absent["r"] is given["r"]
    with pytest.raises(ConditionError, match=r"\[9, 4\] does not go into \[3, 5, 4\]"):
        lib.without(given, {**nulls, "text": np.zeros((9, 4))})
    with pytest.raises(ConditionError, match=r"text needs its null value, float32 \[b, any, 4\]"):
        lib.null_values(TEXT)
    with pytest.raises(ConditionError, match="null values of label, style would do nothing"):
        lib.null_values(TEXT, {"text": empty, "label": 3, "style": 4})


def test_an_examples_conditions_are_dropped_together():
    nulls = lib.null_values(TEXT, {"text": np.zeros((1, 4))})
    given = some()
    found = lib.drop(given, nulls, jnp.array([False, True, False]))
    np.testing.assert_array_equal(found["label"], [0, 10, 2])
    np.testing.assert_array_equal(found["text_mask"].all(axis=1), [True, False, True])
    np.testing.assert_array_equal(found["text"][0], given["text"][0])
    assert not found["text"][1].any() and found["text"].dtype == jnp.bfloat16


def test_of_a_batch_only_a_label_may_go_unused():
    batch = {"image": np.zeros((3, 2, 2, 1)), "conditions": {"label": np.zeros(3, np.int32)}}
    assert lib.select({}, batch) == {} and lib.select({}, {"image": batch["image"]}) == {}
    assert list(lib.select(lib.class_label(4), batch)) == ["label"]
    batch["conditions"]["text"] = np.zeros((3, 5, 4))
    with pytest.raises(ConditionError, match="unknown: text"):
        lib.select(lib.class_label(4), batch)
    assert lib.as_conditions({}, np.zeros(3)) == {} and lib.as_conditions(TEXT, None) == {}
    assert lib.as_conditions(TEXT, [1, 2])["label"].dtype == np.int32


def test_guidance_needs_something_to_leave_out():
    lib.require_guidance(TEXT, "guidance_scale=2.0")
    no_null = lib.class_label(10, null=False)
    for declared, needed in (
        ({}, "network"),
        (no_null, "null class"),
        (lib.second_time(), "network"),
    ):
        assert not lib.can_guide(declared)
        with pytest.raises(ConditionError, match=rf"guidance_scale=2\.0 needs a {needed}"):
            lib.require_guidance(declared, "guidance_scale=2.0")
