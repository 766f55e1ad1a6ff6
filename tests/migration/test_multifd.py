"""Multifd between two machines without KVM: every end that a channel can come to, at every moment; and who belongs here."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qemumig.channels.address import InetAddress
from qemumig.errors import ChannelError
from qemumig.multifd import arrivals, senders
from qemumig.multifd.packet import encode_init
from qemumig.multifd.splice import Splice
from qemumig.ram.live import RamSource
from qemumig.ram.live_multifd import MultifdRamSource
from qemumig.wire.stream import OutputStream
from tests.qemumig.channels.pki import x509_directory
from tests.support.links import Fault, Links
from tests.support.pair import Pair, wait_for
from tests.support.traces import recorded

pytestmark = pytest.mark.usefixtures("no_leaks")

CHANNELS = 3


@contextlib.contextmanager
def multifd_pair(fault: Fault | None = None, **more: Any) -> Iterator[Pair]:
    """A pair with *CHANNELS* channels; *parameters* are of both ends."""
    parameters = {"max-bandwidth": 0, "multifd-channels": CHANNELS, **more.pop("parameters", {})}
    capabilities = {"multifd": True, **more.pop("capabilities", {})}
    with Pair(capabilities=capabilities, parameters=parameters, **more) as pair:
        pair.link.close()
        pair.link = Links(int(pair.incoming.query()["socket-address"][0]["port"]), fault)  # type: ignore[assignment]
        yield pair


def names() -> list[str]:
    return [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize("method", ["none", "zlib", "zstd"])
@pytest.mark.parametrize("each_section", [False, True])
def test_a_guest_moves_over_many_channels(method: str, each_section: bool) -> None:
    with multifd_pair(parameters={"multifd-compression": method}) as pair:
        pair.migration._options.set_property("multifd-flush-after-each-section", "on" if each_section else "off")
        pair.migrate()
        assert pair.statuses == ("completed", "completed")
        pair.assert_guest_at("destination")
        ram = pair.migration.query()["ram"]
        assert ram["normal"] > 100 and ram["multifd-bytes"] > 100_000
        assert ram["transferred"] > ram["multifd-bytes"] + ram["precopy-bytes"]


def test_channels_can_be_followed_by_their_trace(tmp_path: Path) -> None:
    with recorded(tmp_path, "multifd_*") as lines, multifd_pair(running=False) as pair:
        pair.migrate()
        pages = pair.migration.query()["ram"]["normal"]
    for number in range(CHANNELS):
        for event in (
            "send_thread_start",
            "recv_thread_start",
            "new_send_channel_async channel",
            "recv_new_channel channel",
        ):
            assert lines.count(f"multifd_{event} {number}") == 1
    for side, last in (("send", -4), ("recv", -1)):
        ends = [line.split() for line in lines if line.startswith(f"multifd_{side}_thread_end")]
        assert sum(int(words[last]) for words in ends) == pages and len(ends) == CHANNELS
    for event in ("send_section_end", "recv_sync_main"):
        assert any(line.startswith(f"multifd_{event} pages ") for line in lines)
    assert lines.count("multifd_send_terminate_threads") == lines.count("multifd_recv_terminate_threads error 0") == 1


def test_memory_is_equal_when_the_guest_stands_still() -> None:
    with multifd_pair(running=False) as pair:
        pair.migrate()
        assert pair.statuses == ("completed", "completed")
        assert pair.destination.digests() == pair.source.digests()


def test_pages_are_taken_from_where_they_lie() -> None:
    with multifd_pair(capabilities={"zero-copy-send": True}) as pair:
        pair.migrate()
        assert pair.statuses == ("completed", "completed")
        pair.assert_guest_at("destination")
        ram = pair.migration.query()["ram"]
        assert ram["multifd-bytes"] > ram["normal-bytes"] > 100 * 4096
        assert ram["dirty-sync-missed-zero-copy"] >= CHANNELS  # the loopback device copies


@pytest.mark.parametrize("returns", [False, True])
@pytest.mark.parametrize("running", [False, True])
def test_pages_go_by_reference_only_where_the_destination_answers(
    returns: bool, running: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an answer the guest might go on here while the network still reads its pages."""
    made: list[Splice] = []
    monkeypatch.setattr(senders, "Splice", lambda out: made.append(Splice(out)) or made[-1])
    with multifd_pair(capabilities={"return-path": returns}, running=running) as pair:
        pair.migrate()
        assert pair.statuses == ("completed", "completed")
        if running:
            pair.assert_guest_at("destination")
        else:
            assert pair.destination.digests() == pair.source.digests()
    assert len(made) == (CHANNELS if returns else 0)


