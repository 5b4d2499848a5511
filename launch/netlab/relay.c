/* The links between emulated hosts: a star of network namespaces. launch/netlab/emulated_network.py
 * compiles and starts it.
 *
 *     relay RATE_BYTES_PER_S DELAY_S QUEUE_BYTES MTU NAMESPACE...
 *
 * It makes a TUN device "link0" in each namespace; the address of host i, which others send to, ends in i + 1. A packet
 * leaves by its host's link, one after the other at the rate, travels for the delay, and comes in by the receiver's
 * link, which has the same rate: several senders to one receiver share it. A packet begins to come in before its end
 * has left, so its size counts once. One that finds more than QUEUE_BYTES waiting before it is dropped, as a router
 * drops it.
 *
 * "ready" on standard output: the devices are there. A line on standard input is answered with counts since the start,
 * in JSON. The end of the input ends the relay: it cannot outlive who started it, however that dies.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <malloc.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#define PACKETS_AT_ONCE 64 /* read from one host before the others are looked at */
#define MOST_LATE_S 50e-6 /* timers are allowed for up to this */
#define DESTINATION 16    /* of an IPv4 header's bytes the first of the receiver's address */
#define HEADER_BYTES 20

typedef struct Packet {
    struct Packet *next;
    double due_s; /* going out: when its first bit reaches the receiver's link; coming in: when its last bit is there */
    size_t size, receiver;
    unsigned char data[];
} Packet;

typedef struct {
    Packet *first, *last;
    double free_s; /* when the link is done with all it was given so far */
} Link;

typedef struct {
    int tun;
    Link out, in;
} Host;

static double rate, delay_s, queue_bytes;
static size_t mtu, num_hosts;
static Host *hosts;
static unsigned long long packets, bytes, dropped;

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static void push(Link *link, Packet *packet) {
    packet->next = NULL;
    if (link->first)
        link->last->next = packet;
    else
        link->first = packet;
    link->last = packet;
}

static Packet *pop(Link *link) {
    Packet *packet = link->first;
    link->first = packet->next;
    return packet;
}

/* When a link that is given a packet at given_s begins to send it; below 0: it drops it, too much is waiting. */
static double begin(Link *link, const Packet *packet, double given_s) {
    double start_s = link->free_s > given_s ? link->free_s : given_s;
    if ((start_s - given_s) * rate > queue_bytes)
        return -1;
    link->free_s = start_s + packet->size / rate;
    return start_s;
}

static void drop(Packet *packet) {
    dropped++;
    free(packet);
}

static int open_tun(const char *namespace) {
    char path[256];
    snprintf(path, sizeof path, "/run/netns/%s", namespace);
    int own = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC), other = open(path, O_RDONLY | O_CLOEXEC);
    if (own < 0 || other < 0 || setns(other, CLONE_NEWNET))
        fail(path);
    struct ifreq request = {.ifr_name = "link0", .ifr_flags = IFF_TUN | IFF_NO_PI};
    int tun = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    if (tun < 0 || ioctl(tun, TUNSETIFF, &request))
        fail("/dev/net/tun");
    if (setns(own, CLONE_NEWNET))
        fail("setns");
    close(own);
    close(other);
    return tun;
}

/* Reads what a host sends, and gives it to its link. */
static void take_packets(Host *host) {
    for (int i = 0; i < PACKETS_AT_ONCE; i++) {
        Packet *packet = malloc(sizeof *packet + mtu);
        if (!packet)
            fail("malloc");
        ssize_t size = read(host->tun, packet->data, mtu);
        if (size < HEADER_BYTES || packet->data[0] >> 4 != 4) { /* nothing more, or not IPv4 */
            free(packet);
            if (size < 0)
                return;
            continue;
        }
        packet = realloc(packet, sizeof *packet + size); /* shrinks in place: queues take what they hold */
        packet->size = size;
        packet->receiver = packet->data[DESTINATION + 3] - 1;
        double start_s = packet->receiver < num_hosts ? begin(&host->out, packet, now_s()) : -1;
        if (start_s < 0) {
            drop(packet);
            continue;
        }
        packet->due_s = start_s + delay_s;
        push(&host->out, packet);
    }
}

