"""The 17 coarse classes that emoji subgroups and clip-art directories share."""

_LABELS = {
    "animal": (
        "animal-amphibian animal-bird animal-bug animal-mammal animal-marine animal-reptile "
        "animals animals/birds animals/bugs animals/dinosaurs animals/fantasy animals/fish animals/mammals"
    ),
    "building": "place-building place-religious buildings buildings/homes",
    "clothing": "clothing people/clothing",
    "computer": "computer computer/hardware",
    "face or emotion": (
        "cat-face emotion face-affection face-concerned face-costume face-glasses face-hand face-hat face-negative "
        "face-neutral-skeptical face-sleepy face-smiling face-tongue face-unwell heart monkey-face people/smilies"
    ),
    "flag": "country-flag flag subdivision-flag signs_and_symbols/flags",
    "food": (
        "drink food-asian food-fruit food-prepared food-sweet food-vegetable food food/beverages food/breads_and_carbs "
        "food/dairy food/desserts food/fruit food/meats_and_eggs food/vegetables"
    ),
    "household": "household buildings/furniture",
    "medical": "medical",
    "music": "music musical-instrument recreation/music",
    "person or body": (
        "body-parts family hand-fingers-closed hand-fingers-open hand-fingers-partial hand-prop hand-single-finger hands person "
        "person-activity person-fantasy person-gesture person-resting person-role person-sport person-symbol "
        "people people/bodypart people/stickmen"
    ),
    "plant": "plant-flower plant-other plants plants/flowers plants/trees",
    "sky and weather": "sky-weather signs_and_symbols/weather",
    "sport": "sport recreation/sports",
    "symbol": (
        "alphanum arrow av-symbol currency gender geometric keycap math other-symbol punctuation religion transport-sign warning zodiac"
    ),
    "tool": "tool tools tools/toys tools/weapons",
    "vehicle": "transport-air transport-ground transport-water transportation transportation/boating transportation/vehicles",
}
CLASSES = tuple(_LABELS)
_CLASS_OF = {label: name for name, labels in _LABELS.items() for label in labels.split()}


def coarse_class(label: str) -> str:
    """The coarse class of a `label`, or an empty string: many emoji subgroups have none. (`computer` alone means emoji.)"""
    return _CLASS_OF.get(label, "")
