"""Streams of compressed data, one a channel and as long as the migration: zlib and zstd (multifd.md §7).

QEMU's zstd stream is one frame that never ends; ours may be several frames, and QEMU's decompressor takes either.

In    the pages of one packet, some at a time
Out   the packet's bytes, flushed so that the other side can decompress all of them; the stream goes on in the next packet

    compressor     begin(target) · feed(data) · feed(data, last) ─▶ produced
    decompressor   begin(source) · fill(target) · fill(target)   ─▶ is_used_up

The libraries are the system's own, found by name (libraries.py): they are called without the GIL for a whole packet, and
decompress straight into guest RAM.

Threads   one object a channel, used by its thread; no GIL inside.
Holds     (1) nothing is written past the target, nothing read past the source
          (2) the guest may write to a page while it is compressed: zlib, which does not expect that, gets a copy; zstd
              makes one itself
          (3) after a failure the object is of no use any more
"""

from libc.stdint cimport uint8_t, uint64_t, uintptr_t
from libc.string cimport memcpy, memset
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from .libraries import ZLIB, ZSTD, functions_of

cdef enum:
    COPY_SIZE = 0x8000            # bytes that are copied and compressed at a time: they stay in the first-level cache

# the libraries', from their stable interfaces
cdef enum:
    Z_NO_FLUSH = 0
    Z_SYNC_FLUSH = 2
    Z_FINISH = 4
    Z_OK = 0
    Z_STREAM_END = 1
    Z_BUF_ERROR = -5              # no progress was possible
    Z_RLE = 3                     # strategy: repeats of the byte before, and no search for others
    Z_DEFAULT_STRATEGY = 0
    ZSTD_c_compressionLevel = 100
    ZSTD_c_targetLength = 106     # strategy "fast", that of levels 1 and 2: how hurried; above 0, literals go uncoded
    ZSTD_e_continue = 0
    ZSTD_e_flush = 1
    ZSTD_e_end = 2

cdef enum:
    LAST_FAST_LEVEL = 2
    WAYS = 3                      # at most: to do everything, to hurry, to rush
    HURRIED = 4                   # repeats are looked for at every fourth place, where nothing was found lately
    RUSHED = 32
    TRIAL_PERIOD = 16             # packets from one trial to the next …
    TRIAL_PERIOD_NS = 50_000_000  # … or less where the link is slow: what is in a packet then counts for more
    SAMPLE_SIZE = 0x10000         # bytes that a trial looks at …
    SAMPLE_BOUND = 0x11000        # … and more than they can become
    WORTH_IT = 32                 # a longer way must save more than this part of what a shorter one sends

cdef struct ZStream:
    const uint8_t *next_in
    unsigned int avail_in
    unsigned long total_in
    uint8_t *next_out
    unsigned int avail_out
    unsigned long total_out
    const char *msg
    void *state
    void *zalloc
    void *zfree
    void *opaque
    int data_type
    unsigned long adler
    unsigned long reserved

cdef struct ZstdIn:
    const void *src
    size_t size
    size_t pos

cdef struct ZstdOut:
    void *dst
    size_t size
    size_t pos

ctypedef int (*ZInit)(ZStream *, const char *, int) noexcept nogil
ctypedef int (*ZDeflateInit)(ZStream *, int, const char *, int) noexcept nogil
ctypedef int (*ZStep)(ZStream *, int) noexcept nogil
ctypedef int (*ZEnd)(ZStream *) noexcept nogil
ctypedef int (*ZParams)(ZStream *, int, int) noexcept nogil
ctypedef void *(*ZstdCreate)() noexcept nogil
ctypedef size_t (*ZstdFree)(void *) noexcept nogil
ctypedef size_t (*ZstdSet)(void *, int, int) noexcept nogil
ctypedef size_t (*ZstdCompress)(void *, ZstdOut *, ZstdIn *, int) noexcept nogil
ctypedef size_t (*ZstdCompressWhole)(void *, void *, size_t, const void *, size_t) noexcept nogil
ctypedef size_t (*ZstdDecompress)(void *, ZstdOut *, ZstdIn *) noexcept nogil
ctypedef unsigned int (*ZstdIsError)(size_t) noexcept nogil
ctypedef const char *(*ZstdErrorName)(size_t) noexcept nogil


