"""What a test prints, and how it ends."""


def tell(checks):
    """Prints each pair of an outcome and a line as soon as it is known; gives the exit code."""
    outcomes = []
    for ok, line in checks:
        print("ok  " if ok else "FAIL", line, flush=True)
        outcomes.append(ok)
    print(f"{outcomes.count(True)} passed, {outcomes.count(False)} failed")
    return 0 if all(outcomes) else 1
