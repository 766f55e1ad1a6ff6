"""What `tools/interop` is made of.

__main__    options, progress, exit status      trial       one migration, and the proof that it went well
matrix      rows × columns of trials            transports  the ways from one VMM to another
journey     one guest on many hops, random      peers       the VMMs, and what their versions ask for
report      the table, Markdown, JSON           guests      what the guest does meanwhile
"""
