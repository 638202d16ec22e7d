from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from processes import ROOT, children
from torch import Tensor

from comit_bench.errors import BenchError, UsageError
from comit_bench.probing import fit as fit_module
from comit_bench.probing import pool as pool_module
from comit_bench.probing import worker
from comit_bench.probing.fit import (
    EVAL_TOKENS,
    Examples,
    FitProgress,
    FitResult,
    FitTask,
    MessageSource,
    Objective,
    build_probe,
    is_top1,
    moments,
    one_thread,
    permuted,
)
from comit_bench.probing.network import Probe
from comit_bench.probing.pool import ProbePool, fit_seeds
from comit_bench.recipes.specs import ProbeSpec

SPEC = ProbeSpec(width=16, depth=1, heads=2, batch_size=32, learning_rate=3e-3, max_epochs=3, patience=3)
CODEBOOK = torch.randn(12, 3, generator=torch.Generator().manual_seed(1))


def split(count: int, seed: int, *, length: int = 4) -> Examples:
    """The class is decided by the first id."""
    ids = torch.randint(12, (count, length), generator=torch.Generator().manual_seed(seed))
    return Examples(MessageSource(read=lambda rows: CODEBOOK[ids[rows]], count=count), ids[:, 0] % 4)


def task(**changes: object) -> FitTask:
    base = FitTask(spec=SPEC, outputs=4, train=split(150, 0), early_stop=split(40, 1), report=split(60, 2))
    return replace(base, **changes)


def with_spec(**changes: object) -> ProbeSpec:
    return SPEC.model_copy(update=changes)


def same(a: FitResult, b: FitResult) -> None:
    assert a.history == b.history and a.best_epoch == b.best_epoch and a.seed == b.seed
    assert a.outputs is not None and b.outputs is not None and torch.equal(a.outputs, b.outputs)
    assert a.state.keys() == b.state.keys()
    assert all(torch.equal(a.state[name], b.state[name]) for name in a.state)


@pytest.fixture(scope="module")
def pool() -> Iterator[ProbePool]:
    with ProbePool(2) as running:
        running.start()
        yield running
    assert not children()


def test_learns_what_can_be_learnt() -> None:
    long = with_spec(max_epochs=15, patience=15, learning_rate=1e-2)
    result = task(spec=long, train=split(600, 0)).fit(0)
    assert result.outputs is not None
    assert (result.outputs.argmax(1) == split(60, 2).targets).float().mean() > 0.95
    assert result.history[-1].train_loss < result.history[0].train_loss / 3


def test_same_seed_same_bits_whatever_the_global_state_and_threads() -> None:
    first = task().fit(3)
    torch.manual_seed(99)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        second = task().fit(3)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    same(first, second)
    assert torch.equal(state, torch.get_rng_state())
    assert task().fit(4).history != first.history


def test_codes_read_per_batch_give_the_same_bits_as_codes_in_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held = task().fit(0)
    shared = split(150, 0)
    rows = torch.arange(150)
    padded = Examples(
        MessageSource(codes=torch.cat([torch.zeros(9, 4, 3), shared.messages.take(rows)])),
        torch.cat([torch.zeros(9, dtype=torch.long), shared.targets]),
        rows + 9,
    )
    same(held, task(train=padded).fit(0))
    largest = 0

    def watched(rows: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, rows.shape[0])
        return shared.messages.take(rows)

    monkeypatch.setattr(Examples, "in_memory", lambda self, limit=0: None)
    streamed = Examples(MessageSource(read=watched, count=150), shared.targets)
    same(held, task(train=streamed).fit(0))
    assert SPEC.batch_size < largest <= EVAL_TOKENS // 4  # once, to standardise; then by batches


