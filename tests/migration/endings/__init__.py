"""Migrations that end at a random moment, in every way there is, and the judgement of what they leave behind.

    python -m tests.migration.endings --runs 100 --seed 7 --kind cancel        one kind; without --kind all of them
    python -m tests.migration.endings --seed 7 --kind cancel --only 23         the one run that went wrong

    moments     links that break, cancels, yanks, refusals, full disks: two machines without KVM in this process
    processes   VMMs that are killed or told to quit: real guests under KVM
    judgement   what must be true afterwards, whatever the moment was (state-machine.md §5)

A run is its number and the seed: the same ones make the same choices.  What the scheduler does is not in them, so a run
that went wrong may have to be repeated.  Pytest does a handful of each kind (test_random_endings.py).
"""
