"""kvm.chardev_options: what is said about mistakes, and the devices of a command line."""

import os

import pytest

from kvm.chardev_options import CharDevices, from_chardev, from_device
from kvm.keyval import UsageError


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("foo", "'foo' is not a valid char driver"),
        ("", "'' is not a valid char driver"),
        ("null,foo=1", "'null,foo=1' is not a valid char driver"),
        ("unix:s,foo=1", "Invalid parameter 'foo'"),
        ("unix:s,server=maybe", "Parameter 'server' expects 'on' or 'off'"),
        ("unix:s,wait=off", "'wait' option is incompatible with socket in client connect mode"),
        ("unix:s,server=on,telnet=on", "'telnet' is not available for socket character devices"),
        ("tcp:127.0.0.1", "'127.0.0.1' names no port: tcp:HOST:PORT is expected"),
        ("pty", "character device 'pty' is not available"),
    ],
)
def test_bad_dev_syntax_is_named(text, message):
    with pytest.raises(UsageError) as caught:
        from_device(text, "c0")
    assert caught.value.messages == (message,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("null", "chardev: no id specified"),
        ("foo,id=x", "'foo' is not a valid char driver name"),
        ("id=c0", 'chardev: "c0" missing backend'),
        ("null,id=0c", "Parameter 'id' expects an identifier"),
        ("null,id=c0,foo=1", "Invalid parameter 'foo'"),
        ("file,id=c0", "chardev: file: no filename given"),
        ("socket,id=c0,host=h", "chardev: socket: no port given"),
        ("socket,id=c0,path=p,host=h,port=1", "None or one of 'path', 'fd' or 'host' option required."),
        ("socket,id=c0,path=p,wait=off", "'wait' option is incompatible with socket in client connect mode"),
    ],
)
def test_bad_chardev_options_are_named(text, message):
    with pytest.raises(UsageError) as caught:
        from_chardev(text, print)
    assert caught.value.messages == (message,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file:{d}/no/x", "Could not open '{d}/no/x': No such file or directory"),
        ("pipe:{d}/no/x", "Could not open '{d}/no/x': No such file or directory"),
        ("unix:{d}/no/x,server=on", "Failed to bind socket to {d}/no/x: No such file or directory"),
        ("unix:{d}/no", "Failed to connect to '{d}/no': No such file or directory"),
        ("tcp:127.0.0.1:1", "Failed to connect to '127.0.0.1:1': Connection refused"),
    ],
)
def test_what_cannot_be_opened_is_named(directory, text, message):
    with pytest.raises(UsageError) as caught:
        from_device(text.format(d=directory), "c0").open()
    assert caught.value.messages == (message.format(d=directory),)


def test_a_descriptor_that_is_no_socket_is_refused():
    reader, writer = os.pipe()
    backend = from_chardev(f"socket,id=c0,fd={reader}", print)
    with pytest.raises(UsageError, match=f"File descriptor '{reader}' is not a socket"):
        backend.open()
    os.close(reader)
    os.close(writer)


def test_the_short_form_of_a_switch_works_with_a_warning(directory):
    said = []
    devices = CharDevices(said.append)
    devices.add_chardev(f"socket,id=c0,path={directory}/s,server,nowait")
    assert (directory / "s").exists()
    devices.close()
    assert [line.rpartition(": ")[2] for line in said] == [
        "short-form boolean option 'server' deprecated; use server=on instead",
        "short-form boolean option 'nowait' deprecated; use wait=off instead",
    ]


def test_the_legacy_short_form_of_dev_has_no_warning(directory):
    said = []
    devices = CharDevices(said.append)
    devices.add_device("-qmp", f"unix:{directory}/s,server,nowait", "c0", "")
    devices.close()
    assert said == []


class TestCharDevices:
    def messages(self, action):
        with pytest.raises(UsageError) as caught:
            action(CharDevices(print))
        return caught.value.messages

    def test_an_id_is_used_once(self):
        def twice(devices):
            devices.add_chardev("null,id=c0")
            devices.add_chardev("null,id=c0")

        assert self.messages(twice) == ("-chardev null,id=c0: Duplicate ID 'c0' for chardev",)

    def test_stdio_is_used_once(self):
        def twice(devices):
            devices.add_chardev("stdio,id=c0")
            devices.add_chardev("stdio,id=c1")

        assert self.messages(twice) == ("-chardev stdio,id=c1: cannot use stdio by multiple character devices",)

    def test_a_background_process_has_no_stdio(self):
        with pytest.raises(UsageError, match="cannot use stdio with -daemonize"):
            CharDevices(print, daemonize=True).add_chardev("stdio,id=c0")

    def test_a_back_end_has_one_front_end(self):
        def twice(devices):
            devices.add_chardev("null,id=c0")
            devices.claim("c0")
            devices.claim("c0")

        assert self.messages(twice) == ("chardev 'c0' is already in use",)

    def test_an_unknown_label_is_named(self):
        assert self.messages(lambda devices: devices.claim("nope")) == ('chardev "nope" not found',)

    def test_the_second_line_says_what_the_failure_means(self):
        def serial(devices):
            devices.add_device("-serial", "foo", "serial0", "could not connect")

        assert self.messages(serial) == (
            "-serial foo: 'foo' is not a valid char driver",
            "-serial foo: could not connect",
        )
