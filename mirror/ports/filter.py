"""Port: the data plane of one protection, as the control plane sees it.

``FilterControl`` speaks docs/control-protocol.md; ``FilterRunner`` starts and ends the
supervised process. Neither ever blocks longer than the given deadline.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from mirror.domain.model import FilterStatus, Protection, SourceView


class FilterControl(Protocol):
    async def status(self, *, timeout_s: float) -> FilterStatus: ...

    def follow(self) -> AsyncGenerator[FilterStatus, None]:
        """The status now and after each change of state; ends with LinkLost when the filter goes away.

        A generator, so that who stops listening can close it (``aclosing``)."""
        ...

    async def resync_begin(self, *, timeout_s: float) -> int:
        """Step 1 of the resync protocol: connect, forward guest writes, mark them fresh.

        :returns: the number of the mirror connection that the resync belongs to.
        """
        ...

    async def resync_copy(
        self,
        views: Sequence[SourceView],
        *,
        mirror_connection: int,
        client_connections: dict[str, int],
        timeout_s: float,
    ) -> None:
        """Steps 3 and 4. Returns when the books are durably merged; the copying goes on behind.

        ``client_connections``: per disk, the client connection that the book covers.
        """
        ...

    async def barrier(self, *, timeout_s: float) -> FilterStatus:
        """Everything received before is durable on the mirror when this returns."""
        ...

    async def pause(self, reason: str, *, timeout_s: float) -> None: ...

    async def detach(self, *, timeout_s: float) -> None:
        """Flush, mark the mirror's superblock, stop mirroring: DETACHED."""
        ...

    async def fence(self, reason: str, *, timeout_s: float) -> None:
        """Never write to the mirror again, durably: FAILED_OVER."""
        ...

    async def close(self) -> None: ...


class FilterRunner(Protocol):
    async def start(self, protection: Protection, *, timeout_s: float) -> None:
        """Write the config and start the supervised process; returns when its control socket answers.

        A process that runs already for this protection is left alone.
        """
        ...

    async def stop(self, protection: Protection, *, timeout_s: float) -> None: ...

    async def running(self, protection: Protection) -> bool: ...

    async def connect(self, protection: Protection, *, timeout_s: float) -> FilterControl: ...
