/* A small server for benchmarks/others.py: takes one connection on the port that is given, and sends back what it gets.
 * It holds nothing else, so that what CRIU dumps is the least that a process with a connection can be. */

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

static int listening(int port)
{
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons(port) };
	int one = 1, listener = socket(AF_INET, SOCK_STREAM, 0);

	if (listener < 0 || setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one)) ||
	    bind(listener, (struct sockaddr *)&address, sizeof(address)) || listen(listener, 1))
		exit(1);
	return listener;
}

int main(int argc, char **argv)
{
	static char buffer[4096];
	int listener = listening(argc > 1 ? atoi(argv[1]) : 0), one = 1, connection;
	ssize_t got, sent, done;

	/* A line, and then silence: descriptor 1 is of no use to a copy of this process elsewhere. */
	if (write(1, "listening\n", 10) != 10)
		return 1;
	close(1);
	connection = accept(listener, NULL, NULL);
	close(listener);
	setsockopt(connection, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	while ((got = read(connection, buffer, sizeof(buffer))) > 0)
		for (done = 0; done < got; done += sent)
			if ((sent = write(connection, buffer + done, got - done)) <= 0)
				return 1;
	return got < 0;
}
