"""Octets out: batches of files written, flushed and named, with the GIL released; lines of the log; last words.

In: bytes objects and ranges of other files. Out: for each file 0 or an errno; 0 is said only when content and
name are on stable storage. At no moment is a part of a file under a final name; mode 0600 stands before the
first byte. What is borrowed while the GIL is released are immutable objects that the arguments keep alive.
An error of one file (no room, quota, permission) is that file's only, and its temporary file is removed. A
failed syncfs is nobody's in particular: OSError, and the whole batch counts as not delivered, even what has
its name by then (it comes again). No flush is repeated: the second would say OK while the data is gone.
A flush that says OK is not believed either: the file system has to confirm it (`confirm`).
Not here: what the files hold and where they go (delivery/maildir.py), when to try again.
syncfs(2) reports write errors since Linux 5.8, relative to when its descriptor was opened.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_AsStringAndSize, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.float cimport PyFloat_AS_DOUBLE
from libc.errno cimport (
    EDQUOT, EEXIST, EINTR, EINVAL, ENAMETOOLONG, ENODATA, ENOENT, ENOSPC, ENOSYS, EOPNOTSUPP, errno
)
from libc.math cimport isfinite
from libc.stdint cimport int64_t
from libc.stdio cimport snprintf
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memchr, memcpy, memmove, strcpy, strlen, strrchr

import os

cdef extern from "<sys/types.h>" nogil:
    ctypedef long off_t

cdef extern from "<fcntl.h>" nogil:
    int AT_FDCWD, O_RDONLY, O_WRONLY, O_CREAT, O_EXCL, O_CLOEXEC, O_NOFOLLOW, O_DIRECTORY, O_NONBLOCK
    int c_open "open"(const char *path, int flags)
    int c_openat "openat"(int directory, const char *path, int flags, unsigned int mode)
    int FALLOC_FL_KEEP_SIZE
    int c_fallocate "fallocate"(int fd, int mode, off_t offset, off_t length)

cdef extern from "<stdio.h>" nogil:
    int c_renameat "renameat"(int from_directory, const char *name, int to_directory, const char *path)

cdef extern from "<sys/socket.h>" nogil:
    int MSG_DONTWAIT, MSG_MORE, MSG_NOSIGNAL, SHUT_WR
    ssize_t c_send "send"(int fd, const void *octets, size_t length, int flags)
    int c_shutdown "shutdown"(int fd, int how)

cdef extern from "<sys/stat.h>" nogil:
    int c_mkdir "mkdir"(const char *path, unsigned int mode)

cdef extern from "<sys/uio.h>" nogil:
    cdef struct iovec:
        void *iov_base
        size_t iov_len
    ssize_t c_writev "writev"(int fd, const iovec *vector, int count)

cdef extern from "<unistd.h>" nogil:
    ssize_t c_write "write"(int fd, const void *data, size_t length)
    ssize_t c_pread "pread"(int fd, void *data, size_t length, off_t offset)
    int c_close "close"(int fd)
    int c_fsync "fsync"(int fd)
    int c_fdatasync "fdatasync"(int fd)
    int c_syncfs "syncfs"(int fd)
    int c_unlinkat "unlinkat"(int directory, const char *name, int flags)

cdef extern from "Python.h":
    bint PyUnicode_IS_COMPACT_ASCII(object text) noexcept
    const unsigned char *PyUnicode_1BYTE_DATA(object text) noexcept
    Py_ssize_t PyUnicode_GET_LENGTH(object text) noexcept
    long long PyLong_AsLongLongAndOverflow(object number, int *overflow) except? -1
    char *PyOS_double_to_string(double value, char form, int precision, int flags, int *kind) except NULL
    void PyMem_Free(void *memory) noexcept

cdef enum:
    PATH_SIZE = 4096  # PATH_MAX, with the NUL
    LINE_SIZE = 4096  # PIPE_BUF
    WIDTH = 512  # characters of a value in the log that is shown whole, as in log.py
    ITEMS = WIDTH // 16  # of a tuple
    VECTOR_LIMIT = 1024  # IOV_MAX
    BUFFER_SIZE = 256 * 1024
    # A file is flushed after every so many octets, so that no flush of others waits for all of it.
    FLUSH_EVERY = 1024 * 1024

cdef struct Segment:
    const char *data  # NULL: a range of the file `source`
    const char *source
    off_t offset
    size_t length

cdef struct File:
    const char *temporary
    const char *mailbox
    const char *name
    const Segment *segments
    Py_ssize_t count
    bint strip
    int64_t size  # octets written
    int error

cdef struct Writer:
    int fd
    bint strip
    char *buffer
    size_t used
    size_t unflushed
    int64_t size


# Every function below returns 0 or an errno.


cdef int write_all(int fd, const char *data, size_t length) noexcept nogil:
    cdef ssize_t written
    while length:
        written = c_write(fd, data, length)
        if written >= 0:
            data += written
            length -= <size_t>written
        elif errno != EINTR:
            return errno
    return 0


cdef int drain(Writer *writer) noexcept nogil:
    """Writes out what the buffer holds."""
    cdef int error = write_all(writer.fd, writer.buffer, writer.used)
    if error:
        return error
    writer.size += <int64_t>writer.used
    writer.unflushed += writer.used
    writer.used = 0
    if writer.unflushed >= FLUSH_EVERY:
        writer.unflushed = 0
        if c_fdatasync(writer.fd):
            return errno
    return 0


cdef size_t copy_without_cr(char *to, const char *data, size_t length) noexcept nogil:
    """Copies all but the CRs and returns how many octets that was. `to` may be `data`."""
    cdef const char *end = data + length
    cdef const char *cr
    cdef char *start = to
    cdef size_t run
    while True:
        cr = <const char *>memchr(data, c'\r', <size_t>(end - data))
        run = <size_t>((end if cr == NULL else cr) - data)
        memmove(to, data, run)
        to += run
        if cr == NULL:
            return <size_t>(to - start)
        data = cr + 1


cdef int put(Writer *writer, const char *data, size_t length) noexcept nogil:
    """Adds octets from memory."""
    cdef size_t take
    cdef int error
    while length:
        take = min(length, BUFFER_SIZE - writer.used)
        if writer.strip:
            writer.used += copy_without_cr(writer.buffer + writer.used, data, take)
        else:
            memcpy(writer.buffer + writer.used, data, take)
            writer.used += take
        data += take
        length -= take
        if writer.used == BUFFER_SIZE:
            error = drain(writer)
            if error:
                return error
    return 0


cdef int put_range(Writer *writer, const Segment *segment) noexcept nogil:
    """Adds a range of a file. ENODATA: there is no such file, or it ends before the range does."""
    cdef off_t offset = segment.offset
    cdef size_t left = segment.length
    cdef char *end
    cdef ssize_t got
    cdef int error = 0
    # O_NONBLOCK: a FIFO that somebody put there is an error (ESPIPE), not a wait for its writer
    cdef int fd = c_open(segment.source, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK)
    if fd < 0:
        return ENODATA if errno == ENOENT else errno
    while left:
        if writer.used > BUFFER_SIZE // 2:
            error = drain(writer)
            if error:
                break
        end = writer.buffer + writer.used
        got = c_pread(fd, end, min(left, BUFFER_SIZE - writer.used), offset)
        if got > 0:
            offset += got
            left -= <size_t>got
            writer.used += copy_without_cr(end, end, <size_t>got) if writer.strip else <size_t>got
        elif got == 0:
            error = ENODATA
            break
        elif errno != EINTR:
            error = errno
            break
    c_close(fd)
    return error


cdef int write_segments(Writer *writer, const File *file) noexcept nogil:
    cdef const Segment *segment
    cdef Py_ssize_t i
    cdef int error
    for i in range(file.count):
        segment = &file.segments[i]
        if segment.data != NULL:
            error = put(writer, segment.data, segment.length)
        else:
            error = put_range(writer, segment)
        if error:
            return error
    return drain(writer)


cdef void write_file(int directory, File *file, char *buffer, bint flush) noexcept nogil:
    """Writes the temporary file; on an error there is none."""
    cdef Writer writer
    writer.fd = -1
    while writer.fd < 0:
        writer.fd = c_openat(
            directory, file.temporary, O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC | O_NOFOLLOW, 0o600
        )
        if writer.fd < 0 and errno != EINTR:
            file.error = errno
            return
    writer.strip = file.strip
    writer.buffer = buffer
    writer.used = 0
    writer.unflushed = 0
    writer.size = 0
    file.error = write_segments(&writer, file)
    file.size = writer.size
    if not file.error and flush and c_fdatasync(writer.fd):
        file.error = errno
    if c_close(writer.fd) and not file.error:
        file.error = errno
    if file.error:
        c_unlinkat(directory, file.temporary, 0)


cdef int flush_folder(const char *path) noexcept nogil:
    cdef int error = 0
    cdef int fd = c_open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC)
    if fd < 0:
        return errno
    if c_fsync(fd):
        error = errno
    c_close(fd)
    return error


cdef int flush_parent(char *path) noexcept nogil:
    cdef char *slash = strrchr(path, c'/')
    cdef int error
    if slash == NULL:
        return flush_folder(".")
    if slash == path:
        return flush_folder("/")
    slash[0] = 0
    error = flush_folder(path)
    slash[0] = c'/'
    return error


cdef int make_folder(char *path, bint flush) noexcept nogil:
    """Makes a folder, and its parents first, each flushed into its parent before anything is made in it."""
    cdef char *slash
    cdef int error
    if c_mkdir(path, 0o700):
        if errno == EEXIST:
            return 0
        if errno != ENOENT:
            return errno
        slash = strrchr(path, c'/')
        if slash == NULL or slash == path:
            return ENOENT
        slash[0] = 0
        error = make_folder(path, flush)
        slash[0] = c'/'
        if error:
            return error
        if c_mkdir(path, 0o700) and errno != EEXIST:
            return errno
    return flush_parent(path) if flush else 0


cdef int make_mailbox(const char *mailbox, bint flush) noexcept nogil:
    """Makes a Maildir. `new` comes last: a mailbox that can be delivered to is whole."""
    cdef char path[PATH_SIZE]
    cdef size_t length = strlen(mailbox)
    cdef const char *folders[3]
    cdef int error, i
    folders[:] = ["/tmp", "/cur", "/new"]
    if length + 4 >= PATH_SIZE:
        return ENAMETOOLONG
    strcpy(path, mailbox)
    error = make_folder(path, flush)
    if error:
        return error
    for i in range(3):
        strcpy(path + length, folders[i])
        if c_mkdir(path, 0o700) and errno != EEXIST:
            return errno
    return flush_folder(mailbox) if flush else 0


cdef int rename_into(int directory, const File *file, bint flush) noexcept nogil:
    cdef char path[PATH_SIZE]
    cdef int error
    cdef int length = snprintf(
        path, PATH_SIZE, "%s/new/%s,S=%lld", file.mailbox, file.name, <long long>file.size
    )
    if length < 0 or length >= PATH_SIZE:
        return ENAMETOOLONG
    if c_renameat(directory, file.temporary, AT_FDCWD, path):
        if errno != ENOENT:
            return errno
        error = make_mailbox(file.mailbox, flush)
        if error:
            return error
        if c_renameat(directory, file.temporary, AT_FDCWD, path):
            return errno
    return flush_parent(path) if flush else 0


cdef void name_file(int directory, File *file, bint flush) noexcept nogil:
    """Moves the temporary file to where it belongs; on an error it is gone."""
    file.error = rename_into(directory, file, flush)
    if file.error:
        c_unlinkat(directory, file.temporary, 0)


cdef int run_batch(int directory, File *files, Py_ssize_t count, char *buffer) noexcept nogil:
    """Two flushes for all: one before the first name is given, one behind the last."""
    cdef Py_ssize_t i
    cdef Py_ssize_t good = 0
    cdef int error
    for i in range(count):
        write_file(directory, &files[i], buffer, False)
        good += not files[i].error
    if good and c_syncfs(directory):
        error = errno
        for i in range(count):
            if not files[i].error:
                c_unlinkat(directory, files[i].temporary, 0)
        return error
    good = 0
    for i in range(count):
        if not files[i].error:
            name_file(directory, &files[i], False)
            good += not files[i].error
    if good and c_syncfs(directory):
        return errno
    return 0


cdef void run_each(int directory, File *files, Py_ssize_t count, char *buffer) noexcept nogil:
    """Each file with flushes of its own: content, name, new folders."""
    cdef Py_ssize_t i
    for i in range(count):
        write_file(directory, &files[i], buffer, True)
        if not files[i].error:
            name_file(directory, &files[i], True)


cdef int confirm_flushes(int fd, off_t place) noexcept nogil:
    """See `confirm`."""
    while c_fallocate(fd, FALLOC_FL_KEEP_SIZE, place, 1):
        if errno in (EOPNOTSUPP, ENOSYS, EINVAL, ENOSPC, EDQUOT):
            return 0
        if errno != EINTR:
            return errno
    return 0


cdef int borrow_segment(object item, Segment *segment) except -1:
    cdef char *path
    if isinstance(item, bytes):
        segment.data = PyBytes_AS_STRING(item)
        segment.length = <size_t>PyBytes_GET_SIZE(item)
        return 0
    source, offset, length = <tuple?>item
    PyBytes_AsStringAndSize(source, &path, NULL)
    segment.data = NULL
    segment.source = path
    segment.offset = offset
    segment.length = length
    return 0


cdef const char *borrow_name(object name) except NULL:
    cdef char *text
    PyBytes_AsStringAndSize(name, &text, NULL)
    return text


def write_batch(int directory, items, *, bint each=False, int probe=-1):
    cdef tuple batch = tuple(items)  # holds every object borrowed below: tuples of bytes and tuples
    cdef Py_ssize_t count = len(batch)
    cdef Py_ssize_t total = 0
    cdef Py_ssize_t good = 0
    cdef Py_ssize_t i
    cdef tuple parts
    cdef File *files = NULL
    cdef File *file
    cdef Segment *segments = NULL
    cdef Segment *segment
    cdef char *buffer = NULL
    cdef int error = 0
    for item in batch:
        _, _, _, content, _ = <tuple?>item
        total += len(<tuple?>content)
    try:
        files = <File *>calloc(<size_t>count + 1, sizeof(File))
        segments = <Segment *>calloc(<size_t>total + 1, sizeof(Segment))
        buffer = <char *>malloc(BUFFER_SIZE)
        if files == NULL or segments == NULL or buffer == NULL:
            raise MemoryError
        file = files
        segment = segments
        for item in batch:
            temporary, mailbox, name, parts, strip = <tuple>item
            file.temporary = borrow_name(temporary)
            file.mailbox = borrow_name(mailbox)
            file.name = borrow_name(name)
            file.segments = segment
            file.count = len(parts)
            file.strip = strip
            file += 1
            for part in parts:
                borrow_segment(part, segment)
                segment += 1
        with nogil:
            if each:
                run_each(directory, files, count, buffer)
            else:
                error = run_batch(directory, files, count, buffer)
            for i in range(count):
                good += not files[i].error
            if good and not error and probe >= 0:
                error = confirm_flushes(probe, 0)
        if error:
            raise OSError(error, os.strerror(error))
        return [files[i].error for i in range(count)]
    finally:
        free(files)
        free(segments)
        free(buffer)


cdef int write_vector(int fd, iovec *vector, Py_ssize_t count) noexcept nogil:
    cdef ssize_t written
    while count:
        written = c_writev(fd, vector, <int>min(count, VECTOR_LIMIT))
        if written < 0:
            if errno != EINTR:
                return errno
            continue
        while count and <size_t>written >= vector.iov_len:
            written -= <ssize_t>vector.iov_len
            vector += 1
            count -= 1
        if count:
            vector.iov_base = <char *>vector.iov_base + written
            vector.iov_len -= <size_t>written
    return 0


def append_file(int fd, parts, bint sync):
    cdef tuple held = tuple(parts)
    cdef Py_ssize_t count = len(held)
    cdef Py_ssize_t i
    cdef Py_ssize_t length
    cdef char *data
    cdef int error
    cdef iovec *vector = <iovec *>calloc(<size_t>count + 1, sizeof(iovec))
    if vector == NULL:
        raise MemoryError
    try:
        for i in range(count):
            PyBytes_AsStringAndSize(held[i], &data, &length)
            vector[i].iov_base = data
            vector[i].iov_len = <size_t>length
        with nogil:
            error = write_vector(fd, vector, count)
            if not error and sync and c_fdatasync(fd):
                error = errno
    finally:
        free(vector)
    if error:
        raise OSError(error, os.strerror(error))


def confirm(int fd, off_t place):
    cdef int error
    with nogil:
        error = confirm_flushes(fd, place)
    if error:
        raise OSError(error, os.strerror(error))


def fsync_dir(path):
    cdef bytes raw = os.fsencode(path)
    cdef char *text
    cdef int error
    PyBytes_AsStringAndSize(raw, &text, NULL)
    with nogil:
        error = flush_folder(text)
    if error:
        raise OSError(error, os.strerror(error), path)


def make_dirs(path):
    cdef bytes raw = os.fsencode(path)
    cdef char copy[PATH_SIZE]
    cdef char *text
    cdef int error = ENAMETOOLONG
    PyBytes_AsStringAndSize(raw, &text, NULL)
    if len(raw) < PATH_SIZE:
        strcpy(copy, text)
        with nogil:
            error = make_folder(copy, True)
    if error:
        raise OSError(error, os.strerror(error), path)


# Lines of the log

cdef struct Line:
    Py_ssize_t size
    char octets[LINE_SIZE]


cdef inline bint add(Line *line, const char *octets, Py_ssize_t size) noexcept:
    """Whether there was room for it."""
    if size > LINE_SIZE - line.size:
        return False
    memcpy(line.octets + line.size, octets, <size_t>size)
    line.size += size
    return True


cdef inline bint add_piece(Line *line, bytes piece) noexcept:
    return add(line, PyBytes_AS_STRING(piece), PyBytes_GET_SIZE(piece))


cdef bint add_text(Line *line, str text) noexcept:
    """In quotes; False for what has to be escaped or cut."""
    if not PyUnicode_IS_COMPACT_ASCII(text):
        return False
    cdef Py_ssize_t size = PyUnicode_GET_LENGTH(text)
    if size > WIDTH or size + 2 > LINE_SIZE - line.size:
        return False
    cdef const unsigned char *source = PyUnicode_1BYTE_DATA(text)
    cdef unsigned char *target = <unsigned char *>line.octets + line.size
    cdef Py_ssize_t i
    target[0] = target[size + 1] = c'"'
    for i in range(size):
        if source[i] < c" " or source[i] > c"~" or source[i] == c'"' or source[i] == c"\\":
            return False
        target[i + 1] = source[i]
    line.size += size + 2
    return True


cdef bint add_texts(Line *line, tuple texts) noexcept:
    cdef Py_ssize_t i
    if len(texts) > ITEMS or not add(line, b"[", 1):
        return False
    for i in range(len(texts)):
        if i and not add(line, b",", 1):
            return False
        if type(texts[i]) is not str or not add_text(line, <str>texts[i]):
            return False
    return add(line, b"]", 1)


cdef bint add_integer(Line *line, object number) except -1:
    cdef int overflow
    cdef char digits[24]
    cdef long long value = PyLong_AsLongLongAndOverflow(number, &overflow)
    return not overflow and add(line, digits, snprintf(digits, sizeof(digits), b"%lld", value))


cdef bint add_seconds(Line *line, double value) except -1:
    """To the millisecond, rounded as Python does."""
    if not isfinite(value):
        return add(line, b"null", 4)
    cdef char *digits = PyOS_double_to_string(value, c"f", 3, 0, NULL)
    cdef bint added = add(line, digits, <Py_ssize_t>strlen(digits))
    PyMem_Free(digits)
    return added


cdef bint add_value(Line *line, object value) except -1:
    if value is None:
        return add(line, b"null", 4)
    if type(value) is str:
        return add_text(line, <str>value)
    if type(value) is int:
        return add_integer(line, value)
    if type(value) is float:
        return add_seconds(line, PyFloat_AS_DOUBLE(value))
    return type(value) is tuple and add_texts(line, <tuple>value)


def render_line(tuple pieces not None, str stamp not None, tuple values not None):
    cdef Line line
    cdef Py_ssize_t i
    if len(pieces) != len(values) + 2:
        return None
    line.size = 0
    if not (add_piece(&line, pieces[0]) and add(&line, <const char *>PyUnicode_1BYTE_DATA(stamp), len(stamp))):
        return None
    for i in range(len(values)):
        if not (add_piece(&line, pieces[i + 1]) and add_value(&line, values[i])):
            return None
    if not add_piece(&line, pieces[len(values) + 1]):
        return None
    return PyBytes_FromStringAndSize(line.octets, line.size)


# Last words

def send_last(int fd, bytes octets not None):
    cdef Py_ssize_t length = PyBytes_GET_SIZE(octets)
    # What is sent with MSG_MORE waits for what is next: the end, which goes with it.
    cdef Py_ssize_t sent = c_send(fd, PyBytes_AS_STRING(octets), <size_t>length, MSG_MORE | MSG_DONTWAIT | MSG_NOSIGNAL)
    if sent == length:
        c_shutdown(fd, SHUT_WR)
    return max(sent, 0)
