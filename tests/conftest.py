"""For all tests."""

import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A job in the background (`nohup`, `&` in a script) begins with Ctrl-C ignored, and every
    # program that a test starts and interrupts would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
