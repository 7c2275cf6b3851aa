"""The oldest versions that this program works with; said before a name that an older one lacks ends in a traceback."""
import re
from importlib.metadata import PackageNotFoundError, version

from utils.errors import UserError

LOWEST_TIMM = '1.0.22'  # layers take a device and a dtype from 1.0.21 on, which initialises timm's LayerScale wrongly


def check_timm() -> None:
    """Raises UserError where timm is missing or too old; imports nothing of it."""
    try:
        found = version('timm')
    except PackageNotFoundError:
        raise UserError('timm is not installed; pip install -r requirements.txt') from None
    if numbers(found) < numbers(LOWEST_TIMM):
        raise UserError(f"timm {found} is too old for these models; pip install 'timm>={LOWEST_TIMM}'")


def numbers(text: str) -> list[int]:
    """[1, 0, 22] for '1.0.22', so that versions compare as numbers."""
    return [int(number) for number in re.findall(r'\d+', text)[:3]]
