#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Two unmodified programs live in lent memory, and 300 MiB of it is taken back while they run.

redis-server under redis-benchmark, and an sqlite3 job, have a region of 512 MiB each. Once at least
90 % of a region is lent, one buffer of 300 MiB is taken and given back, then 4800 blocks of 64 KiB.
In the end both programs must answer as they do without Contig, and the buffers must hold what was
written to them. Exit status 0 only if nothing was lost and everything was obtained.
"""

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time

import page
from borrowers import (RedisJob, RedisLoad, SqliteJob, SqliteLoad, probe, redis_command,
                       without_contig)
from lending import MIB, Failed, Memcpy, Region

REGION = 512 * MIB
BUFFER = 300 * MIB
BLOCKS, ORDER = 4800, 4
LENT_WANTED = 94.0  # fill up to this
LENT_NEEDED = 90.0  # take back from no less than this
HOME_SECONDS = 30
COMPACTIONS = 4  # of physical memory, before giving up


def say(text=""):
    print(text, flush=True)


def step(text):
    say(f"\n{text}")


class Side:
    """One region, its program, the load, and what was found out about them."""

    def __init__(self, name, region):
        self.name = name
        self.region = region
        self.job = self.load = None
        self.facts = {"name": name}
        self.stalls = []
        self.maps = []

    def fill(self):
        while (lent := self.region.lent_percent()) < LENT_WANTED:
            private = sum(b["private_bytes"] for b in self.region.stat()["borrowers"])
            if private > 32 * MIB:
                break  # what it asks for now no longer comes from the region
            self.job.fill_step()
        self.facts["lent_percent"] = round(lent, 1)

    def borrower_stall(self):
        return max((b["stall_max_ns"] for b in self.region.stat()["borrowers"]), default=0)

    def wait_home(self):
        """What was displaced comes back once the buffer has been released."""
        start = time.monotonic()
        while self.region.lent_percent() < LENT_NEEDED:
            if time.monotonic() - start > HOME_SECONDS:
                raise Failed(f"{self.name}: what was displaced did not come back within "
                             f"{HOME_SECONDS} s")
            time.sleep(0.05)
        return time.monotonic() - start


def make_backings(options):
    """Of each region. A file cannot be shared, so file:PATH makes PATH.redis and PATH.sqlite."""
    options.files = []
    if not options.backing.startswith("file:"):
        return [options.backing] * 2
    for name in ("redis", "sqlite"):
        path = f"{options.backing[len('file:'):]}.{name}"
        try:
            with open(path, "xb") as file:
                file.truncate(REGION)
        except OSError as error:
            raise Failed(f"--backing: cannot make '{path}': {error.strerror}") from None
        options.files.append(path)
    return [f"file:{path}" for path in options.files]


def start_region(options, backing, name, program, log, **popen):
    """A region from which 300 MiB can be had in one piece: with huge pages that is not a matter of
    course, since physical memory may be fragmented. Root can have it compacted."""
    for attempt in range(COMPACTIONS + 1):
        region = Region(options.contig, f"demo-{name}-{os.getpid()}", REGION, backing, program, log,
                        **popen)
        try:
            region.wait_served()
            longest = region.stat()["area"]["longest_unallocated"] * 4096
            if longest >= BUFFER:
                return region
            region.stop()
            why = f"the longest physical run that could be had is {longest // MIB} MiB"
        except Failed as error:
            region.stop()
            if "fragmented" not in str(error):
                raise
            why = str(error)
        if attempt == COMPACTIONS or not compact_memory():
            break
        say(f"  {name}: {why}; the kernel has compacted memory, trying again")
    raise Failed(f"{name}: {why}; restart the machine, or use --backing memfd")


def compact_memory():
    """Ask the kernel to; False if we may not."""
    try:
        with open("/proc/sys/vm/compact_memory", "w", encoding="ascii") as file:
            file.write("1\n")
        return True
    except OSError:
        return False


def start_sides(options, directory):
    kinds = make_backings(options)
    logs = [open(f"{directory}/{name}.log", "w+b") for name in ("redis", "sqlite")]
    sides = [Side("redis", start_region(options, kinds[0], "redis", redis_command(directory), logs[0],
                                        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL))]
    try:
        sides.append(Side("sqlite", start_region(
            options, kinds[1], "sqlite", ["sqlite3", ":memory:"], logs[1],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)))
        for side, job in zip(sides, (
                lambda process: RedisJob(f"{directory}/redis.sock", process), SqliteJob)):
            side.job = job(side.region.process)
    except BaseException:
        stop_all(sides)
        raise
    return sides


def stop_all(sides):
    for side in sides:
        try:
            side.region.stop()
        except Failed:
            pass


def in_parallel(functions):
    """Run all; raise the first failure."""
    failures = []

    def guarded(function):
        try:
            function()
        except Exception as error:  # handed on below
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(f,)) for f in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def take(side, memcpy, what, seed, arguments):
    """Take a buffer, check that it shows nothing, write a pattern, note the figures."""
    lent = side.region.lent_percent()
    if lent < LENT_NEEDED:
        raise Failed(f"{side.name}: only {lent:.1f} % of the area is lent; "
                     f"{LENT_NEEDED:.0f} % are wanted before memory is taken back")
    side.region.stat(reset_stall=True)
    memcpy.measure(3)
    begin = time.monotonic_ns()
    buffer = side.region.alloc(*arguments)
    end = time.monotonic_ns()
    memcpy.measure(3)
    side.stalls.append((begin, end))
    facts = side.facts[what] = {
        "bytes": buffer.bytes, "blocks": len(buffer.blocks),
        "frames_moved": buffer.answer["frames_moved"], "ns": buffer.answer["ns"],
        "memcpy_ns": 0, "ratio": 0.0, "lent_percent": round(lent, 1),
        "stall_ns": side.borrower_stall(), "report": buffer.answer["report"]}
    if buffer.bytes != BUFFER:
        raise Failed(f"{side.name}: {buffer.bytes} bytes came, {BUFFER} were asked for")
    facts["zeroed"] = buffer.is_zero()
    buffer.write_pattern(seed)
    say(f"  {side.name}: {page.block_text(facts)} in "
        f"{page.ms(facts['ns'])} ms, {facts['frames_moved']} frames moved, from an area "
        f"{lent:.1f} % lent")
    return buffer


def take_back(side, memcpy, number):
    """The single buffer, given back; then the blocks, which stay. Returns the buffer that stays."""
    side.maps.append((f"{side.name}: before", side.region.map()))
    buffer = take(side, memcpy, "single", 2 * number + 1, [str(BUFFER)])
    side.maps.append((f"{side.name}: one buffer of 300 MiB taken", side.region.map()))
    side.facts["physically_contiguous"] = buffer.physically_contiguous()
    time.sleep(0.3)  # the load goes on beside it
    side.facts["single"]["pattern_intact"] = buffer.pattern_intact()
    buffer.release()
    side.facts["home_seconds"] = round(side.wait_home(), 2)
    buffer = take(side, memcpy, "bulk", 2 * number + 2,
                  ["--count", str(BLOCKS), "--order", str(ORDER)])
    side.maps.append((f"{side.name}: 4800 blocks of 64 KiB taken", side.region.map()))
    return buffer


def references(sides, directory):
    """The same jobs once more, without Contig: their digests."""
    found = {}
    other = f"{directory}/reference"
    os.mkdir(other)

    def redis():
        process = subprocess.Popen(redis_command(other), env=without_contig(),
                                   stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        try:
            job = RedisJob(f"{other}/redis.sock", process)
            job.repeat(sides[0].job)
            found["redis"] = job.digest()
        finally:
            process.terminate()
            process.wait()

    def sqlite():
        process = subprocess.Popen(["sqlite3", ":memory:"], env=without_contig(),
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            job = SqliteJob(process)
            job.repeat(sides[1].job)
            found["sqlite"] = job.digest()
        finally:
            process.stdin.close()
            process.wait()

    in_parallel([redis, sqlite])
    return found


class Probe:
    """The client that reads Redis all the time."""

    def __init__(self, path, keys):
        self.pipe, far = multiprocessing.Pipe()
        self.process = multiprocessing.Process(target=probe, args=(path, keys, far), daemon=True)
        self.process.start()
        far.close()

    def stop(self):
        try:
            self.pipe.send(None)
            result = self.pipe.recv()
        except (EOFError, OSError):
            raise Failed("the client that reads Redis has ended: a read failed") from None
        self.process.join()
        return result


def longest(slow, windows):
    """The longest wait of a client that began before a window's end and ended after its begin."""
    return max((took for start, took in slow for begin, end in windows
                if start < end and start + took > begin), default=0)


