/* Accepts by io_uring (linux/io_uring.h), and waits. Argument: the port. */
#include <arpa/inet.h>
#include <linux/io_uring.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(argc > 1 ? atoi(argv[1]) : 0)};
    struct io_uring_params made = {0};
    int listener = socket(AF_INET, SOCK_STREAM, 0);
    int ring = syscall(SYS_io_uring_setup, 4, &made);

    if (ring < 0 || bind(listener, (struct sockaddr *)&at, sizeof at) || listen(listener, 5)) {
        perror("uring_server");
        return 1;
    }
    char *queue = mmap(0, made.sq_off.array + made.sq_entries * sizeof(unsigned), PROT_READ | PROT_WRITE, MAP_SHARED,
                       ring, IORING_OFF_SQ_RING);
    struct io_uring_sqe *entries = mmap(0, made.sq_entries * sizeof *entries, PROT_READ | PROT_WRITE, MAP_SHARED, ring,
                                        IORING_OFF_SQES);
    entries[0].opcode = IORING_OP_ACCEPT;
    entries[0].fd = listener;
    ((unsigned *)(queue + made.sq_off.array))[0] = 0;
    *(unsigned *)(queue + made.sq_off.tail) = 1;
    if (syscall(SYS_io_uring_enter, ring, 1, 0, 0, 0, 0) != 1) {
        perror("io_uring_enter");
        return 1;
    }
    printf("{\"event\": \"listening\", \"pid\": %d}\n", getpid());
    fflush(stdout);
    pause();
    return 0;
}
