"""Labels as classes and as numbers."""

from dvora.recipes.data.labels import class_names


def test_classes_that_are_whole_numbers_of_any_length_are_in_their_order() -> None:
    long = "9" * 6000
    assert class_names(["10", f"-{long}", "9", long, "-1", "10"], "label") == (f"-{long}", "-1", "9", "10", long)
