"""Packets of multifd for compiled rooms: a header, taken apart or to be put together."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from ..wire.format cimport MULTIFD_NAME_SIZE, MULTIFD_PACKET_PAGES

cdef enum PacketStatus:
    PACKET_OK = 0
    PACKET_BAD_MAGIC = 1
    PACKET_BAD_VERSION = 2
    PACKET_BAD_FLAGS = 3              # one that nobody knows, or of device state
    PACKET_TOO_MANY_SLOTS = 4
    PACKET_TOO_MANY_PAGES = 5

cdef struct Packet:
    uint32_t magic
    uint32_t version
    uint32_t flags
    uint32_t slots                    # of the sender: at most MULTIFD_PACKET_PAGES
    uint32_t normal_pages             # with data behind the header
    uint32_t data_size                # bytes behind the header; without pages it means nothing
    uint64_t number
    uint32_t zero_pages
    size_t name_length
    uint8_t name[MULTIFD_NAME_SIZE]   # of the block
    uint64_t offset[MULTIFD_PACKET_PAGES]  # in the block, bytes: of the normal pages, then of the zero pages

cdef int parse_header(const uint8_t *header, Packet *packet) noexcept nogil
cdef void fill_header(uint8_t *header, const Packet *packet) noexcept nogil
cdef str describe_fault(int status, const Packet *packet)
