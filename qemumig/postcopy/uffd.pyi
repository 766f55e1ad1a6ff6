DEVICE: str
THREAD_ID: int
MISSING_HUGETLBFS: int
MISSING_SHMEM: int
WRITE_PROTECT: int
WRITE_PROTECT_SHARED: int
WRITE_PROTECT_MISSING: int

def open_descriptor() -> int:
    """A new userfaultfd that also tells of what the kernel itself touches; MachineError says what would permit it."""

def offered_features() -> int:
    """UFFD_FEATURE_… that the kernel offers; MachineError when it offers nothing at all to us."""

class Userfaultfd:
    """An open userfaultfd with those features of *wanted* that the kernel offers.

    Raises MachineError, with what would help, when this process may not have one.
    """

    fd: int
    features: int
    def __init__(self, wanted: int = 0) -> None: ...
    def close(self) -> None:
        """Give the descriptor back; the kernel treats all ranges as ordinary memory again, and wakes who waits."""
    def register_missing(self, address: int, length: int, name: str) -> bool:
        """Tell of missing pages in the range; True when the kernel can place zero pages there."""
    def register_protected(self, address: int, length: int, name: str) -> None:
        """Tell of writes to protected pages in the range."""
    def release(self, address: int, length: int) -> None:
        """Nothing of the range is protected any more, nor told of; whoever waits goes on."""
    def unregister(self, address: int, length: int) -> None:
        """The range is ordinary memory again; who waits for a page of it goes on."""
