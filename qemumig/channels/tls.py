"""TLS on a channel: the source is the client, the destination the server (channels.md §3).

    client_for(options, find, address) ─▶ TlsClient.wrap(channel)     waits for the handshake
    server_for(options, find)          ─▶ Reception.admit(channel)    many handshakes at once, none holds up another
                                          └▶ TlsServer.wrap(channel)     where there is only one connection anyway

    Channel ──[ handshake ]──▶ TlsChannel: the same descriptors, and a carrier that enciphers what goes through them

A peer that is not who it should be, talks nonsense, falls silent or leaves costs its own connection and nothing else.

Threads   one thread for each handshake or Reception, then the rules of a Channel.
Holds     (1) no byte of the migration goes out or comes in before the peer has proved what the credentials ask for
          (2) every wait ends with the quit event
"""

from __future__ import annotations

import ipaddress
import select
import sys
from collections import deque
from collections.abc import Callable, Iterable

from .. import trace
from ..errors import ChannelError, OptionError
from ..options import MigrationOptions
from .address import Address, InetAddress
from .channel import Channel, wait_ready
from .credentials import CLIENT, SERVER, Credentials
from .objects import FindObject
from .openssl import NAME_MISMATCH, X509_V_OK, Connection, TlsError, verification_text

MOST_HANDSHAKES = (
    31  # under way at once besides the expected; one more pushes the oldest out: honest ones take milliseconds
)
LAST_RECORD_MS = 1000  # how long the end of the connection may wait for room on the way


class TlsChannel(Channel):
    """An enciphered channel over *inner*, which belongs to it."""

    def __init__(self, inner: Channel, connection: Connection) -> None:
        super().__init__(inner.kind, inner.name, inner.read_fd, inner.write_fd, inner.quit_fd, can_return=inner.can_return)
        self.carrier = self._session = connection.session(inner.quit_fd)
        self._inner = inner

    def read_some(self, limit: int) -> bytes | None:
        target = bytearray(limit)
        length = self._session.try_read(target)
        return None if length < 0 else bytes(target[:length])

    def is_silent(self) -> int:
        """0 when the peer has sent something; else POLLIN or POLLOUT, to be waited for.

        OSError when it never will.
        """
        return self._session.is_silent()

    def share_core(self) -> None:
        self._inner.share_core()

    def keep_short(self) -> None:
        self._inner.keep_short()

    def shutdown(self) -> None:
        self._inner.shutdown()

    def finish(self) -> None:
        self._session.announce_end()
        self._inner.finish()

    def close(self) -> None:
        """Announce the end, unless the way is blocked for good, and give the descriptors back."""
        want = self._session.announce_end() if self.announces_end else 0
        if want:
            poll = select.poll()
            poll.register(self.write_fd, select.POLLOUT)
            poll.register(self.quit_fd, select.POLLIN)
            if (self.write_fd, select.POLLOUT) in poll.poll(LAST_RECORD_MS):
                self._session.announce_end()
        self._inner.close()
        self.read_fd = self.write_fd = -1