/* The host whose packet reaches its receiver's link first; NULL: none is under way. */
static Host *find_next(void) {
    Host *next = NULL;
    for (Host *host = hosts; host < hosts + num_hosts; host++)
        if (host->out.first && (!next || host->out.first->due_s < next->out.first->due_s))
            next = host;
    return next;
}

/* Packets whose time has come go on from the senders' links to the receivers', and from those to the hosts. */
static void pass_on(void) {
    double t = now_s();
    for (Host *from; (from = find_next()) && from->out.first->due_s <= t;) {
        Packet *packet = pop(&from->out);
        Link *in = &hosts[packet->receiver].in;
        if (begin(in, packet, packet->due_s) < 0) {
            drop(packet);
            continue;
        }
        packet->due_s = in->free_s;
        push(in, packet);
    }
    for (Host *to = hosts; to < hosts + num_hosts; to++)
        while (to->in.first && to->in.first->due_s <= t) {
            Packet *packet = pop(&to->in);
            if (write(to->tun, packet->data, packet->size) < 0) {
                drop(packet);
                continue;
            }
            packets++;
            bytes += packet->size;
            free(packet);
        }
}

static void wait_for_event(struct pollfd *polled) {
    Host *from = find_next();
    double next_s = from ? from->out.first->due_s : -1;
    for (Host *to = hosts; to < hosts + num_hosts; to++)
        if (to->in.first && (next_s < 0 || to->in.first->due_s < next_s))
            next_s = to->in.first->due_s;
    static double late_s; /* what timers are late by, in the mean over the last few */
    double until_s = next_s - late_s, left_s = until_s - now_s();
    left_s = left_s < 0 ? 0 : left_s;
    struct timespec wait = {(time_t)left_s, (long)((left_s - (time_t)left_s) * 1e9)};
    int ready = ppoll(polled, num_hosts + 1, next_s < 0 ? NULL : &wait, NULL);
    if (ready < 0 && errno != EINTR)
        fail("ppoll");
    if (!ready && left_s > 0) {
        double late = now_s() - until_s;
        late_s += ((late < MOST_LATE_S ? late : MOST_LATE_S) - late_s) / 8;
    }
}

/* 0: the input has ended. */
static int answer(void) {
    char line[64];
    if (read(STDIN_FILENO, line, sizeof line) <= 0)
        return 0;
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    double cpu_s = used.ru_utime.tv_sec + used.ru_stime.tv_sec + (used.ru_utime.tv_usec + used.ru_stime.tv_usec) * 1e-6;
    printf("{\"packets\": %llu, \"bytes\": %llu, \"dropped\": %llu, \"cpu_s\": %.6f}\n", packets, bytes, dropped, cpu_s);
    fflush(stdout);
    return 1;
}

int main(int argc, char **argv) {
    if (argc < 6) {
        fprintf(stderr, "usage: relay RATE_BYTES_PER_S DELAY_S QUEUE_BYTES MTU NAMESPACE...\n");
        return 2;
    }
    mallopt(M_TRIM_THRESHOLD, 1 << 30); /* memory of packets that are gone is for those to come: no page faults */
    rate = atof(argv[1]);
    delay_s = atof(argv[2]);
    queue_bytes = atof(argv[3]);
    mtu = atol(argv[4]);
    num_hosts = argc - 5;
    hosts = calloc(num_hosts, sizeof *hosts);
    struct pollfd *polled = calloc(num_hosts + 1, sizeof *polled);
    if (!hosts || !polled)
        fail("calloc");
    for (size_t i = 0; i < num_hosts; i++)
        polled[i] = (struct pollfd){hosts[i].tun = open_tun(argv[5 + i]), POLLIN, 0};
    polled[num_hosts] = (struct pollfd){STDIN_FILENO, POLLIN, 0};
    /* Before the ranks, which take every core: a link does not wait for who uses it. Without the right to, it does. */
    sched_setscheduler(0, SCHED_FIFO, &(struct sched_param){.sched_priority = 1});
    prctl(PR_SET_TIMERSLACK, 1UL);
    puts("ready");
    fflush(stdout);
    for (;;) {
        wait_for_event(polled);
        if (polled[num_hosts].revents && !answer())
            return 0;
        for (size_t i = 0; i < num_hosts; i++) {
            if (polled[i].revents & POLLERR) /* its namespace was removed */
                return 1;
            if (polled[i].revents)
                take_packets(&hosts[i]);
        }
        pass_on();
    }
}
