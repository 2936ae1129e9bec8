#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Use a buffer from another language: receiver.py REGION takes 4 MiB of it, writes and reads it."""
import json
import mmap
import socket
import subprocess
import sys

here, there = socket.socketpair()
subprocess.run(["contig", "alloc", "--from", sys.argv[1], "4M", "--align", "2M", "--fd", str(there.fileno())],
               pass_fds=[there.fileno()], check=True)
line, descriptors, _flags, _address = socket.recv_fds(here, 65536, 1)
lease = json.loads(line)
for extent in lease["extents"]:  # one, but where the region's file is in another order than its memory
    with mmap.mmap(descriptors[0], extent["bytes"], offset=extent["offset"]) as memory:
        memory[:5] = b"hello"
        print(extent["offset"], memory[:5])
subprocess.run(["contig", "release", "--from", sys.argv[1], str(lease["lease"])], check=True)