cdef class Compressor:
    """One stream of compressed data; a subclass overrides `feed` and `failure`."""

    cdef void begin(self, uint8_t *target, size_t capacity) noexcept nogil:
        """Begin a packet, which goes to *target*."""
        self.target = target
        self.capacity = capacity
        self.produced = 0

    cdef int feed(self, const uint8_t *data, size_t length, bint last) noexcept nogil:
        """Compress *data*; *last*: the packet ends with it."""
        return CODEC_FAILED

    cdef str failure(self):
        return "this compressor compresses nothing"

    def compress(self, const uint8_t[::1] data not None, size_t capacity=0x100000) -> bytes:
        """One packet of *data*; see compress.pyi."""
        cdef bytearray target = bytearray(capacity)
        cdef uint8_t[::1] view = target
        cdef int status
        self.begin(&view[0], capacity)
        with nogil:
            status = self.feed(&data[0], data.shape[0], True)
        if status != CODEC_OK:
            raise ValueError(f"{data.shape[0]} bytes do not compress into {capacity}: {self.failure()}")
        return bytes(target[:self.produced])


cdef class Decompressor:
    """The other end of such a stream; a subclass overrides `fill` and `failure`."""

    cdef void begin(self, const uint8_t *source, size_t length) noexcept nogil:
        """Begin with the packet at *source*."""
        self.source = source
        self.length = length
        self.consumed = 0

    cdef int fill(self, uint8_t *target, size_t length) noexcept nogil:
        """The next *length* bytes of the packet's contents into *target*."""
        return CODEC_FAILED

    cdef bint is_used_up(self) noexcept nogil:
        """Whether the packet holds nothing else than what was asked for."""
        cdef uint8_t byte
        # what ends a block makes no output, and what the library holds back would show now
        return self.fill(&byte, 1) == CODEC_SHORT and self.consumed == self.length

    cdef str failure(self):
        return "this decompressor decompresses nothing"

    def decompress(self, const uint8_t[::1] data not None, size_t length) -> bytes:
        """The *length* bytes that one packet holds; see compress.pyi."""
        cdef bytearray target = bytearray(max(length, <size_t> 1))
        cdef uint8_t[::1] view = target
        cdef int status
        cdef bint is_all
        self.begin(&data[0] if data.shape[0] else NULL, data.shape[0])
        with nogil:
            status = self.fill(&view[0], length)
            is_all = status == CODEC_OK and self.is_used_up()
        if status == CODEC_FAILED:
            raise ValueError(self.failure())
        if not is_all:
            raise ValueError(f"{data.shape[0]} bytes make {'fewer' if status == CODEC_SHORT else 'more'} than {length}")
        return bytes(target[:length])


cdef class HurryTrial:
    """Whether to hurry, and leave out what takes long and may save nothing; a subclass compresses in each way.

    In noise nothing repeats and no byte is frequent, which the libraries find out only by doing all the work.  So a
    piece is compressed in all ways now and then, and the lengths decide.  Ways are numbered, 0 does everything.
    """

    cdef int ways
    cdef int way                  # the one that is gone now
    cdef unsigned int packets     # since the last trial
    cdef uint64_t tried_ns        # when that was
    cdef uint8_t sample[SAMPLE_SIZE]
    cdef uint8_t result[SAMPLE_BOUND]

    cdef size_t length_by(self, int way, size_t length) noexcept nogil:
        """What the sample becomes; 0 after a failure."""
        return 0

    cdef bint changes(self, const uint8_t *data, size_t length) noexcept nogil:
        """A packet ends with *data*, which may change meanwhile: True when it is to go another way from then on."""
        cdef int best
        if not self.is_due():
            return False
        best = self.best_way(data, min(length, <size_t> SAMPLE_SIZE))
        if best == self.way:
            return False
        self.way = best
        return True

    cdef bint is_due(self) noexcept nogil:
        cdef timespec now
        cdef uint64_t now_ns
        clock_gettime(CLOCK_MONOTONIC, &now)
        now_ns = <uint64_t> now.tv_sec * 1_000_000_000 + now.tv_nsec
        self.packets += 1
        if self.packets < TRIAL_PERIOD and now_ns - self.tried_ns < TRIAL_PERIOD_NS:
            return False
        self.packets = 0
        self.tried_ns = now_ns
        return True

    cdef int best_way(self, const uint8_t *data, size_t length) noexcept nogil:
        """The shortest way that no longer one beats by enough."""
        cdef size_t made, least = 0
        cdef int way, best = 0
        memcpy(self.sample, data, length)
        for way in range(self.ways):
            made = self.length_by(way, length)
            if made == 0:
                return 0  # the packet itself will tell what is wrong
            if way == 0 or least + made // WORTH_IT >= made:
                best = way
            least = made if way == 0 else min(least, made)
        return best


