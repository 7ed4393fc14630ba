/* A library loaded before libc. It counts the calls that change, or read, files below one directory, and makes them fail.

   fault_below(prefix)              start counting below a directory
   fault_arm(call, until, mode, error, only)   from the `call`th call (from 1) to the `until`th, if its name is in `only`:
                                    0 nothing, 1 SIGKILL before it, 2 SIGKILL after it, 3 SIGKILL after half of its write,
                                    4 it fails with `error`, 5 it writes only half and returns that number
   fault_trace()                    one line per call: `name path`, or `rename path path`
   fault_reads(on)                  also count opening for reading, reading and listing; changes always count

   fsync below the directory is counted and not done, so that a thousand of them cost no time. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { NOTHING, KILL_BEFORE, KILL_AFTER, KILL_HALFWAY, FAIL, SHORT };

static char prefix[PATH_MAX], names[256];
static int counted, reads_count, first_call, last_call, armed_mode, armed_error;
static char trace[1 << 20];
static size_t trace_length;

void fault_below(const char *directory) {
    snprintf(prefix, sizeof prefix, "%s/", directory);
    counted = first_call = last_call = armed_mode = 0;
    trace[trace_length = 0] = 0;
}
void fault_arm(int call, int until, int mode, int error, const char *only) {
    snprintf(names, sizeof names, "%s", only);
    first_call = call, last_call = until, armed_mode = mode, armed_error = error;
}
void fault_reads(int on) { reads_count = on; }
const char *fault_trace(void) { return trace; }

static void *libc_own(const char *name) {
    void *found = dlsym(RTLD_NEXT, name);
    if (!found) abort();
    return found;
}
#define LIBC(name) ((__typeof__(&name))libc_own(#name))

static void die(void) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

/* Write the absolute path of `name`, relative to the directory `at`, to `path`; that of `at` where `name` is NULL. */
static void resolve(int at, const char *name, char *path) {
    char link[64], base[PATH_MAX];
    path[0] = 0;
    if (name && name[0] == '/') {
        snprintf(path, PATH_MAX, "%s", name);
        return;
    }
    if (at == AT_FDCWD) {
        if (!getcwd(base, sizeof base)) return;
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", at);
        ssize_t length = readlink(link, base, sizeof base - 1);
        if (length < 0) return;
        base[length] = 0;
    }
    if (!name) snprintf(path, PATH_MAX, "%s", base);
    else if (strlen(base) + strlen(name) + 2 < PATH_MAX) strcat(strcat(strcpy(path, base), "/"), name);
}

static int is_below(const char *path) { return prefix[0] && !strncmp(path, prefix, strlen(prefix)); }

/* Count a call; return the mode that applies to it. */
static int enter(const char *call, const char *path, const char *to) {
    if (!is_below(path) && !(to && is_below(to))) return NOTHING;
    trace_length += snprintf(trace + trace_length, sizeof trace - trace_length, to ? "%s\t%s\t%s\n" : "%s\t%s\n", call, path, to);
    if (trace_length >= sizeof trace) abort();
    counted++;
    if (counted < first_call || counted > last_call || !strstr(names, call)) return NOTHING;
    if (armed_mode == KILL_BEFORE) die();
    if (armed_mode == FAIL) errno = armed_error;
    return armed_mode;
}

/* Body of a call that cannot be done by half: `value` does it. */
#define WHOLE(call, path, to, type, value)                          \
    do {                                                            \
        int what = enter(call, path, to);                           \
        if (what == FAIL) return -1;                                \
        type result = value;                                        \
        if (what == KILL_AFTER || what == KILL_HALFWAY) die();      \
        return result;                                              \
    } while (0)

static int open_any(int at, const char *name, int flags, mode_t mode) {
    char path[PATH_MAX];
    resolve(at, name, path);
    int changes = (flags & (O_CREAT | O_TRUNC)) || (flags & O_ACCMODE) != O_RDONLY;
    if (!changes && !reads_count) return LIBC(openat)(at, name, flags, mode);
    WHOLE(changes ? "open" : "look", path, NULL, int, LIBC(openat)(at, name, flags, mode));
}
#define OPEN_MODE(last)                                             \
    mode_t mode = 0;                                                \
    if (flags & O_CREAT) {                          \
        va_list more;                                               \
        va_start(more, last);                                       \
        mode = va_arg(more, mode_t);                                \
        va_end(more);                                               \
    }
