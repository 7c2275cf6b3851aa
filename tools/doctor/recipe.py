"""Recipe: options that do not go together."""
from collections.abc import Iterator

from engine.recipe import advise
from tools.doctor.case import Case, Schedule, Splits
from tools.doctor.findings import LOOK, OK, Finding


def look_at_recipe(case: Case, splits: Splits, schedule: Schedule | None) -> Iterator[Finding]:
    """Check whether the options fit one another, and this machine."""
    is_sound = True
    for advice in advise(case.args, images=len(splits.train), processes=case.processes,
                         steps=schedule.steps if schedule else 0, device=case.world.device,
                         dtype=case.precision.dtype):
        is_sound = False
        yield Finding(LOOK, advice.title, advice.figure, advice.remedy, numbers=advice.numbers)
    if is_sound:
        yield Finding(OK, 'Recipe', 'No conflicts found')
