"""Packets of multifd: the one that opens a channel, and the header of every other one (multifd.md §2, §3).

    init      magic u32 · version u32 · uuid 16 · id u8 · 0 × 39                                          64 bytes
    header    magic u32 · version u32 · flags u32 · slots u32 · normal pages u32 · size of the data u32   1344 bytes
              number u64 · zero pages u32 · 0 × 28 · block name 256 · offsets u64 × 128

The header has the same length whatever it says; the data of the normal pages follow it.

Threads   any; pure functions, no GIL in the two that engines call.
Holds     (1) a header that parses has no more pages than slots, and no more slots than there are offsets
          (2) the length of the name is at most one less than its field, whatever the field holds
          (3) what a header without pages says about data, name and offsets is not looked at: 7.2 leaves old values there
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memchr, memcpy, memset

from ..errors import StreamError
from ..wire.format cimport (
    MULTIFD_FLAG_DEVICE_STATE,
    MULTIFD_HEADER_SIZE,
    MULTIFD_INIT_SIZE,
    MULTIFD_MAGIC,
    MULTIFD_NAME_SIZE,
    MULTIFD_PACKET_PAGES,
    MULTIFD_VERSION,
)
from ..wire.stream cimport get_be32, get_be64, put_be32, put_be64

cdef enum:
    # where the fields are
    AT_FLAGS = 8
    AT_SLOTS = 12
    AT_NORMAL_PAGES = 16
    AT_DATA_SIZE = 20
    AT_NUMBER = 24
    AT_ZERO_PAGES = 32
    AT_NAME = 64
    AT_OFFSETS = 320
    INIT_AT_UUID = 8
    INIT_AT_ID = 24
    UUID_SIZE = 16
    KNOWN_FLAGS = 0x3F            # SYNC and those of compression


cdef int parse_header(const uint8_t *header, Packet *packet) noexcept nogil:
    """Take *header*, MULTIFD_HEADER_SIZE bytes, apart; the fields read so far are there when it is refused."""
    cdef uint32_t index
    cdef const void *end
    packet.magic = get_be32(header)
    packet.version = get_be32(header + 4)
    packet.flags = get_be32(header + AT_FLAGS)
    packet.slots = get_be32(header + AT_SLOTS)
    packet.normal_pages = get_be32(header + AT_NORMAL_PAGES)
    packet.data_size = get_be32(header + AT_DATA_SIZE)
    packet.number = get_be64(header + AT_NUMBER)
    packet.zero_pages = get_be32(header + AT_ZERO_PAGES)
    packet.name_length = 0
    if packet.magic != MULTIFD_MAGIC:
        return PACKET_BAD_MAGIC
    if packet.version != MULTIFD_VERSION:
        return PACKET_BAD_VERSION
    if packet.flags & ~(<uint32_t> KNOWN_FLAGS):
        return PACKET_BAD_FLAGS
    if packet.slots > MULTIFD_PACKET_PAGES:
        return PACKET_TOO_MANY_SLOTS
    if packet.normal_pages > packet.slots or packet.zero_pages > packet.slots - packet.normal_pages:
        return PACKET_TOO_MANY_PAGES
    if packet.normal_pages + packet.zero_pages == 0:
        return PACKET_OK
    memcpy(packet.name, header + AT_NAME, MULTIFD_NAME_SIZE)
    end = memchr(packet.name, 0, MULTIFD_NAME_SIZE - 1)
    packet.name_length = <const uint8_t *> end - packet.name if end != NULL else MULTIFD_NAME_SIZE - 1
    for index in range(packet.normal_pages + packet.zero_pages):
        packet.offset[index] = get_be64(header + AT_OFFSETS + 8 * index)
    return PACKET_OK


cdef void fill_header(uint8_t *header, const Packet *packet) noexcept nogil:
    """Write *packet* as MULTIFD_HEADER_SIZE bytes."""
    cdef uint32_t index
    memset(header, 0, MULTIFD_HEADER_SIZE)
    put_be32(header, packet.magic)
    put_be32(header + 4, packet.version)
    put_be32(header + AT_FLAGS, packet.flags)
    put_be32(header + AT_SLOTS, packet.slots)
    put_be32(header + AT_NORMAL_PAGES, packet.normal_pages)
    put_be32(header + AT_DATA_SIZE, packet.data_size)
    put_be64(header + AT_NUMBER, packet.number)
    put_be32(header + AT_ZERO_PAGES, packet.zero_pages)
    memcpy(header + AT_NAME, packet.name, packet.name_length)
    for index in range(packet.normal_pages + packet.zero_pages):
        put_be64(header + AT_OFFSETS + 8 * index, packet.offset[index])


cdef str describe_fault(int status, const Packet *packet):
    """What is wrong with a header that was refused, and what was expected."""
    if status == PACKET_BAD_MAGIC:
        return f"magic {packet.magic:#010x} found, expected {MULTIFD_MAGIC:#010x}"
    if status == PACKET_BAD_VERSION:
        return f"version {packet.version} found, expected {MULTIFD_VERSION}"
    if status == PACKET_BAD_FLAGS and packet.flags & MULTIFD_FLAG_DEVICE_STATE:
        return f"flags {packet.flags:#x} announce device state, which no device here takes this way"
    if status == PACKET_BAD_FLAGS:
        return f"flags {packet.flags:#x} found, expected none besides {KNOWN_FLAGS:#x}"
    if status == PACKET_TOO_MANY_SLOTS:
        return f"{packet.slots} slots for pages, expected at most {MULTIFD_PACKET_PAGES}"
    return f"{packet.normal_pages} normal and {packet.zero_pages} zero pages in {packet.slots} slots"


# ---- the door ----


def encode_init(const uint8_t[::1] uuid not None, int channel_id) -> bytes:
    """The packet that opens channel *channel_id* of the machine with *uuid*; see packet.pyi."""
    cdef uint8_t packet[MULTIFD_INIT_SIZE]
    if uuid.shape[0] != UUID_SIZE or not 0 <= channel_id <= 255:
        raise ValueError(f"channel {channel_id} with a UUID of {uuid.shape[0]} bytes, expected 0 to 255 and {UUID_SIZE}")
    memset(packet, 0, MULTIFD_INIT_SIZE)
    put_be32(packet, MULTIFD_MAGIC)
    put_be32(packet + 4, MULTIFD_VERSION)
    memcpy(packet + INIT_AT_UUID, &uuid[0], UUID_SIZE)
    packet[INIT_AT_ID] = <uint8_t> channel_id
    return packet[:MULTIFD_INIT_SIZE]


def decode_init(const uint8_t[::1] packet not None) -> tuple[bytes, int]:
    """UUID and channel id of an init packet; see packet.pyi."""
    if packet.shape[0] != MULTIFD_INIT_SIZE:
        raise ValueError(f"{packet.shape[0]} bytes, expected {MULTIFD_INIT_SIZE}")
    magic = get_be32(&packet[0])
    version = get_be32(&packet[4])
    if magic != MULTIFD_MAGIC:
        raise StreamError(f"the first packet of a multifd channel has magic {magic:#010x}, expected {MULTIFD_MAGIC:#010x}")
    if version != MULTIFD_VERSION:
        raise StreamError(f"the first packet of a multifd channel has version {version}, expected {MULTIFD_VERSION}")
    return bytes(packet[INIT_AT_UUID:INIT_AT_UUID + UUID_SIZE]), packet[INIT_AT_ID]


def encode_header(
    *, flags=0, slots=MULTIFD_PACKET_PAGES, normal=(), zero=(), data_size=0, number=0, bytes name=b"",
    magic=MULTIFD_MAGIC, version=MULTIFD_VERSION, normal_pages=None, zero_pages=None,
) -> bytes:
    """A header as bytes, also one that no sender would send; see packet.pyi."""
    cdef Packet packet
    cdef uint8_t header[MULTIFD_HEADER_SIZE]
    offsets = [*normal, *zero]
    if len(offsets) > MULTIFD_PACKET_PAGES or len(name) > MULTIFD_NAME_SIZE:
        raise ValueError(f"{len(offsets)} pages of a block whose name has {len(name)} bytes")
    packet.magic, packet.version, packet.flags, packet.slots = magic, version, flags, slots
    packet.normal_pages, packet.zero_pages = len(normal), len(zero)
    packet.data_size, packet.number, packet.name_length = data_size, number, len(name)
    memcpy(packet.name, <const char *> name, len(name))
    for index, offset in enumerate(offsets):
        packet.offset[index] = offset
    fill_header(header, &packet)
    if normal_pages is not None:
        put_be32(header + AT_NORMAL_PAGES, normal_pages)
    if zero_pages is not None:
        put_be32(header + AT_ZERO_PAGES, zero_pages)
    return header[:MULTIFD_HEADER_SIZE]


def decode_header(const uint8_t[::1] header not None) -> dict:
    """The fields of a header; see packet.pyi."""
    cdef Packet packet
    cdef int status
    if header.shape[0] != MULTIFD_HEADER_SIZE:
        raise ValueError(f"{header.shape[0]} bytes, expected {MULTIFD_HEADER_SIZE}")
    status = parse_header(&header[0], &packet)
    if status != PACKET_OK:
        raise StreamError(f"header of a packet: {describe_fault(status, &packet)}")
    offsets = [packet.offset[index] for index in range(packet.normal_pages + packet.zero_pages)]
    return {
        "flags": packet.flags,
        "slots": packet.slots,
        "normal": offsets[:packet.normal_pages],
        "zero": offsets[packet.normal_pages:],
        "data_size": packet.data_size,
        "number": packet.number,
        "name": packet.name[:packet.name_length],
    }
