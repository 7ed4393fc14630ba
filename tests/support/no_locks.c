/* A library loaded before libc: a file system without locks, as some network file systems are mounted. */
#include <errno.h>
int flock(int file, int operation) {
    (void)file, (void)operation;
    errno = ENOLCK;
    return -1;
}
