# SPDX-License-Identifier: MIT
"""The two programs, what they do, and what they must answer in the end.

Both do a fixed sequence of work, whose length is found while it runs (until the area is full, until
the take-backs are over). The same sequence, done again without Contig, must give the same digest.
"""

import os
import queue
import random
import re
import socket
import subprocess
import threading
import time

from lending import Failed

POOL = random.Random(20).randbytes(1 << 20)  # the values of both are slices of this


class Redis:
    """A connection to redis-server, with just enough of its protocol."""

    def __init__(self, path, process=None, seconds=30):
        end = time.monotonic() + seconds
        while True:
            self.socket = socket.socket(socket.AF_UNIX)
            try:
                self.socket.connect(path)
                break
            except OSError as error:
                self.socket.close()
                if time.monotonic() > end or (process and process.poll() is not None):
                    raise Failed(f"redis-server does not serve: {error}") from None
                time.sleep(0.02)
        self.socket.settimeout(60)
        self.file = self.socket.makefile("rb")

    @staticmethod
    def encode(*words):
        parts = [b"*%d\r\n" % len(words)]
        for word in words:
            word = word if isinstance(word, bytes) else str(word).encode()
            parts.append(b"$%d\r\n%s\r\n" % (len(word), word))
        return b"".join(parts)

    def answer(self):
        line = self.file.readline()
        if not line.endswith(b"\r\n"):
            raise Failed("redis-server closed its connection")
        kind, rest = line[:1], line[1:-2]
        if kind == b"-":
            raise Failed(f"redis-server: {rest.decode()}")
        if kind == b"$":
            size = int(rest)
            return None if size < 0 else self.file.read(size + 2)[:-2]
        return int(rest) if kind == b":" else rest

    def call(self, *words):
        self.socket.sendall(self.encode(*words))
        return self.answer()

    def pipeline(self, commands):
        self.socket.sendall(b"".join(commands))
        for _ in commands:
            self.answer()


def redis_command(directory):
    return ["redis-server", "--port", "0", "--unixsocket", f"{directory}/redis.sock", "--save", "",
            "--appendonly", "no", "--enable-debug-command", "yes", "--dir", directory,
            "--daemonize", "no", "--logfile", f"{directory}/redis.log"]


def redis_value(key):
    at = key * 7919 % (len(POOL) - 8192)
    return POOL[at:at + 1000 + key * 37 % 5000]


def redis_batch(number, size=128):
    """The number-th step of filling: strings, and some of each other kind."""
    commands = []
    for key in range(number * size, (number + 1) * size):
        value = redis_value(key)
        commands.append(Redis.encode("SET", f"s:{key}", value))
        if key % 16 == 0:
            commands.append(Redis.encode("HSET", f"h:{key // 256}", f"f{key}", value[:200]))
            commands.append(Redis.encode("RPUSH", f"l:{key // 512}", value[:300]))
            commands.append(Redis.encode("ZADD", f"z:{key // 1024}", key, f"m{key}"))
    return commands


class RedisJob:
    """Fills database 0 and takes its digest. Database 1 is the load's, and is emptied before."""

    name = "redis"
    batch = 128

    def __init__(self, path, process):
        self.redis = Redis(path, process)
        self.path = path
        self.steps = 0

    def fill_step(self):
        for _ in range(8):
            self.redis.pipeline(redis_batch(self.steps, self.batch))
            self.steps += 1

    def keys(self):
        return self.steps * self.batch

    def repeat(self, other):
        while self.steps < other.steps:
            self.redis.pipeline(redis_batch(self.steps, self.batch))
            self.steps += 1

    def digest(self):
        self.redis.call("SELECT", 1)
        self.redis.call("FLUSHDB")
        self.redis.call("SELECT", 0)
        return self.redis.call("DEBUG", "DIGEST").decode()