int open(const char *name, int flags, ...) { OPEN_MODE(flags) return open_any(AT_FDCWD, name, flags, mode); }
int open64(const char *name, int flags, ...) { OPEN_MODE(flags) return open_any(AT_FDCWD, name, flags | O_LARGEFILE, mode); }
int openat(int at, const char *name, int flags, ...) { OPEN_MODE(flags) return open_any(at, name, flags, mode); }
int openat64(int at, const char *name, int flags, ...) { OPEN_MODE(flags) return open_any(at, name, flags | O_LARGEFILE, mode); }
int creat(const char *name, mode_t mode) { return open_any(AT_FDCWD, name, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *name, mode_t mode) { return open_any(AT_FDCWD, name, O_CREAT | O_WRONLY | O_TRUNC | O_LARGEFILE, mode); }

/* `offset` -1: where the file stands. */
static ssize_t write_any(int fd, const void *bytes, size_t size, off_t offset) {
    char path[PATH_MAX];
    resolve(fd, NULL, path);
    int what = enter("write", path, NULL);
    if (what == FAIL) return -1;
    if (what == KILL_HALFWAY || what == SHORT) size = (size + 1) / 2;
    ssize_t result = offset < 0 ? LIBC(write)(fd, bytes, size) : LIBC(pwrite)(fd, bytes, size, offset);
    if (what == KILL_HALFWAY || what == KILL_AFTER) die();
    return result;
}
ssize_t write(int fd, const void *bytes, size_t size) { return write_any(fd, bytes, size, -1); }
ssize_t pwrite(int fd, const void *bytes, size_t size, off_t offset) { return write_any(fd, bytes, size, offset); }
ssize_t pwrite64(int fd, const void *bytes, size_t size, off64_t offset) { return write_any(fd, bytes, size, offset); }
ssize_t writev(int fd, const struct iovec *parts, int number) {
    char path[PATH_MAX];
    resolve(fd, NULL, path);
    WHOLE("write", path, NULL, ssize_t, LIBC(writev)(fd, parts, number));
}
ssize_t read(int fd, void *bytes, size_t size) {
    char path[PATH_MAX];
    if (!reads_count) return LIBC(read)(fd, bytes, size);
    resolve(fd, NULL, path);
    WHOLE("read", path, NULL, ssize_t, LIBC(read)(fd, bytes, size));
}
DIR *opendir(const char *name) {
    char path[PATH_MAX];
    resolve(AT_FDCWD, name, path);
    if (reads_count && enter("list", path, NULL) == FAIL) return NULL;
    return LIBC(opendir)(name);
}

static int sync_any(const char *call, int fd) {
    char path[PATH_MAX];
    resolve(fd, NULL, path);
    WHOLE(call, path, NULL, int, is_below(path) ? 0 : LIBC(fsync)(fd));
}
int fsync(int fd) { return sync_any("fsync", fd); }
int fdatasync(int fd) { return sync_any("fdatasync", fd); }

/* Closed also where it fails, as Linux does. Only what was written to counts. */
int close(int fd) {
    char path[PATH_MAX];
    int flags = fcntl(fd, F_GETFL);
    if (flags < 0 || (flags & O_ACCMODE) == O_RDONLY) return LIBC(close)(fd);
    resolve(fd, NULL, path);
    int what = enter("close", path, NULL);
    int result = LIBC(close)(fd);
    if (what == KILL_AFTER || what == KILL_HALFWAY) die();
    if (what != FAIL) return result;
    errno = armed_error;
    return -1;
}

static int rename_any(int from_at, const char *from, int to_at, const char *to, unsigned flags) {
    char path[PATH_MAX], other[PATH_MAX];
    resolve(from_at, from, path);
    resolve(to_at, to, other);
    WHOLE("rename", path, other, int, LIBC(renameat2)(from_at, from, to_at, to, flags));
}
int rename(const char *from, const char *to) { return rename_any(AT_FDCWD, from, AT_FDCWD, to, 0); }
int renameat(int from_at, const char *from, int to_at, const char *to) { return rename_any(from_at, from, to_at, to, 0); }
int renameat2(int from_at, const char *from, int to_at, const char *to, unsigned flags) {
    return rename_any(from_at, from, to_at, to, flags);
}

int unlinkat(int at, const char *name, int flags) {
    char path[PATH_MAX];
    resolve(at, name, path);
    WHOLE(flags & AT_REMOVEDIR ? "rmdir" : "unlink", path, NULL, int, LIBC(unlinkat)(at, name, flags));
}
int unlink(const char *name) { return unlinkat(AT_FDCWD, name, 0); }
int rmdir(const char *name) { return unlinkat(AT_FDCWD, name, AT_REMOVEDIR); }

int mkdirat(int at, const char *name, mode_t mode) {
    char path[PATH_MAX];
    resolve(at, name, path);
    WHOLE("mkdir", path, NULL, int, LIBC(mkdirat)(at, name, mode));
}
int mkdir(const char *name, mode_t mode) { return mkdirat(AT_FDCWD, name, mode); }

static int truncate_any(int fd, off_t size) {
    char path[PATH_MAX];
    resolve(fd, NULL, path);
    WHOLE("ftruncate", path, NULL, int, LIBC(ftruncate)(fd, size));
}
int ftruncate(int fd, off_t size) { return truncate_any(fd, size); }
int ftruncate64(int fd, off64_t size) { return truncate_any(fd, size); }
