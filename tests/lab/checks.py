"""What a test prints, what it waits for, and how it ends."""

import time


def tell(checks):
    """Prints each pair of an outcome and a line as soon as it is known; gives the exit code."""
    outcomes = []
    for ok, line in checks:
        print("ok  " if ok else "FAIL", line, flush=True)
        outcomes.append(ok)
    print(f"{outcomes.count(True)} passed, {outcomes.count(False)} failed")
    return 0 if all(outcomes) else 1


def settled(look, wanted):
    """What is seen in the end, which is 10 seconds later at most."""
    until = time.monotonic() + 10
    while not wanted(seen := look()) and time.monotonic() < until:
        time.sleep(0.2)
    return seen
