#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""The contig command as its users call it: test_cli.py CONTIG LIBRARY SOURCE_ROOT. Prints TAP.

Each case is a function; each makes the regions that it needs, with names of its own, in a runtime
directory of the test's own.
"""

import contextlib
import json
import mmap
import os
import pty
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback

CONTIG, LIBRARY, ROOT = sys.argv[1:4]
MIB = 1 << 20
USAGE, NO_REGION, NO_MEMORY, BUSY = 2, 3, 4, 5
COMMANDS = ["run", "ps", "alloc", "release", "leases", "stat", "map", "top"]
PATIENCE = 30  # seconds until something that must happen is said not to have happened
CASES = []


def case(function):
    CASES.append(function)
    return function


class Skip(Exception):
    pass


def contig(*args, **kwargs):
    kwargs.setdefault("stdin", subprocess.DEVNULL)
    return subprocess.run([CONTIG, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True, timeout=60, check=False, **kwargs)


def expect(done, status, *texts):
    """The exit status and, for a failure, one line that has each text."""
    assert done.returncode == status, (done.args[1:], done.returncode, done.stdout, done.stderr)
    for text in texts:
        assert text in done.stderr, (done.args[1:], text, done.stderr)
    if status and texts:
        assert done.stderr.count("\n") == 1, done.stderr
    return done


def ask(*args):
    done = contig(*args)
    assert done.returncode == 0, (args, done.returncode, done.stderr)
    return json.loads(done.stdout)


def until(what, seconds=PATIENCE):
    """Wait until what() is true; it has no event that could be waited for."""
    end = time.monotonic() + seconds
    while not (result := what()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
    return result


@contextlib.contextmanager
def region(name, *options, program=("cat",), size="64M", **popen):
    """contig run; its program is cat, which lasts as long as its input."""
    process = subprocess.Popen([CONTIG, "run", "--region", size, "--name", name, *options, "--",
                                *program], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, **popen)
    try:
        until(lambda: contig("stat", name).returncode == 0 or process.poll() is not None)
        assert process.poll() is None, process.stderr.read()
        yield process
    finally:
        process.stdin.close()
        leases = contig("leases", "--json", name)
        if leases.returncode == 0 and json.loads(leases.stdout)["leases"]:
            process.terminate()  # it would wait for their release
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
        process.stdout.close()
        process.stderr.close()


# A borrower that holds so many MiB, says so, and checks them when a line comes.
BORROWER = """
import sys
held = [bytearray(os.urandom(1024) * 1024) for _ in range(int(sys.argv[1]))]
sums = [zlib.crc32(m) for m in held]
print("ready", flush=True)
for line in sys.stdin:
    print("intact" if sums == [zlib.crc32(m) for m in held] else "LOST", flush=True)
