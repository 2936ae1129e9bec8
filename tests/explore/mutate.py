#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Plant one bug after the other in a copy of the core, and require that the explorer finds each.

mutations.txt has, for each bug, a line '# name | file | scenarios', then '-' lines with text that
must occur in the file exactly once, then '+' lines with what takes its place. An empty line ends it.
"""
import argparse
import json
import os
import re
import subprocess
import sys
import tempfile


def read_table(path):
    bugs = []
    with open(path, encoding="utf-8") as table:
        for number, line in enumerate(table, 1):
            line = line.rstrip("\n")
            if line.startswith("# "):
                name, file, scenarios = (part.strip() for part in line[2:].split("|"))
                bugs.append({"name": name, "file": file, "scenarios": scenarios, "old": [], "new": []})
            elif line.startswith("-"):
                bugs[-1]["old"].append(line[1:])
            elif line.startswith("+"):
                bugs[-1]["new"].append(line[1:])
            elif line and not line.startswith(";"):
                sys.exit(f"{path}:{number}: '{line}' is neither of '#', '-', '+', ';'")
    return bugs


def plant(bug, source):
    old, new = "\n".join(bug["old"]), "\n".join(bug["new"])
    if source.count(old) != 1:
        return None
    return source.replace(old, new)


def run_bug(bug, options, directory):
    with open(os.path.join(options.source, bug["file"]), encoding="utf-8") as file:
        source = plant(bug, file.read())
    if source is None:
        return False, f"its text does not occur exactly once in {bug['file']}"
    base = os.path.join(directory, re.sub(r"\W+", "-", bug["name"]))
    with open(base + ".c", "w", encoding="utf-8") as file:
        file.write(source)
    # What the bug leaves unused is no news: warnings are off.
    compiled = subprocess.run(options.cc + ["-w", "-iquote", options.source, "-c", base + ".c", "-o", base + ".o"],
                              check=False)
    if compiled.returncode != 0:
        return False, "it does not compile"
    # The planted object comes first, so the core's own is not taken from the library.
    subprocess.run([options.cc[0], "-o", base, base + ".o", "-Wl,--whole-archive", *options.whole,
                    "-Wl,--no-whole-archive", options.core], check=True)
    command = [base, "--runs", str(options.runs), "--exhaustive", "2", "--no-trace"]
    if bug["scenarios"] != "all":
        command += ["--scenario", bug["scenarios"]]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=options.timeout,
                              check=False)
    except subprocess.TimeoutExpired:
        return False, "not found in time"
    output = done.stdout.decode(errors="replace")
    if done.returncode != 1:
        return False, output.splitlines()[-1] if done.returncode == 0 and output else f"exit {done.returncode}"
    where = re.search(r"VIOLATION in (\S+) \((\w+)[^\n]*\n +([^\n]*)", output)
    for leftover in (base, base + ".o"):
        os.unlink(leftover)
    return True, f"{where[1]}, {where[2]}: {where[3]}" if where else "set-up fails"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", required=True)
    parser.add_argument("--source", required=True, help="the directory of the core")
    parser.add_argument("--core", required=True, help="the core as a library, compiled for the explorer")
    parser.add_argument("--whole", action="append", required=True, help="the explorer's other libraries")
    parser.add_argument("--json")
    parser.add_argument("--only", help="names that contain this")
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--timeout", type=float, default=60)
    parser.add_argument("cc", nargs="+", help="the compiler and its options, after --")
    options = parser.parse_args()
    bugs = [b for b in read_table(options.table) if not options.only or options.only in b["name"]]
    found = 0
    with tempfile.TemporaryDirectory() as directory:
        for bug in bugs:
            ok, how = run_bug(bug, options, directory)
            found += ok
            print(f"{'found ' if ok else 'MISSED'}  {bug['name']}  ({how[:150]})", flush=True)
    print(f"mutations: {len(bugs)} planted, {found} found")
    if options.json:
        with open(options.json, encoding="utf-8") as file:
            result = json.load(file)
        result["mutations"] = {"planted": len(bugs), "found": found}
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)
    return 0 if found == len(bugs) else 1


if __name__ == "__main__":
    sys.exit(main())
