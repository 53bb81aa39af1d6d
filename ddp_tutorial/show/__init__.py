"""What a page needs: its set-up, sources, differences, figures and timing."""

import os
import socket


def prepare_launches() -> None:
    """Give each process that is started from here one thread, and an address where this host's name has none."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        socket.getaddrinfo(socket.gethostname(), None)
    except OSError:  # torchrun asks for it, and would wait for minutes
        os.environ.setdefault("PET_LOCAL_ADDR", "localhost")  # its --local-addr
        loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