cdef class Deflater:
    """A compressor of zlib, at *level*."""

    cdef ZStream stream
    cdef ZStep step
    cdef ZParams set_parameters
    cdef ZEnd end
    cdef int level

    def __cinit__(self, int level):
        functions = functions_of(ZLIB)
        cdef ZDeflateInit init = <ZDeflateInit> <uintptr_t> functions["deflateInit_"]
        self.step = <ZStep> <uintptr_t> functions["deflate"]
        self.set_parameters = <ZParams> <uintptr_t> functions["deflateParams"]
        self.level = level
        memset(&self.stream, 0, sizeof(ZStream))
        if init(&self.stream, level, b"1", sizeof(ZStream)) != Z_OK:
            raise MemoryError(f"no zlib compressor of level {level}")
        self.end = <ZEnd> <uintptr_t> functions["deflateEnd"]

    def __dealloc__(self):
        if self.end != NULL:
            self.end(&self.stream)

    cdef int go(self, int way) noexcept nogil:
        """Way 1: look only for repeats of the byte before, from here on; the stream goes on."""
        return self.set_parameters(&self.stream, self.level, Z_RLE if way else Z_DEFAULT_STRATEGY)


cdef class ZlibTrial(HurryTrial):
    """Whether runs of one byte are all that repeats."""

    cdef Deflater deflater
    cdef ZEnd reset

    def __cinit__(self, int level):
        self.ways = 2
        self.deflater = Deflater(level)
        self.reset = <ZEnd> <uintptr_t> functions_of(ZLIB)["deflateReset"]

    cdef size_t length_by(self, int way, size_t length) noexcept nogil:
        cdef ZStream *stream = &self.deflater.stream
        stream.next_in, stream.avail_in = self.sample, 0
        stream.next_out, stream.avail_out = self.result, SAMPLE_BOUND
        if self.reset(stream) != Z_OK or self.deflater.go(way) != Z_OK:
            return 0
        stream.avail_in = <unsigned int> length
        return stream.total_out if self.deflater.step(stream, Z_FINISH) == Z_STREAM_END else 0


cdef class ZlibCompressor(Compressor):
    """zlib at *level*, 0 to 9; a trial says whether to search for repeats at all."""

    cdef Deflater deflater
    cdef ZlibTrial trial          # None: there is nothing to leave out
    cdef uint8_t copy[COPY_SIZE]

    def __cinit__(self, int level):
        self.deflater = Deflater(level)
        self.trial = ZlibTrial(level) if level else None

    cdef int feed(self, const uint8_t *data, size_t length, bint last) noexcept nogil:
        cdef const uint8_t *piece = data
        cdef size_t rest = length, part
        cdef int status = CODEC_OK
        while rest and status == CODEC_OK:
            part = min(rest, <size_t> COPY_SIZE)
            memcpy(self.copy, piece, part)
            self.deflater.stream.next_in = self.copy
            self.deflater.stream.avail_in = <unsigned int> part
            piece += part
            rest -= part
            status = self.deflate_all(Z_SYNC_FLUSH if last and rest == 0 else Z_NO_FLUSH)
        if last and status == CODEC_OK and self.trial is not None and self.trial.changes(data, length):
            status = self.change()
        return status

    cdef int change(self) noexcept nogil:
        """Nothing is held back behind the packet's flush: the next one is compressed the other way."""
        cdef int result = self.deflater.go(self.trial.way)
        self.note_produced()
        return CODEC_OK if result == Z_OK else CODEC_FAILED

    cdef int deflate_all(self, int flush) noexcept nogil:
        """Compress the copy; a flush is complete when it leaves room."""
        cdef int result
        self.deflater.stream.next_out = self.target + self.produced
        self.deflater.stream.avail_out = <unsigned int> (self.capacity - self.produced)
        result = self.deflater.step(&self.deflater.stream, flush)
        self.note_produced()
        if result != Z_OK and result != Z_BUF_ERROR:
            return CODEC_FAILED
        return CODEC_OK if self.deflater.stream.avail_out else CODEC_FULL

    cdef void note_produced(self) noexcept nogil:
        self.produced = self.capacity - self.deflater.stream.avail_out

    cdef str failure(self):
        if self.deflater.stream.avail_out == 0:
            return "there is no room for what comes out"
        return message_of(&self.deflater.stream)


