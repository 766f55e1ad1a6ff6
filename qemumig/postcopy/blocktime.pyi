from collections.abc import Sequence

class FaultTimes:
    """Who waited for pages, and for how long; *thread_ids* are the kernel's numbers of the vCPU threads."""

    vcpus: int
    def __init__(self, thread_ids: Sequence[int]) -> None: ...
    def all_blocked_ns(self) -> int:
        """How long all vCPUs waited at once."""
    def vcpu_blocked_ns(self) -> list[int]:
        """How long each vCPU waited."""
    def vcpu_latency_ns(self) -> list[int]:
        """What a wait of each vCPU took on average."""
    def other_latency_ns(self) -> int:
        """What a wait of everybody else took on average."""
    def mean_latency_ns(self) -> int:
        """What a wait took on average."""
    def count(self) -> int:
        """Waits that have ended."""
    def distribution(self) -> list[int]:
        """How many waits fell into each octave of microseconds."""
    def percentile_us(self, share: float) -> float:
        """The latency that *share* (0 … 1) of all waits did not exceed, in µs, to a sixteenth of its octave."""