class Handshake:
    """One handshake on *channel*, as far as it has come; both belong to it.

    `step` goes on until it has to wait; `fd` and `events` say for what.  *check* is asked when the library is content.
    *speaks*: the peer has to send the first byte of what follows, too, before it is let in.
    """

    def __init__(
        self, channel: Channel, connection: Connection, check: Callable[[Connection], None], *, speaks: bool = False
    ) -> None:
        self.events = 0
        self._channel = channel
        self._connection = connection
        self._check = check
        self._speaks = speaks
        self._enciphered: TlsChannel | None = None
        trace.qio_channel_tls_handshake_start(channel.name)

    @property
    def fd(self) -> int:
        return self._channel.read_fd if self.events == select.POLLIN else self._channel.write_fd

    def need_not_speak(self) -> None:
        """The peer is let in although it says nothing."""
        self._speaks = False

    def step(self) -> TlsChannel | None:
        """Go on; the channel when it is done, which then is the caller's.  ChannelError when it fails."""
        try:
            if self._enciphered is None:
                self.events = self._connection.advance()
                if self.events:
                    return None
                self._check(self._connection)
                self._enciphered = TlsChannel(self._channel, self._connection)
                trace.qio_channel_tls_handshake_complete(self._channel.name)
            self.events = self._enciphered.is_silent() if self._speaks else 0
        except TlsError as error:
            reason = self._reason(error)
            trace.qio_channel_tls_handshake_fail(self._channel.name, reason)
            raise ChannelError(reason, channel=self._channel.name) from error
        except OSError as error:
            trace.qio_channel_tls_handshake_fail(self._channel.name, error)
            raise ChannelError(f"TLS handshake failed: {error}", channel=self._channel.name) from error
        return None if self.events else self._enciphered

    def _reason(self, error: TlsError) -> str:
        number = self._connection.verification()
        if number in NAME_MISMATCH:
            return f"Certificate does not match the hostname {self._connection.expected_name}"
        if number != X509_V_OK:
            return verification_text(number)
        return f"TLS handshake failed: {error}"

    def wait(self) -> TlsChannel:
        """Go on until it is done; everything is closed when it fails."""
        try:
            while (channel := self.step()) is None:
                wait_ready(self.fd, self.events, self._channel.quit_fd)
            return channel
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give up."""
        self._channel.close()


class TlsClient:
    """The source's side: *hostname* is the name that the server's certificate must have."""

    def __init__(self, creds: Credentials, hostname: str) -> None:
        self._creds = creds
        self._hostname = hostname
        if creds.has_certificate and creds.verify_peer and not hostname:
            raise OptionError("No hostname for certificate validation", name="tls-hostname", value="")

    def wrap(self, channel: Channel) -> TlsChannel:
        """*channel*, enciphered, after the handshake; it is closed when that fails."""
        return self.begin(channel).wait()

    def begin(self, channel: Channel) -> Handshake:
        """The handshake on *channel*, which belongs to it now; ChannelError when there can be none."""
        name = self._hostname if self._creds.has_certificate and self._creds.verify_peer else ""
        return Handshake(channel, _connect(self._creds, channel, name), lambda connection: None)


class TlsServer:
    """The destination's side: *is_allowed* decides about the identity that a client has proved, None lets all in."""

    def __init__(self, creds: Credentials, is_allowed: Callable[[str], bool] | None) -> None:
        self._creds = creds
        self._is_allowed = is_allowed

    def wrap(self, channel: Channel) -> TlsChannel:
        """*channel*, enciphered, after the handshake; it is closed when that fails."""
        return self.begin(channel).wait()

    def begin(self, channel: Channel, *, speaks: bool = False) -> Handshake:
        """The handshake on *channel*, which belongs to it now; ChannelError when there can be none."""
        return Handshake(channel, _connect(self._creds, channel), self._authorize, speaks=speaks)

    def _authorize(self, connection: Connection) -> None:
        if self._is_allowed is None:
            return
        identity = connection.peer_name() if self._creds.verify_peer else None
        identity = identity if identity is not None else connection.psk_identity()
        name = "TLS authorization"
        if identity is None:
            raise ChannelError("TLS authz check: the peer has proved no identity; set verify-peer=on", channel=name)
        try:
            allowed = self._is_allowed(identity)
        except OptionError as error:
            raise ChannelError(str(error), channel=name) from error
        if not allowed:
            raise ChannelError(f"TLS x509 authz check for {identity} is denied", channel=name)