cdef class ZlibDecompressor(Decompressor):
    """The other end of a zlib stream."""

    cdef ZStream stream
    cdef ZStep step
    cdef ZEnd end

    def __cinit__(self):
        functions = functions_of(ZLIB)
        cdef ZInit init = <ZInit> <uintptr_t> functions["inflateInit_"]
        self.step = <ZStep> <uintptr_t> functions["inflate"]
        memset(&self.stream, 0, sizeof(ZStream))
        if init(&self.stream, b"1", sizeof(ZStream)) != Z_OK:
            raise MemoryError("no zlib decompressor")
        self.end = <ZEnd> <uintptr_t> functions["inflateEnd"]

    def __dealloc__(self):
        if self.end != NULL:
            self.end(&self.stream)

    cdef int fill(self, uint8_t *target, size_t length) noexcept nogil:
        cdef int result
        self.stream.next_in = self.source + self.consumed
        self.stream.avail_in = <unsigned int> (self.length - self.consumed)
        self.stream.next_out = target
        self.stream.avail_out = <unsigned int> length
        result = self.step(&self.stream, Z_SYNC_FLUSH)
        self.consumed = self.length - self.stream.avail_in
        if result != Z_OK and result != Z_BUF_ERROR:
            return CODEC_FAILED  # the end of the stream, too: it has none
        return CODEC_SHORT if self.stream.avail_out else CODEC_OK

    cdef str failure(self):
        return message_of(&self.stream)


cdef str message_of(const ZStream *stream):
    return "the stream ends" if stream.msg == NULL else (<bytes> stream.msg).decode("ascii", "replace")


cdef class ZstdContext:
    """A compressor of the library, at *level*."""

    cdef void *handle
    cdef ZstdSet set_parameter
    cdef ZstdFree free
    cdef ZstdIsError is_error

    def __cinit__(self, int level):
        functions = functions_of(ZSTD)
        cdef ZstdCreate create = <ZstdCreate> <uintptr_t> functions["ZSTD_createCCtx"]
        self.set_parameter = <ZstdSet> <uintptr_t> functions["ZSTD_CCtx_setParameter"]
        self.free = <ZstdFree> <uintptr_t> functions["ZSTD_freeCCtx"]
        self.is_error = <ZstdIsError> <uintptr_t> functions["ZSTD_isError"]
        self.handle = create()
        if self.handle == NULL or self.is_error(self.set_parameter(self.handle, ZSTD_c_compressionLevel, level)):
            raise MemoryError(f"no zstd compressor of level {level}")

    def __dealloc__(self):
        if self.free != NULL:
            self.free(self.handle)

    cdef void go(self, int way) noexcept nogil:
        """Which way the next frame, at a fast level, is compressed."""
        cdef int *hurry = [0, HURRIED, RUSHED]
        self.set_parameter(self.handle, ZSTD_c_targetLength, hurry[way])


cdef class ZstdTrial(HurryTrial):
    """Whether it saves anything to code literals, which repeat nothing, by their frequency, and to search everywhere."""

    cdef ZstdContext context
    cdef ZstdCompressWhole compress_whole

    def __cinit__(self, int level):
        self.ways = WAYS
        self.context = ZstdContext(level)
        self.compress_whole = <ZstdCompressWhole> <uintptr_t> functions_of(ZSTD)["ZSTD_compress2"]

    cdef size_t length_by(self, int way, size_t length) noexcept nogil:
        cdef size_t produced
        self.context.go(way)
        produced = self.compress_whole(self.context.handle, self.result, SAMPLE_BOUND, self.sample, length)
        return 0 if self.context.is_error(produced) else produced


