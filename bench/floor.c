/* The floor: what a client costs that speaks AMQP through librabbitmq, or Redis's protocol, and does nothing else.
 *
 *   floor fill      HOST PORT VHOST QUEUE COUNT           publish COUNT persistent messages of a Celery task's size
 *   floor drain     HOST PORT VHOST QUEUE COUNT           consume and ack them, 64 tags with one ack
 *   floor publish   HOST PORT VHOST QUEUE COUNT           publish one by one without confirms
 *   floor confirm   HOST PORT VHOST QUEUE COUNT           publish one by one, each waiting for its confirm
 *   floor roundtrip HOST PORT VHOST QUEUE COUNT           request and reply with a second C client, one by one
 *   floor lpush     HOST PORT -     QUEUE COUNT           put messages into a list of Redis, each waiting for its reply
 *
 * Each prints one line of JSON. No task runs, nothing is decoded, an error ends the program: not a worker, a yardstick.
 * Built by bench/floor.py: cc -O2 floor.c -lrabbitmq. Source: rabbitmq-c 0.11, <amqp.h>.
 */

#include <amqp.h>
#include <amqp_framing.h>
#include <amqp_tcp_socket.h>
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { CHANNEL = 1, PREFETCH = 1000, ACK_EVERY = 64, WARM_UP = 50, MAX_ROUND_TRIPS = 1000000, ENVELOPE = 900 };

static const char BODY[] = "[[1], {}, {\"callbacks\": null, \"errbacks\": null, \"chain\": null, \"chord\": null}]";

static void stop(const char *what) {
    fprintf(stderr, "floor: %s\n", what);
    exit(1);
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static double cpu_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static void check(amqp_connection_state_t connection, const char *what) {
    if (amqp_get_rpc_reply(connection).reply_type != AMQP_RESPONSE_NORMAL) stop(what);
}

static amqp_connection_state_t open_connection(const char *host, int port, const char *vhost) {
    amqp_connection_state_t connection = amqp_new_connection();
    amqp_socket_t *socket = amqp_tcp_socket_new(connection);
    if (socket == NULL || amqp_socket_open(socket, host, port) != AMQP_STATUS_OK) stop("cannot connect");
    amqp_rpc_reply_t reply =
        amqp_login(connection, vhost, 0, 131072, 0, AMQP_SASL_METHOD_PLAIN, "guest", "guest");
    if (reply.reply_type != AMQP_RESPONSE_NORMAL) stop("cannot log in");
    amqp_channel_open(connection, CHANNEL);
    check(connection, "cannot open a channel");
    return connection;
}

static void declare(amqp_connection_state_t connection, const char *queue) {
    amqp_queue_declare(connection, CHANNEL, amqp_cstring_bytes(queue), 0, 1, 0, 0, amqp_empty_table);
    check(connection, "cannot declare the queue");
}

static void consume(amqp_connection_state_t connection, const char *queue, int no_ack) {
    amqp_basic_qos(connection, CHANNEL, 0, PREFETCH, 0);
    check(connection, "cannot set the prefetch count");
    amqp_basic_consume(connection, CHANNEL, amqp_cstring_bytes(queue), amqp_empty_bytes, 0, no_ack, 0, amqp_empty_table);
    check(connection, "cannot consume");
}

/* The headers of a task message, protocol 2: the names, types and sizes that Celery sends. */
static amqp_table_t task_headers(void) {
    static amqp_table_entry_t entries[19], none[1];
    static amqp_field_value_t limits[2];
    static const char *const texts[][2] = {
        {"lang", "py"}, {"task", "bench.peers.celery_app.noop"}, {"id", "7c0f6e0e-1c1c-4d6c-8b57-0a8a5b3f2a11"},
        {"root_id", "7c0f6e0e-1c1c-4d6c-8b57-0a8a5b3f2a11"}, {"argsrepr", "(1,)"}, {"kwargsrepr", "{}"},
        {"origin", "gen12345@benchmark"}};
    static const char *const voids[] = {"shadow", "eta", "expires", "group", "group_index", "parent_id"};
    int n = 0;
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++, n++) {
        entries[n].key = amqp_cstring_bytes(texts[i][0]);
        entries[n].value.kind = AMQP_FIELD_KIND_UTF8;
        entries[n].value.value.bytes = amqp_cstring_bytes(texts[i][1]);
    }
    for (size_t i = 0; i < sizeof voids / sizeof *voids; i++, n++) {
        entries[n].key = amqp_cstring_bytes(voids[i]);
        entries[n].value.kind = AMQP_FIELD_KIND_VOID;
    }
    entries[n].key = amqp_cstring_bytes("retries");
    entries[n].value.kind = AMQP_FIELD_KIND_I32;
    n++;
    limits[0].kind = limits[1].kind = AMQP_FIELD_KIND_VOID;
    entries[n].key = amqp_cstring_bytes("timelimit");
    entries[n].value.kind = AMQP_FIELD_KIND_ARRAY;
    entries[n].value.value.array.num_entries = 2;
    entries[n].value.value.array.entries = limits;
    n++;
    entries[n].key = amqp_cstring_bytes("ignore_result");
    entries[n].value.kind = AMQP_FIELD_KIND_BOOLEAN;
    entries[n].value.value.boolean = 1;
    n++;
    entries[n].key = amqp_cstring_bytes("replaced_task_nesting");
    entries[n].value.kind = AMQP_FIELD_KIND_I32;
    n++;
    entries[n].key = amqp_cstring_bytes("stamped_headers");
    entries[n].value.kind = AMQP_FIELD_KIND_VOID;
    n++;
    entries[n].key = amqp_cstring_bytes("stamps");
    entries[n].value.kind = AMQP_FIELD_KIND_TABLE;
    entries[n].value.value.table.num_entries = 0;
    entries[n].value.value.table.entries = none;
    n++;
    amqp_table_t table = {n, entries};
    return table;
}