class Reception:
    """The handshakes of one listener; *room*: how many honest peers may come at once."""

    def __init__(self, room: int = 1) -> None:
        self._most = MOST_HANDSHAKES + room
        self._pending: list[Handshake] = []  # the oldest first
        self._done: deque[TlsChannel] = deque()

    def admit(self, channel: Channel, server: TlsServer, *, speaks: bool = True) -> None:
        """Begin a handshake on *channel*, which belongs to the reception now.

        *speaks*: the peer sends the first byte, as on the main channel; one that never does is never let in.
        """
        if len(self._pending) == self._most:
            _complain(f"TLS handshake failed: {self._most} others have begun since, the oldest is dropped")
            self._pending.pop(0).close()
        handshake = server.begin(channel, speaks=speaks)
        self._pending.append(handshake)
        self._advance(handshake)

    def let_silent_in(self) -> None:
        """Who has come already need not speak, either."""
        for handshake in list(self._pending):
            handshake.need_not_speak()
            self._advance(handshake)

    def waits(self) -> dict[int, int]:
        """Descriptor: events, of every handshake that waits."""
        return {handshake.fd: handshake.events for handshake in self._pending}

    def advance(self, ready: Iterable[int]) -> None:
        """Go on with the handshakes whose descriptors are among *ready*."""
        for handshake in [handshake for handshake in self._pending if handshake.fd in ready]:
            self._advance(handshake)

    def _advance(self, handshake: Handshake) -> None:
        try:
            channel = handshake.step()
        except ChannelError as error:
            _complain(str(error))
            self._pending.remove(handshake)
            handshake.close()
            return
        if channel is not None:
            self._pending.remove(handshake)
            self._done.append(channel)

    def take(self) -> TlsChannel | None:
        """The next channel that has been let in; it is the caller's."""
        return self._done.popleft() if self._done else None

    def close(self) -> None:
        """Let go of everybody whom nobody took."""
        for handshake in self._pending:
            handshake.close()
        for channel in self._done:
            channel.close()
        self._pending.clear()
        self._done.clear()


def _complain(text: str) -> None:
    print(f"migration: {text}", file=sys.stderr)


def _connect(creds: Credentials, channel: Channel, expected_name: str = "") -> Connection:
    """A connection over *channel*, which is closed when there can be none."""
    try:
        if not channel.is_two_way():
            raise TlsError("it needs a transport that flows both ways")
        connection = Connection(creds.context, channel.read_fd, channel.write_fd)
        if expected_name:
            connection.expect_name(expected_name, is_address=_is_address(expected_name))
        return connection
    except TlsError as error:
        channel.close()
        raise ChannelError(f"no TLS on {channel.kind} '{channel.name}': {error}", channel=channel.name) from error


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


# ---- from parameters and objects ----


def client_for(options: MigrationOptions, find: FindObject, address: Address) -> TlsClient | None:
    """What the source's parameters ask for on a way to *address*; None without TLS, OptionError when it cannot be."""
    creds = _credentials(options, find, CLIENT)
    if creds is None:
        return None
    hostname = options.parameter("tls-hostname")
    if not hostname and isinstance(address, InetAddress):
        hostname = address.host
    return TlsClient(creds, hostname)


def server_for(options: MigrationOptions, find: FindObject) -> TlsServer | None:
    """What the destination's parameters ask for; None without TLS, OptionError when it cannot be.

    The authorization object is looked up anew for each peer, as in QEMU: it may come later, or change.
    """
    creds = _credentials(options, find, SERVER)
    if creds is None:
        return None
    authz_id = options.parameter("tls-authz")

    def is_allowed(identity: str) -> bool:
        authorizer = find(authz_id)
        if authorizer is None:
            raise OptionError(f"Cannot find QAuthZ object ID {authz_id}", name="tls-authz", value=authz_id)
        if not hasattr(authorizer, "is_allowed"):
            raise OptionError(f"Object '{authz_id}' is not a QAuthZ subclass", name="tls-authz", value=authz_id)
        return bool(authorizer.is_allowed(identity))

    return TlsServer(creds, is_allowed if authz_id else None)


def _credentials(options: MigrationOptions, find: FindObject, endpoint: str) -> Credentials | None:
    creds_id = options.parameter("tls-creds")
    if not creds_id:
        return None
    creds = find(creds_id)
    if creds is None:
        raise OptionError(f"No TLS credentials with id '{creds_id}'", name="tls-creds", value=creds_id)
    if not isinstance(creds, Credentials):
        raise OptionError(f"Object with id '{creds_id}' is not TLS credentials", name="tls-creds", value=creds_id)
    if creds.endpoint != endpoint:
        text = f"Expected TLS credentials for a {endpoint} endpoint"
        raise OptionError(text, name="tls-creds", value=creds_id)
    return creds
