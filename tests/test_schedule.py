"""What is due after a step, by a table; and that going on from any position comes to the same steps."""

import pytest

from config import Save
from util.schedule import Due, Progress, Schedule

SAVE = Save(every_epochs=5, every_steps=None, eval_every=2)


@pytest.mark.parametrize(
    "schedule, epoch, i, stopping, due",
    [  # epochs of four steps
        (Schedule(SAVE, 10, 4), 0, 0, False, ""),
        (Schedule(SAVE, 10, 4, log_freq=2), 0, 1, False, "log"),
        (Schedule(SAVE, 10, 4), 0, 3, False, ""),  # an end of an epoch like any other
        (Schedule(SAVE, 10, 4), 4, 3, False, "log save"),  # every fifth
        (Schedule(SAVE, 10, 4), 4, 2, False, ""),
        (Schedule(SAVE, 3, 4), 2, 3, False, "log save"),  # the last
        (Schedule(SAVE, 10, 4), 1, 1, True, "log save stop"),
        (Schedule(SAVE, 10, 4), 4, 3, True, "log save stop"),
        (Schedule(SAVE, 10, 4, evaluates=True), 1, 3, False, "log save evaluate"),  # every second, and saved before
        (Schedule(SAVE, 10, 4, evaluates=True), 1, 2, False, ""),
        (Schedule(SAVE, 10, 4, evaluates=True), 1, 3, True, "log save evaluate stop"),  # the next start makes it
        (Schedule(SAVE, 3, 4, evaluates=True), 2, 3, False, "log save evaluate"),  # the last, though 3 is odd
        (Schedule(SAVE, 900, 4), 100, 3, False, "log save numbered"),
        (Schedule(SAVE, 900, 4), 100, 2, False, ""),
        (Schedule(SAVE, 900, 4), 0, 3, False, ""),  # 0 is no hundredth
        (Schedule(Save(every_epochs=99, every_steps=3), 10, 4), 0, 2, False, "log save"),
        (Schedule(Save(every_epochs=99, every_steps=3), 10, 4), 1, 1, False, "log save"),
        (Schedule(Save(every_epochs=99, every_steps=3), 10, 4), 1, 2, False, ""),
    ],
)
def test_what_is_due(schedule, epoch, i, stopping, due):
    wanted = Due(**dict.fromkeys(due.split(), True))
    assert schedule.after(epoch, i, epoch * schedule.steps_per_epoch + i + 1, stopping) == wanted


def test_the_position_after_each_step_goes_on_where_it_stands():
    schedule = Schedule(SAVE, 3, 4)
    assert (
        schedule.progress(0, 0, 1) == Progress(0, 1, 1)
        and schedule.progress(0, 3, 4) == Progress(1, 0, 4)
        and schedule.progress(2, 3, 12) == Progress(3, 0, 12)
    )
    taken, position = [], Progress()
    for step in range(1, 13):  # as if the run were stopped after each step
        taken.append((position.epoch, position.epoch_step))
        position = schedule.progress(position.epoch, position.epoch_step, step)
    assert taken == [(epoch, i) for epoch in range(3) for i in range(4)]
