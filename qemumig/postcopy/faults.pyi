from .answers import Answers
from .place import MissingMemory

class FaultServer:
    """Asks the source, by *answers*, for the pages of *memory* that are touched and missing.

    *quit_fd*: an eventfd that ends `serve`.
    """

    memory: MissingMemory
    answers: Answers
    faults: int
    """Faults that the kernel told of."""
    merged: int
    """Of those: for pages that had been asked for already."""
    zeroes: int
    """Of those: for pages that precopy had said to be zero."""
    def __init__(self, memory: MissingMemory, answers: Answers, quit_fd: int) -> None: ...
    def serve(self) -> None:
        """Serve faults until the quit event; MachineError when the kernel refuses to go on."""
    def ask_again(self) -> int:
        """Ask for every page that was asked for and is not here; how many those are."""