def run(options, directory):
    started = time.monotonic()
    sides = start_sides(options, directory)
    loads, buffers, prober = [], [], None
    try:
        backing = sides[0].region.stat()
        say(f"  two regions of 512 MiB, {backing['backing']}; writers wait by {backing['guard']}")
        step("filling the regions: redis-server with data, sqlite3 with a table")
        in_parallel([side.fill for side in sides])
        for side in sides:
            say(f"  {side.name}: {side.facts['lent_percent']} % of the area is lent")
        sides[0].load = RedisLoad(sides[0].job.path)
        sides[1].load = SqliteLoad(sides[1].job)
        loads = [side.load for side in sides]
        prober = Probe(sides[0].job.path, sides[0].job.keys())
        memcpy = Memcpy(BUFFER)
        time.sleep(1 if options.quick else 3)
        step("taking 300 MiB back while redis-benchmark and sqlite3 run")
        for number, side in enumerate(sides):
            buffers.append(take_back(side, memcpy, number))
        while time.monotonic() - started < options.seconds:
            time.sleep(0.1)
        for side, buffer in zip(sides, buffers):
            side.facts["bulk"]["pattern_intact"] = buffer.pattern_intact()
            buffer.release()
            side.wait_home()
        for side in sides:
            if not side.load.alive():
                raise Failed(f"{side.name}: the load has ended before its time")
        answers, wrong, slow = prober.stop()
        prober = None
        for side in sides:
            side.load.stop()
        loads = []
        sides[0].facts["probe"] = {"answers": answers, "wrong": wrong,
                                   "longest_ns": longest(slow, sides[0].stalls)}
        step("comparing with the same work without Contig")
        digests = {side.name: side.job.digest() for side in sides}
        finish(sides)
        wanted = references(sides, directory)
        for side in sides:
            side.facts["digest_match"] = digests[side.name] == wanted[side.name]
        for side in sides:
            for what in ("single", "bulk"):
                side.facts[what]["memcpy_ns"] = memcpy.best()
                side.facts[what]["ratio"] = round(side.facts[what]["ns"] / memcpy.best(), 3)
        return collect(sides, backing["backing"], memcpy)
    finally:
        if prober:
            prober.process.kill()
        for load in loads:
            if isinstance(load, RedisLoad):
                load.stop()
        stop_all(sides)