@pytest.mark.parametrize(("scale", "shift"), [(0.01, 0.0), (4.0, -3.0), (100.0, 1.0)])
def test_the_size_and_place_of_codes_decide_nothing(scale: float, shift: float) -> None:
    """Codes are standardised by the training messages: a probe reads a * code + b as it reads code."""

    def moved(part: Examples) -> Examples:
        codes = part.messages.take(part.index()) * torch.tensor([scale, 1.0, -scale]) + shift
        return replace(part, messages=MessageSource(codes=codes * torch.tensor([1.0, 1.0, -1.0])))

    given = task()
    other = task(train=moved(given.train), early_stop=moved(given.early_stop), report=moved(split(60, 2)))
    plain, again = given.fit(0), other.fit(0)
    assert plain.outputs is not None and again.outputs is not None
    assert torch.equal(plain.outputs.argmax(1), again.outputs.argmax(1))
    assert torch.allclose(plain.outputs, again.outputs, atol=1e-2)
    assert [log.stop_score for log in plain.history] == [log.stop_score for log in again.history]


def test_moments_are_those_of_all_rows_in_any_pieces() -> None:
    rows = CODEBOOK[torch.randint(12, (600,), generator=torch.Generator().manual_seed(5))].double()
    for size in (600, 7):
        mean, std = moments(rows.split(size))
        assert torch.allclose(mean, rows.mean(0)) and torch.allclose(std, rows.std(0, unbiased=False))
    assert moments([torch.full((4, 2, 3), 7.0)])[1].unique().tolist() == [1]
    with pytest.raises(ValueError, match="nothing to take a mean of"):
        moments([])


def test_a_task_is_read_once_for_all_fits() -> None:
    """Codes are looked up once, however many probes, seeds and learning rates follow."""
    whole, read = split(150, 0), []

    def watched(rows: Tensor) -> Tensor:
        read.append(len(rows))
        return whole.messages.take(rows)

    given = task(train=Examples(MessageSource(read=watched, count=150), whole.targets)).prepared()
    assert sum(count for count in read if count > 1) == 150  # single ones only show the shape
    before = sum(read)
    assert given.prepared() is given
    fit_seeds(given, [0, 1], workers=1)
    assert sum(read) == before


def test_in_memory_gathers_rows_and_respects_its_limit() -> None:
    whole = split(20, 5)
    part = Examples(whole.messages, whole.targets, torch.tensor([7, 3, 3]))
    held = part.in_memory()
    assert held is not None and held.messages.codes is not None and held.rows is None
    assert torch.equal(held.messages.codes, whole.messages.take(torch.tensor([7, 3, 3])))
    assert torch.equal(held.targets, whole.targets[[7, 3, 3]])
    assert held.in_memory() is held
    assert part.in_memory(limit=3 * 4 * 3 * 4) is not None and part.in_memory(limit=3 * 4 * 3 * 4 - 1) is None


def test_every_row_counts_once_per_epoch_in_an_order_of_its_own() -> None:
    seen: list[Tensor] = []

    def record(outputs: Tensor, targets: Tensor) -> Tensor:
        if outputs.requires_grad:
            seen.append(targets)
        return outputs.square().mean(1)

    score = Objective(record, lambda outputs, targets: torch.zeros(len(targets)))
    numbered = Examples(split(70, 0).messages, torch.arange(70))
    task(train=numbered, objective=score, spec=with_spec(max_epochs=2)).fit(0)
    assert [len(t) for t in seen] == [32, 32, 6, 32, 32, 6]
    first, second = torch.cat(seen[:3]), torch.cat(seen[3:])
    assert torch.equal(first.sort().values, torch.arange(70)) and torch.equal(
        second.sort().values, torch.arange(70)
    )
    assert not torch.equal(first, second)


