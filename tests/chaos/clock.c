/* Preloaded into a process, it shifts the wall clock by the nanoseconds that stand in the file CLOCK_SHIFT_FILE, 8 bytes in
   the machine's order, at once when they change. The monotonic clock stays. Waits until a wall clock time wait until it is
   that time on the shifted clock, as they would on a machine whose clock is wrong. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <threads.h>
#include <time.h>
#include <unistd.h>

#define SECOND_NS 1000000000LL
/* A machine is up for fewer seconds than this, and no wall clock stands before it: so a time tells its clock. */
#define WALL_CLOCK_S 1000000000LL

static const volatile int64_t none = 0;
static const volatile int64_t *shift_ns = &none;

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("CLOCK_SHIFT_FILE");
    int file = path == NULL ? -1 : open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0) abort();
    void *mapped = mmap(NULL, sizeof(int64_t), PROT_READ, MAP_SHARED, file, 0);
    close(file);
    if (mapped == MAP_FAILED) abort();
    shift_ns = mapped;
}

static void move(struct timespec *at, int64_t by_ns) {
    int64_t all_ns = at->tv_sec * SECOND_NS + at->tv_nsec + by_ns;
    at->tv_sec = all_ns / SECOND_NS;
    at->tv_nsec = all_ns % SECOND_NS;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int result = (int)syscall(SYS_clock_gettime, clock, now);
    if (result == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) move(now, *shift_ns);
    return result;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec exact;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &exact);
    now->tv_sec = exact.tv_sec;
    now->tv_usec = exact.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *now) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    if (now != NULL) *now = exact.tv_sec;
    return exact.tv_sec;
}

/* The kernel waits by its own clock. */
static const struct timespec *unshifted(const struct timespec *until, struct timespec *room) {
    if (until->tv_sec < WALL_CLOCK_S) return until;
    *room = *until;
    move(room, -*shift_ns);
    return room;
}

static void *next(const char *name) {
    /* The C library keeps a condition variable of another layout under the same name. */
    void *found = dlvsym(RTLD_NEXT, name, "GLIBC_2.3.2");
    return found != NULL ? found : dlsym(RTLD_NEXT, name);
}

int pthread_cond_timedwait(pthread_cond_t *restrict condition, pthread_mutex_t *restrict mutex,
                           const struct timespec *restrict until) {
    static int (*real)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);
    struct timespec room;
    if (real == NULL) real = next("pthread_cond_timedwait");
    return real(condition, mutex, unshifted(until, &room));
}

int pthread_cond_clockwait(pthread_cond_t *restrict condition, pthread_mutex_t *restrict mutex, clockid_t clock,
                           const struct timespec *restrict until) {
    static int (*real)(pthread_cond_t *, pthread_mutex_t *, clockid_t, const struct timespec *);
    struct timespec room;
    if (real == NULL) real = next("pthread_cond_clockwait");
    return real(condition, mutex, clock, unshifted(until, &room));
}

int sem_timedwait(sem_t *restrict semaphore, const struct timespec *restrict until) {
    static int (*real)(sem_t *, const struct timespec *);
    struct timespec room;
    if (real == NULL) real = next("sem_timedwait");
    return real(semaphore, unshifted(until, &room));
}

/* Of C11. The C library's own calls the one above without passing here. */
int cnd_timedwait(cnd_t *restrict condition, mtx_t *restrict mutex, const struct timespec *restrict until) {
    static int (*real)(cnd_t *, mtx_t *, const struct timespec *);
    struct timespec room;
    if (real == NULL) real = next("cnd_timedwait");
    return real(condition, mutex, unshifted(until, &room));
}

int timespec_get(struct timespec *now, int base) {
    return base == TIME_UTC && clock_gettime(CLOCK_REALTIME, now) == 0 ? base : 0;
}
