"""RAMBlock: one named piece of guest RAM.

A block is the unit of the wire: pages are addressed by the block's idstr and an offset in it.  It says nothing
of where the guest sees it (that may be in several places), except for `guest_address`, the first of them.
"""

TARGET_PAGE_SIZE = 4096


cdef class RAMBlock:
    def __init__(
        self,
        str idstr not None,
        uint64_t host_address,
        uint64_t used_length,
        *,
        uint64_t max_length=0,
        uint64_t page_size=4096,
        uint64_t guest_address=0,
        bint shared=False,
        bint named=False,
        bint anonymous=False,
        bint fresh=False,
        object owner=None,
    ):
        if not 0 < len(idstr.encode()) <= 255:
            raise ValueError(f"RAM block name {idstr!r} has {len(idstr.encode())} bytes, expected 1 to 255")
        if used_length % TARGET_PAGE_SIZE or host_address % TARGET_PAGE_SIZE:
            raise ValueError(
                f"RAM block {idstr!r}: address {host_address:#x} and length {used_length:#x} "
                f"are not multiples of {TARGET_PAGE_SIZE}"
            )
        self.idstr = idstr
        self.host_address = host_address
        self.used_length = used_length
        self.max_length = max(max_length, used_length)
        self.page_size = page_size
        self.guest_address = guest_address
        self.shared = shared
        self.named = named
        self.anonymous = anonymous
        self.fresh = fresh
        self.owner = owner

    @property
    def pages(self) -> int:
        """Target pages in use."""
        return self.used_length // TARGET_PAGE_SIZE

    @property
    def is_at_both_ends(self) -> bool:
        """Whether the other end of a migration can have this very memory, and `x-ignore-shared` leaves it out."""
        return self.shared and self.named

    def __repr__(self) -> str:
        return f"RAMBlock({self.idstr!r}, {self.used_length:#x} bytes at {self.host_address:#x})"
