TARGET_PAGE_SIZE: int

class RAMBlock:
    """One named piece of guest RAM, mapped in this process.

    *host_address* and *used_length* are multiples of 4096 bytes.  *fresh* says that nobody has written to the
    memory since it was mapped, so that it reads as zero everywhere; *anonymous* that it is
    private anonymous memory, where a page that is not populated is zero.  *owner* is kept alive with the block.
    """

    idstr: str
    host_address: int
    used_length: int
    max_length: int
    page_size: int
    guest_address: int
    shared: bool
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
        anonymous: bool = False,
        fresh: bool = False,
        owner: object = None,
    ) -> None: ...
    @property
    def pages(self) -> int: ...
