"""Progress, messages and Ctrl-C."""

from __future__ import annotations

import logging
import signal

import pytest

from comit_bench.commands.console import Bars, Interrupts, set_up_logging
from comit_bench.pipeline.plan import human_bytes, human_seconds


def test_a_lost_ctrl_c_is_raised_at_the_next_check() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interrupts() as interrupts, Bars(enabled=False, check=interrupts.check) as bars:
        advance = bars.start("work", 3, "steps")
        advance(1)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)  # as if something swallowed it
        with pytest.raises(KeyboardInterrupt):
            advance(1)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_ctrl_c_inside_a_callback_is_silent_but_not_forgotten(capfd: pytest.CaptureFixture[str]) -> None:
    class Noisy:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    with Interrupts() as interrupts:
        Noisy()
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()
    assert capfd.readouterr().err == ""


def test_bars_and_messages_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging()
    with Bars(enabled=True) as bars:
        advance = bars.start("tokenizing", 4, "images")
        logging.getLogger("comit_bench.data").warning("one file is broken")
        logging.getLogger("comit_bench.data").info("not shown")
        advance(4)
    captured = capsys.readouterr()
    assert captured.out == "" and "tokenizing" in captured.err
    assert "warning: one file is broken" in captured.err and "not shown" not in captured.err


def test_human_numbers() -> None:
    assert [human_bytes(n) for n in (12, 4_200, 61_800_000, 2_500_000_000)] == [
        "12 B",
        "4 kB",
        "61.8 MB",
        "2.5 GB",
    ]
    assert [human_seconds(s) for s in (12, 240, 12_600)] == ["12 s", "4 min", "3.5 h"]
