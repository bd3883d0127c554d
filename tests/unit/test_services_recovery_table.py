"""The recovery table, the plans and the fencing decisions: pure, and complete."""

from __future__ import annotations

from itertools import product

import pytest

from mirror.domain.decisions import Fence, Process, decide_fence
from mirror.domain.errors import SourceMayBeAlive
from mirror.domain.plans import STEPS, JobKind, Step, main_step, steps_from
from mirror.domain.recovery import TABLE, Action, Graph, Link, Promotion, Sight, decide, sights

CASES = [(kind, step, sight) for kind, steps in STEPS.items() for step in steps for sight in sights()]


def test_every_case_is_met_by_exactly_one_row() -> None:
    for kind, step, sight in CASES:
        met = [row.label for row in TABLE if row.meets(kind, step, sight)]
        assert len(met) == 1, (kind, step, sight.text(), met)


def test_every_row_is_met_by_some_case() -> None:
    met = {decide(kind, step, sight).label for kind, step, sight in CASES}
    assert met == {row.label for row in TABLE}


def test_labels_are_unique() -> None:
    labels = [row.label for row in TABLE]
    assert len(set(labels)) == len(labels)


def test_a_step_belongs_to_one_kind_only() -> None:
    steps = [step for kind in JobKind for step in STEPS[kind]]
    assert sorted(steps) == sorted(Step)


def test_unknown_step_is_named_not_guessed() -> None:
    sight = next(iter(sights()))
    assert decide(JobKind.PROTECT, main_step("from-the-future"), sight).action is Action.NAME
    assert decide(JobKind.PROTECT, Step.FENCE_SOURCE, sight).action is Action.NAME


def test_substep_counts_as_its_step() -> None:
    assert main_step("insert/stop") is Step.INSERT
    assert steps_from(JobKind.UNPROTECT, Step.DELETE_MIRROR) == (Step.DELETE_MIRROR, Step.DROP)


def test_a_promoted_mirror_is_never_undone() -> None:
    for kind, step, sight in CASES:
        row = decide(kind, step, sight)
        if row.action is Action.UNDO and step is not Step.REHEARSE:
            assert sight.promotion is not Promotion.YES, row.label


def test_a_failover_is_never_resumed_beside_a_source_that_may_run() -> None:
    for step, sight in product(STEPS[JobKind.FAILOVER], sights()):
        row = decide(JobKind.FAILOVER, step, sight)
        if row.action is Action.RESUME and step is not Step.RECORD:
            stopped = sight.link is Link.GONE or (sight.link is Link.ANSWERS and not sight.runs)
            assert stopped, (row.label, sight.text())


def test_nothing_is_undone_or_removed_blindly_while_the_graph_is_unknown() -> None:
    sight = Sight(Link.SILENT, Graph.UNSEEN, False, Promotion.NO)
    assert decide(JobKind.PROTECT, Step.INSERT, sight).action is Action.WAIT
    assert decide(JobKind.UNPROTECT, Step.REMOVE, sight).action is Action.WAIT


@pytest.mark.parametrize(
    ("answers", "process", "dead", "wanted"),
    [
        (True, Process.EXISTS, False, Fence.POWER_OFF),
        (True, Process.EXISTS, True, Fence.POWER_OFF),
        (False, Process.GONE, False, Fence.ALREADY_DEAD),
        (False, Process.GONE, True, Fence.ALREADY_DEAD),
        (False, Process.EXISTS, True, Fence.KILL),
        (False, Process.UNKNOWN, True, Fence.TRUST_CALLER),
    ],
)
def test_fence_is_the_surest_that_there_is(
    answers: bool, process: Process, dead: bool, wanted: Fence
) -> None:
    assert decide_fence("web", answers=answers, process=process, source_is_dead=dead) is wanted


@pytest.mark.parametrize("process", [Process.EXISTS, Process.UNKNOWN])
def test_source_that_may_be_alive_is_refused_with_what_would_allow_it(process: Process) -> None:
    with pytest.raises(SourceMayBeAlive, match="--source-is-dead"):
        decide_fence("web", answers=False, process=process, source_is_dead=False)