def finish(sides):
    """End the programs as their users would; contig run must end with them, all released."""
    sides[1].region.process.stdin.close()
    for side in sides:
        status = sides[1].region.process.wait(30) if side is sides[1] else side.region.stop()
        if status != 0:
            raise Failed(f"{side.name}: contig run ended with status {status}: "
                         f"{side.region.last_words()}")


def collect(sides, backing, memcpy):
    regions = [side.facts for side in sides]
    takes = [r[what] for r in regions for what in ("single", "bulk")]
    contiguous = [r["physically_contiguous"] for r in regions]
    facts = {
        "backing": backing, "region_bytes": REGION,
        "lent_percent": min(t["lent_percent"] for t in takes),
        "digest_match": all(r["digest_match"] for r in regions),
        "patterns_intact": all(t["pattern_intact"] for t in takes),
        "zeroed": all(t["zeroed"] for t in takes),
        "physically_contiguous": None if None in contiguous else all(contiguous),
        "stall_max_ns": max(t["stall_ns"] for t in takes),
        "wrong_answers": regions[0]["probe"]["wrong"],
        "single": regions[0]["single"], "bulk": regions[0]["bulk"],
        "memcpy_samples": len(memcpy.times), "memcpy_median_ns": memcpy.median(),
        "cpus": os.cpu_count(), "regions": regions, "machine": platform.machine(), "kernel": platform.release(),
    }
    return facts, [m for side in sides for m in side.maps]


