"""Every number of the wire, once; grouped as a stream is read (stream.md, ram.md)."""

cpdef enum:
    # file header (stream.md §2)
    QEMU_VM_FILE_MAGIC = 0x5145564D           # "QEVM"
    QEMU_VM_FILE_VERSION_COMPAT = 2           # obsolete; refused
    QEMU_VM_FILE_VERSION = 3

cpdef enum SectionType:
    """The byte that opens an element of the stream (stream.md §3)."""
    QEMU_VM_EOF = 0x00                        # the end of the sections
    QEMU_VM_SECTION_START = 0x01              # a live section begins
    QEMU_VM_SECTION_PART = 0x02               # more of it
    QEMU_VM_SECTION_END = 0x03                # the last of it
    QEMU_VM_SECTION_FULL = 0x04               # device state, whole
    QEMU_VM_SUBSECTION = 0x05                 # inside device state only
    QEMU_VM_VMDESCRIPTION = 0x06              # once, after EOF
    QEMU_VM_CONFIGURATION = 0x07              # once, after the file header
    QEMU_VM_COMMAND = 0x08                    # between sections
    QEMU_VM_SECTION_FOOTER = 0x7E             # closes START, PART, END and FULL

cpdef enum MigCommand:
    """Commands of the source, inside COMMAND elements (stream.md §9)."""
    MIG_CMD_INVALID = 0
    MIG_CMD_OPEN_RETURN_PATH = 1
    MIG_CMD_PING = 2
    MIG_CMD_POSTCOPY_ADVISE = 3
    MIG_CMD_POSTCOPY_LISTEN = 4
    MIG_CMD_POSTCOPY_RUN = 5
    MIG_CMD_POSTCOPY_RAM_DISCARD = 6
    MIG_CMD_PACKAGED = 7
    MIG_CMD_ENABLE_COLO = 8
    MIG_CMD_POSTCOPY_RESUME = 9
    MIG_CMD_RECV_BITMAP = 10
    MIG_CMD_SWITCHOVER_START = 11             # since 10.0; off unless asked for

cpdef enum MigReturnPath:
    """Messages of the destination on the return path (stream.md §10)."""
    MIG_RP_MSG_INVALID = 0
    MIG_RP_MSG_SHUT = 1
    MIG_RP_MSG_PONG = 2
    MIG_RP_MSG_REQ_PAGES_ID = 3
    MIG_RP_MSG_REQ_PAGES = 4
    MIG_RP_MSG_RECV_BITMAP = 5
    MIG_RP_MSG_RESUME_ACK = 6
    MIG_RP_MSG_SWITCHOVER_ACK = 7             # since 8.1

cpdef enum:
    MIG_RP_MAX_LENGTH = 512                   # a longer message is an error

cpdef enum RamSaveFlag:
    """Low bits of a RAM record's head; the page's offset fills the rest (ram.md §2)."""
    RAM_SAVE_FLAG_FULL = 0x001                # obsolete; refused
    RAM_SAVE_FLAG_ZERO = 0x002                # followed by one fill byte
    RAM_SAVE_FLAG_MEM_SIZE = 0x004            # the list of RAM blocks, once, in START
    RAM_SAVE_FLAG_PAGE = 0x008                # followed by the page
    RAM_SAVE_FLAG_EOS = 0x010                 # ends the body of a section
    RAM_SAVE_FLAG_CONTINUE = 0x020            # same block as the previous page: no name follows
    RAM_SAVE_FLAG_XBZRLE = 0x040              # followed by a delta
    RAM_SAVE_FLAG_HOOK = 0x080                # RDMA only
    RAM_SAVE_FLAG_COMPRESS_PAGE = 0x100       # until 9.0
    RAM_SAVE_FLAG_MULTIFD_FLUSH = 0x200       # since 8.1

cpdef enum:
    # mapped-ram (ram.md §10), since 9.0
    MAPPED_RAM_HDR_VERSION = 1
    MAPPED_RAM_HDR_SIZE = 28                  # version u32; page size, bitmap offset, pages offset u64
    MAPPED_RAM_FILE_OFFSET_ALIGNMENT = 0x100000  # of the pages of a block

cpdef enum:
    ENCODING_FLAG_XBZRLE = 0x01               # the first byte behind the head of an XBZRLE record; no other is known

cpdef enum:
    TARGET_PAGE_BITS = 12
    TARGET_PAGE_SIZE = 4096                   # x86-64
    RAM_SECTION_VERSION = 4                   # of section "ram"; every other one is refused

cpdef enum:
    # packets of multifd (multifd.md §2, §3)
    MULTIFD_MAGIC = 0x11223344
    MULTIFD_VERSION = 1
    MULTIFD_INIT_SIZE = 64                    # the first packet of a channel
    MULTIFD_PACKET_PAGES = 128                # slots for offsets in every other one
    MULTIFD_HEADER_SIZE = 1344                # 320 + 8 × slots
    MULTIFD_NAME_SIZE = 256                   # of the field for the block's name
    MULTIFD_DATA_LIMIT = 0x100000             # bytes behind a header; more are refused when they are compressed

cpdef enum MultifdFlag:
    """Flags of a packet (multifd.md §4)."""
    MULTIFD_FLAG_NOCOMP = 0x00
    MULTIFD_FLAG_SYNC = 0x01
    MULTIFD_FLAG_ZLIB = 0x02
    MULTIFD_FLAG_ZSTD = 0x04
    MULTIFD_FLAG_QPL = 0x08                   # since 9.1
    MULTIFD_FLAG_UADK = 0x10                  # since 9.1
    MULTIFD_FLAG_QATZIP = 0x20                # since 9.2
    MULTIFD_FLAG_COMPRESSION_MASK = 0x3E
    MULTIFD_FLAG_DEVICE_STATE = 0x40          # since 10.0
