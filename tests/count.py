#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Count test cases in the logs of meson test: count.py LOG.json...

A program that printed TAP counts a case for each result; one that did not counts once. A program
that died, or did not run all that it had planned, adds a failure, so that nothing is lost quietly.
Prints what failed, and last "N passed, N failed, N skipped"; exits 1 if anything failed or nothing ran.
"""

import json
import re
import sys

PLAN = re.compile(r"^1\.\.(\d+)")
RESULT = re.compile(r"^(not )?ok (\d+)(.*)$")
SKIP_STATUS = 77


class Count:
    def __init__(self):
        self.passed = self.failed = self.skipped = 0
        self.failures = []

    def fail(self, test, what):
        self.failed += 1
        self.failures.append(f"{test}: {what}")


def cases(text):
    """(number, ok, rest) of each result; a plan starts a new group, repeats in a group are echoes."""
    planned = 0
    seen = {}
    groups = []
    for line in text.splitlines():
        plan, result = PLAN.match(line), RESULT.match(line)
        if plan:
            if seen or planned:
                groups.append((planned, seen))
            planned, seen = int(plan[1]), {}
        elif result:
            number, ok, rest = int(result[2]), not result[1], result[3]
            # A forked child may write its parent's buffer again; a failure is never hidden by that.
            if number not in seen or not ok:
                seen[number] = (ok, rest)
    if seen or planned:
        groups.append((planned, seen))
    return groups


def count_test(record, count):
    name, status = record["name"], record.get("returncode")
    groups = cases(record.get("stdout") or "")
    result = record.get("result", "")
    if not groups:
        if result == "SKIP" or status == SKIP_STATUS:
            count.skipped += 1
        elif result in ("OK", "EXPECTEDFAIL"):
            count.passed += 1
        else:
            count.fail(name, result.lower() or f"exit status {status}")
        return
    failed_before = count.failed
    for planned, seen in groups:
        for ok, rest in seen.values():
            if "# SKIP" in rest.upper():
                count.skipped += 1
            elif ok:
                count.passed += 1
            else:
                count.fail(name, rest.strip(" -") or "a case failed")
        if len(seen) < planned:
            count.fail(name, f"{planned - len(seen)} of {planned} cases did not run")
    if result not in ("OK", "SKIP") and count.failed == failed_before:
        count.fail(name, result.lower() or f"exit status {status}")


def main():
    count = Count()
    for path in sys.argv[1:]:
        try:
            with open(path, encoding="utf-8") as log:
                lines = log.readlines()
        except OSError as error:
            count.fail(path, f"no log: {error.strerror}")
            continue
        if not lines:
            count.fail(path, "no test ran")
        for line in lines:
            count_test(json.loads(line), count)
    for failure in count.failures:
        print(f"failed: {failure}")
    skipped = f", {count.skipped} skipped" if count.skipped else ""
    print(f"{count.passed} passed, {count.failed} failed{skipped}")
    sys.exit(1 if count.failed or not count.passed else 0)


if __name__ == "__main__":
    main()
