"""Bytes in, events out: framing, tokenizing, dot-unstuffing, BDAT counting, and every limit on octets.

`feed(bytes)` stores, `next()` interprets: what the octets behind a command mean depends on our own answer to it, so
the parser stops at a barrier (a verb of `barriers`, end-of-data, the end of a BDAT chunk) until it is told the next
mode. The same octets give the same events however the reads were cut. Only CR LF . CR LF ends a message.

The message is read by a state machine, octet by octet; a block of which a vectorised scan shows that it holds no bare
CR, no bare LF and no line that begins with a dot is copied whole instead. The states are the truth, the scan only
says where they have nothing to do.

Not here: what a command means, what is done about a bare CR or LF in a message (it is said in BodyEnd).
Raises FrameError when the stream is lost. RFC 5321 2.3.8, 4.1.1.4, 4.5.2, 4.5.3.1; RFC 3030.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.unicode cimport PyUnicode_DecodeASCII
from libc.string cimport memchr, memcmp, memcpy

cdef extern from "Python.h":
    ctypedef struct PyObject
    PyObject* new_bytes "PyBytes_FromStringAndSize"(const char* octets, Py_ssize_t size) except NULL
    int _PyBytes_Resize(PyObject** octets, Py_ssize_t size) except -1
    void Py_XDECREF(PyObject* object)

cdef extern from "string.h":
    void* memrchr(const void* octets, int octet, size_t size) nogil

cdef extern from *:
    """
    #if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) \
        && !defined(__SANITIZE_ADDRESS__)
    #define WIDE __attribute__((target_clones("avx2", "default")))
    #else
    #define WIDE
    #endif

    /* Whether any two adjacent octets are a bare CR, a bare LF or the start of a dot line; adds the octets to
       *high. A plain loop without exits: the compiler makes vectors of it. */
    WIDE static int fastsmtp_dirty(const unsigned char *p, Py_ssize_t n, unsigned char *high)
    {
        unsigned char bad = 0, bits = 0;
        for (Py_ssize_t i = 0; i < n - 1; i++) {
            unsigned char a = p[i], b = p[i + 1];
            bad |= (unsigned char)((a == '\\r') ^ (b == '\\n')) | (unsigned char)((a == '\\n') & (b == '.'));
            bits |= a;
        }
        *high |= bits | p[n - 1];
        return bad;
    }

    /* The same without dots, for BDAT. */
    WIDE static int fastsmtp_bare(const unsigned char *p, Py_ssize_t n)
    {
        unsigned char bad = 0;
        for (Py_ssize_t i = 0; i < n - 1; i++)
            bad |= (unsigned char)((p[i] == '\\r') ^ (p[i + 1] == '\\n'));
        return bad;
    }

    WIDE static unsigned char fastsmtp_high(const unsigned char *p, Py_ssize_t n)
    {
        unsigned char bits = 0;
        for (Py_ssize_t i = 0; i < n; i++)
            bits |= p[i];
        return bits & 0x80;
    }
    """
    int fastsmtp_dirty(const unsigned char* p, Py_ssize_t n, unsigned char* high) noexcept nogil
    int fastsmtp_bare(const unsigned char* p, Py_ssize_t n) noexcept nogil
    unsigned char fastsmtp_high(const unsigned char* p, Py_ssize_t n) noexcept nogil

cdef enum:
    MODE_STOPPED
    MODE_COMMAND
    MODE_LINE
    MODE_DATA
    MODE_BDAT
    MODE_DISCARD

cdef enum:
    BARE_REJECT
    BARE_NORMALIZE
    BARE_KEEP

# DATA: what has been read of the line under way. An octet that is named here and not yet handed out is held.
cdef enum:
    STATE_START      # nothing: CRLF stands before
    STATE_MIDDLE     # something
    STATE_CR         # ... and a CR, held
    STATE_DOT        # a dot, held
    STATE_DOT_CR     # a dot and a CR, held

# Where the search for the header's empty line stands, in the octets handed out.
cdef enum:
    HEADER_LINE_START
    HEADER_IN_LINE
    HEADER_NAME          # at a line's start, in what may be the name of a trace field
    HEADER_CR            # a CR at a line's start
    HEADER_DONE

BARE = {"reject": BARE_REJECT, "normalize": BARE_NORMALIZE, "keep": BARE_KEEP}

cdef const char* RECEIVED = b"received"
cdef const char* DELIVERED_TO = b"delivered-to"

# What a character may be part of, for the paths that are read here.
cdef enum:
    ATEXT = 1        # RFC 5321 4.1.2
    LET_DIG = 2      # with the underscore, which real names have

cdef unsigned char[256] CLASSES

def _fill_classes():
    for octet in b"!#$%&'*+/=?^`{|}~-":
        CLASSES[octet] = ATEXT
    for octet in b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ_abcdefghijklmnopqrstuvwxyz":
        CLASSES[octet] = ATEXT | LET_DIG

_fill_classes()

# A line that goes on for longer is no mistake; reading on for its end is not worth it.
cdef enum:
    LONGEST_LINE = 65536
    BLOCK = 4096
    SMALL_BLOCK = 64


cdef inline bint same_letters(const unsigned char* octets, const char* lower, int size) noexcept:
    """Whether octets are this word, in any case; its letters are given in lower case."""
    cdef int i
    for i in range(size):
        if octets[i] != lower[i] and octets[i] + 32 != lower[i]:
            return False
    return True


class FrameError(Exception):
    def __init__(self, kind):
        super().__init__(kind)
        self.kind = kind


@cython.final
@cython.freelist(64)
cdef class Line:
    pass


@cython.final
@cython.freelist(64)
cdef class Body:
    pass


@cython.final
@cython.freelist(64)
cdef class BodyEnd:
    pass


@cython.final
cdef class Parser:
    def __init__(
        self,
        frozenset barriers,
        *,
        int command_line=2048,
        int auth_line=12288,
        Py_ssize_t text_line=1048576,
        Py_ssize_t header=262144,
        str bare="reject",
    ):
        self._buffer = b""
        self._barriers = barriers
        self._command_line = command_line
        self._auth_line = auth_line
        self._text_line = text_line
        self._header = header
        self._bare = BARE[bare]
        self._mode = MODE_COMMAND
        self._text.header_end = -1

    def another(self):
        cdef Parser parser = Parser.__new__(Parser)
        parser._buffer = b""
        parser._barriers = self._barriers
        parser._command_line = self._command_line
        parser._auth_line = self._auth_line
        parser._text_line = self._text_line
        parser._header = self._header
        parser._bare = self._bare
        parser._mode = MODE_COMMAND
        parser._text.header_end = -1
        return parser

    @property
    def unread(self):
        return PyBytes_GET_SIZE(self._buffer) - self._position

    @property
    def stopped(self):
        return self._mode == MODE_STOPPED

    @property
    def in_text(self):
        return self._mode == MODE_DATA or self._mode == MODE_BDAT

    @property
    def too_big(self):
        return self._text.size > self._limit

    @property
    def header_end(self):
        return self._text.header_end

    def feed(self, bytes data not None):
        if self._position == PyBytes_GET_SIZE(self._buffer):
            self._buffer = data
            self._searched = 0
        else:
            self._buffer = self._buffer[self._position:] + data
            self._searched = max(self._searched - self._position, 0)
        self._position = 0

    def command(self):
        self._mode = MODE_COMMAND

    def line(self):
        self._mode = MODE_LINE

    def data(self, Py_ssize_t limit):
        self._begin_text()
        self._limit = limit
        self._state = STATE_START
        self._mode = MODE_DATA

    def bdat(self, Py_ssize_t size, bint last, Py_ssize_t limit, bint first):
        if first:
            self._begin_text()
            self._state = STATE_START
        self._limit = limit
        self._chunk = size
        self._last = last
        self._mode = MODE_BDAT

    def discard(self):
        self._mode = MODE_DISCARD

    def next(self):
        if self._mode == MODE_STOPPED:
            return None
        if self._mode == MODE_BDAT and self._chunk == 0:
            return self._body_end(self._last, b"")
        if self._let_go():
            return None
        if self._mode == MODE_COMMAND or self._mode == MODE_LINE:
            line = self._take_line()
            self._let_go()
            return line
        if self._mode == MODE_DATA:
            return self._take_data()
        if self._mode == MODE_BDAT:
            return self._take_chunk()
        self._buffer = b""
        self._position = 0
        return None

    cdef bint _let_go(self):
        """An idle session keeps no input alive. Whether all is interpreted."""
        if self._position < PyBytes_GET_SIZE(self._buffer):
            return False
        self._buffer = b""
        self._position = 0
        return True

    cdef object _begin_text(self):
        self._text = Text(size=0, read=0, header_end=-1, line_size=0, header_state=HEADER_LINE_START, name=NULL,
                          matched=0, received=0, delivered=False, bare=False, eight_bit=False,
                          eight_bit_header=False, long_line=False)

    cdef object _lost(self, kind):
        self._mode = MODE_DISCARD
        raise FrameError(kind)

    # Lines

    cdef object _take_line(self):
        cdef const unsigned char* octets = <const unsigned char*>PyBytes_AS_STRING(self._buffer)
        cdef Py_ssize_t end = PyBytes_GET_SIZE(self._buffer)
        cdef Py_ssize_t start = self._position
        cdef const unsigned char* found
        cdef Py_ssize_t at, size, limit, space
        cdef Line line

        if not self._begun:
            self._begun = True
            if octets[start] == 0x16:
                return self._lost("tls")
        if self._skipped:
            return self._skip_line()

        if self._searched < start:
            self._searched = start
        found = <const unsigned char*>memchr(octets + self._searched, b"\n", end - self._searched)
        if found == NULL:
            self._searched = end
            if end - start > self._line_limit(octets + start, end - start):
                return self._skip_line()
            return None
        at = found - octets
        size = at + 1 - start
        limit = self._line_limit(octets + start, size)
        if size > limit:
            return self._skip_line()
        self._position = at + 1
        if size > 1 and octets[at - 1] == b"\r":
            at -= 1
        elif self._bare == BARE_REJECT:
            return self._lost("bare_lf")

        line = Line.__new__(Line)
        if self._mode == MODE_LINE:
            line.verb = b""
            line.rest = PyBytes_FromStringAndSize(<const char*>octets + start, at - start)
            self._mode = MODE_STOPPED
            return line
        while at > start and (octets[at - 1] == b" " or octets[at - 1] == b"\t"):
            at -= 1
        space = self._verb_end(octets, start, at)
        line.verb = self._verb(octets + start, space - start)
        space = min(space + 1, at)
        line.rest = PyBytes_FromStringAndSize(<const char*>octets + space, at - space)
        self._take_path(line, octets + space, at - space)
        if line.verb in self._barriers:
            self._mode = MODE_STOPPED
        return line

    cdef void _take_path(self, Line line, const unsigned char* octets, Py_ssize_t size):
        """Reads the path of nearly every MAIL and RCPT: `<dot-string@domain>`, all of it ASCII, or `<>`. What is not
        of that form is left to the command parser, so nothing here refuses."""
        cdef Py_ssize_t local, domain, label, at
        cdef char[256] lowered
        if line.verb == b"MAIL":
            at = 5
            if size < 7 or not same_letters(octets, b"from:", 5):
                return
        elif line.verb == b"RCPT":
            at = 3
            if size < 5 or not same_letters(octets, b"to:", 3):
                return
        else:
            return
        if octets[at] != c"<":
            return
        local = at = at + 1
        while at < size and (CLASSES[octets[at]] & ATEXT or (octets[at] == c"." and CLASSES[octets[at - 1]] & ATEXT)):
            at += 1
        if at == local and at < size and octets[at] == c">":
            domain = at
        else:
            if at == local or at >= size or octets[at] != c"@" or octets[at - 1] == c".":
                return
            domain = label = at + 1
            at = domain
            while at < size and octets[at] != c">":
                if octets[at] == c"." or octets[at] == c"-":
                    # A hyphen stands between letters, a dot between labels.
                    if at == label or (octets[at] == c"." and octets[at - 1] == c"-"):
                        return
                    if octets[at] == c".":
                        label = at + 1
                elif not CLASSES[octets[at]] & LET_DIG:
                    return
                if at - label > 63 or at - domain > 255:
                    return
                lowered[at - domain] = octets[at] + 32 if c"A" <= octets[at] <= c"Z" else octets[at]
                at += 1
            if at >= size or at == label or octets[at - 1] == c"-" or at - label > 63 or at - domain > 255:
                return
            if at + 1 - (local - 1) > 256:
                return
            line.domain = PyUnicode_DecodeASCII(lowered, at - domain, NULL)
            line.local = PyUnicode_DecodeASCII(<const char*>octets + local, domain - 1 - local, NULL)
            line.tail = at + 1
            return
        line.domain = line.local = ""
        line.tail = at + 1

    cdef inline Py_ssize_t _verb_end(self, const unsigned char* octets, Py_ssize_t start, Py_ssize_t end) noexcept:
        cdef const unsigned char* space = <const unsigned char*>memchr(octets + start, b" ", end - start)
        return end if space == NULL else space - octets

    cdef inline bytes _verb(self, const unsigned char* octets, Py_ssize_t size):
        cdef bytes verb = PyBytes_FromStringAndSize(NULL, size)
        cdef char* target = PyBytes_AS_STRING(verb)
        cdef Py_ssize_t i
        for i in range(size):
            target[i] = octets[i] - 32 if c"a" <= octets[i] <= c"z" else octets[i]
        return verb

    cdef inline Py_ssize_t _line_limit(self, const unsigned char* octets, Py_ssize_t size) noexcept:
        if self._mode == MODE_LINE:
            return self._auth_line
        if (
            size > 4
            and (octets[0] | 32) == c"a" and (octets[1] | 32) == c"u"
            and (octets[2] | 32) == c"t" and (octets[3] | 32) == c"h"
            and (octets[4] == c" " or octets[4] == c"\r" or octets[4] == c"\n")
        ):
            return self._auth_line
        return self._command_line

    cdef object _skip_line(self):
        """Reads an over-long line to its end, keeping nothing but its verb."""
        cdef const unsigned char* octets = <const unsigned char*>PyBytes_AS_STRING(self._buffer)
        cdef Py_ssize_t end = PyBytes_GET_SIZE(self._buffer)
        cdef Py_ssize_t start = self._position
        cdef const unsigned char* found
        cdef Py_ssize_t at
        cdef bint after_cr
        cdef Line line

        if not self._skipped:
            self._skipped_cr = False
            # A verb is short: what is longer than the longest we know is none, and is not kept.
            self._skipped_verb = b"" if self._mode == MODE_LINE else self._verb(
                octets + start, self._verb_end(octets, start, min(start + 16, end)) - start)
        found = <const unsigned char*>memchr(octets + start, b"\n", end - start)
        at = end if found == NULL else found - octets
        if self._skipped + (at - start) + (found != NULL) > LONGEST_LINE:
            return self._lost("line_too_long")
        after_cr = octets[at - 1] == b"\r" if at > start else self._skipped_cr
        if found == NULL:
            self._skipped += end - start
            self._skipped_cr = after_cr
            self._position = end
            return None
        self._position = at + 1
        self._skipped = 0
        if not after_cr and self._bare == BARE_REJECT:
            return self._lost("bare_lf")
        line = Line.__new__(Line)
        line.verb = self._skipped_verb
        line.rest = b""
        line.too_long = True
        if self._mode == MODE_LINE or line.verb in self._barriers:
            self._mode = MODE_STOPPED
        return line

    # Messages

    cdef object _take_data(self):
        cdef const unsigned char* source = <const unsigned char*>PyBytes_AS_STRING(self._buffer) + self._position
        cdef Py_ssize_t size = PyBytes_GET_SIZE(self._buffer) - self._position
        # Two octets may be held from before; a bare LF that becomes CRLF makes two of one.
        cdef Py_ssize_t room = 2 + (2 * size if self._bare == BARE_NORMALIZE else size)
        cdef PyObject* chunk = new_bytes(NULL, room)
        cdef unsigned char* target = <unsigned char*>PyBytes_AS_STRING(<object>chunk)
        cdef Py_ssize_t used = 0
        cdef Py_ssize_t made
        cdef unsigned char high = 0
        cdef bint ended = False
        cdef Body body

        try:
            made = self._unstuff(source, size, target, &used, &high, &ended)
            self._position += used
            self._text.read += used
            self._inspect(target, made, high)
            if (self._text.read - 1) // 10 >= self._limit:  # over ten times the limit, without overflow
                return self._lost("too_much")
            if made == 0 or self._text.size > self._limit:
                return self._body_end(True, b"") if ended else None
            # Shrinks in place; a slice would copy.
            _PyBytes_Resize(&chunk, made)
            if ended:
                return self._body_end(True, <bytes>chunk)
            body = Body.__new__(Body)
            body.chunk = <bytes>chunk
            return body
        finally:
            Py_XDECREF(chunk)

    cdef Py_ssize_t _unstuff(
        self, const unsigned char* source, Py_ssize_t size, unsigned char* target, Py_ssize_t* used,
        unsigned char* high, bint* ended
    ) noexcept:
        """Copies octets from `source` to `target` up to the end of data; returns how many were made."""
        cdef const unsigned char* p = source
        cdef const unsigned char* end = source + size
        cdef const unsigned char* stop = source
        cdef const unsigned char* rough = source    # up to here a block was dirty somewhere: small ones are tried
        # A small message comes in one read with its end, which is no part of a clean block.
        cdef const unsigned char* tail = end - 3 if size > 3 and memcmp(end - 3, b".\r\n", 3) == 0 else end
        cdef unsigned char* out = target
        cdef int state = self._state
        cdef Py_ssize_t block
        cdef unsigned char octet

        while p < end:
            if p == stop:
                # A clean block is copied whole; the octets from here to a new `stop` go through the states.
                if state != STATE_MIDDLE and state != STATE_START:
                    stop = p + 1
                else:
                    block = min((tail if p < tail else end) - p, BLOCK if p >= rough else SMALL_BLOCK)
                    if (
                        (p[0] == c"." and state == STATE_START)
                        or p[0] == c"\n"
                        or block == 1
                        or fastsmtp_dirty(p, block, high)
                    ):
                        if block > SMALL_BLOCK:
                            rough = p + block
                            continue
                        stop = p + block
                    else:
                        # A CR at the block's end waits for what follows it, as in the states.
                        if p[block - 1] == c"\r":
                            block -= 1
                        memcpy(out, p, block)
                        out += block
                        p += block
                        state = STATE_START if (p - 1)[0] == c"\n" else STATE_MIDDLE
                        stop = p
                        continue
            octet = p[0]
            high[0] |= octet
            p += 1
            if state == STATE_MIDDLE:
                if octet == c"\r":
                    state = STATE_CR
                    continue
            elif state == STATE_START:
                if octet == c".":
                    state = STATE_DOT
                    continue
                if octet == c"\r":
                    state = STATE_CR
                    continue
                state = STATE_MIDDLE
            elif state == STATE_CR:
                if octet == c"\n":
                    out[0] = c"\r"
                    out[1] = c"\n"
                    out += 2
                    state = STATE_START
                    continue
                self._text.bare = True
                out[0] = c" " if self._bare == BARE_NORMALIZE else c"\r"
                out += 1
                if octet == c"\r":
                    continue
                state = STATE_MIDDLE
            elif state == STATE_DOT:
                # RFC 5321 4.5.2: a first dot with anything behind it on its line is deleted.
                if octet == c"\r":
                    state = STATE_DOT_CR
                    continue
                state = STATE_MIDDLE
            else:
                if octet == c"\n":
                    ended[0] = True
                    break
                self._text.bare = True
                out[0] = c" " if self._bare == BARE_NORMALIZE else c"\r"
                out += 1
                if octet == c"\r":
                    state = STATE_CR
                    continue
                state = STATE_MIDDLE
            # In the middle of a line now: a LF is bare, it ends no line that a dot could follow.
            if octet == c"\n":
                self._text.bare = True
                if self._bare == BARE_NORMALIZE:
                    out[0] = c"\r"
                    out += 1
            out[0] = octet
            out += 1
        self._state = state
        used[0] = p - source
        return out - target

    cdef object _take_chunk(self):
        cdef Py_ssize_t size = min(PyBytes_GET_SIZE(self._buffer) - self._position, self._chunk)
        cdef const unsigned char* octets = <const unsigned char*>PyBytes_AS_STRING(self._buffer) + self._position
        cdef bytes chunk
        cdef Body body

        if (self._state == STATE_CR) != (octets[0] == c"\n") or fastsmtp_bare(octets, size):
            self._text.bare = True
        self._state = STATE_CR if octets[size - 1] == c"\r" else STATE_MIDDLE
        self._inspect(octets, size, 0xff)
        self._text.read += size
        self._chunk -= size
        self._position += size
        if self._text.size > self._limit:
            return self._body_end(self._last, b"") if self._chunk == 0 else None
        chunk = PyBytes_FromStringAndSize(<const char*>octets, size)
        if self._chunk == 0:
            return self._body_end(self._last, chunk)
        body = Body.__new__(Body)
        body.chunk = chunk
        return body

    cdef BodyEnd _body_end(self, bint last, bytes chunk):
        cdef BodyEnd end = BodyEnd.__new__(BodyEnd)
        self._mode = MODE_STOPPED
        end.chunk = chunk
        end.received = self._text.received
        end.delivered = self._text.delivered
        end.last = last
        end.size = self._text.size
        end.header_end = self._text.size if self._text.header_end < 0 else self._text.header_end
        end.bare = self._text.bare or (last and self._state == STATE_CR)
        end.eight_bit = self._text.eight_bit
        end.eight_bit_header = self._text.eight_bit_header
        end.too_big = self._text.size > self._limit
        end.long_line = self._text.long_line
        end.long_header = end.header_end > self._header
        return end

    cdef void _inspect(self, const unsigned char* octets, Py_ssize_t size, unsigned char high) noexcept:
        """Notes what is said of a message, for octets that are handed out; without the high bit in `high` none of
        them is 8-bit."""
        cdef Py_ssize_t before = self._text.size
        cdef Py_ssize_t header
        if size == 0:
            return
        if self._text.header_end < 0:
            self._find_header_end(octets, size)
            header = size if self._text.header_end < 0 else self._text.header_end - before
        else:
            header = 0
        if high & 0x80:
            if fastsmtp_high(octets, header):
                self._text.eight_bit_header = True
            if not self._text.eight_bit and fastsmtp_high(octets + header, size - header):
                self._text.eight_bit = True
        self._measure_lines(octets, size)
        self._text.size += size

    cdef void _find_header_end(self, const unsigned char* octets, Py_ssize_t size) noexcept:
        """Looks for the empty line, and for lines that begin like a trace field."""
        cdef const unsigned char* p = octets
        cdef const unsigned char* end = octets + size
        cdef int state = self._text.header_state
        while p < end:
            if state == HEADER_IN_LINE:
                p = <const unsigned char*>memchr(p, b"\n", end - p)
                if p == NULL:
                    break
                state = HEADER_LINE_START
            elif state == HEADER_NAME:
                if (p[0] | 32) != self._text.name[self._text.matched]:
                    state = HEADER_IN_LINE
                    continue
                self._text.matched += 1
                if self._text.name[self._text.matched] == 0:
                    if self._text.name == RECEIVED:
                        self._text.received += 1
                    else:
                        self._text.delivered = True
                    state = HEADER_IN_LINE
            elif p[0] == c"\n":
                state = HEADER_DONE
                self._text.header_end = self._text.size + (p + 1 - octets)
                break
            elif state == HEADER_LINE_START and ((p[0] | 32) == c"r" or (p[0] | 32) == c"d"):
                self._text.name = RECEIVED if (p[0] | 32) == c"r" else DELIVERED_TO
                self._text.matched = 1
                state = HEADER_NAME
            else:
                state = HEADER_CR if p[0] == c"\r" and state == HEADER_LINE_START else HEADER_IN_LINE
            p += 1
        self._text.header_state = state

    cdef void _measure_lines(self, const unsigned char* octets, Py_ssize_t size) noexcept:
        """Looks for a line over the limit, in strides: where the last LF of a stride of the limit's length stands,
        the next stride begins."""
        cdef Py_ssize_t at = 0
        cdef Py_ssize_t stride
        cdef const unsigned char* found
        while at < size:
            stride = min(self._text_line - self._text.line_size, size - at)
            if stride > 0:
                found = <const unsigned char*>memrchr(octets + at, b"\n", stride)
                if found != NULL:
                    at = found + 1 - octets
                    self._text.line_size = 0
                    continue
                self._text.line_size += stride
                at += stride
            else:
                self._text.long_line = True
                found = <const unsigned char*>memchr(octets + at, b"\n", size - at)
                if found == NULL:
                    break
                at = found + 1 - octets
                self._text.line_size = 0
