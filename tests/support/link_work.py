"""What the far end of the link does in the link tests, in a process of its own."""

from __future__ import annotations

import time
from types import SimpleNamespace

import torch

from outrider.workers.link.link import NO_PAYLOAD, Packet
from support.rank_processes import LinkPlace, die


def echo(place: LinkPlace) -> int:
    """Send each packet back until the other end closes."""
    link = place.target_end()
    count = 0
    while True:
        try:
            packet = link.receive()
        except ConnectionError:
            link.close()
            return count
        link.send(packet)
        count += 1


def answer_once_then_die(place: LinkPlace) -> None:
    link = place.target_end()
    link.send(link.receive())
    time.sleep(0.2)  # the answer leaves; data that a dead process still had in hand would be lost
    die()


def die_before_the_payload(place: LinkPlace) -> None:
    """After the block that says how long the payload is."""

    def send(*_: object) -> None:
        time.sleep(0.2)  # as above
        die()

    link = place.target_end()
    link._payload_group = SimpleNamespace(send=send)
    link.send(Packet(torch.ones(4, dtype=torch.int32), torch.ones(8, dtype=torch.uint8)))


def send_a_burst_then_close(place: LinkPlace) -> None:
    link = place.target_end()
    for i in range(50):
        link.send(Packet(torch.tensor([i, -i], dtype=torch.int32), NO_PAYLOAD))
    link.close()
    place.wait_until_done()


def stay_silent(place: LinkPlace) -> None:
    link = place.target_end()
    link.receive()
    place.wait_until_done()
