TARGET_PAGE_SIZE: int

class RAMBlock:
    """One named piece of guest RAM, mapped in this process.

    *host_address* and *used_length* are multiples of 4096 bytes.  *fresh* says that nobody has written to the
    memory since it was mapped, so that it reads as zero everywhere; *anonymous* that it is
    private anonymous memory, where a page that is not populated is zero.  *shared*: mapped shared, so that another
    process may see writes; *named*: of a file by whose name others find it.  *owner* is kept alive with the block.
    """

    idstr: str
    host_address: int
    used_length: int
    max_length: int
    page_size: int
    guest_address: int
    shared: bool
    named: bool
    anonymous: bool
    fresh: bool
    owner: object
    def __init__(
        self,
        idstr: str,
        host_address: int,
        used_length: int,
        *,
        max_length: int = 0,
        page_size: int = 4096,
        guest_address: int = 0,
        shared: bool = False,
        named: bool = False,
        anonymous: bool = False,
        fresh: bool = False,
        owner: object = None,
    ) -> None: ...
    @property
    def pages(self) -> int: ...
    @property
    def is_at_both_ends(self) -> bool:
        """Whether the other end of a migration can have this very memory, and `x-ignore-shared` leaves it out.

        A file's memory is, mapped shared; that of a memfd is not, as in QEMU since 10.0: it has no name (machine.md §2).
        """
