"""--help and docs/recipes.md are made from the schema, and the page in the repository is the one made now."""

from pathlib import Path

import pytest

from protoclip_scale.errors import UserError
from protoclip_scale.recipe.describe import help_text, keys_of, page, sections

PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"


def test_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m protoclip_scale.recipe.describe > docs/recipes.md"


@pytest.mark.parametrize("name", sorted(sections()))
def test_every_key_and_section_is_described(name: str):
    section = sections()[name]
    assert section.__doc__ and section.__doc__.strip().endswith(".")
    for key in keys_of(section):
        assert len(key.description) > 8 and key.description.endswith("."), key.name
        assert key.type


def test_sections_reach_lists_optionals_and_objectives():
    assert {"data.plan", "data.sources.columns", "episodes.lit", "prototypes", "objectives.clip", "objectives.prototype", "objectives.teacher"} <= set(sections())


def test_types_and_defaults_in_words():
    keys = {f"{name}.{key.name}".lstrip("."): key for name, section in sections().items() for key in keys_of(section)}
    assert keys["optim.lr"][1:3] == ("number > 0", "required")
    assert keys["optim.max_norm"][1:3] == ("number > 0 or null", "null")
    assert keys["optim.betas"][1:3] == ("list of 2 numbers", "[0.9, 0.98]")
    assert keys["data.plan.epoch_rows"][1:3] == ("whole number > 0 or null", "null")
    assert keys["data.max_bad_fraction"][1:3] == ("number >= 0 and <= 1", "0.02")
    assert keys["objectives.prototype.targets"][1:3] == ("soft or hard", "soft")
    assert keys["data.sources"][1:3] == ("list of sections", "required")
    assert keys["data.sources.files"][1:3] == ("text or list of texts or null", "null")
    assert keys["model.logit_scale.init"].default == "2.65926"


def test_help_lists_sections_then_keys_then_one_key():
    overview = help_text()
    assert "--help SECTION" in overview and "data.plan" in overview and "Optimiser and precision." in overview
    optim = help_text("optim")
    assert optim.startswith("optim: AdamW") and "lr (number > 0, required)" in optim and "Peak learning rate." in optim
    assert "K, the number of prototypes" in help_text("prototypes.clusters")
    assert "Sections below: data.sources" in help_text("data")
    assert all(len(line) <= 110 for section in sections() for line in help_text(section).splitlines()[1:])
    with pytest.raises(UserError, match=r"--help optm: there is no such section, did you mean optim\?"):
        help_text("optm")
