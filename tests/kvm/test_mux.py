"""kvm.mux: one character device, two users that take turns."""

import pytest

from kvm.chardev import CharBackend, FrontEnd
from kvm.mux import HELP, Mux


class Wire(CharBackend):
    """A back end without a descriptor."""

    def __init__(self):
        super().__init__("wire")
        self.sent = b""
        self.listens = True

    def write(self, data):
        self.sent += data
        return len(data)

    def pause(self):
        self.listens = False

    def resume(self):
        self.listens = True


class User:
    def __init__(self, front):
        self.front = front
        self.got = b""
        self.told = []
        front.attach(FrontEnd(self.received, lambda: self.told.append("here"), lambda: self.told.append("gone")))
        self.appetite = 1 << 30

    def received(self, data, descriptors):
        self.got += data
        self.appetite -= 1
        if self.appetite <= 0:
            self.front.pause()


@pytest.fixture
def shared():
    wire, ends = Wire(), []
    mux = Mux(wire, lambda: ends.append("end"))
    device, person = User(mux.front("serial0")), User(mux.front("monitor"))
    wire.front_end.connected()
    return wire, device, person, ends


def type_in(wire, keys):
    wire.front_end.received(keys, [])


def test_keys_go_to_the_one_whose_turn_it_is(shared):
    wire, device, person, _ = shared
    type_in(wire, b"ab\x01ccd\x01")
    type_in(wire, b"cef")
    assert (device.got, person.got) == (b"abef", b"cd")


def test_each_is_greeted_when_its_turn_comes_first(shared):
    wire, device, person, _ = shared
    assert (device.told, person.told) == (["here"], [])
    type_in(wire, b"\x01c\x01c\x01c")
    assert (device.told, person.told) == (["here"], ["here"])
    wire.front_end.disconnected()
    assert (device.told, person.told) == (["here", "gone"], ["here", "gone"])


def test_other_keys_behind_the_escape(shared):
    wire, device, _, ends = shared
    type_in(wire, b"x\x01\x01y\x01h\x01?\x01x")
    assert device.got == b"x\x01y"
    assert wire.sent == HELP
    assert ends == ["end"]


def test_what_the_user_does_not_want_yet_waits_with_the_back_end(shared):
    wire, device, person, _ = shared
    person.appetite = 1
    type_in(wire, b"\x01ca\x01\x01b\x01cd")
    assert (person.got, device.got, wire.listens) == (b"a", b"", False)
    person.front.resume()
    assert (person.got, device.got, wire.listens) == (b"a\x01", b"", False)
    person.front.resume()
    person.front.resume()
    assert (person.got, device.got, wire.listens) == (b"a\x01b", b"d", True)


def test_a_device_that_takes_nothing_keeps_nobody_from_the_monitor(shared):
    wire, device, person, _ = shared
    device.front.pause()
    type_in(wire, b"\x01chelp")
    assert (device.got, person.got, wire.listens) == (b"", b"help", True)
    type_in(wire, b"\x01c\x01")
    type_in(wire, b"\x01")
    assert (device.got, wire.listens) == (b"", False)
    device.front.resume()
    assert device.got == b"\x01"


def test_both_write_to_the_same_place(shared):
    wire, device, person, _ = shared
    device.front.write(b"1")
    person.front.write(b"2")
    assert wire.sent == b"12"
