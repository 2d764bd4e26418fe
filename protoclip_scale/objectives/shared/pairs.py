"""Two views of images and two of texts, as DeCLIP pairs them (methods 3.2), and the groups of rows that its queues and FILIP's selection look at."""

from protoclip_scale.data.views import Views
from protoclip_scale.errors import UserError
from protoclip_scale.recipe.schema import Recipe

IMAGES = ("image", "image@second")


def main_text(masked: bool) -> str:
    """The feature that stands for the first text view."""
    return "text@masked" if masked else "text"


def two_views(recipe: Recipe, masked: bool) -> Views:
    """Beside the main ones: an image with the same augmentation, a text edited by EDA, and the masked text if it is to stand for the main one."""
    return Views({"second": recipe.data.augmentation}, {"eda": "eda"}, ("masked",) if masked else ())


def group_size(num_columns: int, groups: int, name: str) -> int:
    """Rows of the global batch in each of ``groups`` groups of lanes. UserError if it is no whole number."""
    if num_columns % groups:
        raise UserError(f"objectives.{name}.groups {groups} does not divide the batch of {num_columns} rows: use a divisor of data.plan.lanes")
    return num_columns // groups