cdef class ZstdCompressor(Compressor):
    """zstd at *level*, 0 (its default) to 20.

    At the levels at which coding literals is most of the work a trial says whether to do without.  When its answer
    changes the frame ends with the packet, and the next one opens another: decompressors, QEMU's too, go on with it.
    """

    cdef ZstdContext context
    cdef ZstdCompress compress_some
    cdef ZstdErrorName error_name
    cdef size_t result
    cdef ZstdTrial trial          # None: never in a hurry

    def __cinit__(self, int level):
        functions = functions_of(ZSTD)
        self.compress_some = <ZstdCompress> <uintptr_t> functions["ZSTD_compressStream2"]
        self.error_name = <ZstdErrorName> <uintptr_t> functions["ZSTD_getErrorName"]
        self.context = ZstdContext(level)
        self.trial = ZstdTrial(level) if 1 <= level <= LAST_FAST_LEVEL else None

    cdef int feed(self, const uint8_t *data, size_t length, bint last) noexcept nogil:
        cdef bint changes = last and self.trial is not None and self.trial.changes(data, length)
        cdef int directive = ZSTD_e_continue
        if last:
            directive = ZSTD_e_end if changes else ZSTD_e_flush
        cdef int status = self.compress_all(data, length, directive)
        if changes and status == CODEC_OK:
            self.context.go(self.trial.way)
        return status

    cdef int compress_all(self, const uint8_t *data, size_t length, int directive) noexcept nogil:
        cdef ZstdIn source
        cdef ZstdOut target
        source.src, source.size, source.pos = data, length, 0
        target.dst, target.size, target.pos = self.target, self.capacity, self.produced
        while True:
            self.result = self.compress_some(self.context.handle, &target, &source, directive)
            self.produced = target.pos
            if self.context.is_error(self.result):
                return CODEC_FAILED
            if source.pos == source.size and (directive == ZSTD_e_continue or self.result == 0):
                return CODEC_OK
            if target.pos == target.size:
                return CODEC_FULL

    cdef str failure(self):
        if not self.context.is_error(self.result):
            return "there is no room for what comes out"
        return (<bytes> self.error_name(self.result)).decode("ascii", "replace")


cdef class ZstdDecompressor(Decompressor):
    """The other end of a zstd stream."""

    cdef void *context
    cdef ZstdDecompress decompress_some
    cdef ZstdFree free
    cdef ZstdIsError is_error
    cdef ZstdErrorName error_name
    cdef size_t result

    def __cinit__(self):
        functions = functions_of(ZSTD)
        cdef ZstdCreate create = <ZstdCreate> <uintptr_t> functions["ZSTD_createDCtx"]
        self.decompress_some = <ZstdDecompress> <uintptr_t> functions["ZSTD_decompressStream"]
        self.free = <ZstdFree> <uintptr_t> functions["ZSTD_freeDCtx"]
        self.is_error = <ZstdIsError> <uintptr_t> functions["ZSTD_isError"]
        self.error_name = <ZstdErrorName> <uintptr_t> functions["ZSTD_getErrorName"]
        self.context = create()
        if self.context == NULL:
            raise MemoryError("no zstd decompressor")

    def __dealloc__(self):
        if self.free != NULL:
            self.free(self.context)

    cdef int fill(self, uint8_t *target, size_t length) noexcept nogil:
        cdef ZstdIn source
        cdef ZstdOut output
        cdef size_t consumed, made
        source.src, source.size, source.pos = self.source, self.length, self.consumed
        output.dst, output.size, output.pos = target, length, 0
        while True:
            consumed, made = source.pos, output.pos
            self.result = self.decompress_some(self.context, &output, &source)
            self.consumed = source.pos
            if self.is_error(self.result):
                return CODEC_FAILED
            if output.pos == output.size:
                return CODEC_OK
            if source.pos == consumed and output.pos == made:
                return CODEC_SHORT

    cdef str failure(self):
        return (<bytes> self.error_name(self.result)).decode("ascii", "replace")