"""


def borrower(mib):
    return (sys.executable, "-c", "import os, zlib" + BORROWER, str(mib))


def wait_ready(process):
    line = process.stdout.readline()
    assert line == b"ready\n", (line, process.poll())


def check_intact(process):
    process.stdin.write(b"\n")
    process.stdin.flush()
    assert process.stdout.readline() == b"intact\n"


def taken(name):
    return ask("stat", "--json", name)["area"]["allocated"]


# ---- command lines ------------------------------------------------------------------------------


@case
def help_everywhere():
    for args in (["--help"], *([c, "--help"] for c in COMMANDS)):
        done = expect(contig(*args), 0)
        assert "Usage:" in done.stdout and not done.stderr, done
    assert re.match(r"contig \d+\.\d+\.\d+\n", expect(contig("--version"), 0).stdout)


@case
def man_pages_and_completion_know_every_option():
    with open(f"{ROOT}/completions/contig", encoding="utf-8") as file:
        completion = file.read()
    for command in COMMANDS:
        text = contig(command, "--help").stdout
        options = set(re.findall(r"--[a-z][-a-z]+", text.split("Options:")[-1])) | {"--help"}
        with open(f"{ROOT}/docs/man/contig-{command}.1", encoding="utf-8") as file:
            page = file.read().replace("\\-", "-")
        line = re.search(rf"\b{command}\b[^)]*\)(.*?);;", completion, re.S)
        assert line, command
        for option in options:
            assert option in page, (command, option, "man page")
            assert option in line[1], (command, option, "completion")
        for option in re.findall(r"--[a-z][-a-z]+", line[1]):
            assert option in options, (command, option, "completion knows too much")


@case
def wrong_usage():
    for args, texts in (
            ([], ["command is missing"]),
            (["nonsense"], ["'nonsense' is not a command"]),
            (["alloc", "--nonsense"], ["--nonsense", "no such option"]),
            (["alloc", "1M", "--align"], ["--align", "missing"]),
            (["alloc"], ["SIZE is missing"]),
            (["alloc", "1M", "2M"], ["too many"]),
            (["alloc", "1M", "--count", "3"], ["exclude"]),
            (["alloc", "--order", "3"], ["--order needs --count"]),
            (["alloc", "1M", "--hold", "--", "true"], ["exclude"]),
            (["alloc", "1M", "--"], ["command is missing"]),
            (["alloc", "1M", "--fd", "77"], ["--fd", "not an open descriptor"]),
            (["alloc", "1M", "--fd", "1"], ["--fd", "not a Unix socket"]),
            (["alloc", "1M", "--mode", "hard"], ["--mode", "hard"]),
            (["release"], ["LEASE"]),
            (["release", "0"], ["LEASE", "zero"]),
            (["release", "x"], ["LEASE", "not a number"]),
            (["release", "1", "-1"], ["-1 is negative"]),
            (["stat", "a", "b"], ["one region"]),
            (["top", "--interval", "0"], ["--interval", "zero"]),
            (["top", "--interval", "9999"], ["--interval", "hour"]),
            (["top"], ["terminal"]),
            (["ps", "x"], ["too many"])):
        expect(contig(*args), USAGE, *texts)


@case
def bad_sizes_name_the_option():
    for size, why in (("0", "zero"), ("-1M", "negative"), ("", "empty"), ("x", "not a size"),
                      ("1Q", "not a size"), ("1.5M", "not a size"), ("M", "not a size"),
                      ("99999999999999999999", "too large"), ("16E", "too large"),
                      ("9223372036854775808", "too large"), ("1MM", "not a size"),
                      ("1M ", "not a size"), (" 1M", "not a size")):
        for option in ("--region", "--spill"):
            if option == "--spill" and size == "0":
                continue  # none is a choice
            expect(contig("run", option, size, "--", "true"), 125, f"{option}: '{size}'", why)
        expect(contig("alloc", "1M", "--align", size), USAGE, "--align", why)
        if not size.startswith("-"):
            expect(contig("alloc", size), USAGE, "SIZE", why)
    expect(contig("alloc", "-5M"), USAGE, "negative")
    expect(contig("alloc", "1M", "--align", "12K"), USAGE, "--align", "power of two")
    expect(contig("alloc", "1M", "--align", "1K"), USAGE, "--align", "power of two")
    for count in ("0", "-1", "x", "4294967296"):
        expect(contig("alloc", "--count", count), USAGE, "--count")
    expect(contig("alloc", "--count", "1", "--order", "19"), USAGE, "--order", "too large")
    for timeout in ("0", "-1", "x", "1e3", "inf", "nan", ""):
        expect(contig("alloc", "1M", "--timeout", timeout), USAGE, "--timeout")


@case
def sizes_are_understood():
    with region("sizes"):
        for text, size in (("4096", 4096), ("64K", 65536), ("64KiB", 65536), ("1m", MIB),
                           ("1MB", MIB), ("2MiB", 2 * MIB), ("1", 4096)):
            answer = ask("alloc", "--from", "sizes", "--json", text)
            assert sum(b["bytes"] for b in answer["blocks"]) == size, (text, answer)


# ---- run ----------------------------------------------------------------------------------------


@case
def run_exit_status():
    expect(contig("run", "--region", "4M", "true"), 0)
    expect(contig("run", "--region", "4M", "--", "sh", "-c", "exit 7"), 7)
    expect(contig("run", "--region", "4M", "sh", "-c", "kill -9 $$"), 137)
    expect(contig("run", "--region", "4M", "sh", "-c", "kill -TERM $$"), 143)
    expect(contig("run", "--region", "4M"), 125, "program is missing")
    expect(contig("run", "--nonsense"), 125, "--nonsense")
    expect(contig("run", "--region", "4M", "no-such-program"), 127, "no-such-program")
    expect(contig("run", "--region", "4M", "/no/such/program"), 127, "/no/such/program")
    expect(contig("run", "--region", "4M", "/etc/passwd"), 126, "/etc/passwd")
    expect(contig("run", "--region", "4M", "/etc"), 126, "/etc")
    expect(contig("run", "--region", "4M", ""), 127)
    with tempfile.NamedTemporaryFile(mode="w") as bad:
        bad.write("\x7fELF garbage")
        bad.flush()
        os.chmod(bad.name, 0o755)
        done = contig("run", "--region", "4M", bad.name)
        assert done.returncode in (126, 127, 2), done


@case
def run_bad_regions():
    expect(contig("run", "--region", "3M", "true"), 125, "--region", "2M")
    expect(contig("run", "--region", "1000T", "true"), 125)
    expect(contig("run", "--backing", "wood", "true"), 125, "wood")
    expect(contig("run", "--backing", "", "true"), 125)
    expect(contig("run", "--backing", "file:", "true"), 125)
    expect(contig("run", "--backing", "file:/no/such/file", "true"), 125, "/no/such/file")
    expect(contig("run", "--backing", "hugetlb", "--region", "100T", "true"), 125, "more than")
    for name in ("", "a/b", ".hidden", "x" * 300):
        expect(contig("run", "--name", name, "true"), 125)


@case
def run_leaves_the_command_line_alone():
    shell = 'for a; do printf "<%s>" "$a"; done'
    done = expect(contig("run", "--region", "4M", "--", "sh", "-c", shell, "sh", "--name", "--",
                         "-x", ""), 0)
    assert done.stdout == "<--name><--><-x><>", done.stdout
    done = expect(contig("run", "--region", "4M", "sh", "-c", shell, "sh", "--", "--help"), 0)
    assert done.stdout == "<--><--help>", done.stdout


@case
def run_sets_the_environment():
    done = expect(contig("run", "--region", "4M", "--name", "env1", "sh", "-c",
                         'echo "$LD_PRELOAD"; echo "$CONTIG_SOCKET"'), 0)
    preload, path = done.stdout.splitlines()
    assert os.path.samefile(preload, LIBRARY) and path.endswith("/env1.sock"), done.stdout
    libc = next(line.split()[2] for line in subprocess.run(
        ["ldd", "/bin/sh"], stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
        if "libc.so" in line)
    done = expect(contig("run", "--region", "4M", "sh", "-c", 'echo "$LD_PRELOAD"',
                         env={**os.environ, "LD_PRELOAD": libc}), 0)
    assert done.stdout.strip() == f"{libc}:{preload}", done.stdout


@case
def run_makes_names_unique():
    with region("cat"):
        done = expect(contig("run", "--region", "4M", "--name", "cat", "true"), 125, "cat")
        done = expect(contig("run", "--region", "4M", "sh", "-c", "echo $CONTIG_SOCKET"), 0)
        assert done.stdout.endswith("/sh.sock\n"), done.stdout
        with subprocess.Popen([CONTIG, "run", "--region", "4M", "cat"],
                              stdin=subprocess.PIPE) as second:
            until(lambda: contig("stat", "cat-2").returncode == 0)
            second.stdin.close()
            assert second.wait(PATIENCE) == 0


@case
def run_passes_signals_on():
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
        script = f"trap 'echo got; exit 9' {number - 0}; echo ready; while :; do sleep 0.05; done"
        with region("signals", program=("sh", "-c", script)) as process:
            wait_ready(process)
            process.send_signal(number)
            assert process.wait(PATIENCE) == 9, number
            assert process.stdout.readline() == b"got\n", number


@case
def run_waits_for_borrowers_that_outlive_the_program():
    inner, outer = os.pipe()
    child = "import sys; x = bytearray(8 << 20); print('ready', flush=True); sys.stdin.read()"
    with region("outlive", program=("sh", "-c", '"$@" <&"$0" & exit 5', str(inner), sys.executable,
                                    "-c", child), pass_fds=[inner]) as process:
        os.close(inner)
        wait_ready(process)
        time.sleep(0.5)  # its first child has ended long ago; the region must still be there
        assert process.poll() is None, process.stderr.read()
        assert ask("stat", "--json", "outlive")["borrowers"]
        os.close(outer)
        assert process.wait(PATIENCE) == 5


@case
def run_ends_with_a_signal_though_a_lease_is_left():
    with region("left") as process:
        expect(contig("alloc", "--from", "left", "4M"), 0)
        process.stdin.close()
        time.sleep(0.5)
        assert process.poll() is None  # the buffer may be in use
        process.terminate()
        assert process.wait(PATIENCE) == 0
    expect(contig("stat", "left"), NO_REGION, "left")


@case
def run_killed_leaves_the_program_running():
    with region("killed", program=borrower(16)) as process:
        wait_ready(process)
        process.kill()
        process.wait()
        check_intact(process)
        expect(contig("alloc", "--from", "killed", "4M"), NO_REGION)
        assert "killed" not in contig("ps").stdout


@case
def run_warns_of_unseen_pins():
    done = contig("run", "--region", "4M", "--allow-unseen-pins", "true")
    assert done.returncode == 0 and "warning" in done.stderr, done
    assert "unseen" not in contig("run", "--region", "4M", "true").stderr


@case
def run_without_privileges():
    if os.geteuid() != 0:
        raise Skip("this is an ordinary user already")
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        tree = f"{directory}/tools"
        for part in ("contig", "malloc"):
            os.makedirs(f"{tree}/{part}")
        shutil.copy(CONTIG, f"{tree}/contig/contig")
        shutil.copy(LIBRARY, f"{tree}/malloc/libcontig-malloc.so")
        libraries = subprocess.run(["ldd", CONTIG], stdout=subprocess.PIPE, text=True,
                                   check=True).stdout
        for path in re.findall(r"=> (\S*libcontig\S*)", libraries):
            shutil.copy(path, f"{tree}/{os.path.basename(path)}")
        private = f"{directory}/runtime"
        os.mkdir(private)
        os.chown(private, 65534, 65534)
        env = {**os.environ, "LD_LIBRARY_PATH": tree, "XDG_RUNTIME_DIR": private}
        program = ["run", "--region", "32M", "--name", "user", "--", "python3", "-c",
                   "x = bytearray(b'a') * (20 << 20); import subprocess; "
                   f"assert subprocess.call(['{tree}/contig/contig', 'alloc', '--from', 'user', "
                   "'16M', '--', 'true']) == 0; assert x.count(b'a') == len(x); print('intact')"]
        env["PATH"] = "/usr/bin:/bin"
        done = subprocess.run([f"{tree}/contig/contig", *program], env=env, user=65534,
                              group=65534, extra_groups=[], stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                              timeout=60, check=False, start_new_session=True)
        assert "intact" in done.stdout, done


# ---- buffers ------------------------------------------------------------------------------------


@case
def a_lease_from_taking_to_release():
    with region("lease", program=borrower(40)) as process:
        wait_ready(process)
        done = expect(contig("alloc", "--from", "lease", "32M"), 0)
        number = re.match(r"lease (\d+): 32 MiB at offset \d+, contiguous", done.stdout)[1]
        assert taken("lease") == 32 * MIB // 4096
        check_intact(process)
        leases = ask("leases", "--json", "lease")["leases"]
        assert [(x["bytes"], x["hold"]) for x in leases] == [(32 * MIB, False)], leases
        assert f" {number} " in expect(contig("leases", "--from", "lease"), 0).stdout
        expect(contig("release", "--from", "lease", number), 0)
        expect(contig("release", "--from", "lease", number), 1, number)
        assert taken("lease") == 0 and ask("leases", "--json", "lease")["leases"] == []
        check_intact(process)


@case
def the_only_region_needs_no_name():
    if ask("ps", "--json"):
        raise Skip("this user has other regions")
    expect(contig("stat"), NO_REGION, "no region")
    with region("only"):
        expect(contig("stat"), 0)
        expect(contig("alloc", "2M"), 0)
        with region("other"):
            expect(contig("stat"), NO_REGION, "2 regions")


@case
def blocks_are_taken_and_released_one_by_one():
    with region("blocks"):
        answer = ask("alloc", "--from", "blocks", "--json", "--count", "100", "--order", "4")
        assert len(answer["blocks"]) == 100
        assert {b["bytes"] for b in answer["blocks"]} == {65536}
        pfns = [b["pfn"] for b in answer["blocks"]]
        assert pfns == sorted(set(pfns)) and all(p % 16 == 0 for p in pfns)
        lease = str(answer["lease"])
        expect(contig("release", "--from", "blocks", lease, "99"), 0)
        expect(contig("release", "--from", "blocks", lease, "99"), 1)
        expect(contig("release", "--from", "blocks", lease, "100"), 1)
        assert taken("blocks") == 99 * 16
        expect(contig("release", "--from", "blocks", lease), 0)
        assert taken("blocks") == 0


@case
def what_cannot_be_had_is_said():
    with region("small"):
        expect(contig("alloc", "--from", "small", "65M"), NO_MEMORY, "65 MiB", "64 MiB")
        expect(contig("alloc", "--from", "small", "--count", "5", "--order", "12"), NO_MEMORY)
        expect(contig("alloc", "--from", "small", "8E", "--no-zero"), USAGE)
        expect(contig("alloc", "--from", "small", "4E"), NO_MEMORY)
        first = ask("alloc", "--from", "small", "--json", "40M")
        done = expect(contig("alloc", "--from", "small", "40M", "--json"), NO_MEMORY)
        assert json.loads(done.stdout)["ok"] is False
        expect(contig("release", "--from", "small", str(first["lease"])), 0)
        assert taken("small") == 0
        answer = ask("alloc", "--from", "small", "--json", "1M", "--align", "32M")
        assert answer["blocks"][0]["pfn"] * 4096 % (32 * MIB) == 0


@case
def no_room_to_move_leaves_everything_as_it_was():
    with region("full", "--spill", "0", program=borrower(40)) as process:
        wait_ready(process)
        before = ask("stat", "--json", "full")["area"]
        expect(contig("alloc", "--from", "full", "48M"), NO_MEMORY)
        after = ask("stat", "--json", "full")["area"]
        assert (before["lent"], before["allocated"]) == (after["lent"], after["allocated"])
        check_intact(process)


@case
def a_stopped_borrower_is_busy_and_named_so():
    with region("stopped", program=borrower(56)) as process:
        wait_ready(process)
        pid = ask("stat", "--json", "stopped")["borrowers"][0]["pid"]
        os.kill(pid, signal.SIGSTOP)
        try:
            done = contig("alloc", "--from", "stopped", "48M")
            assert done.returncode in (BUSY, 0), done
            if os.geteuid() == 0 and done.returncode == BUSY:
                assert done.stderr.count("\n") == 1, done.stderr
        finally:
            os.kill(pid, signal.SIGCONT)
        check_intact(process)


@case
def hold_ends_with_input_signal_or_death():
    with region("hold"):
        def holder():
            process = subprocess.Popen([CONTIG, "alloc", "--from", "hold", "--hold", "8M"],
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            assert process.stdout.readline().startswith(b"lease ")
            assert taken("hold") == 8 * MIB // 4096
            assert ask("leases", "--json", "hold")["leases"][0]["hold"] is True
            return process

        def ended(process, status):
            assert process.wait(PATIENCE) == status
            process.stdout.close()
            until(lambda: taken("hold") == 0)

        process = holder()
        process.stdin.close()
        ended(process, 0)
        for number, status in ((signal.SIGTERM, 0), (signal.SIGINT, 0),
                               (signal.SIGKILL, -signal.SIGKILL)):
            process = holder()
            process.send_signal(number)
            ended(process, status)
            process.stdin.close()


@case
def hold_says_when_the_region_ends():
    with region("ends") as process:
        with subprocess.Popen([CONTIG, "alloc", "--from", "ends", "--hold", "8M"],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE) as holder:
            holder.stdout.readline()
            process.kill()
            assert holder.wait(PATIENCE) == NO_REGION
            assert b"region has ended" in holder.stderr.read()


USER = """
import mmap, os
fd, offset, size = (int(os.environ["CONTIG_BUFFER_" + n]) for n in ("FD", "OFFSET", "BYTES"))
pieces = os.environ.get("CONTIG_BUFFER_EXTENTS", f"{offset}:{size}").split(",")
total = 0
for piece in pieces:
    at, n = map(int, piece.split(":"))
    memory = mmap.mmap(fd, n, offset=at)
    assert memory[:] == bytes(n), "not zeroed"
    memory[:] = b"x" * n
    total += n