static amqp_basic_properties_t task_properties(void) {
    amqp_basic_properties_t properties = {0};
    properties._flags = AMQP_BASIC_CONTENT_TYPE_FLAG | AMQP_BASIC_CONTENT_ENCODING_FLAG | AMQP_BASIC_HEADERS_FLAG |
                        AMQP_BASIC_DELIVERY_MODE_FLAG | AMQP_BASIC_PRIORITY_FLAG | AMQP_BASIC_CORRELATION_ID_FLAG;
    properties.content_type = amqp_cstring_bytes("application/json");
    properties.content_encoding = amqp_cstring_bytes("utf-8");
    properties.headers = task_headers();
    properties.delivery_mode = 2;
    properties.priority = 0;
    properties.correlation_id = amqp_cstring_bytes("7c0f6e0e-1c1c-4d6c-8b57-0a8a5b3f2a11");
    return properties;
}

static void publish(amqp_connection_state_t connection, const char *queue, const amqp_basic_properties_t *properties) {
    if (amqp_basic_publish(connection, CHANNEL, amqp_empty_bytes, amqp_cstring_bytes(queue), 0, 0, properties,
                           amqp_cstring_bytes(BODY)) != AMQP_STATUS_OK)
        stop("cannot publish");
}

/* Wait until the broker has taken everything that was sent: a synchronous method is answered in order. */
static void settle_down(amqp_connection_state_t connection, const char *queue) { declare(connection, queue); }

static void close_connection(amqp_connection_state_t connection) {
    amqp_connection_close(connection, AMQP_REPLY_SUCCESS);
    amqp_destroy_connection(connection);
}

static void next_frame(amqp_connection_state_t connection, amqp_frame_t *frame) {
    amqp_maybe_release_buffers(connection);
    if (amqp_simple_wait_frame(connection, frame) != AMQP_STATUS_OK) stop("the connection ended");
}

/* Return the delivery tag of the next message, with its body read and dropped; *reply_to, where asked for, is copied. */
static uint64_t next_message(amqp_connection_state_t connection, char *reply_to, size_t reply_to_size) {
    amqp_frame_t frame;
    do next_frame(connection, &frame);
    while (frame.frame_type != AMQP_FRAME_METHOD || frame.payload.method.id != AMQP_BASIC_DELIVER_METHOD);
    uint64_t tag = ((amqp_basic_deliver_t *)frame.payload.method.decoded)->delivery_tag;
    next_frame(connection, &frame);
    if (frame.frame_type != AMQP_FRAME_HEADER) stop("a header frame was due");
    if (reply_to != NULL) {
        amqp_bytes_t text = ((amqp_basic_properties_t *)frame.payload.properties.decoded)->reply_to;
        size_t size = text.len < reply_to_size ? text.len : reply_to_size - 1;
        memcpy(reply_to, text.bytes, size);
        reply_to[size] = '\0';
    }
    for (uint64_t left = frame.payload.properties.body_size; left > 0; left -= frame.payload.body_fragment.len) {
        next_frame(connection, &frame);
        if (frame.frame_type != AMQP_FRAME_BODY) stop("a body frame was due");
    }
    return tag;
}

static void fill(amqp_connection_state_t connection, const char *queue, long count) {
    amqp_basic_properties_t properties = task_properties();
    declare(connection, queue);
    double cpu = cpu_seconds(), began = now();
    for (long i = 0; i < count; i++) publish(connection, queue, &properties);
    cpu = cpu_seconds() - cpu;
    settle_down(connection, queue);
    printf("{\"count\": %ld, \"wall_s\": %.6f, \"cpu_s\": %.6f}\n", count, now() - began, cpu);
}

static void confirm(amqp_connection_state_t connection, const char *queue, long count) {
    amqp_basic_properties_t properties = task_properties();
    amqp_frame_t frame;
    declare(connection, queue);
    amqp_confirm_select(connection, CHANNEL);
    check(connection, "cannot select confirms");
    double cpu = cpu_seconds(), began = now();
    for (long i = 0; i < count; i++) {
        publish(connection, queue, &properties);
        do next_frame(connection, &frame);
        while (frame.frame_type != AMQP_FRAME_METHOD || frame.payload.method.id != AMQP_BASIC_ACK_METHOD);
    }
    printf("{\"count\": %ld, \"wall_s\": %.6f, \"cpu_s\": %.6f}\n", count, now() - began, cpu_seconds() - cpu);
}

