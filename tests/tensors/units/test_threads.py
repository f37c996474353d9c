"""Threads that share out work: what they run, what they leave as it was, and when the calling one does all."""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmark_memory import transient_bytes_of
from stac_optimizer.optim import AdamW, Adan, Signum
from stac_optimizer.tensors.scratch import Scratch
from stac_optimizer.tensors.units import threads
from stac_optimizer.tensors.units.threads import SERIAL_NUMEL, Shares, Task, run_all, shares, threads_for
from tests.optim.test_ambient_contexts import Dispatching, Watching
from tests.support import assert_same_bits, have_cores, set_units


@pytest.fixture
def _three_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    have_cores(monkeypatch)
    torch.set_num_threads(3)


def test_each_task_runs_once_and_by_itself_in_others_than_the_calling_thread() -> None:
    ran: list[tuple[int, str, int, bool]] = []
    meeting = threading.Barrier(3)

    def task(number: int, scratch: Scratch) -> None:
        if number < 3:
            meeting.wait(60)  # so that each thread has one
        torch.ones(2**16, device="cpu").add_(1)  # an operation that torch would share out
        ran.append((number, threading.current_thread().name, torch.get_num_threads(), torch.is_grad_enabled()))

    run_all([Task(partial(task, number), 1) for number in range(20)], Shares(3, 1))
    assert sorted(number for number, *_ in ran) == list(range(20))
    names = {name for _, name, *_ in ran}
    assert len(names) == 3
    assert threading.current_thread().name not in names
    assert {(count, is_recorded) for *_, count, is_recorded in ran} == {(1, False)}


def test_threads_of_others_keep_their_number_of_threads() -> None:
    """In a process of its own, in which nothing was shared out before."""
    script = """
        import threading, torch
        from stac_optimizer.tensors.units.threads import Shares, Task, run_all
        torch.set_num_threads(4)
        def of_new_thread():
            found = []
            def look():
                torch.ones(9).add_(1)
                found.append(torch.get_num_threads())
            thread = threading.Thread(target=look)
            thread.start()
            thread.join()
            return found[0]
        old = []
        class Look(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x): return x.clone()
            @staticmethod
            def backward(ctx, g):
                old.append(torch.get_num_threads())
                return g
        def look(): Look.apply(torch.ones(2, requires_grad=True)).sum().backward()
        look()
        run_all([Task(lambda scratch: torch.ones(9).add_(1), 1)] * 50, Shares(3, 1))
        look()
        assert torch.get_num_threads() == of_new_thread() == 4 and old == [4, 4], (torch.get_num_threads(), old)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)


@pytest.mark.parametrize("count", [1, 3])
def test_what_a_task_raises_is_raised_once_none_runs_any_more(count: int) -> None:
    began: list[int] = []
    ended: list[int] = []

    def task(number: int, scratch: Scratch) -> None:
        began.append(number)
        if number == 1:
            raise torch.OutOfMemoryError("no memory")
        time.sleep(0.01)
        ended.append(number)

    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        run_all([Task(partial(task, number), 1) for number in range(1000)], Shares(count, 1))
    assert sorted(began) == sorted([*ended, 1])
    assert len(began) < 100


@pytest.mark.usefixtures("_three_threads")
def test_the_calling_thread_does_all_where_others_would_miss_something() -> None:
    plain = [[torch.zeros(2), torch.nn.Parameter(torch.zeros(2))], [torch.zeros(2)]]
    assert threads_for(plain) == 3
    contexts: list[Callable[[], Any]] = [Watching, Dispatching, torch.inference_mode, partial(torch.device, "cpu")]
    for context in contexts:
        with context():
            assert threads_for(plain) == 1, context

    class Own(Tensor):
        pass

    assert threads_for([[torch.zeros(2).as_subclass(Own)]]) == 1
    assert threads_for([[torch.zeros(2, device="meta")]]) == 1
    torch.set_num_threads(1)
    assert threads_for(plain) == 1


def test_no_more_threads_than_share_memory_well_nor_than_there_are_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    have_cores(monkeypatch)
    torch.set_num_threads(threads.MOST_THREADS + 5)
    assert threads_for([[torch.zeros(2)]]) == threads.MOST_THREADS
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})  # as where OpenMP has bound the calling thread
    assert threads_for([[torch.zeros(2)]]) == 1


@pytest.fixture(params=[Signum, AdamW, partial(Signum, cautious=True)], ids=["signum", "adamw", "cautious"])
def steps(request: pytest.FixtureRequest) -> Callable[[int], list[Tensor]]:
    def take(count: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in (50_000, 10, 3000, 70_000)]
        optimizer = request.param(params)
        torch.set_num_threads(count)
        for _ in range(3):
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator)
            optimizer.step()
        return [*params, *(tensor for state in optimizer.state.values() for tensor in state.values())]

    return take


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Gets the names of the threads that have run tasks."""
    names: set[str] = set()
    work = threads._work

    def noting(*arguments: Any) -> None:
        names.add(threading.current_thread().name)
        work(*arguments)

    monkeypatch.setattr(threads, "_work", noting)
    return names


