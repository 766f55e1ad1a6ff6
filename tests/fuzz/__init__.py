"""Coverage-guided fuzzing of whatever comes from a peer or out of a file.

    python -m tests.fuzz --seconds 3600                  all targets in turn; needs clang and extra `fuzz` (atheris)
    python -m tests.fuzz --seconds 600 records deltas    some of them
    python -m tests.fuzz --keep                          choose anew what is kept in corpus/, from all that was found
    python -m pytest tests/fuzz                          load the kept corpus, in the ordinary build; needs neither

A target (targets/) is a function that loads one input and says whether that was taken or refused.  Everything else is a
`Fault`: another error than the one that is documented, a refusal without a place, a byte outside of the block, a page that
is not what an independent reader makes of the same bytes, a thread or a descriptor left behind, a hang, memory without
bounds.

The extensions are built once more for it, in a copy below .venv/ (build.py): with the coverage that libFuzzer follows, and
with AddressSanitizer and UndefinedBehaviorSanitizer, which end the run at the first finding.  Python code is followed, too.

An input is one byte or two that choose what this side is like, and then the bytes of the wire, folded (folding.py), so
that whole pages are small files.  corpus/TARGET/ holds the inputs that together reach everything that was ever reached;
what has once been a fault stays there.
"""
