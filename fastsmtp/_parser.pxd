"""Declarations of the parser: its events and its state."""

cdef class Line:
    cdef readonly bytes verb
    cdef readonly bytes rest
    cdef readonly str local
    cdef readonly str domain
    cdef readonly Py_ssize_t tail
    cdef readonly bint too_long

cdef class Body:
    cdef readonly bytes chunk

cdef class BodyEnd:
    cdef readonly bytes chunk
    cdef readonly Py_ssize_t received
    cdef readonly bint delivered
    cdef readonly Py_ssize_t size
    cdef readonly Py_ssize_t header_end
    cdef readonly bint last
    cdef readonly bint bare
    cdef readonly bint eight_bit
    cdef readonly bint eight_bit_header
    cdef readonly bint too_big
    cdef readonly bint long_line
    cdef readonly bint long_header

cdef struct Text:
    # What is known of the message that is being read; reset as a whole when one begins.
    Py_ssize_t size            # octets stored
    Py_ssize_t read            # octets read
    Py_ssize_t header_end      # -1: not yet
    Py_ssize_t line_size       # octets of the line under way
    int header_state           # HEADER_*
    const char* name           # of the trace field that a header line may turn out to be
    int matched                # octets of it that were seen
    Py_ssize_t received
    bint delivered
    bint bare
    bint eight_bit
    bint eight_bit_header
    bint long_line

cdef class Parser:
    cdef bytes _buffer
    cdef Py_ssize_t _position  # first octet not yet interpreted
    cdef Py_ssize_t _searched  # no LF stands between _position and here
    cdef frozenset _barriers
    cdef int _command_line
    cdef int _auth_line
    cdef Py_ssize_t _text_line
    cdef Py_ssize_t _header
    cdef int _bare             # BARE_*
    cdef int _mode             # MODE_*
    cdef int _state            # DATA: STATE_*; BDAT: whether the last octet was a CR
    cdef bint _begun           # the connection's first octet has been looked at
    cdef bint _last
    cdef bytes _skipped_verb   # the verb of an over-long line, while its end is awaited
    cdef bint _skipped_cr
    cdef Py_ssize_t _skipped
    cdef Py_ssize_t _chunk     # octets of a BDAT chunk still to come
    cdef Py_ssize_t _limit
    cdef Text _text

    cdef bint _let_go(self)
    cdef object _begin_text(self)
    cdef object _lost(self, kind)
    cdef Py_ssize_t _verb_end(self, const unsigned char* octets, Py_ssize_t start, Py_ssize_t end) noexcept
    cdef bytes _verb(self, const unsigned char* octets, Py_ssize_t size)
    cdef Py_ssize_t _line_limit(self, const unsigned char* octets, Py_ssize_t size) noexcept
    cdef object _take_line(self)
    cdef void _take_path(self, Line line, const unsigned char* octets, Py_ssize_t size)
    cdef object _skip_line(self)
    cdef object _take_data(self)
    cdef object _take_chunk(self)
    cdef Py_ssize_t _unstuff(self, const unsigned char* source, Py_ssize_t size, unsigned char* target, Py_ssize_t* used, unsigned char* high, bint* ended) noexcept
    cdef void _inspect(self, const unsigned char* octets, Py_ssize_t size, unsigned char high) noexcept
    cdef void _find_header_end(self, const unsigned char* octets, Py_ssize_t size) noexcept
    cdef void _measure_lines(self, const unsigned char* octets, Py_ssize_t size) noexcept
    cdef BodyEnd _body_end(self, bint last, bytes chunk)
