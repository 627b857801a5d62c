"""Names that are nearly right; does not know where they are used."""

from frankenmoe.suggest import did_you_mean, nearest


def test_the_nearest_choice_is_found_whatever_the_case() -> None:
    assert nearest("BASEMODEL", ["experts", "base_model"]) == "base_model"


def test_nothing_near_is_none() -> None:
    assert nearest("zzz", ["experts", "base_model"]) is None


def test_the_hint_lists_the_choices_where_none_is_near() -> None:
    assert did_you_mean("expert", ["experts", "seed"]) == "did you mean 'experts'?"
    assert did_you_mean("zzz", iter(["experts", "seed"])) == "choose one of experts, seed"