print(total == size, len(pieces))
raise SystemExit(11)
"""


@case
def a_command_gets_the_buffer():
    with region("command", program=borrower(40)) as process:
        wait_ready(process)
        done = contig("alloc", "--from", "command", "32M", "--", sys.executable, "-c", USER)
        assert done.returncode == 11 and done.stdout == "True 1\n", done
        assert taken("command") == 0
        check_intact(process)
        expect(contig("alloc", "--from", "command", "1M", "--", "no-such-program"), 127)
        expect(contig("alloc", "--from", "command", "1M", "--", "/etc"), 126)
        expect(contig("alloc", "--from", "command", "1M", "--", "sh", "-c", "kill -9 $$"), 137)
        assert taken("command") == 0


@case
def a_descriptor_goes_through_a_socket():
    with region("send", program=borrower(40)) as process:
        wait_ready(process)
        here, there = socket.socketpair()
        with here, there:
            expect(contig("alloc", "--from", "send", "32M", "--fd", str(there.fileno()),
                          pass_fds=[there.fileno()]), 0)
            text, descriptors, _flags, _address = socket.recv_fds(here, 65536, 4)
            line = json.loads(text)
            assert text.endswith(b"\n") and len(descriptors) == 1
            assert sum(e["bytes"] for e in line["extents"]) == line["bytes"] == 32 * MIB
            extent = line["extents"][0]
            with mmap.mmap(descriptors[0], extent["bytes"], offset=extent["offset"]) as memory:
                assert memory[:] == bytes(len(memory))
                memory[:] = b"y" * len(memory)
            os.close(descriptors[0])
        check_intact(process)
        expect(contig("release", "--from", "send", str(line["lease"])), 0)
        # Nobody at the other end: the buffer must not be lost.
        here, there = socket.socketpair()
        here.close()
        with there:
            expect(contig("alloc", "--from", "send", "8M", "--fd", str(there.fileno()),
                          pass_fds=[there.fileno()]), 1, "--fd", "released")
        assert taken("send") == 0


@case
def killing_the_taker_leaves_nothing_behind():
    with region("taker", program=borrower(56)) as process:
        wait_ready(process)
        for delay in (0, 0.002, 0.005, 0.01, 0.02, 0.05):
            with subprocess.Popen([CONTIG, "alloc", "--from", "taker", "--hold", "48M"],
                                  stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                                  stderr=subprocess.DEVNULL) as tool:
                time.sleep(delay)
                tool.kill()
            until(lambda: taken("taker") == 0)
        check_intact(process)


@case
def killing_the_borrower_frees_its_memory():
    with region("victim", program=("sh", "-c", "cat; :")) as process:
        with subprocess.Popen([*borrower(40)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              env={**os.environ, "LD_PRELOAD": LIBRARY,
                                   "CONTIG_SOCKET": runtime_path("victim")}) as victim:
            wait_ready(victim)
            assert ask("stat", "--json", "victim")["area"]["lent"] >= 40 * MIB // 4096
            victim.kill()
        until(lambda: ask("stat", "--json", "victim")["area"]["lent"] == 0)
        assert process.poll() is None


def runtime_path(name):
    return f"{os.environ['XDG_RUNTIME_DIR']}/contig/{name}.sock"


# ---- what is shown ------------------------------------------------------------------------------


@case
def stat_in_both_forms():
    with region("shown", program=borrower(40)) as process:
        wait_ready(process)
        expect(contig("alloc", "--from", "shown", "16M"), 0)
        stat = ask("stat", "--json", "shown")
        assert stat["name"] == "shown" and stat["backing"] == "memfd"
        assert stat["region_bytes"] == 64 * MIB
        area = stat["area"]
        assert area["frames"] == area["allocated"] + area["lent"] + area["free"], area
        assert stat["borrowers"][0]["pid"] > 0
        text = expect(contig("stat", "shown"), 0).stdout
        for word in ("shown", "memfd", "64 MiB", "16 MiB", "userfaultfd"):
            assert word in text or word == "userfaultfd", (word, text)
        expect(contig("stat", "--reset-stall", "--json", "shown"), 0)
        assert ask("stat", "--json", "shown")["borrowers"][0]["stall_max_ns"] == 0


@case
def ps_lists_regions_and_borrowers():
    with region("one", program=borrower(16)) as process, region("two"):
        wait_ready(process)
        listed = {r["name"]: r["stat"] for r in ask("ps", "--json")}
        assert set(listed) >= {"one", "two"}
        assert listed["one"]["borrowers"] and not listed["two"]["borrowers"]
        text = expect(contig("ps"), 0).stdout
        assert "one" in text and "two" in text and str(listed["one"]["borrowers"][0]["pid"]) in text


@case
def ps_shows_a_region_that_does_not_answer():
    with region("asleep") as process:
        process.send_signal(signal.SIGSTOP)
        try:
            assert "does not answer" in expect(contig("ps"), 0).stdout
        finally:
            process.send_signal(signal.SIGCONT)


@case
def map_as_text_json_and_page():
    with region("drawn") as process:
        expect(contig("alloc", "--from", "drawn", "16M"), 0)
        text = expect(contig("map", "drawn"), 0).stdout
        row = re.search(r"0 MiB  (\S+)", text)[1]
        assert len(row) == 32 and row.count("#") == 8 and row.count(".") == 24, text
        blocks = ask("map", "--json", "drawn")["blocks"]["area"]
        assert sum(blocks["taken"]) == 16 * MIB // 4096
        with tempfile.TemporaryDirectory() as directory:
            path = f"{directory}/map.html"
            expect(contig("map", "--html", path, "drawn"), 0)
            with open(path, encoding="utf-8") as file:
                page = file.read()
        assert page.startswith("<!DOCTYPE html>") and "<svg" in page and "</html>" in page
        assert not re.search(r'(src|href)="', page), "it must be self-contained"
        assert expect(contig("map", "--html", "-", "drawn"), 0).stdout.startswith("<!DOCTYPE")
        expect(contig("map", "--html", "/no/such/dir/x", "drawn"), 1, "--html", "/no/such/dir/x")
        assert process.poll() is None


@case
def a_full_disk_is_noticed():
    with region("disk"), open("/dev/full", "w", encoding="utf-8") as full:
        for args in (["stat", "disk"], ["stat", "--json", "disk"], ["map", "disk"], ["ps"],
                     ["--help"]):
            done = subprocess.run([CONTIG, *args], stdout=full, stderr=subprocess.PIPE, text=True,
                                  check=False)
            assert done.returncode == 1 and "cannot write" in done.stderr, (args, done)


class Terminal:
    """A program on a pseudo terminal."""

    def __init__(self, *command):
        self.seen = b""
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ["TERM"] = "xterm"
            os.execv(command[0], command)

    def wait_for(self, text):
        end = time.monotonic() + PATIENCE
        while text not in self.seen:
            assert time.monotonic() < end, (text, self.seen)
            if select.select([self.fd], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self.fd, 65536)
                except OSError:
                    break
        assert text in self.seen, (text, self.seen)

    def end(self):
        while select.select([self.fd], [], [], PATIENCE)[0]:
            try:
                if not os.read(self.fd, 65536):
                    break
            except OSError:
                break
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self.fd)
        return status


@case
def top_draws_and_quits():
    with region("live", program=borrower(16)) as process:
        wait_ready(process)
        top = Terminal(CONTIG, "top", "--interval", "0.1", "live")
        top.wait_for(b"region live")
        top.wait_for(b"MAX STALL")
        os.write(top.fd, b"q")
        assert top.end() == 0
        top = Terminal(CONTIG, "top", "live")
        top.wait_for(b"region live")
        process.kill()
        assert top.end() == NO_REGION


@case
def progress_on_a_terminal():
    with region("slow") as process:
        process.send_signal(signal.SIGSTOP)
        try:
            tool = Terminal(CONTIG, "alloc", "--from", "slow", "4M")
            tool.wait_for(b"taking the buffer ... 1 s")
        finally:
            process.send_signal(signal.SIGCONT)
        tool.wait_for(b"lease ")
        assert tool.end() == 0


@case
def interrupt_from_the_terminal_comes_once():
    script = "n=0; trap 'n=$((n+1)); echo got $n' INT; echo ready; " \
             "while [ $n -lt 1 ]; do sleep 0.05; done; sleep 0.3; echo end $n; exit 4"
    tool = Terminal(CONTIG, "run", "--region", "4M", "--name", "tty", "--", "bash", "-c", script)
    tool.wait_for(b"ready")
    os.write(tool.fd, b"\x03")
    tool.wait_for(b"end 1")
    assert tool.end() == 4


# ---- what answers is not to be trusted ----------------------------------------------------------


@case
def what_is_not_a_region():
    directory = f"{os.environ['XDG_RUNTIME_DIR']}/contig"
    os.makedirs(directory, mode=0o700, exist_ok=True)
    expect(contig("stat", "gone"), NO_REGION, "gone")
    expect(contig("stat", "../gone"), 1, "not a name")
    for reply in (b"", b"{", b"\xff" * 100, b"[]", b"{}", b'{"ok": 1}', b'{"ok": false}',
                  b'{"ok": true, "in_fd": true, "bytes": 9}', os.urandom(60000), None):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            path = f"{directory}/fake.sock"
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            listener.bind(path)
            listener.listen()
            tool = subprocess.Popen([CONTIG, "stat", "fake"], stdout=subprocess.PIPE,
                                    stderr=subprocess.PIPE)
            peer, _address = listener.accept()
            with peer:
                peer.recv(65536)
                peer.recv(65536)
                if reply is not None:
                    peer.send(reply)
            out, err = tool.communicate(timeout=PATIENCE)
            assert tool.returncode == NO_REGION and err.count(b"\n") == 1, (reply, out, err)
            os.unlink(path)


@case
def an_answer_with_the_wrong_fields_is_survived():
    directory = f"{os.environ['XDG_RUNTIME_DIR']}/contig"
    os.makedirs(directory, mode=0o700, exist_ok=True)
    for command in (["stat", "fake"], ["map", "fake"], ["map", "--html", "-", "fake"],
                    ["leases", "fake"], ["alloc", "--from", "fake", "1M"],
                    ["alloc", "--from", "fake", "1M", "--", "true"], ["release", "--from", "fake",
                                                                    "1"]):
        for reply in (b'{"ok": true}',
                      b'{"ok": true, "area": [], "borrowers": 7, "blocks": {"area": {"pfn": [1], '
                      b'"free": ["x"], "taken": [-1], "in_use": [1e9], "isolated": [null]}}, '
                      b'"leases": [[], 1, {"lease": "x"}], "lease": -1, "extents": {"a": 1}}'):
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
                path = f"{directory}/fake.sock"
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                listener.bind(path)
                listener.listen()
                tool = subprocess.Popen([CONTIG, *command], stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
                peer, _address = listener.accept()
                with peer:
                    peer.recv(65536)
                    peer.recv(65536)
                    peer.send(reply)
                    tool.communicate(timeout=PATIENCE)
                assert tool.returncode >= 0, (command, reply, tool.returncode)
                os.unlink(path)


def main():
    print(f"1..{len(CASES)}")
    failed = 0
    only = sys.argv[4:]  # names, for work on a case
    for number, function in enumerate(CASES, 1):
        if only and function.__name__ not in only:
            continue
        with tempfile.TemporaryDirectory() as runtime:
            os.environ["XDG_RUNTIME_DIR"] = runtime
            try:
                function()
                print(f"ok {number} - {function.__name__}", flush=True)
            except Skip as why:
                print(f"ok {number} - {function.__name__} # SKIP {why}", flush=True)
            except BaseException:  # a case that fails must not hide the others
                failed += 1
                print(f"not ok {number} - {function.__name__}")
                for line in traceback.format_exc().splitlines():
                    print(f"# {line}", flush=True)
    sys.exit(failed != 0)


if __name__ == "__main__":
    main()
