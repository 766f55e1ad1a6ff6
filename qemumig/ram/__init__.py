"""Pages: which ones are dirty, which comes next, how one leaves and how it arrives.

    block     RAMBlock: a named piece of guest RAM
    bitmap    words and bits: one bit a target page
    dirty     bitmap sync: the hypervisor's log into the migration bitmap
    populated which pages exist at all: the others are zero
    scout     goes ahead of the walk where a core is free: protects, and finds zero pages
    save      the walk over the bitmap: one page after the other into the stream, by reference
    cache     what the destination has of a page, and how the page goes out because of it
    landing   where pages go at the destination, and which have come
    region    the pages of a block at their places in a file
    mapped    mapped-ram: the file around them
    load      records from the stream straight into guest RAM
    scan      a recorded stream's records, counted and found again: for tools
    scan_pages the pages that they leave: read, written to a file, compared

Truths that cross rooms:

 1. The chunk of a page is protected again *before* its bytes are read; a write in between makes it dirty again.
 2. Two versions of one page never fly on two channels without a sync between them.
 3. Guest pages never become Python objects: they go from guest RAM to the socket by `writev` and from the socket to
    guest RAM by `readv`, without the GIL.
"""