static void drain(amqp_connection_state_t connection, const char *queue, long count) {
    declare(connection, queue);
    double cpu = cpu_seconds(), began = now();
    consume(connection, queue, 0);
    for (long i = 1; i <= count; i++) {
        uint64_t tag = next_message(connection, NULL, 0);
        if (i % ACK_EVERY == 0 || i == count) amqp_basic_ack(connection, CHANNEL, tag, 1);
    }
    double wall = now() - began;
    settle_down(connection, queue);
    printf("{\"count\": %ld, \"wall_s\": %.6f, \"cpu_s\": %.6f}\n", count, wall, cpu_seconds() - cpu);
}

static void answer_forever(const char *host, int port, const char *vhost, const char *queue) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    amqp_connection_state_t connection = open_connection(host, port, vhost);
    amqp_basic_properties_t properties = task_properties();
    char reply_to[256];
    declare(connection, queue);
    consume(connection, queue, 0);
    for (;;) {
        uint64_t tag = next_message(connection, reply_to, sizeof reply_to);
        publish(connection, reply_to, &properties);
        amqp_basic_ack(connection, CHANNEL, tag, 1);
    }
}

static int by_size(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void round_trip(amqp_connection_state_t connection, const char *queue, const char *host, int port,
                       const char *vhost, long count) {
    char reply_queue[64];
    if (count < 1 || count > MAX_ROUND_TRIPS) stop("that many round trips are not kept");
    double *times = calloc((size_t)count, sizeof *times);
    snprintf(reply_queue, sizeof reply_queue, "reply-%d", (int)getpid());
    amqp_queue_declare(connection, CHANNEL, amqp_cstring_bytes(reply_queue), 0, 0, 1, 1, amqp_empty_table);
    check(connection, "cannot declare the reply queue");
    consume(connection, reply_queue, 1);
    pid_t server = fork();
    if (server == 0) answer_forever(host, port, vhost, queue);
    amqp_basic_properties_t properties = task_properties();
    properties._flags |= AMQP_BASIC_REPLY_TO_FLAG;
    properties.reply_to = amqp_cstring_bytes(reply_queue);
    declare(connection, queue);
    for (long i = -WARM_UP; i < count; i++) {
        double began = now();
        publish(connection, queue, &properties);
        next_message(connection, NULL, 0);
        if (i >= 0) times[i] = now() - began;
    }
    kill(server, SIGKILL);
    waitpid(server, NULL, 0);
    qsort(times, (size_t)count, sizeof *times, by_size);
    printf("{\"count\": %ld, \"p50_s\": %.9f, \"p99_s\": %.9f}\n", count, times[count / 2], times[count * 99 / 100]);
    free(times);
}

static void lpush(const char *host, int port, const char *queue, long count) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    char command[ENVELOPE + 256], envelope[ENVELOPE + 1], reply[64];
    int yes = 1, connection = socket(AF_INET, SOCK_STREAM, 0);
    if (inet_pton(AF_INET, host, &address.sin_addr) != 1) stop("not an address");
    if (connect(connection, (struct sockaddr *)&address, sizeof address) != 0) stop("cannot connect");
    setsockopt(connection, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    memset(envelope, 'x', ENVELOPE);
    envelope[ENVELOPE] = '\0';
    int size = snprintf(command, sizeof command, "*3\r\n$5\r\nLPUSH\r\n$%zu\r\n%s\r\n$%d\r\n%s\r\n", strlen(queue),
                        queue, ENVELOPE, envelope);
    if (size >= (int)sizeof command) stop("the queue's name is too long");
    double cpu = cpu_seconds(), began = now();
    for (long i = 0; i < count; i++) {
        if (send(connection, command, (size_t)size, 0) != size) stop("cannot send");
        if (recv(connection, reply, sizeof reply, 0) <= 0 || reply[0] != ':') stop("Redis has not taken it");
    }
    printf("{\"count\": %ld, \"wall_s\": %.6f, \"cpu_s\": %.6f}\n", count, now() - began, cpu_seconds() - cpu);
    close(connection);
}

int main(int argc, char **argv) {
    if (argc != 7) stop("usage: floor fill|drain|publish|confirm|roundtrip|lpush HOST PORT VHOST QUEUE COUNT");
    const char *what = argv[1], *host = argv[2], *vhost = argv[4], *queue = argv[5];
    int port = atoi(argv[3]);
    long count = atol(argv[6]);
    if (strcmp(what, "lpush") == 0) {
        lpush(host, port, queue, count);
        return 0;
    }
    amqp_connection_state_t connection = open_connection(host, port, vhost);
    if (strcmp(what, "fill") == 0 || strcmp(what, "publish") == 0) fill(connection, queue, count);
    else if (strcmp(what, "drain") == 0) drain(connection, queue, count);
    else if (strcmp(what, "confirm") == 0) confirm(connection, queue, count);
    else if (strcmp(what, "roundtrip") == 0) round_trip(connection, queue, host, port, vhost, count);
    else stop("unknown command");
    close_connection(connection);
    return 0;
}