def test_pages_are_copied_when_there_are_no_pipes_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(out: OutputStream) -> Splice:
        raise ChannelError("no pipe")

    monkeypatch.setattr(senders, "Splice", refuse)
    with recorded(tmp_path, "multifd_send_copies") as lines, multifd_pair() as pair:
        pair.migrate()
        assert pair.statuses == ("completed", "completed")
        pair.assert_guest_at("destination")
    assert [line.endswith(": no pipe") for line in lines] == [True] * CHANNELS


def test_enciphered_channels(tmp_path: Path) -> None:
    with multifd_pair(tls=x509_directory(tmp_path / "x509")) as pair:
        pair.migrate()
        assert pair.statuses == ("completed", "completed")
        pair.assert_guest_at("destination")


def test_threads_have_their_names() -> None:
    with multifd_pair(parameters={"max-bandwidth": 1 << 20}) as pair:
        pair.start()
        wait_for(lambda: pair.migration.status.value == "active", "the rounds to begin")
        wanted = {f"mig/{end}_{number}" for end in ("src/send", "dst/recv") for number in range(CHANNELS)}
        wait_for(lambda: wanted <= set(names()), "the threads")
        pair.migration.cancel()
        pair.wait()


# ---- a channel comes to an end ----


def settled(pair: Pair) -> str:
    """Wait for both ends; the source's status.  A destination that nothing was sent to goes on waiting for a source."""
    wait_for(lambda: not pair.migration.is_running, "the source to end")
    wait_for(lambda: pair.incoming.status.value in ("completed", "failed", "setup"), "the destination to settle")
    source, destination = pair.statuses
    assert (source == "completed") == (destination == "completed")
    return source


@pytest.mark.parametrize("seed", range(12))
def test_any_channel_that_breaks_leaves_the_guest_at_the_source(seed: int) -> None:
    chance = random.Random(seed)
    channel = seed % (CHANNELS + 1)
    after = chance.choice((1, 63, 64, 65, 1407, 1408, chance.randrange(2000, 50_000)))
    if channel == 0:
        after = chance.randrange(1, 400)  # there is not much more on the main one
    method = chance.choice(("none", "zlib", "zstd"))
    with multifd_pair(
        Fault(channel, after, chance.choice(("reset", "end"))),
        capabilities={"zero-copy-send": method == "none"},
        parameters={"multifd-compression": method},
    ) as pair:
        pair.start()
        if settled(pair) == "completed":  # the other channels had taken nearly everything
            assert not pair.link.struck.is_set()  # type: ignore[attr-defined]
            return
        assert pair.migration.query()["error-desc"]
        pair.assert_guest_at("source")


@pytest.mark.parametrize(("channel", "zero_copy"), [(0, False), (1, False), (3, False), (1, True)])
def test_a_cancel_ends_a_migration_whose_channel_stalls(channel: int, zero_copy: bool) -> None:
    fault = Fault(channel, 3000 if channel else 300, "stall")
    with multifd_pair(fault, capabilities={"zero-copy-send": zero_copy}) as pair:
        pair.start()
        assert pair.link.struck.wait(20)  # type: ignore[attr-defined]
        pair.migration.cancel()
        wait_for(lambda: not pair.migration.is_running, "the source to end")
        pair.link.close()  # where it stalls nobody sees that the source is gone
        pair.wait()
        assert pair.statuses == ("cancelled", "failed")
        pair.assert_guest_at("source")


@pytest.mark.parametrize("seed", range(8))
def test_a_cancel_at_any_moment_leaves_the_guest_at_the_source(seed: int) -> None:
    chance = random.Random(seed)
    limit = chance.choice((0, 8 << 20, 64 << 20))
    with multifd_pair(capabilities={"zero-copy-send": bool(seed % 2)}, parameters={"max-bandwidth": limit}) as pair:
        pair.start()
        threading.Event().wait(chance.random() * 0.08)  # the moment is the point
        pair.migration.cancel()
        if settled(pair) != "completed":
            assert pair.statuses[0] == "cancelled"
            pair.assert_guest_at("source")


def test_a_migration_after_one_that_failed() -> None:
    with multifd_pair(Fault(2, 5000)) as pair:
        pair.migrate()
        assert pair.statuses == ("failed", "failed")
        pair.incoming.listen(InetAddress("127.0.0.1", "0"), exit_on_error=False)
        pair.link.close()
        pair.link = Links(int(pair.incoming.query()["socket-address"][0]["port"]))  # type: ignore[assignment]
        pair.migrate()
        assert pair.statuses == ("completed", "completed")
        pair.assert_guest_at("destination")


