"""The guest runs at the destination before its memory is there (postcopy.md).

    uffd        Userfaultfd: the kernel's descriptor for pages that are missing, or must not be written yet
    place       MissingMemory: which pages have arrived; PageReceiver: records of one channel, placed whole and once
    faults      FaultServer: what a vCPU touches and is not here becomes a request to the source
    answers     Answers: the return path, written by several threads
    blocktime   who waited for pages, and for how long
    discard     memory given back, so that touching it faults
    serve       the source: pages asked for first, else the walk; what the destination has, after the link broke
    requests    page requests as they come off the return path

       vCPU touches a page ─▶ userfaultfd ─▶ FaultServer ─▶ Answers ═══ REQ_PAGES ═══▶ RequestReader ─▶ PageServer
       vCPU goes on  ◀─ UFFDIO_COPY ◀─ PageReceiver ◀══════ page, at once ═════════════════════════════════┘

Who may wait for a page, and for whom.  Any thread that touches guest memory after LISTEN may sleep in the kernel until the
page has come: vCPU threads inside KVM_RUN, device models, the load of device state (the kernel writes the paravirtual
clock's page), a monitor that dumps memory.  What brings the page, from the fault to the placing, therefore

 1. never touches guest memory itself: it places pages, and reads records into buffers of its own;
 2. needs no GIL between two looks round: the fault thread none at all, the receivers only between two sections.  Whoever
    touches guest memory has let go of the GIL before (ctypes and the calls of `os` do), for a receiver that is between two
    sections would wait for it, and the page would never come;
 3. takes no lock that anybody holds while touching guest memory.

Truths:

 1. A page counts as received after it is placed, and is placed whole; a page that counts as received is never written to.
 2. A page that counts as received and is missing all the same is zero: precopy said so, and nobody has touched it yet.
    The fault thread gives it without asking the source, which would not answer.
 3. After the link broke nothing is forgotten: what is here stays, what was asked for is asked for again.
 4. A host page leaves the source once: whoever clears its bits, under the lock, sends it; on one channel, in one piece.
"""