class RedisLoad:
    """redis-benchmark, going on until it is stopped."""

    def __init__(self, path):
        self.process = subprocess.Popen(
            ["redis-benchmark", "-s", path, "--dbnum", "1", "-t", "set,get,incr,lpush,rpop,hset",
             "-r", "1000", "-d", "256", "-c", "8", "-n", "20000", "-l", "-q"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def alive(self):
        return self.process.poll() is None

    def stop(self):
        self.process.kill()
        self.process.wait()


def probe(path, keys, pipe):
    """
    In a process of its own: read keys of the data set, check every answer, note how long each took.
    Sends (answers, wrong answers, [(when, ns)] of the slow ones) when something comes through pipe.
    """
    redis = Redis(path)
    chosen = random.Random(1)
    wrong = nr = 0
    slow, threshold = [], 2_000_000
    while not pipe.poll():
        key = chosen.randrange(keys)
        start = time.monotonic_ns()
        value = redis.call("GET", f"s:{key}")
        took = time.monotonic_ns() - start
        nr += 1
        wrong += value != redis_value(key)
        if took > threshold:
            slow.append((start, took))
        time.sleep(0.0005)
    pipe.send((nr, wrong, slow))


class SqliteJob:
    """An in-memory database in the sqlite3 shell: fill, rounds of updates and joins, a checksum."""

    name = "sqlite"
    rows = 8000

    def __init__(self, process):
        self.process = process
        self.lines = queue.Queue()
        self.steps = self.rounds = self.longest_round_ns = 0
        threading.Thread(target=self.read, daemon=True).start()
        groups = ("WITH RECURSIVE s(i) AS (VALUES(0) UNION ALL SELECT i+1 FROM s WHERE i<996) "
                  "INSERT INTO grp SELECT i, i*37%101 FROM s;")
        # Without a journal: it would hold a second copy of all that an update touches.
        self.send(".bail on\nPRAGMA journal_mode=OFF;\n"
                  "CREATE TABLE item(id INTEGER PRIMARY KEY, grp INTEGER, v INTEGER, body BLOB);\n"
                  f"CREATE TABLE grp(id INTEGER PRIMARY KEY, w INTEGER);\n{groups}\n")

    def read(self):
        for line in self.process.stdout:
            self.lines.put(line.decode().strip())
        self.lines.put(None)

    def send(self, text):
        try:
            self.process.stdin.write(text.encode())
            self.process.stdin.flush()
        except BrokenPipeError:
            raise Failed("sqlite3 has ended") from None

    def wait_for(self, pattern, seconds=120):
        while True:
            try:
                line = self.lines.get(timeout=seconds)
            except queue.Empty:
                raise Failed(f"sqlite3 did not answer in {seconds} s") from None
            if line is None:
                raise Failed(f"sqlite3 ended with status {self.process.wait()}")
            if re.search(pattern, line):
                return line

    def fill_step(self):
        first = self.steps * self.rows
        self.steps += 1
        self.send(f"WITH RECURSIVE s(i) AS (VALUES({first}) UNION ALL SELECT i+1 FROM s "
                  f"WHERE i<{first + self.rows - 1}) INSERT INTO item SELECT i, i%997, "
                  f"i*2654435761%1000003, substr(x'{POOL[:10000].hex()}',1+i*7919%8600,1250) "
                  f"FROM s;\nSELECT 'step', {self.steps};\n")
        self.wait_for(f"^step\\|{self.steps}$")

    def round(self):
        k = self.rounds
        self.rounds += 1
        start = time.monotonic_ns()
        self.send(f"UPDATE item SET v=(v*31+{k})%1000003 WHERE id%16={k % 16};\n"
                  f"UPDATE item SET body=substr(x'{POOL[:10000].hex()}',1+(id*31+{k})%8600,1250) "
                  f"WHERE id%64={k % 64};\n"
                  f"SELECT 'round', {k}, count(*), sum(i.v*g.w) FROM item i JOIN grp g "
                  f"ON g.id=i.grp WHERE i.v%7={k % 7};\n")
        self.wait_for(f"^round\\|{k}\\|")
        self.longest_round_ns = max(self.longest_round_ns, time.monotonic_ns() - start)

    def repeat(self, other):
        while self.steps < other.steps:
            self.fill_step()
        while self.rounds < other.rounds:
            self.round()

    def digest(self):
        self.send(".sha3sum item\nSELECT 'sum', sum(v), sum(length(body)), count(*) FROM item;\n")
        sha3 = self.wait_for("^[0-9a-f]{40,}").split("|")[0]
        return sha3 + " " + self.wait_for("^sum\\|")


class SqliteLoad:
    """Rounds of updates and joins on a thread, until stopped."""

    def __init__(self, job):
        self.job = job
        self.error = None
        self.going = True
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self):
        try:
            while self.going:
                self.job.round()
                time.sleep(0.1)  # every round has to be done once more for the comparison
        except Failed as error:
            self.error = error

    def alive(self):
        return self.error is None

    def stop(self):
        self.going = False
        self.thread.join()
        if self.error:
            raise self.error


def without_contig():
    """The environment of a program that borrows nothing."""
    return {k: v for k, v in os.environ.items() if k not in ("CONTIG_SOCKET", "LD_PRELOAD")}
