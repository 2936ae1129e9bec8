# SPDX-License-Identifier: MIT
"""Regions and buffers as a user of the contig command has them."""

import array
import ctypes
import json
import mmap
import os
import socket
import statistics
import struct
import subprocess
import tempfile
import time

MIB = 1 << 20
PAGE = 4096
HUGE = 2 * MIB
TAG_BYTES = 64 * 1024  # each such piece of a buffer gets a pattern of its own
PRESENT = 1 << 63
PFN_MASK = (1 << 55) - 1

libc = ctypes.CDLL(None, use_errno=True)
libc.memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
libc.memcpy.restype = ctypes.c_void_p


class Failed(Exception):
    """Something that ends the demo: one line for people."""


def command_output(command, timeout=60):
    """stdout of a command that has to succeed."""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        raise Failed(f"'{' '.join(command)}' did not end in {timeout} s") from None
    if done.returncode != 0:
        raise Failed(done.stderr.strip() or f"'{' '.join(command)}' failed")
    return done.stdout


class Region:
    """A region served by `contig run`, and the program that borrows from it."""

    def __init__(self, contig, name, size, backing, program, log, **popen):
        self.contig = contig
        self.name = name
        self.log = log
        self.process = subprocess.Popen(
            [contig, "run", "--region", str(size), "--backing", backing, "--name", name, "--",
             *program], stderr=log, **popen)

    def wait_served(self, seconds=60):
        """The region exists. Its program borrows from it once it needs more than a little."""
        end = time.monotonic() + seconds
        while True:
            if self.process.poll() is not None:
                raise Failed(f"the region '{self.name}' could not be made: {self.last_words()}")
            try:
                self.stat()
                return
            except Failed:
                if time.monotonic() > end:
                    raise
            time.sleep(0.02)

    def last_words(self):
        self.log.flush()
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit status {self.process.poll()}"

    def stat(self, reset_stall=False):
        command = [self.contig, "stat", "--json", self.name]
        if reset_stall:
            command.insert(2, "--reset-stall")
        return json.loads(command_output(command))

    def map(self):
        return json.loads(command_output([self.contig, "map", "--json", self.name]))

    def lent_percent(self):
        area = self.stat()["area"]
        return 100.0 * area["lent"] / area["frames"]

    def alloc(self, *what):
        """Take a buffer: `contig alloc --fd`, as any program would."""
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with here, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            with there:
                tool = subprocess.Popen(
                    [self.contig, "alloc", "--from", self.name, "--json", "--fd",
                     str(there.fileno()), *what],
                    pass_fds=[there.fileno()], stdin=subprocess.DEVNULL, stdout=out, stderr=err)
            line, fd = receive_line(here)
            status = tool.wait()
            out.seek(0)
            err.seek(0)
            if status != 0 or fd is None:
                raise Failed(err.read().decode().strip() or "contig alloc sent no descriptor")
            return Buffer(self, json.loads(out.read()), json.loads(line), fd)

    def stop(self, seconds=20):
        """End the program; the region ends with it. The exit status of contig run."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise Failed(f"'{self.name}' did not end in {seconds} s") from None


def receive_line(sock):
    """A line of text and the descriptor that comes with it; b"" and None if nothing came."""
    text, fd = b"", None
    while not text.endswith(b"\n"):
        data, control, _flags, _address = sock.recvmsg(1 << 20, socket.CMSG_SPACE(4))
        for level, kind, payload in control:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i", payload[:4])
                os.set_inheritable(fds[0], False)
                fd = fds[0]
        if not data:
            break
        text += data
    return text, fd


class Buffer:
    """A buffer that was taken, mapped here."""

    def __init__(self, region, answer, line, fd):
        self.region = region
        self.answer = answer
        self.lease = line["lease"]
        self.blocks = answer["blocks"]
        self.bytes = sum(block["bytes"] for block in self.blocks)
        self.pieces = []  # (view of the mapping, where it lies in it, bytes), in order
        self.maps = []
        self.seed = 0
        for start, end in self.spans(line["extents"]):
            self.maps.append((start, mmap.mmap(fd, end - start, offset=start)))
        os.close(fd)
        views = [(start, memoryview(memory)) for start, memory in self.maps]
        for extent in line["extents"]:
            start, view = next((s, v) for s, v in reversed(views) if s <= extent["offset"])
            at = extent["offset"] - start
            for done in range(0, extent["bytes"], TAG_BYTES):
                size = min(TAG_BYTES, extent["bytes"] - done)
                self.pieces.append((view, at + done, size))

    @staticmethod
    def spans(extents):
        """What to map: whole huge pages, since huge pages cannot be mapped in part; sorted."""
        spans = []
        for extent in sorted(extents, key=lambda e: e["offset"]):
            start = extent["offset"] // HUGE * HUGE
            end = (extent["offset"] + extent["bytes"] + HUGE - 1) // HUGE * HUGE
            if spans and start <= spans[-1][1]:
                spans[-1][1] = max(end, spans[-1][1])
            else:
                spans.append([start, end])
        return spans

    def is_zero(self):
        zero = bytes(TAG_BYTES)
        return all(view[at:at + size] == zero[:size] for view, at, size in self.pieces)

    def write_pattern(self, seed):
        self.seed = seed
        for i, (view, at, size) in enumerate(self.pieces):
            view[at:at + size] = self.pattern(i, size)

    def pattern(self, i, size):
        return struct.pack("<Q", (self.seed << 32 | i) * 0x9e3779b97f4a7c15 % (1 << 64)) * (size // 8)

    def pattern_intact(self):
        return all(view[at:at + size] == self.pattern(i, size)
                   for i, (view, at, size) in enumerate(self.pieces))

    def frames(self):
        """Physical frame numbers in the buffer's order; None if the kernel does not tell."""
        frames = []
        try:
            with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
                for view, at, size in self.pieces:
                    address = ctypes.addressof(ctypes.c_char.from_buffer(view)) + at
                    pagemap.seek(address // PAGE * 8)
                    entries = array.array("Q", pagemap.read(size // PAGE * 8))
                    if len(entries) != size // PAGE or not all(e & PRESENT for e in entries):
                        return None
                    frames += [entry & PFN_MASK for entry in entries]
        except OSError:
            return None
        return frames if any(frames) else None  # only root sees other numbers than 0

    def physically_contiguous(self):
        """Of one buffer that has been written to: True, False; None: not to be known."""
        frames = self.frames()
        return frames and frames == list(range(frames[0], frames[0] + len(frames)))

    def release(self):
        for view in {id(v): v for v, _at, _size in self.pieces}.values():
            view.release()
        self.pieces = []
        for _start, memory in self.maps:
            memory.close()
        self.maps = []
        command_output([self.region.contig, "release", "--from", self.region.name,
                        str(self.lease)])


class Memcpy:
    """The physical limit: the C library's memcpy of as many bytes, in this process, in this run."""

    def __init__(self, size):
        self.size = size
        self.source = mmap.mmap(-1, size)
        self.target = mmap.mmap(-1, size)
        self.addresses = [ctypes.addressof(ctypes.c_char.from_buffer(m))
                          for m in (self.target, self.source)]
        self.source[::PAGE] = b"\1" * (size // PAGE)
        self.copy()  # faults the target in
        self.times = []

    def copy(self):
        start = time.monotonic_ns()
        libc.memcpy(*self.addresses, self.size)
        return time.monotonic_ns() - start

    def measure(self, times):
        self.times += [self.copy() for _ in range(times)]

    def best(self):
        return min(self.times)

    def median(self):
        return int(statistics.median(self.times))
