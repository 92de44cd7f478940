"""What the tour asks."""

from __future__ import annotations

import io

from rich.console import Console

from baton.client import Client
from deploy.tour import Tour
from tests.baton.fake_inference import ending, piece, serving


def test_the_tour_asks_four_questions_the_last_as_a_turn_after_the_third() -> None:
    output = io.StringIO()
    with serving() as server, Client(server.target) as client:
        server.responses = [piece(" 19", 5, finish=1), ending(200, 160, 1)]
        Tour(client, Console(file=output, width=100)).run()
        story, problem, recall, turn = [request.text for request in server.requests]
    assert len({story, problem, recall, turn}) == 4
    assert turn.startswith(f"{recall} 19\n")
    assert output.getvalue().count("200 prompt tokens (160 cached)") == 4
    assert output.getvalue().count("\nright\n") == 1
