"""What to do with a job that a crash left unfinished: one table, each case met by exactly one row.

In: the job's kind, its last journalled step, and what is *seen* now: does the source answer, what
do its devices have open, do its CPUs run, is the mirror promoted. Out: an action. The journal says
how far we may have come; only what is seen says how far we came.

The actions, from the most to the least wished for:

    ADOPT          the protection stands: hand it to its follower
    RESUME         run the plan on from the journalled step (all steps are idempotent)
    RESUME_REMOVE  the same, but the filter is back in the graph: from ``remove`` on
    UNDO           take away everything that was made; the source was not touched, or is as before
    GIVE_UP        nothing irreversible happened: the operation is dropped, the protection goes on
    HEAL           the source stands half-way (paused by us): finish that first, then look again
    WAIT           it cannot be told now (the source or the datastore is silent): look again later
    NAME           neither way is safe: change nothing, say what is seen and what a person can do
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import product
from typing import Final

from mirror.domain.plans import STEPS, JobKind, Step


class Link(StrEnum):
    """``GONE``: nothing answers *and* the recorded process does not exist any more."""

    ANSWERS = "answers"
    SILENT = "silent"
    GONE = "gone"


class Graph(StrEnum):
    """What the protected devices have open; ``HALF``: parked, or not all of them the same."""

    OUT = "out"
    HALF = "half"
    IN = "in"
    UNSEEN = "unseen"


class Promotion(StrEnum):
    NO = "no"
    YES = "yes"
    UNREADABLE = "unreadable"


@dataclass(frozen=True, slots=True)
class Sight:
    """What is seen of a protection from outside. ``graph`` and ``runs`` mean something only when the
    source answers."""

    link: Link
    graph: Graph
    runs: bool
    promotion: Promotion

    def text(self) -> str:
        source = f"the source {self.link}"
        if self.link is Link.ANSWERS:
            source += f" ({'runs' if self.runs else 'is paused'}, filter {self.graph})"
        return f"{source}, mirror promoted: {self.promotion}"


class Action(StrEnum):
    ADOPT = "adopt"
    RESUME = "resume"
    RESUME_REMOVE = "resume-remove"
    UNDO = "undo"
    GIVE_UP = "give-up"
    HEAL = "heal"
    WAIT = "wait"
    NAME = "name"


@dataclass(frozen=True, slots=True)
class Row:
    """One case. ``None`` in a column: any."""

    label: str
    kind: JobKind
    steps: frozenset[Step]
    action: Action
    text: str
    links: frozenset[Link] | None = None
    graphs: frozenset[Graph] | None = None
    runs: bool | None = None
    promotions: frozenset[Promotion] | None = None

    def meets(self, kind: JobKind, step: Step, sight: Sight) -> bool:
        return (
            kind is self.kind
            and step in self.steps
            and (self.links is None or sight.link in self.links)
            and (self.graphs is None or sight.graph in self.graphs)
            and (self.runs is None or sight.runs is self.runs)
            and (self.promotions is None or sight.promotion in self.promotions)
        )


_P, _U, _F = JobKind.PROTECT, JobKind.UNPROTECT, JobKind.FAILOVER
_MADE = frozenset({Step.CREATE_IMAGES, Step.START_MIRROR_VM, Step.START_FILTER})
_TOUCHED = frozenset({Step.INSERT, Step.INITIAL_SYNC})
_AFTER_REMOVE = frozenset(STEPS[_U]) - {Step.REMOVE}
_FENCED = frozenset({Step.FENCE_FILTER, Step.CLOSE_EXPORTS, Step.PROMOTE_SUPERBLOCK})
_TO_PROMOTE = _FENCED | {Step.FENCE_SOURCE}
_TO_VM = _TO_PROMOTE | {Step.PROMOTE_MIRROR_VM}
_ANSWERS, _SILENT, _GONE = frozenset({Link.ANSWERS}), frozenset({Link.SILENT}), frozenset({Link.GONE})
_IN, _OUT, _HALF = frozenset({Graph.IN}), frozenset({Graph.OUT}), frozenset({Graph.HALF})
_NOT_IN_OR_HALF = frozenset({Graph.OUT, Graph.UNSEEN})
_NOT_HALF = frozenset({Graph.IN, Graph.OUT, Graph.UNSEEN})
_YES, _NO, _UNREADABLE = (frozenset({each}) for each in (Promotion.YES, Promotion.NO, Promotion.UNREADABLE))
_NOT_YES = _NO | _UNREADABLE


TABLE: Final[tuple[Row, ...]] = (
    # -- protect: until `insert` the source was not touched
    Row("P1", _P, frozenset({Step.REHEARSE}), Action.UNDO, "nothing had been made"),
    Row("P2", _P, _MADE, Action.UNDO, "the source was not touched",
        graphs=_NOT_IN_OR_HALF, promotions=_NOT_YES),
    Row("P3", _P, _MADE, Action.NAME, "a filter that this job did not put in is in the source's block graph",
        graphs=_IN | _HALF, promotions=_NOT_YES),
    Row("P4", _P, _MADE, Action.NAME, "the mirror is promoted, though this job had only begun to make it",
        promotions=_YES),
    # -- protect: from `insert` on the graph is the truth
    Row("P5", _P, _TOUCHED, Action.HEAL, "the insertion was cut in the middle", graphs=_HALF),
    Row("P6", _P, frozenset({Step.INSERT}), Action.UNDO, "the filter had not been put in",
        graphs=_OUT, promotions=_NOT_YES),
    Row("P7", _P, frozenset({Step.INSERT}), Action.ADOPT, "the filter is in",
        graphs=_IN, promotions=_NOT_YES),
    Row("P8", _P, frozenset({Step.INSERT}), Action.UNDO, "the source VM ended before its first sync",
        links=_GONE, graphs=frozenset({Graph.UNSEEN}), promotions=_NOT_YES),
    Row("P9", _P, frozenset({Step.INSERT}), Action.WAIT, "the source does not answer; its graph is unknown",
        links=_SILENT, graphs=frozenset({Graph.UNSEEN}), promotions=_NOT_YES),
    Row("P10", _P, frozenset({Step.INITIAL_SYNC}), Action.ADOPT, "the filter had been put in",
        graphs=_NOT_HALF, promotions=_NOT_YES),
    Row("P11", _P, _TOUCHED, Action.NAME, "the mirror is promoted, though its first sync had not ended",
        graphs=_NOT_HALF, promotions=_YES),
    # -- unprotect: always forward, the user wants it gone; the steps never delete a promoted mirror
    Row("U1", _U, frozenset({Step.REMOVE}), Action.HEAL, "the removal was cut in the middle", graphs=_HALF),
    Row("U2", _U, frozenset({Step.REMOVE}), Action.RESUME, "the source answers", graphs=_IN | _OUT),
    Row("U3", _U, frozenset({Step.REMOVE}), Action.RESUME, "the source is gone, and the filter with it",
        links=_GONE),
    Row("U4", _U, frozenset({Step.REMOVE}), Action.WAIT, "the source does not answer; its graph is unknown",
        links=_SILENT),
    Row("U5", _U, _AFTER_REMOVE, Action.HEAL, "the source stands half-way", graphs=_HALF),
    Row("U6", _U, _AFTER_REMOVE, Action.RESUME_REMOVE, "the filter is in the graph again", graphs=_IN),
    Row("U7", _U, _AFTER_REMOVE, Action.RESUME, "the filter is out", graphs=_NOT_IN_OR_HALF),
    # -- failover: before the promotion is durable
    Row("F1", _F, _TO_PROMOTE, Action.HEAL, "the source stands half-way", graphs=_HALF, promotions=_NO),
    Row("F2", _F, frozenset({Step.FENCE_SOURCE}), Action.GIVE_UP, "the source had not been fenced; it runs",
        links=_ANSWERS, graphs=_IN | _OUT, runs=True, promotions=_NO),
    Row("F3", _F, frozenset({Step.FENCE_SOURCE}), Action.RESUME, "the source had been stopped, not yet ended",
        links=_ANSWERS, graphs=_IN | _OUT, runs=False, promotions=_NO),
    Row("F4", _F, _TO_PROMOTE, Action.RESUME, "the source is gone", links=_GONE, promotions=_NO),
    Row("F5", _F, _TO_PROMOTE, Action.GIVE_UP, "the source does not answer and may be alive",
        links=_SILENT, promotions=_NO),
    Row("F6", _F, _FENCED, Action.GIVE_UP, "the source had been fenced, and was started again",
        links=_ANSWERS, graphs=_IN | _OUT, promotions=_NO),
    Row("F7", _F, frozenset({Step.PROMOTE_MIRROR_VM, Step.RECORD}), Action.NAME,
        "the journal says promoted, the superblock does not: another mirror may be in its place",
        promotions=_NO),
    # -- failover: the promotion is durable, there is no way back
    Row("F8", _F, _TO_VM, Action.RESUME, "the mirror is promoted and the source is gone",
        links=_GONE, promotions=_YES),
    Row("F9", _F, _TO_VM, Action.NAME, "the mirror is promoted and the source is, or may be, alive",
        links=_ANSWERS | _SILENT, promotions=_YES),
    Row("F10", _F, frozenset({Step.RECORD}), Action.RESUME, "all is done but the record", promotions=_YES),
    Row("F11", _F, frozenset(STEPS[_F]), Action.WAIT, "the mirror's superblock cannot be read",
        promotions=_UNREADABLE),
)  # fmt: skip


def sights() -> Iterator[Sight]:
    """Everything that can be seen."""
    for promotion in Promotion:
        for graph, runs in product((Graph.OUT, Graph.HALF, Graph.IN), (True, False)):
            yield Sight(Link.ANSWERS, graph, runs, promotion)
        yield Sight(Link.SILENT, Graph.UNSEEN, False, promotion)
        yield Sight(Link.GONE, Graph.UNSEEN, False, promotion)


def decide(kind: JobKind, step: Step | None, sight: Sight) -> Row:
    """The one row for this case. A step that no plan of ours knows (a newer version wrote it) is named."""
    if step is None or step not in STEPS[kind]:
        return Row(
            "X1", kind, frozenset(), Action.NAME, "the journalled step is of no plan that this version knows"
        )
    met = [row for row in TABLE if row.meets(kind, step, sight)]
    if len(met) != 1:
        raise AssertionError(f"{kind} {step} {sight}: {[row.label for row in met]}")
    return met[0]
