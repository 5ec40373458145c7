/* Memory of many kinds, for a guest of the tests; says what it made, and keeps it. */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define MIB (1UL << 20)
#define PAGE 4096UL
#ifndef MADV_PAGEOUT
#define MADV_PAGEOUT 21
#endif

static char *filled(size_t size, size_t alignment, int flags, int same) {
    char *start = mmap(NULL, size + alignment, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
    if (start == MAP_FAILED)
        return NULL;
    if (alignment)
        start += alignment - (size_t)start % alignment;
    if (alignment)
        madvise(start, size, MADV_HUGEPAGE);
    for (size_t at = 0; at < size; at += PAGE) {
        memset(start + at, same ? 0x5a : 1 + at / PAGE % 255, PAGE);
        if (!same)
            *(size_t *)(start + at) = at;
    }
    return start;
}

static void advise(const char *name, char *start, size_t size, int advice) {
    int failed = madvise(start, size, advice);
    printf("mixer: %s: %s\n", name, failed ? strerror(errno) : "done");
}

static void go_on(int signal) {
}

int main(void) {
    signal(SIGBUS, go_on); /* of pages that are made bad */
    char *same = filled(16 * MIB, 0, 0, 1);
    advise("mergeable", same, 16 * MIB, MADV_MERGEABLE);
    char *out = filled(24 * MIB, 0, 0, 0);
    advise("pageout", out, 24 * MIB, MADV_PAGEOUT);
    long sum = 0;
    for (size_t at = 0; at < 8 * MIB; at += PAGE)
        sum += out[at + 8];
    filled(32 * MIB, 2 * MIB, 0, 0);
    printf("mixer: hugetlb: %s\n", filled(8 * MIB, 0, MAP_HUGETLB, 0) ? "done" : strerror(errno));
    char *bad = filled(16 * PAGE, 0, 0, 0);
    advise("hwpoison", bad, 4 * PAGE, MADV_HWPOISON);
    advise("soft offline", bad + 8 * PAGE, 4 * PAGE, 101);
    printf("mixer is %s\n", sum ? "done" : "odd");
    fflush(stdout);
    for (;;)
        pause();
}