def test_stops_after_patience_and_returns_the_best_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([0.2, 0.6, 0.6, 0.5, 0.4])
    losses = iter([1.0, 0.9, 0.9, 0.1, 0.1])
    states: list[Tensor] = []

    def judge(self: fit_module.Fit) -> tuple[Tensor, Tensor]:
        states.append(self.probe.head.weight.detach().clone())
        return torch.tensor([next(losses)]), torch.tensor([next(scores)])

    monkeypatch.setattr(fit_module._LabelFit, "stop_set", judge)
    events: list[FitProgress] = []
    result = task(spec=with_spec(max_epochs=50, patience=3)).fit(0, progress=events.append)
    assert result.best_epoch == 2 and len(result.history) == 5
    assert torch.equal(result.state["head.weight"], states[1])
    assert result.outputs is not None
    again = task().standardised().begin(0, torch.device("cpu"))
    again.probe.load_state_dict(result.state)
    with one_thread():
        assert torch.equal(again.answers(), result.outputs)  # type: ignore[arg-type]
    assert [e.finished for e in events] == [False] * 4 + [True]
    assert [e.log.epoch for e in events] == [1, 2, 3, 4, 5] and events[0].max_epochs == 50


def test_equal_scores_are_decided_by_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([(1.0, 0.5), (0.8, 0.5), (0.9, 0.5)])
    monkeypatch.setattr(fit_module._LabelFit, "stop_set", lambda self: torch.tensor(next(answers))[:, None])
    assert task().fit(0).best_epoch == 2


def test_a_loss_that_is_not_finite_names_epoch_and_step() -> None:
    bad = split(150, 0)
    codes = bad.messages.take(torch.arange(150)).clone()
    codes[17] = float("nan")
    with pytest.raises(
        BenchError, match=r"not finite in epoch 1, step \d of 5 \(seed 0, learning rate 0.003\)"
    ):
        task(train=Examples(MessageSource(codes=codes), bad.targets)).fit(0)
    stop = split(40, 1).messages.take(torch.arange(40)).clone()
    stop[11] = float("inf")
    with pytest.raises(BenchError, match="epoch 1, early-stop message 12 of 40"):
        task(early_stop=Examples(MessageSource(codes=stop), torch.zeros(40).long())).fit(0)


def test_vectors_as_targets() -> None:
    def multilabel(outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.nn.functional.binary_cross_entropy_with_logits(outputs, targets, reduction="none").mean(
            1
        )

    def exact(outputs: Tensor, targets: Tensor) -> Tensor:
        return ((outputs > 0) == (targets > 0.5)).all(1).float()

    def hot(part: Examples) -> Examples:
        return Examples(part.messages, torch.nn.functional.one_hot(part.targets, 4).float())

    result = task(
        train=hot(split(600, 0)),
        early_stop=hot(split(40, 1)),
        objective=Objective(multilabel, exact),
        spec=with_spec(max_epochs=15, patience=15, learning_rate=1e-2),
    ).fit(0)
    assert result.history[result.best_epoch - 1].stop_score > 0.9


def test_permuted_targets_keep_their_frequencies() -> None:
    train, stop = torch.arange(50), torch.arange(50, 60)
    a, b = permuted(train, stop, 0)
    assert len(a) == 50 and torch.equal(torch.cat([a, b]).sort().values, torch.arange(60))
    assert (a != train).float().mean() > 0.5 and (a >= 50).any()
    assert torch.equal(a, permuted(train, stop, 0)[0]) and not torch.equal(a, permuted(train, stop, 1)[0])


def test_the_control_shuffles_what_the_fit_sees() -> None:
    long = with_spec(max_epochs=15, patience=15, learning_rate=1e-2)
    base = task(spec=long, train=split(600, 0), permute_targets=True)
    before = base.train.targets.clone()
    result = base.fit(0)
    assert result.outputs is not None and torch.equal(base.train.targets, before)
    assert (result.outputs.argmax(1) == split(60, 2).targets).float().mean() < 0.5


def test_mistakes_in_the_data_are_named() -> None:
    with pytest.raises(UsageError, match="early-stop set of the probe is empty"):
        task(early_stop=Examples(split(40, 1).messages, torch.zeros(40), torch.zeros(0))).fit(0)
    with pytest.raises(ValueError, match="either codes"):
        MessageSource(read=lambda rows: rows)
    with pytest.raises(ValueError, match="3 messages but 2 targets"):
        Examples(MessageSource(codes=torch.zeros(3, 2, 1)), torch.zeros(2))
    with pytest.raises(ValueError, match="at least one seed"):
        fit_seeds(task(), [])
    with pytest.raises(ValueError, match="at least 1, got 0"):
        ProbePool(0)


def test_one_thread_restores_after_an_error() -> None:
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError), one_thread():
        assert torch.get_num_threads() == 1
        raise RuntimeError
    assert torch.get_num_threads() == before


