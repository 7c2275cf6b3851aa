"""The oldest supported versions of libraries, checked before a missing name causes a traceback."""
import re
from importlib.metadata import PackageNotFoundError, version

from utils.errors import UserError

# Layers take a device and a dtype from 1.0.21 on, but that version initialises timm's LayerScale wrongly.
LOWEST_TIMM = '1.0.22'


def check_timm() -> None:
    """Raise UserError if timm is missing or too old, without importing it."""
    try:
        found = version('timm')
    except PackageNotFoundError:
        raise UserError('timm is not installed; pip install -r requirements.txt') from None
    if numbers(found) < numbers(LOWEST_TIMM):
        raise UserError(f"timm {found} is too old for these models; pip install 'timm>={LOWEST_TIMM}'")


def numbers(text: str) -> list[int]:
    """Return [1, 0, 22] for '1.0.22', so that versions compare as numbers."""
    return [int(number) for number in re.findall(r'\d+', text)[:3]]
