"""`python -m launch.netlab`."""

import signal

from launch.netlab.command import main

if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `... | head` is no error
    main()