def test_processes_give_the_same_bits_as_this_process(pool: ProbePool) -> None:
    events: list[FitProgress] = []
    shuffled = task(permute_targets=True)  # settings travel with the data
    apart = fit_seeds(shuffled, [5, 2, 8], pool=pool, progress=events.append)
    here = fit_seeds(shuffled, [5, 2, 8], workers=1)
    for a, b in zip(apart, here, strict=True):
        same(a, b)
    assert sorted((e.seed, e.log.epoch) for e in events) == [(s, e) for s in (2, 5, 8) for e in (1, 2, 3)]


def test_the_pool_survives_a_refused_fit_and_a_killed_worker(pool: ProbePool) -> None:
    broken = Examples(MessageSource(codes=torch.full((40, 4, 3), float("nan"))), torch.zeros(40).long())
    with pytest.raises(BenchError, match="not finite in epoch 1"):
        fit_seeds(task(train=broken), [0, 1], pool=pool)
    assert not children()
    victims: list[int] = []

    def kill_once(event: FitProgress) -> None:
        if not victims:
            victims.extend(children())
            for victim in victims:
                os.kill(victim, signal.SIGKILL)

    with pytest.raises(BenchError, match=r"ended before its fit was done \(exit code -9"):
        fit_seeds(task(spec=with_spec(max_epochs=5000, patience=5000)), [0, 1], pool=pool, progress=kill_once)
    assert len(victims) == 2 and not children()


def test_large_sets_stay_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Examples, "in_memory", lambda self, limit=0: None)
    monkeypatch.setattr(pool_module, "_Worker", None)  # starting one would fail
    assert len(fit_seeds(task(spec=with_spec(max_epochs=1)), [0, 1], workers=2)) == 2


def test_ctrl_c_in_an_unguarded_script_leaves_one_message_and_no_children(tmp_path: Path) -> None:
    script = tmp_path / "unguarded.py"  # no __main__ guard: workers must not run it again
    script.write_text(
        textwrap.dedent(
            """
            import torch
            from processes import children
            from comit_bench.recipes.specs import ProbeSpec
            from comit_bench.probing.fit import FitTask, MessageSource, Examples
            from comit_bench.probing.pool import ProbePool, fit_seeds
            data = Examples(MessageSource(codes=torch.ones(64, 4, 3)), torch.zeros(64).long())
            spec = ProbeSpec(width=16, depth=1, heads=2, max_epochs=10**6, patience=10**6)
            def tell(event):
                if event.log.epoch == 1:
                    print("pids", *children(), flush=True)
            try:
                with ProbePool(2) as pool:
                    task = FitTask(spec=spec, outputs=4, train=data, early_stop=data)
                    fit_seeds(task, [0, 1], pool=pool, progress=tell)
            except KeyboardInterrupt:
                print("stopped", len(children()), flush=True)
            """
        )
    )
    with subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a process group of its own, as a terminal gives
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'support'}"},
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("pids ")
        os.killpg(process.pid, signal.SIGINT)
        try:
            output, errors = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert "stopped 0" in output and errors == ""
    deadline = time.monotonic() + 5
    for pid in map(int, line.split()[1:]):
        while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not Path(f"/proc/{pid}").exists()