# ---- who belongs here ----


def test_a_source_with_more_channels_is_refused() -> None:
    with multifd_pair() as pair:
        pair.migration._options.set_parameters({"multifd-channels": CHANNELS + 2})
        pair.migrate()
        assert pair.statuses == ("failed", "failed")
        assert "parameter 'multifd-channels' must be equal on both sides" in pair.incoming.query()["error-desc"]
        pair.assert_guest_at("source")


def test_a_source_with_fewer_channels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrivals, "LATE_S", 0.3)
    with multifd_pair() as pair:
        pair.migration._options.set_parameters({"multifd-channels": CHANNELS - 1})
        pair.migrate()
        assert pair.statuses == ("failed", "failed")
        found = pair.incoming.query()["error-desc"]
        assert f"the source has opened 2 multifd channels, this side waits for {CHANNELS}" in found
        assert "'multifd-channels'" in pair.migration.query()["error-desc"]
        pair.assert_guest_at("source")


def test_pages_behind_the_last_sync_point_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing says that they are in memory when the guest starts."""

    def end_body(ram: MultifdRamSource) -> None:
        if not ram._is_started:
            ram.sender.write_mark()
        ram._is_started = True
        RamSource._end_body(ram)

    monkeypatch.setattr(MultifdRamSource, "_end_body", end_body)
    with multifd_pair() as pair:
        pair.migrate()
        assert pair.statuses == ("failed", "failed")
        assert "has brought pages behind the last sync point" in pair.incoming.query()["error-desc"]
        pair.assert_guest_at("source")


def test_strangers_cost_their_own_connection(capfd: pytest.CaptureFixture[str]) -> None:
    with multifd_pair() as pair:
        port = int(pair.incoming.query()["socket-address"][0]["port"])
        strangers = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
        strangers[0].sendall(b"GET / HTTP/1.1\r\n\r\n")
        strangers[1].close()
        pair.migrate()
        assert pair.statuses == ("completed", "completed")
        pair.assert_guest_at("destination")
        for stranger in strangers:
            stranger.close()
    said = capfd.readouterr().err
    assert "a connection is dropped: it begins with 47455420" in said
    assert "a connection is dropped: it ended before it had said what it is" in said


@pytest.mark.parametrize(
    ("init", "finding"),
    [
        (encode_init(b"\1" * 16, 0), "multifd channel 0 comes from a machine with UUID 0101"),
        (encode_init(bytes(16), CHANNELS), f"the source has a multifd channel {CHANNELS}, this side has {CHANNELS}"),
        (encode_init(bytes(16), 0) * 2, ""),
        (encode_init(bytes(16), 0)[:7] + b"\2" + bytes(56), "has version 2, expected 1"),
    ],
)
def test_a_channel_of_somebody_else_ends_the_load(init: bytes, finding: str) -> None:
    with multifd_pair() as pair:
        port = int(pair.incoming.query()["socket-address"][0]["port"])
        others = [socket.create_connection(("127.0.0.1", port)) for _ in range(2)]
        with contextlib.suppress(ConnectionError):  # the first may have been enough, and all are closed
            for other in others:
                other.sendall(init)
        wait_for(lambda: pair.incoming.status.value == "failed", "the refusal")
        assert (finding or "multifd channel 0 has come twice") in pair.incoming.query()["error-desc"]
        for other in others:
            other.close()


def test_a_source_that_left_before_its_main_channel_spoke_is_forgotten() -> None:
    with multifd_pair() as pair:
        port = int(pair.incoming.query()["socket-address"][0]["port"])
        for _ in range(2):
            with socket.create_connection(("127.0.0.1", port)) as lost:
                lost.sendall(encode_init(bytes(16), 1))
        pair.migrate()
        assert pair.statuses == ("completed", "completed")


def test_channels_may_come_in_any_order() -> None:
    """The main one last, and the init packet in pieces."""
    with multifd_pair(running=False) as pair:
        port = int(pair.incoming.query()["socket-address"][0]["port"])
        with contextlib.ExitStack() as stack:
            for number in (2, 0, 1):
                sock = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
                init = encode_init(bytes(16), number)
                for piece in (init[:3], init[3:20], init[20:]):
                    sock.sendall(piece)
            main = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            main.sendall(b"QE")
            main.sendall(b"VM")
            wait_for(lambda: pair.incoming.status.value == "active", "the load to begin")
        wait_for(lambda: pair.incoming.status.value == "failed", "the end of it")
        assert "stream ends inside" in pair.incoming.query()["error-desc"]