def test_shared_steps_have_the_bits_of_those_of_one_thread(
    steps: Callable[[int], list[Tensor]], workers: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = steps(1)
    assert workers == {threading.current_thread().name}
    set_units(monkeypatch, block=1000, pack=100, shared=True)
    workers.clear()
    assert_same_bits(steps(3), expected)
    assert threading.current_thread().name not in workers
    assert workers


def test_parameters_that_share_memory_are_updated_one_after_the_other(
    workers: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = torch.randn(200, generator=torch.Generator().manual_seed(0))

    def stepped(*, views: list[slice]) -> Tensor:
        memory = held.clone()
        params = [torch.nn.Parameter(memory[view]) for view in views]
        optimizer = Signum(params, lr=0.1)
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        return memory

    tied, flat = [slice(0, 150), slice(100, 200)], [slice(0, 100), slice(100, 200)]
    set_units(monkeypatch, block=10)
    expected = [stepped(views=views) for views in (tied, flat)]
    set_units(monkeypatch, block=10, shared=True)
    workers.clear()
    assert_same_bits(stepped(views=tied), expected[0])
    assert workers == {threading.current_thread().name}
    assert_same_bits(stepped(views=flat), expected[1])
    assert len(workers) > 1


def in_new_process(script: str) -> None:
    """Run a script, which must end by itself."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)], check=True, timeout=100)


STEPPING = """
    import atexit, os, threading, time, torch
    from stac_optimizer.optim import Signum
    os.sched_getaffinity = lambda _: range(8)
    torch.set_num_threads(3)
    weight = torch.nn.Parameter(torch.zeros(2**21))
    weight.grad = torch.ones(2**21)
    optimizer = Signum([weight], lr=1.0)
    def take_steps():
        time.sleep(0.5)
        for _ in range(3):
            optimizer.step()
        assert (weight == -wanted).all()
        os._exit(0)
"""


@pytest.mark.parametrize(
    "ends",
    [
        "optimizer.step(); wanted = 4; threading.Thread(target=take_steps).start()",
        "wanted = 3; threading.Thread(target=take_steps).start()",
        "optimizer.step(); wanted = 4; atexit.register(take_steps)",
    ],
)
def test_steps_go_on_once_the_main_thread_has_ended(ends: str) -> None:
    in_new_process(textwrap.dedent(STEPPING) + ends + "\natexit.register(lambda: os._exit(1))" * ("atexit" not in ends))


def test_a_thread_that_cannot_begin_leaves_its_work_to_the_calling_one() -> None:
    in_new_process(
        textwrap.dedent(STEPPING)
        + textwrap.dedent(
            """
            start, count = threading.Thread.start, 0
            def failing(self):
                global count
                count += 1
                if count > 1:
                    raise RuntimeError("can't start new thread")
                start(self)
            threading.Thread.start = failing
            optimizer.step()
            assert (weight == -1).all()
            """
        )
    )


def test_an_interrupt_while_threads_begin_leaves_none_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    submit, given = ThreadPoolExecutor.submit, []

    def interrupted(self: ThreadPoolExecutor, function: Any, /, *arguments: Any) -> Any:
        given.append(function)
        if len(given) == 2:
            raise KeyboardInterrupt
        return submit(self, function, *arguments)

    ended: list[int] = []

    def task(scratch: Scratch) -> None:
        time.sleep(0.05)
        ended.append(1)

    tasks = [Task(task, 1)] * 100
    run_all(tasks[:3], Shares(3, 1))  # all threads have begun
    ended.clear()
    monkeypatch.setattr(ThreadPoolExecutor, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_all(tasks, Shares(3, 1))
    seen = len(ended)
    time.sleep(0.2)
    assert len(ended) == seen < 100


def test_threads_run_in_the_calling_ones_context() -> None:
    """In which torch keeps what its compilers are configured to."""
    variable: ContextVar[str] = ContextVar("variable", default="lost")
    variable.set("kept")
    found: list[str] = []
    run_all([Task(lambda scratch: found.append(variable.get()), 1)] * 6, Shares(3, 1))
    assert found == ["kept"] * 6


def test_a_failed_step_keeps_nothing_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    class Held:
        pass

    def failing(scratch: Scratch, held: Held) -> None:
        raise MemoryError

    gc.disable()
    try:
        held = Held()
        alive = weakref.ref(held)
        with contextlib.suppress(MemoryError):
            run_all([Task(partial(failing, held=held), 1)] * 3, Shares(3, 1))
        del held
        time.sleep(0.1)  # until threads have put their task away
        assert alive() is None
    finally:
        gc.enable()


def test_packs_take_memory_one_after_the_other() -> None:
    params = [torch.nn.Parameter(torch.zeros(16_000)) for _ in range(500)]  # 30 MiB
    for param in params:
        param.grad = torch.ones_like(param)
    for count in (1, 2):
        torch.set_num_threads(count)
        for optimizer in (Signum(params), Signum(params, cautious=True), Adan(params)):
            optimizer.step()
            peak = transient_bytes_of(optimizer.step, torch.device("cpu"))
            assert peak <= count * 26 * 2**20, f"{optimizer} {count}: {peak / 2**20:.1f} MiB"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_has_threads_of_its_own() -> None:
    """In a process of its own, for to fork one with threads draws a warning since Python 3.12."""
    script = """
        import os, torch
        from stac_optimizer.tensors.units.threads import Shares, Task, run_all
        ran = []
        run_all([Task(lambda scratch: ran.append(os.getpid()), 1)] * 4, Shares(2, 1))
        child = os.fork()
        if child == 0:
            run_all([Task(lambda scratch: ran.append(os.getpid()), 1)] * 4, Shares(2, 1))
            os._exit(0 if ran[4:] == [os.getpid()] * 4 else 1)
        assert os.waitpid(child, 0)[1] == 0
    """
    subprocess.run([sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)], check=True, timeout=100)


def test_step_that_fails_in_a_thread_says_what_it_had_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    set_units(monkeypatch, block=10, shared=True)
    weight = torch.nn.Parameter(torch.ones(35))
    weight.grad = torch.ones(35)
    optimizer = Signum([("weight", weight)])

    def full(*_: object, **__: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("stac_optimizer.optim.signum.arithmetic.move", full)
        with pytest.raises(MemoryError, match="perhaps in part: 'weight'"):
            optimizer.step()
    assert torch.equal(weight.detach(), torch.ones(35))
    optimizer.step()


def test_small_tasks_go_to_one_thread_in_turn() -> None:
    ran: list[tuple[str, int]] = []
    tasks = [Task(lambda scratch, n=n: ran.append((threading.current_thread().name, n)), n) for n in (5, 3, 4, 20, 1)]  # type: ignore[misc]
    run_all(tasks, Shares(3, 12))
    by_number = {number: name for name, number in ran}
    assert by_number[5] == by_number[3] == by_number[4]
    assert [number for _, number in ran if number in (5, 3, 4)] == [5, 3, 4]


@torch.no_grad()
@pytest.mark.usefixtures("_three_threads")
@pytest.mark.parametrize("total", [1000, 100_000, 2_000_000])
def test_small_updates_run_in_the_calling_thread_alone(total: int) -> None:
    """In operations that torch does not share out, so that nothing is waited for."""
    found = shares([[torch.zeros(total)]])
    assert found.threads == (3 if total == 2_000_000 else 1)
    assert found.numel is not None
    assert found.numel <= (SERIAL_NUMEL if found.threads == 1 else total / 3)
    assert SERIAL_NUMEL < 32768