def test_ctrl_c_while_workers_start_leaves_one_message_and_no_children(tmp_path: Path) -> None:
    script = tmp_path / "starting.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, time
            from processes import children
            from comit_bench.probing.pool import ProbePool
            pool = ProbePool(2)  # the signal may come before the first one below has a name
            print("ready", flush=True)
            try:
                while True:
                    with ProbePool(2) as pool:
                        pool.start()
            except KeyboardInterrupt:
                pool.close()
                end = time.monotonic() + 30
                while children() and time.monotonic() < end:  # one that had just begun leaves by itself
                    os.waitpid(-1, os.WNOHANG)
                    time.sleep(0.05)
                print("stopped", len(children()), flush=True)
            """
        )
    )
    for delay in (0.0, 0.03, 0.1):
        with subprocess.Popen(
            [sys.executable, str(script)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'support'}"},
        ) as process:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            time.sleep(delay)
            os.killpg(process.pid, signal.SIGINT)
            output, errors = process.communicate(timeout=60)
        assert output == "stopped 0\n" and errors == "", (output, errors)


def test_workers_leave_when_their_owner_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(
        textwrap.dedent(
            """
            import time
            from processes import children
            from comit_bench.probing.pool import ProbePool
            with ProbePool(2) as pool:
                pool.start()
                print(*children(), flush=True)
                time.sleep(60)
            """
        )
    )
    with subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'support'}"},
    ) as process:
        assert process.stdout is not None
        workers = [Path(f"/proc/{pid}") for pid in process.stdout.readline().split()]
        process.kill()
    assert len(workers) == 2
    deadline = time.monotonic() + 30
    while any(place.exists() for place in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(place.exists() for place in workers)


class _Row:
    """Makes its tensor only while it is pickled: the next one may get the same place in memory."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __getstate__(self) -> Tensor:
        return torch.full((64,), self.value)

    def __setstate__(self, row: Tensor) -> None:
        self.value = int(row[0])


def test_tensors_that_are_made_while_a_task_is_packed_stay_apart(tmp_path: Path) -> None:
    rest = worker.pack([_Row(value) for value in range(1, 50)], tmp_path / "data.safetensors")
    found = worker.unpack(tmp_path / "data.safetensors", rest)
    assert [row.value for row in found] == list(range(1, 50))


def test_only_products_are_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where somebody else has switched autocast on."""
    seen: dict[str, set[torch.dtype]] = {}

    def watched(name: str, module: torch.nn.Module) -> None:
        module.register_forward_hook(lambda _, given, out: seen.setdefault(name, set()).add(out.dtype))

    def build(*args: object, **rest: object) -> Probe:
        probe = build_probe(*args, **rest)  # type: ignore[arg-type]
        for name in ("project", "blocks.0.norm1", "blocks.0.proj", "blocks.0.fc1", "norm", "head"):
            watched(name, probe.get_submodule(name))
        return probe

    monkeypatch.setattr("comit_bench.probing.fit.build_probe", build)
    done = task(precision="bfloat16").fit(0)
    low, high = {torch.bfloat16}, {torch.float32}
    assert seen == {
        "project": low, "blocks.0.norm1": high, "blocks.0.proj": low, "blocks.0.fc1": low, "norm": high,
        "head": high,
    }  # fmt: skip
    assert done.outputs is not None and done.outputs.dtype == torch.float32
    assert {value.dtype for value in done.state.values()} == high
    seen.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        task().fit(0)
    assert all(types == high for types in seen.values())


def test_scores_of_rounded_products_are_those_of_float32() -> None:
    long = with_spec(max_epochs=15, patience=15, learning_rate=1e-2)
    done = {p: task(spec=long, train=split(600, 0), precision=p).fit(0) for p in ("float32", "bfloat16")}
    right = {}
    for precision, one in done.items():
        assert one.outputs is not None
        right[precision] = float(is_top1(one.outputs, split(60, 2).targets).mean())
    assert min(right.values()) > 0.95 and abs(right["float32"] - right["bfloat16"]) < 0.02
    for one, other in zip(done["float32"].history[:3], done["bfloat16"].history[:3], strict=True):
        assert one.train_loss == pytest.approx(other.train_loss, rel=0.02) and one != other
