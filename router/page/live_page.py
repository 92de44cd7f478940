"""The page as a whole: its parts, made and joined; owned by the router's server."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from starlette.routing import BaseRoute

from router.membership import Membership
from router.observation import Observer
from router.page.feed import Feed
from router.page.overview import NumRequests, Overview, Served
from router.page.pulse import Pulse
from router.page.roster import Roster
from router.page.routes import page_routes
from router.timeline import Timeline


class LivePage:
    """What the server needs of the page.

    Args:
        clock: monotonic seconds, the same as the pipeline's.

    Attributes:
        observers: to be told of the pipeline's moments.
        routes: to be added to the HTTP side.
    """

    def __init__(
        self,
        *,
        served: Served,
        membership: Membership,
        num_requests: Callable[[], NumRequests],
        is_ready: Callable[[], bool],
        clock: Callable[[], float],
    ) -> None:
        timeline, pulse, roster = Timeline(clock), Pulse(clock), Roster(clock)
        membership.subscribe(roster.update)
        overview = Overview(
            served=served,
            num_requests=num_requests,
            membership=membership,
            timeline=timeline,
            pulse=pulse,
            roster=roster,
            is_ready=is_ready,
            clock=clock,
        )
        self._feed = Feed(overview.capture, overview.version, clock)
        self.observers: Sequence[Observer] = (timeline, pulse)
        self.routes: Sequence[BaseRoute] = page_routes(self._feed)

    def close(self) -> None:
        """Ends the streams of those who look."""
        self._feed.close()
