/* A program whose threads wait, each in a way of its own, and that tells whatever changed meanwhile.
 *
 *     inside WAY     read, poll, ppoll, epoll_wait, futex, nanosleep, sigsuspend, getpid (calls all the time), spin
 *
 * The wait is one `syscall` instruction with a known value in every register that it does not use, in every vector
 * register and below the stack pointer, where a program without calls may keep things. Behind it all of these are
 * compared. "waiting", then "intact" or what is not, and the result of the wait, one a line.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static volatile struct { uint64_t rbx, rbp, r12, r13, r14, r15, rdi, rsi, rdx, r10, r8, r9, below, flags; uint8_t xmm[16]; }
    seen __attribute__((used));
static volatile uint64_t signals;
static volatile uint64_t arguments[6] __attribute__((used)), number __attribute__((used));
static volatile long result __attribute__((used));

static void handler(int signal) { signals += signal; }

/* Everything is loaded, the call made, and everything stored. r11 and rcx belong to the kernel in a call. */
__attribute__((naked)) static void wait_in_call(void) {
    __asm__ volatile (
        "push %rbx; push %rbp; push %r12; push %r13; push %r14; push %r15\n"
        "mov $0x1111111111111111, %rbx; mov $0x2222222222222222, %rbp; mov $0x3333333333333333, %r12\n"
        "mov $0x4444444444444444, %r13; mov $0x5555555555555555, %r14; mov $0x6666666666666666, %r15\n"
        "mov $0x7777777777777777, %rax; mov %rax, -8(%rsp); movq %rax, %xmm7; pshufd $0x44, %xmm7, %xmm7\n"
        "mov arguments(%rip), %rdi; mov arguments+8(%rip), %rsi; mov arguments+16(%rip), %rdx\n"
        "mov arguments+24(%rip), %r10; mov arguments+32(%rip), %r8; mov arguments+40(%rip), %r9\n"
        "mov number(%rip), %rax; stc\n"
        "syscall\n"
        "mov %rax, result(%rip)\n"
        "mov %rbx, seen(%rip); mov %rbp, seen+8(%rip); mov %r12, seen+16(%rip); mov %r13, seen+24(%rip)\n"
        "mov %r14, seen+32(%rip); mov %r15, seen+40(%rip); mov %rdi, seen+48(%rip); mov %rsi, seen+56(%rip)\n"
        "mov %rdx, seen+64(%rip); mov %r10, seen+72(%rip); mov %r8, seen+80(%rip); mov %r9, seen+88(%rip)\n"
        "mov -8(%rsp), %rax; mov %rax, seen+96(%rip); setc seen+104(%rip); movdqu %xmm7, seen+112(%rip)\n"
        "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbp; pop %rbx; ret\n");
}

static const char *compare(void) {
    uint8_t sevens[16];
    memset(sevens, 0x77, sizeof sevens);
    const uint64_t kept[] = {seen.rbx, seen.rbp, seen.r12, seen.r13, seen.r14, seen.r15, seen.below};
    for (unsigned i = 0; i < 7; i++)
        if (kept[i] != (i + 1) * 0x1111111111111111)
            return "a saved register, or what was below the stack";
    const uint64_t passed[] = {seen.rdi, seen.rsi, seen.rdx, seen.r10, seen.r8, seen.r9};
    if (memcmp(passed, (void *)arguments, sizeof passed))
        return "an argument";
    if (!seen.flags)
        return "the flags";
    return memcmp((void *)seen.xmm, sevens, 16) ? "a vector register" : "intact";
}

static void call(uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint64_t e, uint64_t f, uint64_t which) {
    const uint64_t all[] = {a, b, c, d, e, f};
    memcpy((void *)arguments, all, sizeof all);
    number = which;
}

int main(int argc, char **argv) {
    const char *way = argc > 1 ? argv[1] : "";
    char byte;
    static uint32_t word;
    struct pollfd polled = {.fd = 0, .events = POLLIN};
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = 42};
    const struct timespec long_time = {.tv_sec = 60}, short_time = {.tv_nsec = 400000000};
    sigset_t blocked, none, after;
    struct sigaction action = {.sa_handler = handler};

    sigaction(SIGUSR1, &action, NULL);
    action.sa_flags = SA_RESTART;
    sigaction(SIGUSR2, &action, NULL);
    sigemptyset(&none);
    sigemptyset(&blocked);
    sigaddset(&blocked, SIGWINCH);
    if (!strcmp(way, "sigsuspend") || !strcmp(way, "ppoll"))
        sigaddset(&blocked, SIGUSR1);
    sigprocmask(SIG_SETMASK, &blocked, NULL);

    int watch = epoll_create1(EPOLL_CLOEXEC);
    epoll_ctl(watch, EPOLL_CTL_ADD, 0, &event);
    if (!strcmp(way, "read"))
        call(0, (uint64_t)&byte, 1, 9, 9, 9, SYS_read);
    else if (!strcmp(way, "poll"))
        call((uint64_t)&polled, 1, 60000, 9, 9, 9, SYS_poll);
    else if (!strcmp(way, "ppoll"))
        call((uint64_t)&polled, 1, 0, (uint64_t)&none, 8, 9, SYS_ppoll);
    else if (!strcmp(way, "epoll_wait"))
        call(watch, (uint64_t)&event, 1, 60000, 9, 9, SYS_epoll_wait);
    else if (!strcmp(way, "futex"))
        call((uint64_t)&word, FUTEX_WAIT, 0, (uint64_t)&long_time, 9, 9, SYS_futex);
    else if (!strcmp(way, "nanosleep"))
        call((uint64_t)&short_time, 0, 9, 9, 9, 9, SYS_nanosleep);
    else if (!strcmp(way, "sigsuspend"))
        call((uint64_t)&none, 8, 9, 9, 9, 9, SYS_rt_sigsuspend);
    else if (!strcmp(way, "getpid"))
        call(9, 9, 9, 9, 9, 9, SYS_getpid);
    puts("waiting");
    fflush(stdout);
    if (!strcmp(way, "spin"))
        for (volatile uint64_t n = 0;; n++)
            ;
    struct timespec begin, end;
    clock_gettime(CLOCK_MONOTONIC, &begin);
    const char *what;
    do
        wait_in_call(), what = compare();
    while (number == SYS_getpid && !signals && !strcmp(what, "intact"));
    clock_gettime(CLOCK_MONOTONIC, &end);
    sigprocmask(SIG_SETMASK, NULL, &after);
    if (memcmp(&after, &blocked, 8))
        what = "the signal mask";
    if (number == SYS_nanosleep && (end.tv_sec - begin.tv_sec) * 1000000000 + end.tv_nsec - begin.tv_nsec < 400000000)
        what = "the time to sleep";
    printf("%s %ld %lu\n", what, number == SYS_getpid ? 0 : result, (unsigned long)signals);
    fflush(stdout);
    for (;;)
        if (read(0, &byte, 1) <= 0)
            pause();
}