def verdict(facts):
    """What was proved, and what failed: two lists of lines."""
    good, bad = [], []

    def check(ok, text, otherwise):
        (good if ok else bad).append(text if ok else otherwise)

    check(facts["digest_match"], "data: the digests equal those of the same work without Contig",
          "data: a digest DIFFERS from that of the same work without Contig")
    probe_facts = facts["regions"][0]["probe"]
    check(probe_facts["wrong"] == 0,
          f"reads: {probe_facts['answers']} answers of Redis checked meanwhile, all right; while "
          f"memory moved, the slowest took "
          f"{'less than 2' if not probe_facts['longest_ns'] else page.ms(probe_facts['longest_ns'])}"
          f" ms",
          f"reads: {probe_facts['wrong']} answers of Redis were WRONG")
    check(facts["patterns_intact"], "buffers: the patterns written into them stayed intact",
          "buffers: a pattern was DESTROYED")
    check(facts["zeroed"], "privacy: the buffers came zeroed",
          "privacy: a buffer showed what a borrower had in it")
    physical = facts["physically_contiguous"]
    if physical and facts["backing"] == "hugetlb":
        good.append("300 MiB: physically contiguous, by /proc/self/pagemap")
    elif facts["backing"] == "hugetlb" and physical is False:
        bad.append("300 MiB: NOT physically contiguous, by /proc/self/pagemap")
    else:
        good.append("300 MiB: contiguous in the region"
                    + (" (physically too, by chance)" if physical else ""))
    good.append(f"stall: writers waited {page.ms(facts['stall_max_ns'])} ms at most")
    return good, bad


def parse_options():
    parser = argparse.ArgumentParser(prog="./run demo", description=__doc__.split("\n\n")[0])
    parser.add_argument("--contig", required=True, help=argparse.SUPPRESS)
    parser.add_argument("--backing", default="memfd", metavar="KIND",
                        help="memfd (default), hugetlb (needs root), or file:PATH (makes "
                             "PATH.redis and PATH.sqlite, and removes them)")
    parser.add_argument("--seconds", type=float, metavar="N",
                        help="how long the load runs at least (default 30, with --quick 0)")
    parser.add_argument("--quick", action="store_true", help="no longer than is needed")
    parser.add_argument("--html", metavar="FILE", help="write a page with maps and table")
    parser.add_argument("--json", metavar="FILE", help="write the facts")
    options = parser.parse_args()
    if options.seconds is None:
        options.seconds = 0 if options.quick else 30
    if not 0 <= options.seconds <= 86400:
        parser.error("--seconds: between 0 and 86400")
    for name in ("html", "json"):
        if path := getattr(options, name):
            try:  # now, not after the work
                open(path, "a", encoding="utf-8").close()
            except OSError as error:
                parser.error(f"--{name}: cannot write '{path}': {error.strerror}")
    return options


def main():
    options = parse_options()
    os.environ["LC_ALL"] = "C"
    for tool in ("redis-server", "redis-benchmark", "sqlite3"):
        if not shutil.which(tool):
            sys.exit(f"demo: {tool} is not installed; './run packages' does it")
    step("Contig demo: 300 MiB out of memory that two programs are using")
    directory = tempfile.mkdtemp(prefix="contig-demo-")
    try:
        facts, maps = run(options, directory)
    except Failed as error:
        sys.exit(f"demo: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        for path in getattr(options, "files", []):
            os.unlink(path)
    good, bad = verdict(facts)
    for title, answer in maps:
        say("\n" + page.text_map(title, answer))
    say(page.legend())
    say("\n" + page.text_table(page.table_rows(facts["regions"])) + "\n")
    say("  " + page.memcpy_note(facts) + "\n")
    for line in good + bad:
        say("  " + line)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as out:
            json.dump(facts, out, indent=2)
            out.write("\n")
    if options.html:
        with open(options.html, "w", encoding="utf-8") as out:
            out.write(page.page(facts, maps, good + bad))
    say("\n" + ("Nothing was lost." if not bad else "FAILED"))
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
